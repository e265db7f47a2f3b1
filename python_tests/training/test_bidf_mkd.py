"""Check a fit against the same steps taken one by one, and the arguments that it refuses."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bidfmkd_fast.black_box import APISpec, BlackBox, Budget, FunctionBlackBox
from bidfmkd_fast.errors import BadAnswer, InputError, InputTypeError
from bidfmkd_fast.meta import (
    DistillationTask,
    TaskMemory,
    adapt_to_api,
    outer_distillation_step,
    outer_replay_step,
)
from bidfmkd_fast.meta.inner_loop import forward
from bidfmkd_fast.models import AnySizeConv4
from bidfmkd_fast.recovery import Recovered, RecoveryConfig, recover
from bidfmkd_fast.seeds import derive_seed
from bidfmkd_fast.survey import SurveyConfig
from bidfmkd_fast.training import (
    BiDfMKD,
    DistillationConfig,
    ReplayConfig,
    Run,
    TrainConfig,
    inner_level,
)
from bidfmkd_fast.training import loop as training_loop
from bidfmkd_fast.training.run_folder import RunFolder

N_CLASSES, N_PER_CLASS, SHAPE = 3, 3, (1, 16, 16)
B = N_CLASSES * N_PER_CLASS
STEP = 3 * B  # queries of one recovery step with two directions

TINY = TrainConfig(
    survey=SurveyConfig(n_images=0),
    n_per_class=N_PER_CLASS,
    meta_batch_size=2,
    meta_model_width=4,
    recovery=RecoveryConfig(steps=2, num_directions=2, generator_width=4, latent_dim=8),
    distillation=DistillationConfig(inner_steps=2),
    replay=ReplayConfig(final_steps=2, n_query=2, rotations=4, inner_steps=1),
)


def api(number: int, **spec: Any) -> BlackBox:
    """Make a linear classifier; number i knows the classes i, i + 1 and i + 2.

    Neighbours share classes.
    """
    values: dict[str, Any] = {
        "n_classes": N_CLASSES,
        "image_shape": SHAPE,
        "class_names": tuple(f"class {number + k}" for k in range(N_CLASSES)),
        "data_set": "made up",
        "name": f"api {number}",
    }
    values |= spec
    draws = torch.Generator().manual_seed(number)
    weight = torch.randn(math.prod(values["image_shape"]), values["n_classes"], generator=draws)
    return FunctionBlackBox(lambda images: images.flatten(1) @ weight, APISpec(**values))


def linear() -> nn.Module:
    """Make a linear meta-model."""
    return nn.Sequential(nn.Flatten(), nn.Linear(SHAPE[1] * SHAPE[2], N_CLASSES))


def pool(n: int = 3) -> list[BlackBox]:
    return [api(number) for number in range(n)]


def parameters_of(run: Run) -> list[torch.Tensor]:
    """Return the parameters of the meta-model."""
    return [value.detach() for value in run.meta_model.module.state_dict().values()]


def same(a: Run, b: Run) -> bool:
    """Return True if the meta-models of two runs are equal bit for bit."""
    pairs = zip(parameters_of(a), parameters_of(b), strict=True)
    return all(torch.equal(left, right) for left, right in pairs)


def test_two_runs_of_a_seed_are_equal_bit_for_bit_and_another_seed_differs(seed: int) -> None:
    config = replace(TINY, seed=seed)
    first = BiDfMKD(pool(), config=config).fit()
    torch.rand(3)  # torch's global generator must have no influence
    second = BiDfMKD(pool(), config=config).fit()
    assert same(first, second)
    for ours, theirs in zip(first.recovered, second.recovered, strict=True):
        assert torch.equal(ours.images, theirs.images)
        assert torch.equal(ours.recovered.scores, theirs.recovered.scores)
    for record, again in zip(first.history, second.history, strict=True):
        assert record | {"seconds": 0} == again | {"seconds": 0}
    assert not same(first, BiDfMKD(pool(), config=replace(TINY, seed=seed + 1)).fit())


def test_apis_may_differ_in_their_number_of_classes(seed: int) -> None:
    """Check that an API of 3, one of 5 and one of 8 classes are asked, distilled and replayed."""
    apis = [api(i, n_classes=n, class_names=()) for i, n in enumerate((3, 5, 8))]
    config = replace(TINY, seed=seed, survey=SurveyConfig(n_images=30, epochs=2, batch_size=10))
    learner = BiDfMKD(apis, config=config)
    run = learner.fit()
    assert run.complete and run.queries == learner.planned_queries()
    shapes = [tuple(recovered.recovered.scores.shape) for recovered in run.recovered]
    assert shapes == [(3 * n, n) for n in (3, 3, 5, 5, 8, 8)]
    stages = {record["stage"] for record in run.history}
    assert stages == {"survey", "recovery", "distillation", "replay"}
    assert run.meta_model.module.n_classes == 8
    labels = torch.arange(12).repeat(2)
    classifier = run.meta_model.adapt(torch.rand(24, *SHAPE), labels)
    assert classifier.scores(torch.rand(2, *SHAPE)).shape == (2, 12)


def test_fitting_twice_starts_anew_and_leaves_the_global_generator_alone() -> None:
    learner = BiDfMKD(pool(2), config=TINY)
    before = torch.get_rng_state()
    first = learner.fit()
    assert torch.equal(before, torch.get_rng_state())
    assert same(first, learner.fit())


def by_hand(config: TrainConfig) -> tuple[list[torch.Tensor], list[Recovered]]:
    """Run a round over two APIs and its replay with the parts of the library.

    Returns the parameters of the meta-model and the recovered sets.
    """
    apis = [api(number, input_range=(-1, 1)) for number in range(2)]
    module = copy.deepcopy(BiDfMKD(apis, config=config)._module)
    start = {name: value.detach().clone() for name, value in module.named_parameters()}
    memory, tasks, sets = TaskMemory(), [], []
    for index, black_box in enumerate(apis):
        keys = [
            ("made up", black_box.spec.names[label])
            for label in range(N_CLASSES)
            for _ in range(N_PER_CLASS)
        ]
        seeds = [derive_seed(config.seed, "api", index, part) for part in ("support", "query")]
        support = recover(black_box, N_PER_CLASS, None, config.recovery, seed=seeds[0])
        adapted = adapt_to_api(
            module,
            {name: value.clone().requires_grad_() for name, value in start.items()},
            (support.images + 1) / 2,
            support.scores,
            config.distillation.inner,
        )
        task_model = {name: value.detach() for name, value in adapted.items()}

        def student(
            images: torch.Tensor, task_model: dict[str, torch.Tensor] = task_model
        ) -> torch.Tensor:
            return forward(module, task_model, (images + 1) / 2)

        asked = student if config.boundary_start == 0 else None
        query = recover(black_box, N_PER_CLASS, asked, config.recovery, seed=seeds[1])
        memory.add((support.images + 1) / 2, keys)
        memory.add((query.images + 1) / 2, keys)
        sets += [support, query]
        unit = [(images + 1) / 2 for images in (support.images, query.images)]
        tasks.append(DistillationTask(unit[0], support.scores, unit[1], query.scores))
    outer_distillation_step(
        module,
        torch.optim.Adam(module.parameters(), lr=config.distillation.outer_lr),
        tasks,
        config.distillation.inner,
    )
    optimizer, replay = (
        torch.optim.Adam(module.parameters(), lr=config.replay.outer_lr),
        config.replay,
    )
    for step in range(replay.final_steps):
        episodes = [
            memory.sample_episode(
                N_CLASSES,
                replay.n_shot,
                replay.n_query,
                seed=derive_seed(config.seed, "replay"),
                index=2 * step + i,
                rotations=replay.rotations,
            )
            for i in range(2)
        ]
        outer_replay_step(module, optimizer, episodes, replay.inner)
    return [value.detach() for value in module.state_dict().values()], sets


@pytest.mark.parametrize("boundary_start", [0, 1])
def test_a_round_is_its_steps_taken_one_by_one(seed: int, boundary_start: int) -> None:
    config = replace(TINY, seed=seed, boundary_start=boundary_start)
    parameters, sets = by_hand(config)
    run = BiDfMKD([api(number, input_range=(-1, 1)) for number in range(2)], config=config).fit()
    assert [(found.api_index, found.part) for found in run.recovered] == [
        (0, "support"), (0, "query"), (1, "support"), (1, "query"),
    ]  # fmt: skip
    for ours, theirs in zip(run.recovered, sets, strict=True):
        assert torch.equal(ours.images, (theirs.images + 1) / 2)
        assert torch.equal(ours.recovered.labels, theirs.labels)
    for value, wanted in zip(parameters_of(run), parameters, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-4, atol=1e-5)
    assert any(
        (a - b).abs().max() > 1e-3 for a, b in zip(parameters_of(run), initial(run), strict=True)
    )


def initial(run: Run) -> list[torch.Tensor]:
    """Return the parameters before training."""
    return [value.detach() for value in run.initial_model.module.state_dict().values()]


def test_the_boundary_term_starts_at_its_outer_step() -> None:
    """Compare two starts of the boundary term in two rounds of one API each.

    The second API's query set has a student only if the boundary term has started.
    """
    config = replace(TINY, meta_batch_size=1)
    early, late = (
        [
            found.images
            for found in BiDfMKD(pool(2), config=replace(config, boundary_start=start))
            .fit()
            .recovered
        ]
        for start in (1, 99)
    )
    for position in (0, 1, 2):
        assert torch.equal(early[position], late[position])
    assert not torch.equal(early[3], late[3])


def test_queries_requests_and_the_plan() -> None:
    apis = pool()
    apis[0](torch.zeros(5, *SHAPE))  # queries asked before the run are not counted
    learner = BiDfMKD(apis, config=TINY)
    run = learner.fit()
    assert run.queries == learner.planned_queries() == 3 * 2 * 2 * STEP
    assert run.queries + 5 == sum(box.ledger.queries for box in apis)
    assert run.requests + 1 == sum(box.ledger.requests for box in apis)
    assert run.complete
    assert set(run.seconds) == {"survey", "recovery", "distillation", "replay"}
    assert all(seconds > 0 for stage, seconds in run.seconds.items() if stage != "survey")
    assert run.seconds["survey"] == 0
    assert run.history[-1]["queries"] == run.queries
    assert [record["stage"] for record in run.history] == [
        *["recovery"] * 4, "distillation", *["recovery"] * 2, "distillation", "replay",
    ]  # fmt: skip


def test_the_memory_joins_classes_of_one_name_and_keeps_nameless_ones_apart() -> None:
    run = BiDfMKD(pool(2), config=TINY).fit()
    assert run.memory.classes == tuple(("made up", f"class {k}") for k in range(4))
    assert len(run.memory.images_of(("made up", "class 1"))) == 4 * N_PER_CLASS
    assert len(run.memory.images_of(("made up", "class 0"))) == 2 * N_PER_CLASS
    nameless = BiDfMKD([api(0, class_names=()), api(1, class_names=())], config=TINY).fit()
    assert len(nameless.memory.classes) == 6


def test_memory_and_recovered_images_are_in_unit_range_whatever_the_api_takes() -> None:
    run = BiDfMKD([api(0, input_range=(-3.0, 5.0))], config=TINY).fit()
    for found in run.recovered:
        assert found.images.min() >= 0
        assert found.images.max() <= 1
    held = run.memory._images["made up", "class 0"].chunks
    assert [chunk.data_ptr() for chunk in held] == [
        found.images.data_ptr() for found in run.recovered
    ], "the memory must hold the sets' images, not copies"
    assert torch.equal(
        run.memory.images_of(("made up", "class 0"))[:N_PER_CLASS],
        run.recovered[0].images[:N_PER_CLASS],
    )


def test_a_module_of_ones_own_is_trained_as_a_copy() -> None:
    module = nn.Sequential(
        nn.Flatten(), nn.Linear(256, 8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, N_CLASSES)
    )
    before = copy.deepcopy(module.state_dict())
    runs = [BiDfMKD(pool(2), module, config=TINY).fit() for _ in range(2)]
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    assert same(*runs)  # although the module has dropout
    assert not torch.equal(runs[0].meta_model.module.state_dict()["1.weight"], before["1.weight"])
    labels = torch.arange(N_CLASSES)
    classifier = runs[0].meta_model.adapt(torch.rand(N_CLASSES, *SHAPE), labels)
    assert classifier.predict(torch.rand(2, *SHAPE)).shape == (2,)


def test_a_generator_of_ones_own() -> None:
    generator = nn.Sequential(nn.Linear(8, 256), nn.Sigmoid(), nn.Unflatten(1, SHAPE))
    run = BiDfMKD(pool(1), generator=generator, config=TINY).fit()
    assert not torch.equal(
        run.recovered[0].images, BiDfMKD(pool(1), config=TINY).fit().recovered[0].images
    )


def test_a_bad_answer_keeps_what_was_recovered_before(tmp_path: Path) -> None:
    broken = FunctionBlackBox(
        lambda images: images.new_full((len(images), N_CLASSES), torch.nan), api(1).spec
    )
    with pytest.raises(BadAnswer, match="api 1"):
        BiDfMKD([api(0), broken], config=TINY).fit(tmp_path / "run")
    files = sorted(file.name for file in (tmp_path / "run" / "recovered").iterdir())
    assert files == ["api_000_query.safetensors", "api_000_support.safetensors"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: BiDfMKD([]), "apis is empty"),
        (lambda: BiDfMKD([api(0), nn.Linear(1, 1)]), "apis must be black boxes"),  # type: ignore[list-item]
        (
            lambda: BiDfMKD([api(0), api(1, image_shape=(3, 16, 16))], linear()),
            r"fails on images \[2, 3, 16, 16\]",
        ),
        (
            lambda: BiDfMKD([api(0)], nn.Sequential(nn.Flatten(), nn.Linear(256, 4))),
            r"logits \[2, 3\].*\[2, 4\]",
        ),
        (lambda: BiDfMKD([api(0)], nn.Linear(5, 3)), "meta_model fails on images"),
        (lambda: BiDfMKD([api(0)], "conv4"), "meta_model must be a torch.nn.Module"),  # type: ignore[arg-type]
        (lambda: BiDfMKD([api(0)], config={"seed": 1}), "config must be a TrainConfig"),  # type: ignore[arg-type]
        (lambda: BiDfMKD([api(0)], budget=100), "budget must be a Budget"),  # type: ignore[arg-type]
        (lambda: BiDfMKD([api(0)], device="nowhere"), "device must be one that torch can use"),
    ],
)
def test_bad_arguments(make: Callable[[], BiDfMKD], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


def test_an_api_given_twice_or_under_two_budgets() -> None:
    box = api(0)
    with pytest.raises(InputError, match="the same black box twice"):
        BiDfMKD([box, box])
    box.budget = Budget(max_queries=1)
    with pytest.raises(InputError, match="a budget of its own"):
        BiDfMKD([box], budget=Budget(max_queries=1))
    with pytest.raises(InputTypeError, match="generator must be"):
        BiDfMKD([api(0)], generator="mine", config=TINY).fit()  # type: ignore[arg-type]


def test_without_boundary_recovery_the_query_set_is_recovered_like_the_support_set() -> None:
    plain = BiDfMKD(pool(1), config=replace(TINY, boundary_recovery=False)).fit()
    late = BiDfMKD(pool(1), config=replace(TINY, boundary_start=99)).fit()
    full = BiDfMKD(pool(1), config=TINY).fit()
    assert torch.equal(plain.recovered[1].images, late.recovered[1].images)
    assert not torch.equal(plain.recovered[1].images, full.recovered[1].images)


def test_the_parts_left_out_do_nothing_and_nothing_else_changes() -> None:
    neither = BiDfMKD(
        pool(2), config=replace(TINY, bilevel_distillation=False, task_replay=False)
    ).fit()
    assert all(
        torch.equal(a, b) for a, b in zip(parameters_of(neither), initial(neither), strict=True)
    )
    assert {record["stage"] for record in neither.history} == {"recovery"}
    no_distillation = BiDfMKD(pool(2), config=replace(TINY, bilevel_distillation=False)).fit()
    no_replay = BiDfMKD(pool(2), config=replace(TINY, task_replay=False)).fit()
    assert {record["stage"] for record in no_distillation.history} == {"recovery", "replay"}
    assert {record["stage"] for record in no_replay.history} == {"recovery", "distillation"}
    full = BiDfMKD(pool(2), config=TINY).fit()
    for run in (neither, no_distillation, no_replay):
        for ours, theirs in zip(run.recovered, full.recovered, strict=True):
            assert torch.equal(ours.images, theirs.images)


def test_paper_compat_reaches_every_part(monkeypatch: pytest.MonkeyPatch) -> None:
    config = replace(TINY, paper_compat=True, recovery=replace(TINY.recovery, num_directions=7))
    asked: list[tuple[str, bool]] = []
    parts = (
        (training_loop, "recover"),
        (inner_level, "adapt_to_api"),
        (training_loop, "outer_distillation_step"),
    )
    for where, name in parts:
        plain = getattr(where, name)

        def watched(*args: Any, name: str = name, plain: Callable = plain, **options: Any) -> Any:
            asked.append((name, options["paper_compat"]))
            return plain(*args, **options)

        monkeypatch.setattr(where, name, watched)
    run = BiDfMKD(pool(2), config=config).fit()
    assert set(asked) == {
        ("recover", True),
        ("adapt_to_api", True),
        ("outer_distillation_step", True),
    }
    assert run.queries == 2 * 2 * 2 * (1 + 5) * B  # 7 directions, of which 5 fill the splits


def test_apis_of_different_image_shapes(tmp_path: Path) -> None:
    """Keep the classes of two data sets apart if they share a name; take images of both sizes."""
    apis = [api(0), api(0, image_shape=(3, 20, 20), data_set="colours", name="api c")]
    run = BiDfMKD(apis, config=TINY).fit(tmp_path / "run")
    module = run.meta_model.module
    assert isinstance(module, AnySizeConv4)
    assert (module.in_channels, module.image_size) == (3, (20, 20))
    assert [found.images.shape[1:] for found in run.recovered] == [(1, 16, 16)] * 2 + [
        (3, 20, 20)
    ] * 2
    assert len(run.memory.classes) == 6
    assert run.memory.images_of(("made up", "class 0")).shape[1:] == (1, 16, 16)
    restored = RunFolder(tmp_path / "run").memory()
    assert restored.sample_episode(3, 1, 2, seed=0, index=0).query_images.shape == (6, 3, 20, 20)
    loaded = RunFolder(tmp_path / "run").meta_model()
    labels = torch.arange(N_CLASSES)
    for shape in (SHAPE, (3, 20, 20), (1, 40, 30)):  # the last is a size of no API
        images = torch.rand(N_CLASSES, *shape)
        wanted = run.meta_model.adapt(images, labels).scores(images)
        assert torch.equal(loaded.adapt(images, labels).scores(images), wanted)

    small = BiDfMKD(apis, config=replace(TINY, meta_model_side=16))
    assert small.fit().meta_model.module.image_size == (16, 16)
