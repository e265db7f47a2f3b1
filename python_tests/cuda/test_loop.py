"""Test the loop on a CUDA device: black boxes in full float32, captured steps, a whole run."""

from __future__ import annotations

import copy
import gc
import warnings
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tolerances import TOLERANCES

import bidfmkd_fast as bf
from bidfmkd_fast.meta import InnerLoop, TaskMemory, outer_replay_step
from bidfmkd_fast.meta.replay_on_device import DeviceEpisodes, DeviceReplay
from bidfmkd_fast.models import Conv4
from bidfmkd_fast.recovery import Journal, Objective, Recovered, journal
from bidfmkd_fast.recovery.image_maker import ImageMaker
from bidfmkd_fast.recovery.on_device import DeviceRecovery, serves
from bidfmkd_fast.recovery.side_by_side import run_side_by_side
from bidfmkd_fast.recovery.step import RecoveryStep
from bidfmkd_fast.runtime import captured_step as repeated
from bidfmkd_fast.runtime.full_float32 import full_float32
from bidfmkd_fast.seeds import seeded

SHAPE, N_CLASSES, N_PER_CLASS = (3, 32, 32), 5, 6
CONFIG = bf.RecoveryConfig(steps=7, num_directions=8, augment=True, generator_precision="float32")
RTOL, ATOL = TOLERANCES["half"]  # several steps of optimisation grow a rounding


@pytest.fixture(autouse=True)
def strict(device: torch.device) -> Iterator[None]:
    """Turn warnings of a step without its graph into failures, and make convolutions repeatable."""
    before = torch.backends.cudnn.deterministic
    torch.backends.cudnn.deterministic = True
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        yield
    torch.backends.cudnn.deterministic = before


def make_module(seed: int, batch_statistics: bool = False) -> Conv4:
    with seeded(seed, "test module"):
        return Conv4(3, N_CLASSES, SHAPE[1:], width=16, batch_statistics=batch_statistics).eval()


def make_api(seed: int, device: torch.device | str) -> bf.TorchBlackBox:
    return bf.TorchBlackBox(
        make_module(seed), bf.APISpec(N_CLASSES, SHAPE, input_range=(-1, 1)), device=device
    )


def make_recovery(
    seed: int, device: torch.device, student: object = None, api: bf.TorchBlackBox | None = None
) -> DeviceRecovery:
    api = api or make_api(seed, device)
    labels = torch.arange(N_CLASSES, device=device).repeat_interleave(N_PER_CLASS)
    maker = ImageMaker(api, len(labels), CONFIG, None, seed, device)
    objective = Objective(labels, "logits", student, 0.3, "l1_prob")  # type: ignore[arg-type]
    assert serves(api, CONFIG, labels)
    return DeviceRecovery(RecoveryStep(api, maker, objective, CONFIG))


def test_scores_are_full_float32(device: torch.device, seed: int) -> None:
    """Compare scores under any setting of the process; with TF32 they would be off by 1e-3."""
    images = 2 * torch.rand(300, *SHAPE, generator=torch.Generator().manual_seed(seed)) - 1
    wanted = make_module(seed).double()(images.double()).detach()
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    try:
        for where in (images, images.to(device)):
            scores = make_api(seed, device)(where)
            assert scores.device == where.device
            torch.testing.assert_close(
                scores.cpu().double(), wanted, rtol=0, atol=2e-5 * float(wanted.abs().max())
            )
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("with_student", [False, True])
def test_recovery_from_a_graph(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, with_student: bool, seed: int
) -> None:
    student = make_module(seed + 1).to(device) if with_student else None
    api = make_api(seed, device)  # one for all: its memory format goes by what was faster
    graphed = make_recovery(seed, device, student, api)
    from_graph = graphed.run()
    assert graphed._repeated._graph is not None
    with monkeypatch.context() as patch:
        patch.setattr(repeated, "WARM_UP_STEPS", 100)
        plain = make_recovery(seed, device, student, api).run()
    looked_at = bf.recover(  # a function is asked step by step, with a look at each answer
        bf.FunctionBlackBox(api, bf.APISpec(N_CLASSES, SHAPE, input_range=(-1, 1))),
        N_PER_CLASS,
        student,
        CONFIG,
        seed=seed,
        device=device,
    )
    torch.testing.assert_close(api(from_graph.images), from_graph.scores, rtol=RTOL, atol=ATOL)
    # Losses, not images: a rounding may change which step was a slot's best.
    for other in (plain, looked_at):
        torch.testing.assert_close(from_graph.losses, other.losses, rtol=RTOL, atol=ATOL)
        for record, wanted in zip(from_graph.history, other.history, strict=True):
            assert record["queries"] == wanted["queries"]
            assert record["loss"] == pytest.approx(wanted["loss"], rel=RTOL, abs=ATOL)
    # A graph that did nothing new would repeat a loss; two of them may be equal by chance.
    assert len({record["loss"] for record in from_graph.history}) >= CONFIG.steps - 1


