"""Go from a set of black-box APIs to a classifier of new classes, in two to three minutes.

Usage: `python examples/quickstart.py`. The APIs are small stand-ins, trained here on characters
that the package draws itself; only their scores are used. The run is far too short for a good
meta-model; `bidfmkd demo` makes one in minutes.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import bidfmkd_fast as bf


def main() -> None:
    dataset = bf.load_dataset("glyphs")
    with tempfile.TemporaryDirectory() as folder:
        # 1. Train four stand-in APIs with three classes each. Yours could be a RemoteBlackBox or a
        # FunctionBlackBox.
        bf.train_pool(dataset, Path(folder) / "pool", n_apis=4, n_way=3, width=16, epochs=8)
        apis = bf.load_pool(Path(folder) / "pool")

    # 2. Learn from their answers. The budget caps what all APIs together may be asked.
    config = bf.TrainConfig(
        n_per_class=10,
        recovery=bf.RecoveryConfig(steps=20, num_directions=4),
        replay=bf.ReplayConfig(steps_per_round=10, final_steps=20, n_shot=1, n_query=10),
    )
    run = bf.BiDfMKD(apis, config=config, budget=bf.Budget(max_queries=50_000)).fit()
    print(f"asked {run.queries:,} queries in {run.requests:,} requests")

    # 3. Evaluate the meta-model on classes that no API has seen.
    for name, model in (("before", run.initial_model), ("after", run.meta_model)):
        print(name, bf.evaluate(model, dataset, n_way=3, n_shot=5, n_episodes=50))

    # 4. Adapt it to one new task: five pictures for each of three new characters.
    sampler = bf.EpisodeSampler(dataset, "meta_test", n_way=3, n_shot=5, n_query=5, seed=0)
    episode = sampler.episode(0)
    classifier = run.meta_model.adapt(episode.support_images, episode.support_labels)
    correct = classifier.predict(episode.query_images) == episode.query_labels
    print(f"one task: {int(correct.sum())} of {len(correct)} new pictures classified correctly")


if __name__ == "__main__":
    main()
