"""Train BiDf-MKD and the methods it is compared with, each a function of the same experiment.

The other methods leave out recovery or meta-learning, or use the APIs' true gradients or real data.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from bidfmkd_fast import ops
from bidfmkd_fast.black_box import BlackBox, OpenBox
from bidfmkd_fast.black_box.ledger_file import LedgerRow, row_of
from bidfmkd_fast.data import Dataset, EpisodeSampler
from bidfmkd_fast.errors import InputError
from bidfmkd_fast.experiments.config import ExperimentConfig
from bidfmkd_fast.files.atomic import write_json
from bidfmkd_fast.meta import MetaModel, outer_replay_step
from bidfmkd_fast.pools.pool import Pool, load_modules, load_pool
from bidfmkd_fast.recovery import recover
from bidfmkd_fast.runtime.progress import Bar
from bidfmkd_fast.seeds import derive_seed, seeded, torch_generator
from bidfmkd_fast.training import BiDfMKD, TrainConfig
from bidfmkd_fast.training.default_model import initial_module
from bidfmkd_fast.training.recovered_set import read_images_and_scores
from bidfmkd_fast.training.run_folder import META_MODEL, SUMMARY, RunFolder


@dataclass(frozen=True)
class Experiment:
    """What every method starts from: the same pool, data sets, settings and seed.

    `bidf_mkd` is the folder of the finished BiDf-MKD run, for methods that use the sets it
    recovered.
    """

    pool: Pool
    datasets: Sequence[Dataset]
    config: ExperimentConfig
    bidf_mkd: Path
    device: torch.device | str = "cpu"
    progress: bool = True

    @property
    def train(self) -> TrainConfig:
        """Return the settings of the run, from which all methods take their seed."""
        return self.config.train

    def fresh(self) -> nn.Module:
        """Return a new copy of the meta-model that all methods start from."""
        specs = [entry.spec for entry in self.pool.trained]
        return initial_module(specs, self.train).to(self.device)


Method = Callable[[Experiment, Path], None]


def random_initialisation(experiment: Experiment, folder: Path) -> None:
    """Keep the meta-model as it starts."""
    _finish(folder, experiment, experiment.fresh(), 0, 0.0)


def control(experiment: Experiment, folder: Path) -> None:
    """Run BiDf-MKD on images of untrained generators: meta-learning without recovery."""
    _fit(
        experiment, load_pool(experiment.pool.folder), experiment.train.control(), folder, "control"
    )


def bidf_mkd(experiment: Experiment, folder: Path) -> None:
    """Run BiDf-MKD."""
    _fit(experiment, load_pool(experiment.pool.folder), experiment.train, folder, "bidf_mkd")


def white_box(experiment: Experiment, folder: Path) -> None:
    """Run BiDf-MKD with the APIs' true gradients: what a perfect estimate would give."""
    modules = load_modules(experiment.pool.folder)
    boxes = [
        OpenBox(module, entry.spec, device=experiment.device)
        for module, entry in zip(modules, experiment.pool.trained, strict=True)
    ]
    _fit(experiment, boxes, experiment.train, folder, "white_box")


def best_api_distilled(experiment: Experiment, folder: Path) -> None:
    """Distil the API that is most accurate on held-out images into the meta-model (Single-DFKD).

    The method may spend what the whole run spends: as many sets are recovered from this one API as
    the run recovers from all. The classifier is then set to zero, because its classes mean nothing
    in another task. A classifier of zeros was measured to adapt better than the distilled one
    (Omniglot, 10 steps, 1-shot: 72 % against 67 %).
    """
    started = time.perf_counter()
    entries, config = experiment.pool.trained, experiment.train
    best = max(range(len(entries)), key=lambda i: entries[i].accuracy)
    api = load_pool(experiment.pool.folder)[best]
    images, scores = [], []
    with Bar(f"single: recover {api.name}", 2 * len(entries), "sets", experiment.progress) as bar:
        for index in bar.over(range(2 * len(entries))):
            seed = derive_seed(config.seed, "best api", index)
            recovered = recover(
                api,
                config.n_per_class,
                None,
                config.recovery,
                seed=seed,
                device=experiment.device,
                paper_compat=config.paper_compat,
            )
            images.append(api.spec.to_unit(recovered.images))
            scores.append(recovered.scores)
    module = experiment.fresh()
    _distil(experiment, module, torch.cat(images), torch.cat(scores), api.spec.returned_kind, best)
    _clear_classifier(module)
    _finish(
        folder,
        experiment,
        module,
        api.ledger.queries,
        time.perf_counter() - started,
        [row_of(best, api)],
    )


def distilled_average(experiment: Experiment, folder: Path) -> None:
    """Distil each API by itself, from the same start, and average the parameters (Distill-Avg).

    The method learns from the sets that BiDf-MKD recovered, so it costs the same queries. The
    classifier is set to zero, as in `best_api_distilled`.
    """
    started = time.perf_counter()
    entries = experiment.pool.trained
    total: dict[str, Tensor] = {}
    with Bar("average: distil", len(entries), "APIs", experiment.progress) as bar:
        for index in bar.over(range(len(entries))):
            images, scores = recovered_sets(experiment.bidf_mkd, index)
            module = experiment.fresh()
            _distil(experiment, module, images, scores, entries[index].spec.returned_kind, index)
            for name, value in module.named_parameters():
                total[name] = total.get(name, torch.zeros_like(value)) + value.detach() / len(
                    entries
                )
    module = experiment.fresh()
    module.load_state_dict(total)
    _clear_classifier(module)
    queries = RunFolder(experiment.bidf_mkd).summary()["queries"]
    _finish(folder, experiment, module, queries, time.perf_counter() - started)


