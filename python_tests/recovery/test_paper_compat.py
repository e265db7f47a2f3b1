"""Check `paper_compat` against a rendering of the authors' recovery step in plain torch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from tolerances import TOLERANCES
from torch import Tensor, nn
from torch.nn import functional

from bidfmkd_fast.black_box import APISpec, Budget, FunctionBlackBox
from bidfmkd_fast.errors import InputError
from bidfmkd_fast.ops.directions import unit_directions
from bidfmkd_fast.recovery import RecoveryConfig, recover
from bidfmkd_fast.seeds import derive_seed, torch_generator

N_CLASSES, N_PER_CLASS = 3, 4
B = N_CLASSES * N_PER_CLASS
CONFIG = RecoveryConfig(
    steps=8,
    num_directions=7,
    mu=0.05,
    directions="sphere",
    latent_dim=8,
    learning_rate=0.05,
    boundary_weight=1.0,
    divergence="l1",
)


class Watched(nn.Module):
    """Generate images and record them and the gradient that comes back to them."""

    images: list[Tensor] = []  # noqa: RUF012
    gradients: list[Tensor] = []  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 64), nn.Sigmoid(), nn.Unflatten(1, (1, 8, 8)))

    def forward(self, latents: Tensor) -> Tensor:
        images = self.layers(latents)
        if images.requires_grad:
            self.images.append(images.detach().clone())
            images.register_hook(lambda gradient: self.gradients.append(gradient.clone()))
        return images


def linear(seed: int) -> nn.Linear:
    module = nn.Linear(64, N_CLASSES)
    nn.init.normal_(module.weight, 0, 0.7, generator=torch_generator(seed, "linear"))
    return module


def authors_estimate(
    api: nn.Module, student: nn.Module, x: Tensor, labels: Tensor, state: Tensor
) -> Tensor:
    """Estimate the gradient `[B, d]` in the authors' order.

    They draw 5 splits of q // 5 directions each, and divide by q.
    """
    q, mu, d, splits = CONFIG.num_directions, CONFIG.mu, 64, 5
    flat = x.flatten(1)
    student_logits = student(flat)

    def losses(points: Tensor) -> Tensor:
        logits = api(points)
        mask = (student_logits.max(1)[1] == logits.max(1)[1]).float()
        adversarial = -(functional.l1_loss(logits, student_logits, reduction="none").sum(1) * mask)
        return functional.cross_entropy(logits, labels, reduction="none") + adversarial

    directions = list(unit_directions(x.shape, state, q, "sphere"))
    estimate = torch.zeros(B, d)
    for split in range(splits):
        for k in range(split * (q // splits), (split + 1) * (q // splits)):
            u = directions[k].float().flatten(1)
            estimate += (d / q) * u * (losses(flat + mu * u) - losses(flat))[:, None] / mu
    return estimate


@torch.no_grad()
def test_gradients_and_choice_are_the_authors(seed: int) -> None:
    Watched.images.clear()
    Watched.gradients.clear()
    api, student = linear(seed), linear(seed + 1)
    box = FunctionBlackBox(lambda images: api(images.flatten(1)), APISpec(N_CLASSES, (1, 8, 8)))
    with torch.enable_grad():
        recovered = recover(
            box,
            N_PER_CLASS,
            lambda images: student(images.flatten(1)),
            CONFIG,
            generator=Watched(),
            seed=seed,
            paper_compat=True,
        )
    assert len(Watched.images) >= CONFIG.steps
    images = Watched.images[-CONFIG.steps :]  # a check of the generator may come before them
    # Every gradient is computed twice: by `torch.autograd.grad` for the surrogate, and by the
    # backward pass.
    gradients = Watched.gradients[-2 * CONFIG.steps :][1::2]
    labels = torch.arange(N_CLASSES).repeat_interleave(N_PER_CLASS)
    best_cost, best_inputs, costs = 1e6, None, []
    rtol, atol = TOLERANCES["float32"]
    for step, (x, gradient) in enumerate(zip(images, gradients, strict=True)):
        state = torch.tensor([derive_seed(seed, "recovery", "directions"), step])
        estimate = authors_estimate(api, student, x, labels, state)
        scale = float(estimate.abs().max()) / B
        # The estimate divides differences of losses by mu. Losses near 1 in float32 have an error
        # of 1e-7, which becomes 1e-7 / 0.05 before the sum over d.
        torch.testing.assert_close(
            gradient.flatten(1), estimate / B, rtol=100 * rtol, atol=100 * rtol * scale
        )
        cost = (x.flatten(1) * estimate).sum(-1).mean().item()
        costs.append(cost)
        if best_cost > cost:
            best_cost, best_inputs = cost, x
    assert best_inputs is not None
    torch.testing.assert_close(recovered.images, best_inputs, rtol=rtol, atol=atol)
    torch.testing.assert_close(recovered.scores, api(best_inputs.flatten(1)), rtol=rtol, atol=atol)
    # The settings say 7 directions; 5 are drawn.
    assert box.ledger.queries == CONFIG.steps * (1 + 5) * B


def test_without_the_switch_the_choice_is_by_the_loss(seed: int) -> None:
    api = linear(seed)
    box = FunctionBlackBox(lambda images: api(images.flatten(1)), APISpec(N_CLASSES, (1, 8, 8)))
    ours, theirs = (
        recover(box, N_PER_CLASS, None, CONFIG, generator=Watched(), seed=seed, paper_compat=compat)
        for compat in (False, True)
    )
    assert box.ledger.queries == CONFIG.steps * (1 + 7 + 1 + 5) * B
    assert ours.losses.mean() <= theirs.losses.mean()


def test_a_budget_that_ends_midway_keeps_the_choice_of_the_whole_steps(seed: int) -> None:
    api = linear(seed)

    def run(budget: Budget | None, steps: int) -> Tensor:
        box = FunctionBlackBox(
            lambda images: api(images.flatten(1)), APISpec(N_CLASSES, (1, 8, 8)), budget=budget
        )
        config = replace(CONFIG, steps=steps, num_directions=5)
        return recover(
            box, N_PER_CLASS, None, config, generator=Watched(), seed=seed, paper_compat=True
        ).images

    assert torch.equal(run(Budget(max_queries=3 * 6 * B + 5), 8), run(None, 3))


def test_too_few_directions_for_the_splits_are_refused_before_anything_is_asked() -> None:
    box = FunctionBlackBox(lambda images: images.flatten(1)[:, :3], APISpec(N_CLASSES, (1, 8, 8)))
    with pytest.raises(InputError, match="num_directions must be at least 5"):
        recover(box, 2, None, replace(CONFIG, num_directions=4), paper_compat=True)
    assert box.ledger.queries == 0
