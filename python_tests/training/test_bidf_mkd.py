"""Compare the loop with its steps taken one by one; its budget, control and errors."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from bidfmkd_fast.black_box import APISpec, BlackBox, Budget, FunctionBlackBox
from bidfmkd_fast.errors import BadAnswer, BudgetExhausted, InputError, InputTypeError
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
from bidfmkd_fast.training import (
    BiDfMKD,
    DistillationConfig,
    ReplayConfig,
    Run,
    TrainConfig,
    fit_with_control,
    inner_level,
    local_at_once,
)
from bidfmkd_fast.training import loop as training_loop
from bidfmkd_fast.training import replay as training_replay
from bidfmkd_fast.training.run_folder import RunFolder

N_CLASSES, N_PER_CLASS, SHAPE = 3, 3, (1, 16, 16)
B = N_CLASSES * N_PER_CLASS
STEP = 3 * B  # queries of one recovery step with two directions

TINY = TrainConfig(
    n_per_class=N_PER_CLASS,
    meta_batch_size=2,
    meta_model_width=4,
    recovery=RecoveryConfig(steps=2, num_directions=2, generator_width=4, latent_dim=8),
    distillation=DistillationConfig(inner_steps=2),
    replay=ReplayConfig(final_steps=2, n_query=2, rotations=4, inner_steps=1),
)


def api(number: int, **spec: Any) -> BlackBox:
    """A linear classifier; number i knows the classes i, i + 1 and i + 2, so neighbours share
    classes.
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
    return nn.Sequential(nn.Flatten(), nn.Linear(SHAPE[1] * SHAPE[2], N_CLASSES))


def pool(n: int = 3) -> list[BlackBox]:
    return [api(number) for number in range(n)]


def parameters_of(run: Run) -> list[torch.Tensor]:
    return [value.detach() for value in run.meta_model.module.state_dict().values()]


def same(a: Run, b: Run) -> bool:
    pairs = zip(parameters_of(a), parameters_of(b), strict=True)
    return all(torch.equal(one, other) for one, other in pairs)


def test_two_runs_of_a_seed_are_equal_bit_for_bit_and_another_seed_differs(seed: int) -> None:
    config = replace(TINY, seed=seed)
    first = BiDfMKD(pool(), config=config).fit()
    torch.rand(3)  # the global generator plays no part
    second = BiDfMKD(pool(), config=config).fit()
    assert same(first, second)
    for one, other in zip(first.recovered, second.recovered, strict=True):
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.recovered.scores, other.recovered.scores)
    for one_record, other_record in zip(first.history, second.history, strict=True):
        assert one_record | {"seconds": 0} == other_record | {"seconds": 0}
    assert not same(first, BiDfMKD(pool(), config=replace(TINY, seed=seed + 1)).fit())


def test_fitting_twice_starts_anew_and_leaves_the_global_generator_alone() -> None:
    learner = BiDfMKD(pool(2), config=TINY)
    before = torch.get_rng_state()
    first = learner.fit()
    assert torch.equal(before, torch.get_rng_state())
    assert same(first, learner.fit())


def by_hand(config: TrainConfig) -> tuple[list[torch.Tensor], list[Recovered]]:
    """One round over two APIs with the parts of the library, replay included: parameters and the
    recovered sets.
    """
    apis = [api(number, input_range=(-1, 1)) for number in range(2)]
    module = copy.deepcopy(BiDfMKD(apis, config=config)._module)
    start = {name: value.detach().clone() for name, value in module.named_parameters()}
    memory, tasks, sets = TaskMemory(), [], []
    for index, one in enumerate(apis):
        keys = [
            ("made up", one.spec.names[label])
            for label in range(N_CLASSES)
            for _ in range(N_PER_CLASS)
        ]
        seeds = [derive_seed(config.seed, "api", index, part) for part in ("support", "query")]
        support = recover(one, N_PER_CLASS, None, config.recovery, seed=seeds[0])
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
        query = recover(one, N_PER_CLASS, asked, config.recovery, seed=seeds[1])
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
    assert [(one.api_index, one.part) for one in run.recovered] == [
        (0, "support"), (0, "query"), (1, "support"), (1, "query"),
    ]  # fmt: skip
    for one, other in zip(run.recovered, sets, strict=True):
        assert torch.equal(one.images, (other.images + 1) / 2)
        assert torch.equal(one.recovered.labels, other.labels)
    for value, wanted in zip(parameters_of(run), parameters, strict=True):
        torch.testing.assert_close(value, wanted, rtol=1e-4, atol=1e-5)
    assert any(
        (a - b).abs().max() > 1e-3 for a, b in zip(parameters_of(run), initial(run), strict=True)
    )


