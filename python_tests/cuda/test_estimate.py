"""Test `estimate` and `as_differentiable` on a CUDA device against the CPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import bidfmkd_fast as bf


def losses_of(images: Tensor) -> Tensor:
    assert images.dtype == torch.float32 and not torch.is_autocast_enabled("cuda")
    return images.flatten(1).sin().sum(1)


@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("kind", ["rademacher", "sphere"])
def test_the_estimate_is_that_of_the_cpu(
    antithetic: bool, kind: str, device: torch.device, seed: int
) -> None:
    x = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    found = []
    for where in (torch.device("cpu"), device):
        zo = bf.ZerothOrder(12, 0.05, kind, seed=seed, antithetic=antithetic)
        images = x.to(where).requires_grad_()
        loss = zo.estimate(losses_of, images, max_images=17)
        loss.backward()
        assert zo.gradient.device.type == where.type
        found.append((loss.cpu(), images.grad.cpu()))
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)


def test_a_half_precision_generator(device: torch.device, seed: int) -> None:
    torch.manual_seed(seed)
    generator = torch.nn.Linear(6, 3 * 8 * 8).to(device)
    zo = bf.ZerothOrder(12, 0.05, seed=seed)
    with torch.autocast("cuda", torch.bfloat16):
        images = generator(torch.randn(5, 6, device=device)).view(-1, 3, 8, 8)
        assert images.dtype == torch.bfloat16
        zo.estimate(losses_of, images).backward()
    assert generator.weight.grad.isfinite().all() and generator.weight.grad.any()


def test_the_module(device: torch.device, seed: int) -> None:
    x = torch.randn(5, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    found = []
    for where in (torch.device("cpu"), device):
        images = x.to(where).requires_grad_()
        teacher = bf.as_differentiable(
            lambda points: points.flatten(1)[:, :7].sin(), 12, 0.05, seed=seed, antithetic=True
        )
        torch.func.vmap(teacher)(images[None]).square().sum().backward()
        found.append(images.grad.cpu())
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)
