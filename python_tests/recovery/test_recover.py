"""Check `recover`: the best images, the seed, the budget, generators of the user, and errors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from tolerances import TOLERANCES
from torch import nn

from bidfmkd_fast.black_box import APISpec, Budget, FunctionBlackBox, TorchBlackBox
from bidfmkd_fast.errors import BadAnswer, BudgetExhausted, InputError, InputTypeError
from bidfmkd_fast.recovery import RecoveryConfig, recover
from bidfmkd_fast.seeds import seeded, torch_generator

N_CLASSES, N_PER_CLASS = 3, 4
N_IMAGES = N_CLASSES * N_PER_CLASS
RTOL, ATOL = TOLERANCES["float32"]
SMALL = RecoveryConfig(
    steps=6, num_directions=4, latent_dim=8, generator_width=4, learning_rate=0.05
)


def linear(seed: int, scale: float = 8.0) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return a linear classifier of 8x8 images.

    Its answer for an image is the same bit for bit in any batch.
    """
    weight = (
        scale
        * torch.randn(N_CLASSES, 64, generator=torch_generator(seed, "linear"), dtype=torch.float64)
        / 8
    )
    return lambda images: (images.flatten(1).double()[:, None] * weight).sum(-1).float()


class Recorder(FunctionBlackBox):
    """Record what is asked and answered."""

    def __init__(
        self,
        function: Callable[[torch.Tensor], torch.Tensor],
        budget: Budget | None = None,
        **spec: Any,
    ):
        super().__init__(function, APISpec(N_CLASSES, (1, 8, 8), **spec), budget=budget)
        self.asked: list[torch.Tensor] = []
        self.answered: list[torch.Tensor] = []

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        scores = super().__call__(images)
        self.asked.append(images.clone())
        self.answered.append(scores.clone())
        return scores

    def at_the_images(self, num_directions: int) -> tuple[np.ndarray, np.ndarray]:
        """Return row 0 of every step's points, and its scores.

        They are `[steps, B, 1, 8, 8]` and `[steps, B, n_classes]`.
        """
        per_step = (1 + num_directions) * N_IMAGES
        asked, answered = (
            torch.cat(self.asked).split(per_step),
            torch.cat(self.answered).split(per_step),
        )
        return (
            torch.stack([a[:N_IMAGES] for a in asked]).numpy(),
            torch.stack([a[:N_IMAGES] for a in answered]).numpy().astype(np.float64),
        )