def maml_on_real_data(experiment: Experiment, folder: Path) -> None:
    """Train MAML on the real meta-train classes, with the settings and step count of the replay.

    Episodes come from the data sets in turn.
    """
    started = time.perf_counter()
    config, replay = experiment.train, experiment.train.replay
    rounds = -(-len(experiment.pool.entries) // config.meta_batch_size)
    samplers = [
        EpisodeSampler(
            dataset,
            "meta_train",
            experiment.config.pool.n_way,
            replay.n_shot,
            replay.n_query,
            derive_seed(config.seed, "maml", dataset.name),
            replay.rotations,
        )
        for dataset in experiment.datasets
    ]
    module = experiment.fresh()
    optimizer = torch.optim.Adam(module.parameters(), lr=replay.outer_lr)
    n_steps = replay.final_steps + replay.steps_per_round * (rounds - 1)
    with Bar("maml: train", n_steps, "steps", experiment.progress) as bar:
        for step in bar.over(range(n_steps)):
            indices = range(step * config.meta_batch_size, (step + 1) * config.meta_batch_size)
            episodes = [
                samplers[index % len(samplers)].episode(index // len(samplers)) for index in indices
            ]
            with seeded(config.seed, "maml", step):
                outer_replay_step(
                    module,
                    optimizer,
                    episodes,
                    replay.inner,
                )
    _finish(folder, experiment, module, 0, time.perf_counter() - started)


# Label and function of each method, in the order of the table: without recovery, without
# meta-learning, BiDf-MKD, and the upper bounds.
METHODS: dict[str, tuple[str, Method]] = {
    "random": ("random initialisation", random_initialisation),
    "control": ("no-recovery control", control),
    "single": ("best API distilled (Single-DFKD)", best_api_distilled),
    "average": ("Distill-Avg", distilled_average),
    "bidf_mkd": ("BiDf-MKD", bidf_mkd),
    "white_box": ("white-box recovery", white_box),
    "maml": ("MAML on real meta-train data", maml_on_real_data),
}


OURS, CONTROL = "bidf_mkd", "control"
USES_OUR_SETS = frozenset({"average"})  # methods that need the finished BiDf-MKD run


def recovered_sets(folder: Path, api_index: int) -> tuple[Tensor, Tensor]:
    """Read the images, in [0, 1], and scores of all sets that a run recovered from one API.

    Raises:
        InputError: `folder` holds no set of this API, or a damaged one.
    """
    files = sorted((folder / "recovered").glob(f"api_{api_index:03d}_*.safetensors"))
    if not files:
        raise InputError(f"{folder} holds no recovered set of API {api_index}")
    images, scores = zip(*map(read_images_and_scores, files))
    return torch.cat(images), torch.cat(scores)


def _fit(
    experiment: Experiment, apis: Sequence[BlackBox], config: TrainConfig, folder: Path, label: str
) -> None:
    learner = BiDfMKD(apis, config=config, device=experiment.device)
    learner.label = label
    learner.fit(folder, experiment.progress)


def _distil(
    experiment: Experiment,
    module: nn.Module,
    images: Tensor,
    scores: Tensor,
    scores_kind: str,
    api_index: int,
) -> None:
    """Train `module` with Adam on the KD loss, over random mini-batches.

    `images` is `[N, C, H, W]`, `scores` what API number `api_index` answered, `[N, n_classes]`.
    """
    settings = experiment.config.baselines
    images, scores = images.to(experiment.device), scores.to(experiment.device)
    optimizer = torch.optim.Adam(module.parameters(), lr=settings.learning_rate)
    generator = torch_generator(experiment.train.seed, "distil", api_index)
    module.train()
    for _ in range(settings.steps):
        rows = torch.randperm(len(images), generator=generator)[: settings.batch_size].to(
            images.device
        )
        optimizer.zero_grad()
        ops.kd_loss(module(images[rows]), scores[rows], scores_kind=scores_kind).backward()
        optimizer.step()


@torch.no_grad()
def _clear_classifier(module: nn.Module) -> None:
    assert isinstance(module.classifier, nn.Linear)
    module.classifier.weight.zero_()
    module.classifier.bias.zero_()


def _finish(
    folder: Path,
    experiment: Experiment,
    module: nn.Module,
    queries: int,
    seconds: float,
    ledger: Sequence[LedgerRow] = (),
) -> None:
    """Write the folder of a finished method that is no run.

    `queries` is the number of queries that the method needs, even if another method has asked them.
    `ledger` has only the queries that this method asked itself.
    """
    config = experiment.train
    rows = [asdict(row) for row in ledger]
    summary = {"queries": queries, "seconds": {"training": round(seconds, 3)}, "ledger": rows}
    write_json(folder / SUMMARY, summary)
    meta_model = MetaModel(
        module, adapt_steps=config.adapt_steps, adapt_learning_rate=config.adapt_lr
    )
    meta_model.save(folder / META_MODEL)