def initial(run: Run) -> list[torch.Tensor]:
    return [value.detach() for value in run.initial_model.module.state_dict().values()]


def test_the_boundary_term_starts_when_it_is_told() -> None:
    """Two rounds of one API: the second API's query set sees the task model only if the start is
    not later.
    """
    config = replace(TINY, meta_batch_size=1)
    early, late = (
        [
            one.images
            for one in BiDfMKD(pool(2), config=replace(config, boundary_start=start))
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
    apis[0](torch.zeros(5, *SHAPE))  # what was asked before is no part of the run
    learner = BiDfMKD(apis, config=TINY)
    run = learner.fit()
    assert run.queries == learner.planned_queries() == 3 * 2 * 2 * STEP
    assert run.queries + 5 == sum(one.ledger.queries for one in apis)
    assert run.requests + 1 == sum(one.ledger.requests for one in apis)
    assert run.complete
    assert set(run.seconds) == {"recovery", "distillation", "replay"}
    assert all(seconds > 0 for seconds in run.seconds.values())
    assert run.history[-1]["queries"] == run.queries
    assert [record["stage"] for record in run.history] == [
        *["recovery"] * 4, "distillation", *["recovery"] * 2, "distillation", "replay",
    ]  # fmt: skip


def test_the_control_asks_for_scores_only_and_starts_where_the_run_starts() -> None:
    control = BiDfMKD(pool(), config=TINY.control())
    run = control.fit()
    assert run.queries == control.planned_queries() == 3 * 2 * B
    other = BiDfMKD(pool(), config=TINY).fit()
    assert all(torch.equal(a, b) for a, b in zip(initial(run), initial(other), strict=True))
    assert not same(run, other)


def test_the_memory_joins_classes_of_one_name_and_keeps_nameless_ones_apart() -> None:
    run = BiDfMKD(pool(2), config=TINY).fit()
    assert run.memory.classes == tuple(("made up", f"class {k}") for k in range(4))
    assert len(run.memory.images_of(("made up", "class 1"))) == 4 * N_PER_CLASS
    assert len(run.memory.images_of(("made up", "class 0"))) == 2 * N_PER_CLASS
    nameless = BiDfMKD([api(0, class_names=()), api(1, class_names=())], config=TINY).fit()
    assert len(nameless.memory.classes) == 6


def test_memory_and_recovered_images_are_in_unit_range_whatever_the_api_takes() -> None:
    run = BiDfMKD([api(0, input_range=(-3.0, 5.0))], config=TINY).fit()
    for one in run.recovered:
        assert one.images.min() >= 0
        assert one.images.max() <= 1
    held = run.memory._images["made up", "class 0"]._chunks
    assert [chunk.data_ptr() for chunk in held] == [
        one.images.data_ptr() for one in run.recovered
    ], "the memory must hold the sets' images, not copies"
    assert torch.equal(
        run.memory.images_of(("made up", "class 0"))[:N_PER_CLASS],
        run.recovered[0].images[:N_PER_CLASS],
    )


def test_sets_of_a_group_made_at_once(
    seed: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As on a GPU: the same sets and the same model, however the run is cut."""
    config = replace(TINY, seed=seed)
    expected = BiDfMKD(pool(4), config=config).fit()
    monkeypatch.setattr(local_at_once, "on_one_gpu", lambda run: True)
    save, left = RunFolder.save_recovered, [5]

    def cut_off(self: RunFolder, one: Any) -> None:
        save(self, one)
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt

    monkeypatch.setattr(RunFolder, "save_recovered", cut_off)
    with pytest.raises(KeyboardInterrupt):
        BiDfMKD(pool(4), config=config).fit(tmp_path / "run")
    left[0] = 99
    for run in (
        BiDfMKD(pool(4), config=config).fit(),
        BiDfMKD(pool(4), config=config).fit(tmp_path / "run"),
    ):
        assert run.complete
        assert run.queries == expected.queries
        for one, wanted in zip(run.recovered, expected.recovered, strict=True):
            assert (one.api_index, one.part) == (wanted.api_index, wanted.part)
            assert torch.equal(one.images, wanted.images)
        for value, wanted_value in zip(
            run.meta_model.module.parameters(), expected.meta_model.module.parameters()
        ):
            assert torch.equal(value, wanted_value)


def test_a_budget_pays_sets_one_after_the_other(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Made at once, four sets would share what is left and none would be whole."""
    config = replace(TINY, seed=seed, meta_batch_size=4)
    set_of = BiDfMKD(pool(1), config=config).planned_queries() // 2
    runs = []
    for at_once in (False, True):
        monkeypatch.setattr(local_at_once, "on_one_gpu", lambda run, at_once=at_once: at_once)
        runs.append(
            BiDfMKD(
                pool(4), config=config, budget=Budget(max_queries=3 * set_of + set_of // 2)
            ).fit()
        )
    assert same(*runs)
    assert runs[0].queries == runs[1].queries
    assert [record["stage"] for record in runs[1].history].count("distillation") == 1


def test_patience_where_metrics_are_read_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: patience counts from the best step, replay stops only when metrics are read, and
    every step is recorded.
    """
    accuracies, recorded, taken = [0.1, 0.2, 0.3, 0.4, 0.5, *[0.5] * 30], [], []

    def step_taker(run: Any, read_every: int) -> training_replay.TakeStep:
        unread: list[dict[str, float]] = []

        def take(last: bool) -> list[dict[str, float]]:
            unread.append({"loss": 0.0, "accuracy": accuracies[len(taken)]})
            taken.append(last)
            read = list(unread) if last or len(unread) == read_every else []
            del unread[: len(read)]
            return read

        return take

    monkeypatch.setattr(training_replay, "step_taker", step_taker)
    run = SimpleNamespace(
        recovered=True,
        config=SimpleNamespace(task_replay=True),
        progress=False,
        label="run",
        record=lambda stage, **values: recorded.append(values["accuracy"]),
    )
    training_replay.replay(run, 35, patience=3)  # type: ignore[arg-type]
    assert len(taken) == 9  # metrics are read at steps 3, 6 and 9; the fifth was the best
    assert sum(recorded) * 9 == pytest.approx(sum(accuracies[:9]))


def test_replay_between_rounds_ends_early_when_patience_runs_out() -> None:
    # 2 tasks x 3 classes x 2 query images: accuracy can improve at most 12 times in a row, so
    # patience 1 ends by then.
    config = replace(
        TINY, meta_batch_size=1, replay=replace(TINY.replay, steps_per_round=40, patience=1)
    )
    steps = [
        record["step"]
        for record in BiDfMKD(pool(2), config=config).fit().history
        if record["stage"] == "replay"
    ]
    fixed = replace(config, replay=replace(config.replay, patience=0))
    fixed_steps = [
        r["step"] for r in BiDfMKD(pool(2), config=fixed).fit().history if r["stage"] == "replay"
    ]
    assert steps[0] <= 1 + 14
    assert fixed_steps == [1 + 25, 1 + 40, 2 + 40 + 2]


def test_a_module_of_ones_own_is_trained_as_a_copy() -> None:
    module = nn.Sequential(
        nn.Flatten(), nn.Linear(256, 8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, N_CLASSES)
    )
    before = copy.deepcopy(module.state_dict())
    runs = [BiDfMKD(pool(2), module, config=TINY).fit() for _ in range(2)]
    assert all(torch.equal(before[name], value) for name, value in module.state_dict().items())
    assert same(*runs)  # with dropout in it
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


# Sets are recovered in the order support 0, query 0, support 1, ...; each takes two steps of STEP
# queries.
@pytest.mark.parametrize(
    ("queries", "n_sets", "spent"),
    [
        (STEP, 1, STEP),  # one step of the first support set
        (2 * STEP + 5, 1, 2 * STEP),  # the first support set alone
        (5 * STEP, 3, 5 * STEP),  # support 1 in part
        (12 * STEP - 1, 6, 11 * STEP),  # the last step of the last set is missing
    ],
)
def test_a_budget_that_ends_midway(queries: int, n_sets: int, spent: int, tmp_path: Path) -> None:
    apis, budget = pool(), Budget(max_queries=queries)
    run = BiDfMKD(apis, config=TINY, budget=budget).fit(tmp_path / "run")
    assert not run.complete
    assert len(run.recovered) == n_sets
    assert run.queries == budget.queries
    assert spent <= run.queries <= queries
    assert len(run.memory) == n_sets * B
    assert run.history[-1]["stage"] == "replay"
    assert not all(map(torch.equal, parameters_of(run), initial(run)))
    assert len(list((tmp_path / "run" / "recovered").iterdir())) == n_sets
    assert all(one.budget is None for one in apis)  # as they came


def test_a_budget_that_is_just_enough() -> None:
    run = BiDfMKD(pool(), config=TINY, budget=Budget(max_queries=12 * STEP)).fit()
    assert run.complete
    assert run.queries == 12 * STEP


def test_a_budget_too_small_for_one_step_asks_nothing_and_leaves_nothing(tmp_path: Path) -> None:
    apis = pool()
    with pytest.raises(BudgetExhausted, match="one step"):
        BiDfMKD(apis, config=TINY, budget=Budget(max_queries=STEP - 1)).fit(tmp_path / "run")
    assert sum(one.ledger.queries for one in apis) == 0
    assert not (tmp_path / "run").exists()
    with pytest.raises(BudgetExhausted, match="the control and one recovery step"):
        fit_with_control(
            apis, tmp_path / "run", TINY, budget=Budget(max_queries=3 * 2 * B + STEP - 1)
        )
    assert sum(one.ledger.queries for one in apis) == 0
    assert not (tmp_path / "run").exists()


def test_a_budget_of_one_api_stops_that_api_only() -> None:
    apis = pool()
    apis[1].budget = Budget(max_queries=0)
    run = BiDfMKD(apis, config=TINY).fit()
    assert not run.complete
    assert {one.api_index for one in run.recovered} == {0, 2}
    assert apis[1].ledger.queries == 0


def test_run_and_control_share_a_budget(tmp_path: Path) -> None:
    budget = Budget(max_queries=6 * B + 5 * STEP)
    run, control = fit_with_control(pool(), tmp_path / "run", TINY, budget=budget, progress=False)
    assert control.complete
    assert not run.complete
    assert control.queries == 6 * B
    assert run.queries + control.queries <= 6 * B + 5 * STEP
    assert same(control, BiDfMKD(pool(), config=TINY.control()).fit())


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
            lambda: BiDfMKD([api(0), api(1, n_classes=4, class_names=())]),
            "the same n_classes; api 0 has 3 and api 1",
        ),
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
    one = api(0)
    with pytest.raises(InputError, match="the same black box twice"):
        BiDfMKD([one, one])
    one.budget = Budget(max_queries=1)
    with pytest.raises(InputError, match="a budget of its own"):
        BiDfMKD([one], budget=Budget(max_queries=1))
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
        for one, other in zip(run.recovered, full.recovered, strict=True):
            assert torch.equal(one.images, other.images)


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
    """Two data sets that share a class name: two classes of the memory; the meta-model takes both
    sizes.
    """
    apis = [api(0), api(0, image_shape=(3, 20, 20), data_set="colours", name="api c")]
    run = BiDfMKD(apis, config=TINY).fit(tmp_path / "run")
    module = run.meta_model.module
    assert isinstance(module, AnySizeConv4)
    assert (module.in_channels, module.image_size) == (3, (20, 20))
    assert [one.images.shape[1:] for one in run.recovered] == [(1, 16, 16)] * 2 + [(3, 20, 20)] * 2
    assert len(run.memory.classes) == 6
    assert run.memory.images_of(("made up", "class 0")).shape[1:] == (1, 16, 16)
    restored = RunFolder(tmp_path / "run").memory()
    assert restored.sample_episode(3, 1, 2, seed=0, index=0).query_images.shape == (6, 3, 20, 20)
    loaded = RunFolder(tmp_path / "run").meta_model()
    labels = torch.arange(N_CLASSES)
    for shape in (SHAPE, (3, 20, 20), (1, 40, 30)):  # a size that no API takes, too
        images = torch.rand(N_CLASSES, *shape)
        wanted = run.meta_model.adapt(images, labels).scores(images)
        assert torch.equal(loaded.adapt(images, labels).scores(images), wanted)

    small = BiDfMKD(apis, config=replace(TINY, meta_model_side=16))
    assert small.fit().meta_model.module.image_size == (16, 16)