def test_a_set_that_is_looked_at_goes_on_from_its_journal(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, seed: int
) -> None:
    """Cut a recovery off in the last step, after a snapshot.

    A recovery that stays on the device keeps nothing.
    """
    monkeypatch.setattr(journal, "SNAPSHOT_STEPS", 2)
    monkeypatch.setattr(journal, "SNAPSHOT_SECONDS", 0.0)
    inside, calls = make_api(seed, device), 0

    def recovered(at: int | None, held: Journal | None) -> Recovered:
        def answer(images: torch.Tensor) -> torch.Tensor:
            nonlocal calls
            calls += 1
            if calls == at:
                raise KeyboardInterrupt
            return inside(images)

        api = bf.FunctionBlackBox(answer, bf.APISpec(N_CLASSES, SHAPE, input_range=(-1, 1)))
        config = replace(CONFIG, max_images=10**6)  # a step is a call
        return bf.recover(api, N_PER_CLASS, config=config, seed=seed, device=device, journal=held)

    whole, calls = recovered(None, None), 0
    with Journal(tmp_path / "journal") as held, pytest.raises(KeyboardInterrupt):
        recovered(CONFIG.steps, held)
    with Journal(tmp_path / "journal") as held:
        assert held.history
        again = recovered(None, held)
    assert calls == CONFIG.steps + 1
    torch.testing.assert_close(again.losses, whole.losses, rtol=RTOL, atol=ATOL)
    with Journal(tmp_path / "other") as held:
        bf.recover(inside, N_PER_CLASS, config=CONFIG, seed=seed, device=device, journal=held)
    assert not (tmp_path / "other").exists()


def test_no_step_waits(device: torch.device, seed: int) -> None:
    recovery = make_recovery(seed, device)
    for _ in range(4):  # the capture itself synchronises
        recovery.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        recovery.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert recovery.api.ledger.queries == 5 * 9 * N_CLASSES * N_PER_CLASS


def test_side_by_side_changes_nothing(device: torch.device, seed: int) -> None:
    apis = [make_api(seed + i, device) for i in range(3)]
    together = run_side_by_side(
        [make_recovery(seed + i, device, api=api) for i, api in enumerate(apis)]
    )
    for i, (api, result) in enumerate(zip(apis, together)):
        alone = make_recovery(seed + i, device, api=api).run()
        torch.testing.assert_close(result.losses, alone.losses, rtol=RTOL, atol=ATOL)
        torch.testing.assert_close(api(result.images), result.scores, rtol=RTOL, atol=ATOL)


def test_a_graph_ends_with_its_recovery(device: torch.device, seed: int) -> None:
    """Check that reference counts alone free a graph.

    A garbage collection during the capture of another graph would cut that capture off.
    """
    gc.disable()
    try:
        recovery = make_recovery(seed, device)
        recovery.run()
        graph = weakref.ref(recovery._repeated)
        del recovery
        assert graph() is None
    finally:
        gc.enable()


