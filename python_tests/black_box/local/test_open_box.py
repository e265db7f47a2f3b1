"""Check that an open box gives true gradients, and is paid and counted as a black box."""

from __future__ import annotations

import pytest
import torch
from tolerances import TOLERANCES
from torch import nn
from torch.nn import functional

from bidfmkd_fast.black_box import APISpec, Budget, OpenBox
from bidfmkd_fast.errors import BudgetExhausted, InputError
from bidfmkd_fast.recovery import RecoveryConfig, recover

SPEC = APISpec(3, (1, 8, 8), name="open")


def module(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.BatchNorm1d(6), nn.Linear(6, 3))


def test_scores_and_gradients_are_the_modules_own_and_calls_are_counted(seed: int) -> None:
    inside = module(seed)
    box = OpenBox(inside, SPEC)
    images = torch.rand(5, 1, 8, 8, requires_grad=True)
    (gradient,) = torch.autograd.grad(
        functional.cross_entropy(box(images), torch.tensor([0, 1, 2, 0, 1])), images
    )
    inside.eval()
    (wanted,) = torch.autograd.grad(
        functional.cross_entropy(inside(images), torch.tensor([0, 1, 2, 0, 1])), images
    )
    assert torch.equal(gradient, wanted)
    assert (box.ledger.queries, box.ledger.requests) == (5, 1)
    assert box.ledger.answered_queries == 5
    box.budget = Budget(max_queries=4)
    with pytest.raises(BudgetExhausted):
        box(images)
    with pytest.raises(InputError, match="must be"):
        box(torch.rand(2, 3, 8, 8))


def test_recovery_descends_the_true_gradient(seed: int) -> None:
    """Compare the first gradient, and the final loss with that of estimates in as many steps."""
    box = OpenBox(module(seed), SPEC)
    config = RecoveryConfig(steps=30, num_directions=2, generator_width=4, latent_dim=8)
    student_module = module(seed + 1).eval()
    for student in (None, lambda images: student_module(images)):
        before = box.ledger.queries
        opened = recover(box, 4, student, config, seed=seed)
        assert box.ledger.queries - before == 30 * 12  # one query an image and step
        assert opened.history[-1]["loss"] < opened.history[0]["loss"]
        assert not opened.images.requires_grad and not opened.scores.requires_grad
        rtol, atol = TOLERANCES["float32"]
        torch.testing.assert_close(box(opened.images), opened.scores, rtol=rtol, atol=atol)


def test_no_step_length_is_measured_where_no_step_is_taken(seed: int) -> None:
    config = RecoveryConfig(steps=2, mu="auto", generator_width=4, latent_dim=8)
    box = OpenBox(module(seed), SPEC)
    box.budget = Budget(max_queries=2 * 12)
    recovered = recover(box, 4, None, config, seed=seed)
    assert recovered.complete
    assert recovered.mu is None
    assert box.ledger.queries == 2 * 12


def test_scores_of_a_top_k_api_are_all_probabilities(seed: int) -> None:
    inside = nn.Sequential(module(seed), nn.Softmax(1)).eval()
    box = OpenBox(inside, APISpec(3, (1, 8, 8), scores_kind="top_k", top_k=2, decimals=2))
    images = torch.rand(4, 1, 8, 8)
    assert torch.equal(box(images), inside(images))
    recovered = recover(
        box, 2, None, RecoveryConfig(steps=2, generator_width=4, latent_dim=8), seed=seed
    )
    wanted = functional.nll_loss(
        recovered.scores.double().log(), recovered.labels, reduction="none"
    ).float()
    rtol, atol = TOLERANCES["float32"]
    torch.testing.assert_close(recovered.losses, wanted, rtol=rtol, atol=atol)


def test_the_generator_gets_the_gradient_of_the_mean_objective(seed: int) -> None:
    seen: list[torch.Tensor] = []

    class Generator(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(8, 64), nn.Sigmoid(), nn.Unflatten(1, (1, 8, 8)))

        def forward(self, latents: torch.Tensor) -> torch.Tensor:
            images = self.layers(latents)
            if images.requires_grad:
                images.register_hook(lambda gradient: seen.extend([images.detach(), gradient]))
            return images

    inside = module(seed).eval()
    recover(
        OpenBox(inside, SPEC),
        4,
        None,
        RecoveryConfig(steps=1, latent_dim=8),
        generator=Generator(),
        seed=seed,
    )
    images, gradient = seen[-2].clone().requires_grad_(), seen[-1]
    loss = functional.cross_entropy(inside(images).double(), torch.arange(3).repeat_interleave(4))
    rtol, atol = TOLERANCES["float32"]
    torch.testing.assert_close(gradient, torch.autograd.grad(loss, images)[0], rtol=rtol, atol=atol)
