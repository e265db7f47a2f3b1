"""ask, tell, tell_scores, ask_chunks."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tolerances import TOLERANCES
from torch import Tensor

import bidfmkd_fast as bf
from bidfmkd_fast.errors import InputError

KINDS = [("rademacher", 0), ("sphere", 0), ("gaussian", 0), ("lowres", 2)]
RTOL, ATOL = TOLERANCES["kernel"]


def leaf(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


@pytest.mark.parametrize(("kind", "grid"), KINDS)
def test_truth(kind: str, grid: int, seed: int) -> None:
    """On a linear function, d = 8, q = 20000: cosine above 0.99, length within 5 %, through ask and tell alone."""
    x, slope = leaf(1, 2, 2, 2, seed=seed), leaf(2, 2, 2, seed=seed + 1).detach()
    zo = bf.ZerothOrder(20000, 0.1, kind, grid, seed)
    loss = zo.tell((zo.ask(x).double() * slope).flatten(2).sum(-1).float())
    loss.backward()
    assert F.cosine_similarity(x.grad.flatten(), slope.flatten(), dim=0) > 0.99
    assert abs(x.grad.norm() / slope.norm() - 1) < 0.05


def test_the_estimate_flows_into_the_graph(seed: int) -> None:
    """loss is mean(losses[0]); its gradient in x is estimate / B, times whatever came from above."""
    weight, q, b = leaf(3, 3, seed=seed), 6, 4
    inputs = leaf(b, 3, seed=seed + 1)
    x = inputs @ weight
    zo = bf.ZerothOrder(q, 0.2, seed=seed)
    points = zo.ask(x)
    assert torch.equal(points[0], x)
    assert not points.requires_grad
    losses = points.square().sum(-1)
    loss = zo.tell(losses)
    torch.testing.assert_close(loss, losses[0].mean())
    torch.testing.assert_close(zo.last_loss, losses[0])
    (3 * loss).backward()
    estimate = bf.ops.estimate_gradient(losses[1:] - losses[:1], torch.tensor([seed, 0]), (b, 3), 0.2)
    torch.testing.assert_close(weight.grad, 3 * inputs.detach().T @ (estimate / b))


@pytest.mark.parametrize(("kind", "grid"), KINDS)
def test_chunks_are_the_whole(kind: str, grid: int, seed: int) -> None:
    x = leaf(5, 3, 8, 8, seed=seed)
    for max_images in (1, 7, 5 * 13, 10**6):
        whole, parts = bf.ZerothOrder(70, 0.1, kind, grid, seed), bf.ZerothOrder(70, 0.1, kind, grid, seed)
        for _ in range(2):
            chunks = list(parts.ask_chunks(x, max_images))  # all kept: none may overwrite another
            assert max(len(chunk) for chunk in chunks) == max(1, min(71, max_images // 5))
            assert torch.equal(torch.cat(chunks), whole.ask(x))


def test_every_ask_draws_anew_and_a_seed_repeats(seed: int) -> None:
    x = leaf(2, 3, 8, 8, seed=seed)
    one, other = bf.ZerothOrder(4, 0.1, seed=seed), bf.ZerothOrder(4, 0.1, seed=seed)
    first, second = one.ask(x), one.ask(x)
    assert not torch.equal(first, second)
    assert torch.equal(first, other.ask(x))
    assert torch.equal(second, other.ask(x))
    assert torch.equal(one.state, torch.tensor([seed, 1]))
    assert torch.equal(first, bf.ops.perturb(x.detach(), torch.tensor([seed, 0]), 4, 0.1))
    assert not torch.equal(first, bf.ZerothOrder(4, 0.1, seed=seed + 1).ask(x))


def test_tell_scores_is_tell_of_the_objective(seed: int) -> None:
    x = leaf(3, 1, 4, 4, seed=seed)
    network = leaf(16, 5, seed=seed + 1).detach()
    labels = torch.tensor([0, 3, 4])
    by_scores, by_losses = bf.ZerothOrder(8, 0.1, seed=seed), bf.ZerothOrder(8, 0.1, seed=seed)
    scores = by_scores.ask(x).flatten(2) @ network
    loss = by_scores.tell_scores(scores, labels)
    (gradient,) = torch.autograd.grad(loss, x)
    by_losses.ask(x)
    losses = F.cross_entropy(scores.flatten(0, 1).double(), labels.repeat(9), reduction="none").view(9, 3)
    expected = by_losses.tell(losses)
    (wanted,) = torch.autograd.grad(expected, x)
    torch.testing.assert_close(loss.double(), expected, rtol=RTOL, atol=ATOL)
    # The losses' own rounding to float32, divided by mu.
    torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


def test_the_boundary_term_needs_a_weight_and_scores(seed: int) -> None:
    x = leaf(2, 1, 4, 4, seed=seed)
    zo = bf.ZerothOrder(8, 0.1, seed=seed)
    scores = torch.randn(9, 2, 5)
    zo.ask(x)
    plain = zo.tell_scores(scores, torch.tensor([0, 1]))
    zo.ask(x)
    student = scores[0] + 1
    pushed = zo.tell_scores(scores, torch.tensor([0, 1]), student, boundary_weight=0.5, divergence="l1")
    torch.testing.assert_close(plain - pushed, torch.tensor(0.5 * 5))  # five classes, each 1 apart


def test_bad_input() -> None:
    for keywords, message in (
        ({"num_directions": 0}, "num_directions must be at least 1; got 0"),
        ({"mu": 0.0}, "must be a positive number; got 0.0"),
        ({"mu": float("inf")}, "must be a positive number; got inf"),
    ):
        with pytest.raises(InputError, match=message):
            bf.ZerothOrder(**keywords)
    zo = bf.ZerothOrder(3, 0.1)
    with pytest.raises(InputError, match="tell needs the points of an ask"):
        zo.tell(torch.zeros(4, 2))
    zo.ask(torch.zeros(2, 3))
    with pytest.raises(InputError, match=r"losses must be \[1 \+ q, B\] = \[4, 2\]; got \[3, 2\]"):
        zo.tell(torch.zeros(3, 2))
    with pytest.raises(InputError, match=r"scores must be \[1 \+ q, B, n_classes\] with q = 3; got \[3, 2, 5\]"):
        zo.tell_scores(torch.zeros(3, 2, 5), torch.zeros(2, dtype=torch.int64))
    zo.tell(torch.zeros(4, 2))
    with pytest.raises(InputError, match="tell once per ask"):
        zo.tell(torch.zeros(4, 2))
