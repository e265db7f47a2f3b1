"""Compare every method with its parts put together by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tolerances import TOLERANCES
from torch import Tensor
from torch.nn import functional

from bidfmkd_fast.black_box import BlackBox
from bidfmkd_fast.data import Dataset, EpisodeSampler
from bidfmkd_fast.errors import InputError
from bidfmkd_fast.experiments import controls
from bidfmkd_fast.experiments import methods as baselines
from bidfmkd_fast.experiments.config import ExperimentConfig
from bidfmkd_fast.experiments.experiment import Experiment
from bidfmkd_fast.experiments.methods import METHODS, recovered_sets
from bidfmkd_fast.meta import InnerLoop, MetaModel, TaskMemory, outer_replay_step
from bidfmkd_fast.pools import Pool, load_pool
from bidfmkd_fast.priors import procedural_images
from bidfmkd_fast.priors.library import draw_pictures
from bidfmkd_fast.seeds import derive_seed, torch_generator
from bidfmkd_fast.training import BiDfMKD, Run, pseudo_tasks
from bidfmkd_fast.training.default_model import initial_module
from bidfmkd_fast.training.run_folder import META_MODEL, SUMMARY
from bidfmkd_fast.training.step_records import StepRecords

N_APIS, N_WAY, STEPS, SET = 3, 3, 2, 9  # as in conftest
RUN_QUERIES = N_APIS * 2 * STEPS * 3 * SET


@pytest.fixture(scope="module")
def experiment(
    tiny: ExperimentConfig,
    tiny_pool: Pool,
    datasets: list[Dataset],
    tmp_path_factory: pytest.TempPathFactory,
) -> Experiment:
    folder = tmp_path_factory.mktemp("run") / "bidf_mkd"
    experiment = Experiment(tiny_pool, datasets, tiny.with_seed(7), folder, progress=False)
    METHODS["bidf_mkd"][1](experiment, folder)
    return experiment


def learned(
    method: str, experiment: Experiment, folder: Path
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the meta-model's parameters and the summary."""
    METHODS[method][1](experiment, folder)
    meta_model = MetaModel.load(folder / META_MODEL)
    assert meta_model.adapt_steps == experiment.train.adapt_steps
    return dict(meta_model.module.state_dict()), json.loads((folder / SUMMARY).read_text())


def start(experiment: Experiment) -> dict[str, Tensor]:
    return dict(
        initial_module(
            [entry.spec for entry in experiment.pool.entries], experiment.train
        ).state_dict()
    )


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_all_start_where_the_run_starts(experiment: Experiment, tmp_path: Path) -> None:
    parameters, summary = learned("random", experiment, tmp_path / "random")
    assert equal(parameters, start(experiment))
    assert equal(
        parameters,
        dict(MetaModel.load(experiment.bidf_mkd / "initial_model.safetensors").module.state_dict()),
    )
    assert summary["queries"] == 0


def test_the_run_and_its_control_are_those_of_the_library(
    experiment: Experiment, tmp_path: Path
) -> None:
    apis = load_pool(experiment.pool.folder)
    run = BiDfMKD(apis, config=experiment.train).fit(progress=False)
    assert equal(
        dict(MetaModel.load(experiment.bidf_mkd / META_MODEL).module.state_dict()),
        run.meta_model.module.state_dict(),
    )
    parameters, summary = learned("control", experiment, tmp_path / "control")
    control = BiDfMKD(load_pool(experiment.pool.folder), config=experiment.train.control()).fit(
        progress=False
    )
    assert equal(parameters, dict(control.meta_model.module.state_dict()))
    assert summary["queries"] == N_APIS * 2 * SET