def cross_entropy(scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    log_p = scores - np.log(np.exp(scores - scores.max(-1, keepdims=True)).sum(-1, keepdims=True))
    log_p -= scores.max(-1, keepdims=True)
    return -np.take_along_axis(
        log_p, np.broadcast_to(labels[..., None], (*scores.shape[:-1], 1)), -1
    )[..., 0]


def masked_distance(scores: np.ndarray, student: np.ndarray) -> np.ndarray:
    """Compute `[argmax equal] * |p - p_student|_1`."""
    p, q = (np.exp(s) / np.exp(s).sum(-1, keepdims=True) for s in (scores, student))
    return (scores.argmax(-1) == student.argmax(-1)) * np.abs(p - q).sum(-1)


@pytest.mark.parametrize("boundary_weight", [None, 0.8])
def test_every_slot_keeps_its_best_image_by_the_true_loss(
    boundary_weight: float | None, seed: int
) -> None:
    api, student = Recorder(linear(seed)), linear(seed + 1)
    config = RecoveryConfig(
        **{**vars(SMALL), "steps": 12, "boundary_weight": boundary_weight or 0.0}
    )
    recovered = recover(
        api, N_PER_CLASS, None if boundary_weight is None else student, config, seed=seed
    )

    images, scores = api.at_the_images(config.num_directions)
    labels = np.repeat(np.arange(N_CLASSES), N_PER_CLASS)
    losses = cross_entropy(scores, labels)  # [steps, B]
    if boundary_weight is not None:
        at = student(torch.from_numpy(images).flatten(0, 1)).double().numpy().reshape(scores.shape)
        losses -= boundary_weight * masked_distance(scores, at)
    best, slots = losses.argmin(0), np.arange(N_IMAGES)
    assert len(set(best)) > 1, "the best step must differ between slots, or this test shows nothing"
    np.testing.assert_array_equal(recovered.images.numpy(), images[best, slots])
    np.testing.assert_array_equal(recovered.scores.numpy(), scores[best, slots].astype(np.float32))
    np.testing.assert_allclose(recovered.losses.numpy(), losses.min(0), rtol=RTOL, atol=ATOL)
    np.testing.assert_array_equal(recovered.labels.numpy(), labels)
    assert recovered.labels.dtype == torch.int64
    assert recovered.complete
    assert api.ledger.queries == 12 * 5 * N_IMAGES, "no query beyond the steps"
    # The scores are the API's answer for exactly these images.
    assert torch.equal(api(recovered.images), recovered.scores)


def test_the_history_is_what_happened(seed: int) -> None:
    api, seen = Recorder(linear(seed)), []
    recovered = recover(api, N_PER_CLASS, config=SMALL, seed=seed, callback=seen.append)
    assert seen == recovered.history
    _, scores = api.at_the_images(SMALL.num_directions)
    labels = np.repeat(np.arange(N_CLASSES), N_PER_CLASS)
    losses = cross_entropy(scores, labels)
    assert [record["step"] for record in seen] == list(range(6))
    assert [record["queries"] for record in seen] == [60 * (step + 1) for step in range(6)]
    np.testing.assert_allclose(
        [record["loss"] for record in seen], losses.mean(1), rtol=RTOL, atol=ATOL
    )
    running_best = np.minimum.accumulate(losses).mean(1)
    np.testing.assert_allclose(
        [record["best_loss"] for record in seen], running_best, rtol=RTOL, atol=ATOL
    )
    np.testing.assert_allclose(
        [r["matched"] for r in seen], (scores.argmax(-1) == labels).mean(1), rtol=RTOL, atol=ATOL
    )


@pytest.mark.parametrize("directions", ["rademacher", "sphere", "lowres"])
def test_the_result_is_a_pure_function_of_the_seed(directions: str, seed: int) -> None:
    def run(run_seed: int, max_images: int) -> Any:
        grid = 3 if directions == "lowres" else 0
        settings = {
            **vars(SMALL),
            "directions": directions,
            "grid": grid,
            "augment": True,
            "max_images": max_images,
        }
        api = FunctionBlackBox(linear(seed), APISpec(N_CLASSES, (1, 8, 8)))
        torch.rand(max_images % 5)  # the state of the global generator must not matter
        before = torch.random.get_rng_state()
        recovered = recover(
            api, N_PER_CLASS, linear(seed + 1), RecoveryConfig(**settings), seed=run_seed
        )
        assert torch.equal(before, torch.random.get_rng_state())
        return recovered, api.ledger

    first, ledger = run(seed, 4096)
    assert (ledger.queries, ledger.requests) == (6 * 60, 6)
    # The 5 rows of 12 images are asked together, row by row (also if a row alone is too large), as
    # two, two and one rows, and as three and two.
    for max_images, requests in ((4096, 1), (1, 5), (12, 5), (29, 3), (36, 2)):
        again, ledger = run(seed, max_images)
        assert (ledger.queries, ledger.requests) == (6 * 60, 6 * requests)
        assert torch.equal(first.images, again.images)
        assert torch.equal(first.scores, again.scores)
        assert torch.equal(first.losses, again.losses)
        assert first.history == again.history
    other, _ = run(seed + 1, 4096)
    assert not torch.equal(first.images, other.images)


@pytest.mark.parametrize(
    "generator", [None, nn.Sequential(nn.Sigmoid(), nn.Unflatten(1, (1, 8, 8)))]
)
def test_two_sets_share_neither_images_nor_directions(
    generator: nn.Module | None, seed: int
) -> None:
    """Compare two seeds.

    A generator without parameters makes images that come from the latents alone.
    """
    latent_dim = 64 if generator else 8
    signs, starts = [], []
    for run_seed in (seed, seed + 1):
        api = Recorder(linear(seed))
        config = RecoveryConfig(**{**vars(SMALL), "steps": 2, "latent_dim": latent_dim})
        recover(api, N_PER_CLASS, config=config, generator=generator, seed=run_seed)
        points = torch.cat(api.asked).view(2, 5, N_IMAGES, -1)
        starts.append(points[0, 0])
        signs += [(points[step, 1:] - points[step, :1]).sign().flatten() for step in (0, 1)]
    assert not torch.isclose(starts[0], starts[1]).all(1).any()
    for i, ours in enumerate(signs):
        for theirs in signs[:i]:
            # On average half of 3072 fair signs agree; six standard deviations are allowed.
            assert abs((ours == theirs).double().mean() - 0.5) < 6 * 0.5 / math.sqrt(ours.numel())


class Still(nn.Module):
    """Generate the same image whatever the latents are."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Parameter(
            torch.linspace(0.1, 0.9, 64).view(1, 1, 8, 8), requires_grad=False
        )

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        return self.image + 0 * latents.sum(1).view(-1, 1, 1, 1)


def test_the_augmentation_is_drawn_anew_every_step(seed: int) -> None:
    kinds = {}
    for augment in (False, True):
        api = Recorder(linear(seed))
        config = RecoveryConfig(**{**vars(SMALL), "steps": 30, "augment": augment})
        recover(api, N_PER_CLASS, config=config, generator=Still(), seed=seed)
        images, _ = api.at_the_images(SMALL.num_directions)
        kinds[augment] = len(np.unique(images[:, 0].reshape(30, -1), axis=0))
        assert (images == images[:, :1]).all(), "one draw for the whole batch"
    # There are 18 crops with flips. That 30 fair draws give fewer than 6 of them has a probability
    # below 1e-10.
    assert kinds[False] == 1, kinds
    assert kinds[True] >= 6, kinds


@pytest.mark.parametrize("augment", [False, True])
def test_no_steps_is_the_control(augment: bool, seed: int) -> None:
    settings = {**vars(SMALL), "augment": augment}
    api, student = Recorder(linear(seed)), linear(seed + 1)
    control = recover(
        api, N_PER_CLASS, student, RecoveryConfig(**{**settings, "steps": 0}), seed=seed
    )
    assert (api.ledger.queries, api.ledger.requests) == (N_IMAGES, 1)
    assert control.complete
    assert control.history == []
    assert not control.images.requires_grad
    assert torch.equal(api(control.images), control.scores)
    # A recovery of one step returns the images that it started from. They are the control's.
    found = recover(
        Recorder(linear(seed)),
        N_PER_CLASS,
        student,
        RecoveryConfig(**{**settings, "steps": 1}),
        seed=seed,
    )
    assert torch.equal(found.images, control.images)
    torch.testing.assert_close(found.losses, control.losses, rtol=RTOL, atol=ATOL)


def test_the_boundary_term_drives_api_and_student_apart(seed: int) -> None:
    gains = []
    for pair in range(10):
        api, student = linear(seed + pair, scale=3.0), linear(seed + pair + 100, scale=3.0)
        apart = []
        for weight in (0.0, 3.0):
            settings = {**vars(SMALL), "steps": 40, "num_directions": 8, "boundary_weight": weight}
            box = FunctionBlackBox(api, APISpec(N_CLASSES, (1, 8, 8)))
            recovered = recover(
                box, N_PER_CLASS, student, RecoveryConfig(**settings), seed=seed + pair
            )
            answers = student(recovered.images).double().numpy()
            apart.append(masked_distance(recovered.scores.double().numpy(), answers).mean())
        gains.append(apart[1] - apart[0])
    # Over 200 seeds the gain of a pair was 0.42 with a standard deviation of 0.21, so the mean of
    # ten pairs is 0.42 +- 0.07.
    assert np.mean(gains) > 0.1, gains


@pytest.mark.parametrize("scores_kind", ["probabilities", "log_probabilities"])
def test_the_student_meets_the_api_in_its_kind_of_scores(scores_kind: str, seed: int) -> None:
    convert = torch.softmax if scores_kind == "probabilities" else torch.log_softmax
    small = 8.0 / 4  # keeps probabilities away from the floor of 1e-7
    logits = Recorder(linear(seed, small))
    other = Recorder(
        lambda images: convert(linear(seed, small)(images), 1), scores_kind=scores_kind
    )
    config = RecoveryConfig(**{**vars(SMALL), "steps": 1, "boundary_weight": 3.0})
    wanted = recover(logits, N_PER_CLASS, linear(seed + 1, small), config, seed=seed)
    came = recover(other, N_PER_CLASS, linear(seed + 1, small), config, seed=seed)
    # Both begin with the same images. From the second step on rounding would make them differ.
    np.testing.assert_allclose(
        came.history[0]["loss"], wanted.history[0]["loss"], rtol=RTOL, atol=ATOL
    )
    torch.testing.assert_close(came.losses, wanted.losses, rtol=RTOL, atol=ATOL)


def test_probabilities_rounded_to_zero_do_no_harm(seed: int) -> None:
    api = FunctionBlackBox(
        lambda images: linear(seed, scale=100.0)(images).softmax(1).round(decimals=2),
        APISpec(N_CLASSES, (1, 8, 8), scores_kind="probabilities"),
    )
    recovered = recover(api, N_PER_CLASS, config=SMALL, seed=seed)
    assert (recovered.scores == 0).any(), "the API must have rounded to 0"
    assert recovered.losses.isfinite().all()
    assert recovered.images.isfinite().all()


def test_images_live_in_the_input_range_of_the_api(seed: int) -> None:
    unit = recover(
        Recorder(linear(seed)),
        N_PER_CLASS,
        config=RecoveryConfig(**{**vars(SMALL), "steps": 0}),
        seed=seed,
    )
    wide_api = Recorder(linear(seed), input_range=(-3.0, 5.0))
    wide = recover(
        wide_api, N_PER_CLASS, config=RecoveryConfig(**{**vars(SMALL), "steps": 0}), seed=seed
    )
    torch.testing.assert_close(wide.images, unit.images * 8 - 3, rtol=RTOL, atol=ATOL)
    recovered = recover(wide_api, N_PER_CLASS, config=SMALL, seed=seed)
    assert -3 <= recovered.images.min() < 0
    assert 1 < recovered.images.max() <= 5
    # mu is a length in this range: a Rademacher direction moves each of the 64 pixels by mu / 8.
    points = torch.cat(wide_api.asked[1:])[: 5 * N_IMAGES].view(5, N_IMAGES, -1)
    moved = (points[1:] - points[:1]).norm(dim=-1)
    torch.testing.assert_close(moved, torch.full_like(moved, SMALL.mu), rtol=1e-3, atol=0)


# --- the budget


@pytest.mark.parametrize(
    ("steps", "budget"),
    [
        (6, Budget(max_queries=59)),
        (6, Budget(max_requests=2)),
        (0, Budget(max_queries=11)),
        (0, Budget(max_requests=0)),
    ],
)
def test_a_budget_below_one_step_is_refused_before_any_query(
    steps: int, budget: Budget, seed: int
) -> None:
    api = FunctionBlackBox(linear(seed), APISpec(N_CLASSES, (1, 8, 8)), budget=budget)
    with pytest.raises(
        BudgetExhausted, match=r"recover: one step asks api (60|12) queries in (3|1) requests"
    ):
        recover(
            api,
            N_PER_CLASS,
            config=RecoveryConfig(**{**vars(SMALL), "steps": steps, "max_images": 24}),
            seed=seed,
        )
    assert api.ledger.queries == api.ledger.requests == budget.queries == budget.requests == 0


@pytest.mark.parametrize(
    ("budget", "max_images"),
    [
        (Budget(max_queries=199), 4096),
        (Budget(max_requests=3), 4096),
        # The fourth step lacks one query, in the last of its five requests.
        (Budget(max_queries=239), 12),
        (Budget(max_requests=19), 12),
    ],
)
def test_a_budget_that_ends_midway_loses_nothing(
    budget: Budget, max_images: int, seed: int
) -> None:
    api = FunctionBlackBox(linear(seed), APISpec(N_CLASSES, (1, 8, 8)), budget=budget)
    short = recover(
        api,
        N_PER_CLASS,
        config=RecoveryConfig(**{**vars(SMALL), "max_images": max_images}),
        seed=seed,
    )
    three = RecoveryConfig(**{**vars(SMALL), "steps": 3})
    whole = recover(FunctionBlackBox(linear(seed), api.spec), N_PER_CLASS, config=three, seed=seed)
    assert not short.complete
    assert whole.complete
    assert short.history == whole.history
    assert api.ledger.queries == 3 * 60
    assert torch.equal(short.images, whole.images)
    assert torch.equal(short.scores, whole.scores)


def test_exactly_the_budget_is_enough(seed: int) -> None:
    budget = Budget(max_queries=6 * 60, max_requests=6)
    api = FunctionBlackBox(linear(seed), APISpec(N_CLASSES, (1, 8, 8)), budget=budget)
    assert recover(api, N_PER_CLASS, config=SMALL, seed=seed).complete
    assert budget.remaining_queries == 0


@pytest.mark.parametrize("calls_before", [1, 3, 7])
def test_a_shared_budget_spent_by_another_in_the_middle_of_a_step(
    calls_before: int, seed: int
) -> None:
    """Spend the rest of the budget elsewhere during call number `calls_before`.

    Each of the 5 rows of a step is asked in a call of its own.
    """
    budget = Budget(max_queries=10_000)
    calls = 0

    def answer(images: torch.Tensor) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == calls_before:
            budget.reserve(budget.remaining_queries or 0)
        return linear(seed)(images)

    api = Recorder(answer, budget)
    config = RecoveryConfig(**{**vars(SMALL), "max_images": 1})
    recovered = recover(api, N_PER_CLASS, config=config, seed=seed)
    assert not recovered.complete
    assert len(recovered.history) == calls_before // 5
    # Row 0 of each step, also of the step that was cut off.
    asked = [api.asked[row] for row in range(0, calls_before, 5)]
    scores = np.stack([api.answered[row].double().numpy() for row in range(0, calls_before, 5)])
    best = cross_entropy(scores, np.repeat(np.arange(N_CLASSES), N_PER_CLASS)).argmin(0)
    wanted = torch.stack(asked)[best, torch.arange(N_IMAGES)]
    assert torch.equal(recovered.images, wanted)


def test_a_bad_answer_is_raised_to_the_caller(seed: int) -> None:
    api = FunctionBlackBox(
        lambda images: images.flatten(1)[:, :N_CLASSES] * torch.nan, APISpec(N_CLASSES, (1, 8, 8))
    )
    with pytest.raises(BadAnswer):
        recover(api, N_PER_CLASS, config=SMALL, seed=seed)


# --- a trained black box


def stripes_and_blobs(n_per_class: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw noisy 16x16 images of three kinds: horizontal stripes, vertical stripes, a blob."""
    draws = torch_generator(seed, "data")
    row = torch.arange(16.0)
    wave = 0.5 + 0.5 * torch.sin(row)
    blob = torch.exp(-((row[:, None] - 8) ** 2 + (row[None] - 8) ** 2) / 16)
    kinds = torch.stack([wave[:, None].expand(16, 16), wave[None].expand(16, 16), blob])
    labels = torch.arange(3).repeat_interleave(n_per_class)
    noise = 0.2 * torch.randn(len(labels), 1, 16, 16, generator=draws)
    return (kinds[labels][:, None] + noise).clamp(0, 1), labels


def test_recovery_from_a_trained_network_beats_the_control_clearly(seed: int) -> None:
    images, labels = stripes_and_blobs(30, seed)
    with seeded(seed, "network"):
        network = nn.Sequential(
            nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(8, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(256, 3),
        )  # fmt: skip
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    for _ in range(25):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(images), labels).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    network.eval()
    assert (network(images).argmax(1) == labels).float().mean() > 0.9
    api = TorchBlackBox(network, APISpec(3, (1, 16, 16)))
    settings = {"num_directions": 8, "latent_dim": 32, "generator_width": 8, "mu": 0.05}
    entropies = {}
    for steps in (0, 60):
        recovered = recover(api, 5, config=RecoveryConfig(steps=steps, **settings), seed=seed)
        with torch.no_grad():  # the network itself answers, without the black box
            logits = network(recovered.images).double().numpy()
        entropies[steps] = cross_entropy(logits, recovered.labels.numpy()).mean()
    assert entropies[60] < 0.4 * entropies[0], entropies
    assert recovered.history[-1]["matched"] > 0.8, recovered.history[-1]


# --- a generator of the user's


class Noisy(nn.Module):
    """Combine a layer that draws random numbers, a frozen layer and trained layers."""

    def __init__(self, latent_dim: int = 8) -> None:
        super().__init__()
        self.first = nn.Linear(latent_dim, 32)
        self.frozen = nn.Linear(32, 32).requires_grad_(False)
        self.last = nn.Linear(32, 64)
        self.dropout = nn.Dropout(0.2)

    def forward(self, latents: torch.Tensor) -> torch.Tensor:
        assert self.training, "batch norms must use batch statistics and dropout must drop"
        hidden = self.dropout(self.frozen(self.first(latents).relu()).relu())
        return self.last(hidden).sigmoid().view(-1, 1, 8, 8)


def test_a_generator_of_ones_own(seed: int) -> None:
    results = []
    for start in (seed, seed + 1):
        with seeded(start, "noisy"):
            generator = Noisy().eval()
        before = {name: value.clone() for name, value in generator.state_dict().items()}
        api = FunctionBlackBox(linear(seed), APISpec(N_CLASSES, (1, 8, 8)))
        settings = RecoveryConfig(**{**vars(SMALL), "steps": 40, "num_directions": 16})
        torch.rand(start % 7)
        results.append(recover(api, N_PER_CLASS, config=settings, generator=generator, seed=seed))
        assert all(
            torch.equal(value, before[name]) for name, value in generator.state_dict().items()
        )
        assert not generator.training
        assert all(p.grad is None for p in generator.parameters())
    # The generator is initialised anew under the seed, so its own parameters do not matter.
    assert torch.equal(results[0].images, results[1].images)
    assert results[0].history[-1]["best_loss"] < 0.6 * results[0].history[0]["loss"]


class Fixed(nn.Module):
    """Return the same object whatever the latents are."""

    def __init__(self, answer: object) -> None:
        super().__init__()
        self.answer = answer

    def forward(self, latents: torch.Tensor) -> object:
        return self.answer


@pytest.mark.parametrize(
    ("generator", "message"),
    [
        (
            Fixed(torch.zeros(N_IMAGES, 3, 8, 8)),
            r"must make float32 images \[12, 1, 8, 8\].*; got .* \[12, 3, 8, 8\]",
        ),
        (Fixed(torch.zeros(N_IMAGES, 1, 8, 8).double()), "got torch.float64"),
        (Fixed("images"), "got str"),
        (Fixed(torch.full((N_IMAGES, 1, 8, 8), -0.5)), r"images in \[0, 1\]; got -0.5"),
        (Fixed(torch.full((N_IMAGES, 1, 8, 8), 0.5)), "generator must be differentiable"),
        (Fixed(torch.full((N_IMAGES, 1, 8, 8), torch.nan)), r"images in \[0, 1\]; got nan"),
    ],
)
@pytest.mark.parametrize("steps", [0, 2])
def test_a_generator_that_makes_no_images(generator: nn.Module, message: str, steps: int) -> None:
    api = FunctionBlackBox(linear(0), APISpec(N_CLASSES, (1, 8, 8)))
    with pytest.raises(InputError, match=message):
        recover(
            api,
            N_PER_CLASS,
            config=RecoveryConfig(**{**vars(SMALL), "steps": steps}),
            generator=generator,
        )
    assert api.ledger.requests == 0


# --- bad input


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"api": linear(0)},
            InputTypeError,
            "recover: api must be a black box such as TorchBlackBox; got function",
        ),
        ({"n_per_class": 0}, InputError, "recover: n_per_class must be at least 1; got 0"),
        ({"n_per_class": 2.0}, InputTypeError, "recover: n_per_class must be an integer; got 2.0"),
        (
            {"config": {"steps": 3}},
            InputTypeError,
            "recover: config must be a RecoveryConfig; got dict",
        ),
        ({"student": 3}, InputTypeError, "recover: student must be callable on images; got int"),
        (
            {"generator": linear(0)},
            InputTypeError,
            "recover: generator must be a torch.nn.Module; got function",
        ),
        ({"student": lambda x: x}, InputError, "recover: student must return logits"),
    ],
)
def test_bad_arguments_cost_no_query(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    api = FunctionBlackBox(linear(0), APISpec(N_CLASSES, (1, 8, 8)))
    with pytest.raises(error, match=message):
        recover(**{"api": api, "n_per_class": N_PER_CLASS, "config": SMALL, **arguments})
    assert api.ledger.requests == 0


def test_image_shapes_the_built_in_generator_cannot_make() -> None:
    api = FunctionBlackBox(linear(0), APISpec(N_CLASSES, (1, 10, 10)))
    with pytest.raises(
        InputError, match=r"Generator: image_shape .* give `recover` a generator module of your own"
    ):
        recover(api, N_PER_CLASS)
    assert api.ledger.requests == 0


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"steps": -1}, InputError, "steps must be at least 0; got -1"),
        ({"steps": True}, InputTypeError, "steps must be of type int; got True"),
        ({"num_directions": 0}, InputError, "num_directions must be at least 1"),
        ({"num_directions": 2.5}, InputTypeError, "num_directions must be of type int"),
        ({"latent_dim": 0}, InputError, "latent_dim must be at least 1"),
        ({"generator_width": 0}, InputError, "generator_width must be at least 1"),
        ({"generator_width": 10**6}, InputError, "generator_width must be at most 4,096"),
        ({"max_images": 0}, InputError, "max_images must be at least 1"),
        ({"mu": 0.0}, InputError, "mu must be finite and above 0; got 0.0"),
        ({"mu": math.nan}, InputError, "mu must be finite and above 0; got nan"),
        ({"mu": "long"}, InputTypeError, "mu must be a number or 'auto'; got 'long'"),
        ({"learning_rate": math.inf}, InputError, "learning_rate must be finite and above 0"),
        (
            {"boundary_weight": -0.1},
            InputError,
            "boundary_weight must be finite and at least 0; got -0.1",
        ),
        (
            {"directions": "normal"},
            InputError,
            "directions must be one of rademacher, .*; got 'normal'",
        ),
        ({"divergence": "l2"}, InputError, "divergence must be one of l1, .*; got 'l2'"),
        ({"directions": "lowres"}, InputError, "grid must be at least 1 with directions='lowres'"),
        (
            {"grid": 4},
            InputError,
            "grid must be at least 1 .* got grid=4 with directions='rademacher'",
        ),
        ({"betas": (0.5,)}, InputError, "betas must be two numbers"),
        ({"betas": (0.5, 1.0)}, InputError, "betas must be two numbers"),
        ({"betas": 0.9}, InputTypeError, r"betas must be of type tuple\[float, float\]"),
        ({"betas": ("a", 0.9)}, InputTypeError, "betas must be of type tuple"),
        ({"augment": 1}, InputTypeError, "augment must be of type bool; got 1"),
    ],
)
def test_bad_settings(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"RecoveryConfig: {message}"):
        RecoveryConfig(**settings)


def test_an_api_of_labels_is_refused_before_it_is_asked(seed: int) -> None:
    labels = Recorder(
        lambda images: linear(seed)(images).argmax(1), name="tags", scores_kind="labels"
    )
    with pytest.raises(
        InputError, match="recover: tags gives labels only, and a label alone gives"
    ):
        recover(labels, N_PER_CLASS, None, SMALL)
    assert labels.ledger.queries == 0
