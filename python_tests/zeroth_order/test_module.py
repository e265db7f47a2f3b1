"""`as_differentiable`: scores forward, zeroth-order gradient backward."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import bidfmkd_fast as bf
from bidfmkd_fast.errors import InputError


def test_gradient_of_any_loss(seed: int) -> None:
    """With a linear box and many directions the gradient is the true one, whatever loss stands on top."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(8, 5, generator=generator)
    x = torch.randn(2, 8, generator=generator).requires_grad_()
    teacher = bf.as_differentiable(lambda images: images @ weight, num_directions=20000, mu=0.1, seed=seed)
    assert torch.equal(teacher(x), x @ weight)
    for loss in (lambda s: F.cross_entropy(s, torch.tensor([0, 3])), lambda s: s.square().sum(), lambda s: s[0, 1]):
        (estimate,) = torch.autograd.grad(loss(teacher(x)), x)
        (exact,) = torch.autograd.grad(loss(x @ weight), x)
        assert F.cosine_similarity(estimate.flatten(), exact.flatten(), dim=0) > 0.99


def test_queries_are_spent_only_when_wanted(seed: int) -> None:
    asked: list[int] = []

    def query(images: torch.Tensor) -> torch.Tensor:
        asked.append(len(images))
        return images.flatten(1)

    teacher = bf.as_differentiable(query, num_directions=6, mu=0.1, max_images=8, seed=seed)
    x = torch.randn(4, 1, 2, 2)
    teacher(x)
    assert asked == [4]
    asked.clear()
    teacher(x.requires_grad_()).sum().backward()
    assert asked == [4, 8, 8, 8]


def test_trains_a_generator_through_a_black_box(seed: int) -> None:
    """The drop-in use: a module in somebody's own training loop lowers the box's cross entropy."""
    torch.manual_seed(seed)
    secret = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    spec = bf.APISpec(n_classes=3, image_shape=(1, 4, 4))
    teacher = bf.as_differentiable(bf.TorchBlackBox(secret, spec), num_directions=20, mu=0.05, seed=seed)
    generator = nn.Sequential(nn.Linear(8, 16), nn.Sigmoid(), nn.Unflatten(1, (1, 4, 4)))
    optimizer = torch.optim.Adam(generator.parameters(), lr=0.05)
    latents, labels = torch.randn(12, 8), torch.arange(12) % 3
    before = None
    for _ in range(60):
        optimizer.zero_grad()
        loss = F.cross_entropy(teacher(generator(latents)), labels)
        before = float(loss.detach()) if before is None else before
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.8 * before


def test_bad_answer() -> None:
    with pytest.raises(InputError, match=r"query must answer \[N, n_classes\] with N = 2; got \[8\]"):
        bf.as_differentiable(lambda images: images.flatten())(torch.zeros(2, 4))