def test_zero_query_is_maml_on_pseudo_classes(
    experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check it against episodes drawn by hand; nothing is asked."""
    monkeypatch.setattr(pseudo_tasks, "PSEUDO_CLASSES", 6)
    monkeypatch.setattr(pseudo_tasks, "PSEUDO_MEMBERS", 4)
    parameters, summary = learned("zero_query", experiment, tmp_path / "zero_query")
    assert summary["queries"] == 0 and summary["ledger"] == []
    config, replay = experiment.train, experiment.train.replay
    seed = derive_seed(config.seed, "zero_query")
    memory = TaskMemory((1, 28, 28))
    for scene in range(6):
        pictures = draw_pictures(torch.full((4,), scene), torch.arange(4), (1, 28, 28), seed)
        memory.add(pictures, [("pictures", str(scene))] * 4)
    module = initial_module([entry.spec for entry in experiment.pool.entries], config)
    optimizer = torch.optim.Adam(module.parameters(), lr=replay.outer_lr)
    for step in range(STEPS):
        episodes = [
            memory.sample_episode(N_WAY, 1, replay.n_query, seed=seed, index=2 * step + task)
            for task in range(2)
        ]
        outer_replay_step(module, optimizer, episodes, replay.inner)
    rtol, atol = TOLERANCES["float32"]
    for name, value in module.state_dict().items():
        torch.testing.assert_close(parameters[name], value, rtol=rtol, atol=atol)


def test_zero_query_has_images_for_any_number_of_shots_and_classes(
    experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pseudo_tasks, "PSEUDO_CLASSES", 1)
    train = experiment.train
    train = replace(
        train, n_per_class=30, replay=replace(train.replay, n_shot=20, final_steps=1, n_query=5)
    )
    many = replace(experiment, config=replace(experiment.config, train=train))
    controls.zero_query(many, tmp_path)
    assert (tmp_path / "meta_model.safetensors").exists()


def test_random_teachers_answer_in_place_of_the_apis(
    experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Check that no API is asked, that teachers differ, and that their logits are spread."""
    asked: list[BlackBox] = []
    fit = BiDfMKD.fit

    def watched(learner: BiDfMKD, *arguments: Any, **named: Any) -> Run:
        asked.extend(learner.apis)
        return fit(learner, *arguments, **named)

    monkeypatch.setattr(BiDfMKD, "fit", watched)
    monkeypatch.setattr(controls, "load_pool", lambda folder: pytest.fail("an API was opened"))
    parameters, summary = learned("random_teachers", experiment, tmp_path / "random_teachers")
    assert summary["queries"] == 0 and not equal(parameters, start(experiment))
    pictures = procedural_images(300, (1, 28, 28), seed=3)
    scores = [box.score(pictures) for box in asked]
    assert len(scores) == N_APIS and not torch.equal(scores[0], scores[1])
    for logits in scores:
        assert 2 < logits.std(0).mean() < 4  # TEACHER_SPREAD on other pictures


def distilled_by_hand(experiment: Experiment, index: int) -> dict[str, Tensor]:
    """Return the parameters that Adam reaches on torch's own KL divergence of one API's sets."""
    module = initial_module([entry.spec for entry in experiment.pool.entries], experiment.train)
    images, scores = recovered_sets(experiment.bidf_mkd, index)
    optimizer = torch.optim.Adam(module.parameters(), lr=experiment.config.baselines.learning_rate)
    draws = torch_generator(experiment.train.seed, "distil", index)
    for _ in range(experiment.config.baselines.steps):
        rows = torch.randperm(len(images), generator=draws)[
            : experiment.config.baselines.batch_size
        ]
        optimizer.zero_grad()
        student = module(images[rows]).log_softmax(1)
        functional.kl_div(student, scores[rows].softmax(1), reduction="batchmean").backward()
        optimizer.step()
    return {name: value.detach() for name, value in module.named_parameters()}


def test_distill_avg_is_the_mean_of_every_apis_distillation(
    experiment: Experiment, tmp_path: Path
) -> None:
    parameters, summary = learned("average", experiment, tmp_path / "average")
    by_hand = [distilled_by_hand(experiment, index) for index in range(N_APIS)]
    rtol, atol = TOLERANCES["float32"]
    for name, value in parameters.items():
        mean = torch.stack([distilled[name] for distilled in by_hand]).mean(0)
        wanted = torch.zeros_like(mean) if name.startswith("classifier") else mean
        torch.testing.assert_close(
            value, wanted, rtol=10 * rtol, atol=10 * atol
        )  # Adam divides by small moments
    assert not equal(parameters, start(experiment))
    assert summary["queries"] == RUN_QUERIES  # it learns from what the run recovered


def test_recovered_sets_are_both_sets_of_an_api(experiment: Experiment, tmp_path: Path) -> None:
    images, scores = recovered_sets(experiment.bidf_mkd, 1)
    assert images.shape == (2 * SET, 1, 28, 28) and scores.shape == (2 * SET, N_WAY)
    api = load_pool(experiment.pool.folder)[1]
    torch.testing.assert_close(api(images), scores, rtol=1e-4, atol=1e-4)
    with pytest.raises(InputError, match="no recovered set of API 9"):
        recovered_sets(experiment.bidf_mkd, 9)


def test_the_most_accurate_api_is_distilled_for_the_queries_of_the_run(
    experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    plain = baselines.recover

    def watched(api: Any, *arguments: Any, **options: Any) -> Any:
        asked.append(api.name)
        return plain(api, *arguments, **options)

    monkeypatch.setattr(baselines, "recover", watched)
    results = []
    for best in (1, 2):
        entries = [
            replace(entry, accuracy=float(i == best))
            for i, entry in enumerate(experiment.pool.entries)
        ]
        other = replace(experiment, pool=replace(experiment.pool, entries=tuple(entries)))
        asked.clear()
        parameters, summary = learned("single", other, tmp_path / f"best_{best}")
        assert asked == [f"api_00{best}"] * 2 * N_APIS
        assert summary["queries"] == RUN_QUERIES
        assert not parameters["classifier.weight"].any() and not parameters["classifier.bias"].any()
        results.append(parameters)
    assert not equal(*results)


def test_distillation_learns_what_the_api_says(experiment: Experiment) -> None:
    longer = replace(
        experiment,
        config=replace(
            experiment.config, baselines=replace(experiment.config.baselines, steps=150)
        ),
    )
    images, scores = recovered_sets(experiment.bidf_mkd, 0)
    module = initial_module([entry.spec for entry in experiment.pool.entries], experiment.train)
    target = scores.argmax(1)
    baselines._distil(longer, module, images, 30 * scores, "logits", 0, StepRecords(None))
    assert (module(images).argmax(1) == target).float().mean() > 0.9


def test_white_box_recovery_asks_once_an_image_and_gets_further(
    experiment: Experiment, tmp_path: Path
) -> None:
    """Check that the same steps with true gradients end at a lower loss."""
    longer = replace(experiment.train, recovery=replace(experiment.train.recovery, steps=25))
    experiment = replace(experiment, config=replace(experiment.config, train=longer))
    _, opened = learned("white_box", experiment, tmp_path / "open")
    _, closed = learned("bidf_mkd", experiment, tmp_path / "closed")
    assert opened["queries"] == N_APIS * 2 * 25 * SET
    assert closed["queries"] == 3 * opened["queries"]
    losses = []
    for folder in ("open", "closed"):
        records = [
            json.loads(line)
            for line in (tmp_path / folder / "metrics.jsonl").read_text().splitlines()
        ]
        losses.append(
            sum(r["loss"] for r in records if r["stage"] == "recovery" and r["set"] == "support")
        )
    assert losses[0] < losses[1]


def test_maml_sees_the_real_meta_train_classes_as_often_as_the_replay_its_memory(
    experiment: Experiment, datasets: list[Dataset], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[Any]] = []
    plain = baselines.outer_replay_step

    def watched(module: Any, optimizer: Any, episodes: Any, inner: InnerLoop) -> Any:
        assert inner == InnerLoop(steps=1, learning_rate=0.1, first_order=False)
        seen.append(list(episodes))
        return plain(module, optimizer, episodes, inner)

    monkeypatch.setattr(baselines, "outer_replay_step", watched)
    train = replace(
        experiment.train, replay=replace(experiment.train.replay, steps_per_round=3, rotations=4)
    )
    experiment = replace(experiment, config=replace(experiment.config, train=train))
    parameters, summary = learned("maml", experiment, tmp_path / "maml")
    assert len(seen) == 2 + 3  # 3 APIs in groups of 2: one round between, then the final steps
    assert summary["queries"] == 0
    known, n_classes = set(datasets[0].classes("meta_train")), len(datasets[0].class_names)
    classes = [episode.classes for episodes in seen for episode in episodes]
    indices = [index for of_episode in classes for index in of_episode]
    assert {index % n_classes for index in indices} <= known
    assert {index // n_classes for index in indices} == set(range(4))  # turned, as in the replay
    assert len(set(classes)) == len(classes) == 5 * 2
    sizes = {tuple(episode.support_images.shape) for episodes in seen for episode in episodes}
    assert sizes == {(N_WAY, 1, 28, 28)}
    assert not equal(parameters, start(experiment))


def test_maml_may_train_for_longer_than_the_replay(
    experiment: Experiment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    longer = replace(experiment.config.baselines, maml_steps=experiment.replay_steps + 3)
    config = replace(experiment.config, baselines=longer)
    steps: list[int] = []

    def step(*_: object) -> dict[str, float]:
        steps.append(1)
        return {"loss": 0.0, "accuracy": 0.0}

    monkeypatch.setattr(baselines, "outer_replay_step", step)
    METHODS["maml"][1](replace(experiment, config=config), tmp_path / "maml")
    assert len(steps) == longer.maml_steps > experiment.replay_steps


def test_maml_takes_data_sets_in_turn(
    experiment: Experiment, datasets: list[Dataset], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[tuple[str, int]] = []
    plain = EpisodeSampler.episode
    monkeypatch.setattr(
        EpisodeSampler,
        "episode",
        lambda self, index: drawn.append((self.dataset.name, index)) or plain(self, index),
    )
    other = replace(datasets[0], name="other")
    METHODS["maml"][1](replace(experiment, datasets=[datasets[0], other]), tmp_path / "maml")
    assert drawn == [("glyphs", 0), ("other", 0), ("glyphs", 1), ("other", 1)]