def test_a_step_that_cannot_be_captured_runs_plainly(device: torch.device) -> None:
    counter = torch.zeros(1, device=device)

    def step() -> None:
        counter.add_(1)
        counter.item()  # waits, which no capture can hold

    runner = repeated.RepeatedStep(device)
    for _ in range(2):
        runner(step)
    with pytest.warns(RuntimeWarning, match="runs without a CUDA graph: .* makes the host wait"):
        runner(step)
    runner(step)
    assert counter.item() == 4
    assert runner._graph is None


@pytest.mark.parametrize("from_host", [False, True])
def test_replay_from_a_graph(device: torch.device, from_host: bool, seed: int) -> None:
    memory, sizes, inner = (
        TaskMemory(),
        (N_CLASSES, 1, 4),
        InnerLoop(3, 0.05),
    )
    images = torch.rand(90, *SHAPE, generator=torch.Generator().manual_seed(seed))
    memory.add(images, [("set", f"class {i % 9}") for i in range(90)])
    module = make_module(seed, batch_statistics=True).to(device)
    twin = copy.deepcopy(module)
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-3, capturable=True)
    plain = torch.optim.Adam(twin.parameters(), lr=1e-3, capturable=True)
    replay = DeviceReplay(module, optimizer, memory, sizes, 2, inner)
    hosted = DeviceEpisodes(module, optimizer, SHAPE, sizes, 2, inner)
    steps: DeviceReplay | DeviceEpisodes = hosted if from_host else replay
    expected = []
    with full_float32():
        for step in range(7):
            episodes = [
                memory.sample_episode(*sizes, seed=seed, index=2 * step + i) for i in range(2)
            ]
            if from_host:
                hosted.step(episodes)
            else:
                replay.step(seed, 2 * step)
            expected.append(outer_replay_step(twin, plain, episodes, inner))
    assert steps._repeated._graph is not None
    for record, wanted in zip(steps.records(), expected, strict=True):
        assert record["loss"] == pytest.approx(wanted["loss"], rel=RTOL, abs=ATOL)
    for value, wanted in zip(module.parameters(), twin.parameters()):
        torch.testing.assert_close(value, wanted, rtol=RTOL, atol=ATOL)


def test_a_whole_run(device: torch.device, seed: int) -> None:
    apis = [make_api(seed + i, device) for i in range(3)]
    config = bf.TrainConfig(
        survey=bf.SurveyConfig(n_images=0),
        seed=seed,
        n_per_class=N_PER_CLASS,
        meta_batch_size=2,
        recovery=replace(CONFIG, steps=5),
        replay=bf.ReplayConfig(n_query=3, steps_per_round=6, final_steps=30, inner_steps=2),
        distillation=bf.DistillationConfig(inner_steps=2),
    )
    learner = bf.BiDfMKD(apis, config=config, device=device)
    run = learner.fit(progress=False)
    assert run.complete
    assert run.queries == learner.planned_queries()
    assert [record["stage"] for record in run.history if record["stage"] == "replay"]
    assert all(torch.isfinite(torch.tensor(record["loss"])) for record in run.history)
    assert all(parameter.isfinite().all() for parameter in run.meta_model.module.parameters())
    assert not all(
        torch.equal(after, before)
        for after, before in zip(
            run.meta_model.module.parameters(), run.initial_model.module.parameters()
        )
    )


def test_evaluation_as_on_the_cpu(device: torch.device, seed: int) -> None:
    dataset = bf.load_dataset("glyphs")
    with seeded(seed, "evaluated module"):
        module = Conv4(1, 5, (28, 28), batch_statistics=True)
    settings = {"n_way": 5, "n_shot": 1, "n_episodes": 40, "seed": seed}
    with full_float32():
        on_cpu = bf.evaluate(bf.MetaModel(module, adapt_steps=3), dataset, **settings)  # type: ignore[arg-type]
        moved = bf.MetaModel(copy.deepcopy(module).to(device), adapt_steps=3)
        on_gpu = bf.evaluate(moved, dataset, **settings)  # type: ignore[arg-type]
    # A prediction may tip on a rounding; accuracies are in steps of 1/75.
    assert (on_cpu.per_episode - on_gpu.per_episode).abs().mean() < 0.01
