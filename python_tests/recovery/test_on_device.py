"""Check that recovery on the device equals the stepwise loop.

Here it runs on the CPU, where steps are plain calls instead of a graph.
"""

from __future__ import annotations

import gc
import importlib
import warnings
import weakref
from dataclasses import replace

import pytest
import torch
from looks import NoLooks
from tolerances import TOLERANCES

from bidfmkd_fast.black_box import APISpec, Budget, FunctionBlackBox, TorchBlackBox
from bidfmkd_fast.errors import (
    BadAnswer,
    BudgetExhausted,
    InputError,
    PrecisionWarning,
    ServiceWarning,
)
from bidfmkd_fast.models import build_model
from bidfmkd_fast.recovery import Generator, Objective, Recovered, RecoveryConfig, recover
from bidfmkd_fast.recovery.augment import augment, augment_at, crop_of
from bidfmkd_fast.recovery.image_maker import ImageMaker
from bidfmkd_fast.recovery.on_device import DeviceRecovery, serves
from bidfmkd_fast.recovery.side_by_side import recover_side_by_side, run_side_by_side
from bidfmkd_fast.recovery.step import RecoveryStep
from bidfmkd_fast.seeds import seeded

SHAPE, N_CLASSES, N_PER_CLASS = (1, 16, 16), 3, 4
CONFIG = RecoveryConfig(
    steps=6, num_directions=4, latent_dim=8, generator_width=4, learning_rate=0.05
)
RTOL, ATOL = TOLERANCES["float32"]


def make_module(seed: int) -> torch.nn.Module:
    with seeded(seed, "test module"):
        return build_model(
            "conv4", in_channels=1, n_classes=N_CLASSES, image_size=SHAPE[1:], width=4
        ).eval()


def make_api(seed: int, budget: Budget | None = None) -> TorchBlackBox:
    spec = APISpec(N_CLASSES, SHAPE, input_range=(-1.0, 1.0), scores_kind="logits")
    return TorchBlackBox(make_module(seed), spec, budget=budget)


def make_recovery(
    api: TorchBlackBox, config: RecoveryConfig, student: object = None, seed: int = 0
) -> DeviceRecovery:
    labels = torch.arange(N_CLASSES).repeat_interleave(N_PER_CLASS)
    maker = ImageMaker(api, len(labels), config, None, seed, "cpu")
    objective = Objective(labels, "logits", student, config.boundary_weight, config.divergence)  # type: ignore[arg-type]
    return DeviceRecovery(RecoveryStep(api, maker, objective, config))


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"augment": True},
        {"max_images": 20},
        {"directions": "lowres", "grid": 2},
        {"boundary_weight": 0.5, "divergence": "l1"},
        {"generator_precision": "float32"},
    ],
)
@pytest.mark.parametrize("with_student", [False, True])
def test_the_same_as_the_loop(change: dict[str, object], with_student: bool, seed: int) -> None:
    config = replace(CONFIG, **change)  # type: ignore[arg-type]
    student = make_module(seed + 1) if with_student else None
    expected_api, api = make_api(seed), make_api(seed)
    expected = recover(expected_api, N_PER_CLASS, student, config, seed=seed)
    seen: list[dict[str, float]] = []
    actual = make_recovery(api, config, student, seed).run(callback=seen.append)
    for name in ("images", "labels", "scores", "losses"):
        assert torch.equal(getattr(actual, name), getattr(expected, name)), name
    assert actual.complete
    assert actual.mu == expected.mu == config.mu
    for records in (actual.history, seen):
        assert [list(record) for record in records] == [list(record) for record in expected.history]
        for record, wanted in zip(records, expected.history):
            assert record == pytest.approx(wanted, rel=RTOL, abs=ATOL)
    assert api.ledger.queries == expected_api.ledger.queries
    assert api.ledger.requests == expected_api.ledger.requests


def test_answers_that_do_not_change_give_a_warning() -> None:
    class Flat(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.zeros(len(images), N_CLASSES) + images.mean() * 0

    api = TorchBlackBox(Flat(), APISpec(N_CLASSES, SHAPE, scores_kind="logits"))
    with pytest.warns(
        PrecisionWarning,
        match=r"step length \(mu\) 0.025 is too small for 'api': the scores of 100 % of the images",
    ):
        make_recovery(api, CONFIG).run()


def test_side_by_side_changes_nothing(seed: int) -> None:
    configs = [CONFIG, replace(CONFIG, steps=3)]
    together = [
        make_recovery(make_api(seed + i), config, seed=seed + i) for i, config in enumerate(configs)
    ]
    for i, found in enumerate(run_side_by_side(together)):
        assert isinstance(found, Recovered)
        alone = recover(make_api(seed + i), N_PER_CLASS, None, configs[i], seed=seed + i)
        assert torch.equal(found.images, alone.images)
        assert [record["step"] for record in found.history] == list(range(configs[i].steps))


def test_a_recovery_that_fails_leaves_the_others_alone(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        importlib.import_module("bidfmkd_fast.recovery.recover"), "serves", lambda *_: True
    )
    per_step = 5 * N_CLASSES * N_PER_CLASS
    logits = TorchBlackBox(
        torch.nn.Flatten(), APISpec(256, SHAPE, scores_kind="probabilities", input_range=(0, 9))
    )
    small, none = Budget(max_queries=2 * per_step), Budget(max_queries=1)
    apis = [
        make_api(seed),
        logits,
        make_api(seed + 1, small),
        make_api(seed, none),
        make_api(seed + 2),
    ]
    students = [None, None, None, None, make_module(seed)]
    results = dict(recover_side_by_side(apis, N_PER_CLASS, students, CONFIG, seeds=range(5)))
    for i in (0, 4):
        alone = recover(make_api(seed + i // 2), N_PER_CLASS, students[i], CONFIG, seed=i)
        assert isinstance(results[i], Recovered)
        assert torch.equal(results[i].images, alone.images)
    assert isinstance(results[1], BadAnswer)
    assert isinstance(results[2], Recovered)
    assert not results[2].complete
    assert len(results[2].history) == 2
    assert isinstance(results[3], BudgetExhausted)


def test_answers_that_are_not_finite_end_a_recovery(seed: int) -> None:
    class Broken(torch.nn.Module):
        calls = 0

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            Broken.calls += 1
            return images.flatten(1)[:, :N_CLASSES] * (float("nan") if Broken.calls > 20 else 1.0)

    api = TorchBlackBox(Broken(), APISpec(N_CLASSES, SHAPE))
    Broken.calls = 18
    with pytest.raises(BadAnswer, match="api: the API must answer finite scores"):
        make_recovery(api, CONFIG).run()

    def endless(images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1)[:, :N_CLASSES] / 0.0

    with pytest.raises(InputError, match="student returned NaN or infinity"):
        make_recovery(make_api(seed), CONFIG, endless).run()


def test_a_budget_shared_with_others_ends_it_early(seed: int) -> None:
    per_step = 5 * N_CLASSES * N_PER_CLASS
    budget = Budget(max_queries=3 * per_step)
    api, other = make_api(seed, budget), make_api(seed, budget)
    recovery = make_recovery(api, CONFIG, seed=seed)
    other(torch.zeros(per_step // 2, *SHAPE))
    result = recovery.run()
    assert not result.complete
    assert len(result.history) == 2
    assert api.ledger.queries == 2 * per_step
    assert torch.equal(
        result.images,
        make_recovery(make_api(seed), replace(CONFIG, steps=2), seed=seed).run().images,
    )
    with pytest.raises(BudgetExhausted):
        make_recovery(api, CONFIG, seed=seed).run()


def test_logits_declared_as_probabilities() -> None:
    class Logits(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return 4 - images.flatten(1)[:, :N_CLASSES]

    api = TorchBlackBox(Logits(), APISpec(N_CLASSES, SHAPE, scores_kind="probabilities"))
    with pytest.raises(
        BadAnswer, match="they must be from 0 to 1; it answered .*; does it give logits"
    ):
        make_recovery(api, CONFIG).run()


@pytest.mark.parametrize("with_student", [False, True])
def test_no_step_looks_at_a_value(with_student: bool, seed: int) -> None:
    recovery = make_recovery(
        make_api(seed), replace(CONFIG, augment=True), make_module(seed) if with_student else None
    )
    recovery.step()  # in the first step the optimiser makes its state
    # The optimiser reads values on the CPU, but not on a GPU.
    recovery._maker.optimizer.step = lambda: None  # type: ignore[assignment,method-assign]
    with NoLooks():
        recovery.step()
    with pytest.raises(AssertionError, match="needs a tensor's value"), NoLooks():
        recovery.result()


def test_a_recovery_is_freed_without_a_garbage_collection(seed: int) -> None:
    """Free the graph without a garbage collection.

    A collection could free a graph while another graph is captured.
    """
    gc.disable()
    try:
        recovery = make_recovery(make_api(seed), CONFIG)
        recovery.run()
        ended = weakref.ref(recovery)
        del recovery
        assert ended() is None
    finally:
        gc.enable()


def test_which_apis_and_budgets_are_served(seed: int) -> None:
    """Refuse a budget that ends midway, since only the stepwise loop can stop there."""

    class Labels(list[int]):
        is_cuda, device, dtype = True, torch.device("cpu"), torch.int64

    labels, per_set = Labels(range(12)), CONFIG.steps * 5 * 12
    small, requests = replace(CONFIG, max_images=12), CONFIG.steps * 5  # a request takes 12 images
    for budget, config, served in (
        (None, CONFIG, True),
        (Budget(per_set), CONFIG, True),
        (Budget(per_set - 1), CONFIG, False),
        (Budget(per_set, requests), small, True),
        (Budget(per_set, requests - 1), small, False),
    ):
        assert serves(make_api(seed, budget), config, labels) == served  # type: ignore[arg-type]
    assert not serves(make_api(seed), CONFIG, torch.arange(12))
    function = FunctionBlackBox(
        lambda images: images.flatten(1)[:, :N_CLASSES], APISpec(N_CLASSES, SHAPE)
    )
    assert not serves(function, CONFIG, labels)  # type: ignore[arg-type]
    probabilities = torch.nn.Sequential(make_module(seed), torch.nn.Softmax(1))
    for coarse in (
        {"decimals": 3},
        {"dtype": "uint8"},
        {"encoding": "png"},
        {"scores_kind": "top_k", "top_k": 2},
    ):
        spec = APISpec(N_CLASSES, SHAPE, **coarse)  # type: ignore[arg-type]
        assert not serves(TorchBlackBox(probabilities, spec), CONFIG, labels)  # type: ignore[arg-type]


def test_only_the_plain_recovery_stays_on_the_device(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Leave the slips of the authors' code and a user's generator to the stepwise loop."""
    # The attribute `recover` of the package is the function, not the module.
    module = importlib.import_module("bidfmkd_fast.recovery.recover")
    monkeypatch.setattr(module, "serves", lambda *_: True)
    taken: list[int] = []

    class Watched(DeviceRecovery):
        def run(self, *args: object) -> Recovered:  # type: ignore[override]
            taken.append(1)
            return super().run()

    monkeypatch.setattr(module, "DeviceRecovery", Watched)
    config = replace(CONFIG, steps=1, num_directions=5)
    generator = Generator(SHAPE, config.latent_dim, config.generator_width)
    recover(make_api(seed), N_PER_CLASS, None, config, paper_compat=True)
    recover(make_api(seed), N_PER_CLASS, None, config, generator=generator)
    assert not taken
    recover(make_api(seed), N_PER_CLASS, None, config)
    assert taken == [1]


def test_crops_on_the_device(seed: int) -> None:
    images = torch.randn(
        2, 3, 24, 17, generator=torch.Generator().manual_seed(seed)
    ).requires_grad_()
    flips = set()
    for step in range(12):
        crop = crop_of(seed, step, 24, 17)
        flips.add(crop[2])
        actual, wanted = augment_at(images, torch.tensor(crop)), augment(images, seed, step)
        assert torch.equal(actual, wanted)
        weights = torch.randn(wanted.shape, generator=torch.Generator().manual_seed(step))
        gradients = [
            torch.autograd.grad((shown * weights).sum(), images)[0] for shown in (actual, wanted)
        ]
        assert torch.equal(*gradients)
    assert flips == {0, 1}


def test_bfloat16_generator(seed: int) -> None:
    """Make the images in half precision; the points are float32, so recovery still works."""
    recovered = recover(
        make_api(seed),
        N_PER_CLASS,
        None,
        replace(CONFIG, generator_precision="bfloat16"),
        seed=seed,
    )
    full = recover(make_api(seed), N_PER_CLASS, None, CONFIG, seed=seed)
    assert recovered.images.dtype == torch.float32
    assert not torch.equal(recovered.images, full.images)
    torch.testing.assert_close(
        recovered.history[0]["loss"], full.history[0]["loss"], rtol=0.05, atol=0.05
    )
    with pytest.raises(
        InputError, match="generator_precision must be one of tf32, float32, bfloat16; got 'fp8'"
    ):
        RecoveryConfig(generator_precision="fp8")


def test_the_first_answers_are_checked_once_for_an_api(seed: int) -> None:
    class Wrong(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.mean((1, 2, 3))[:, None] / 255 + torch.tensor([0.0, 1.0, 2.0])

    api = TorchBlackBox(Wrong(), APISpec(N_CLASSES, SHAPE, name="dark"))
    with pytest.warns(ServiceWarning, match="dark: its scores hardly change"):
        make_recovery(api, CONFIG).run()
    with warnings.catch_warnings():
        warnings.simplefilter("error", ServiceWarning)
        make_recovery(api, CONFIG, seed=1).run()

    spec = APISpec(N_CLASSES, SHAPE, scores_kind="log_probabilities", name="scores")
    refused = make_recovery(TorchBlackBox(Wrong(), spec), CONFIG)
    with pytest.raises(
        BadAnswer, match="scores: its scores_kind is 'log_probabilities', so none may be above 0"
    ):
        refused.run()
    assert refused.done == 1  # no further step was paid for
