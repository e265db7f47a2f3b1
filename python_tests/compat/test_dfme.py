"""Test `compat.estimate_gradient_objective` against a rendering of DFME in plain torch."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from compat import plain
from tolerances import TOLERANCES
from torch import Tensor, nn

from bidfmkd_fast import compat
from bidfmkd_fast.errors import InputError

N, SHAPE, CLASSES = 3, (2, 3, 5), 4
RTOL, ATOL = TOLERANCES["float64"]
# float64 losses, each rounded, whose differences are divided by a step of 0.01.
SLOPES = {"rtol": 1e-8, "atol": 1e-10}


def arguments(**fields: Any) -> SimpleNamespace:
    values = {
        "loss": "l1",
        "no_logits": False,
        "logit_correction": "none",
        "forward_differences": True,
        "G_activation": torch.tanh,
    }
    return SimpleNamespace(**{**values, **fields})


def models(seed: int) -> tuple[nn.Module, nn.Module]:
    """Return a victim and a clone."""
    return plain.network(seed + 1, SHAPE, CLASSES), plain.network(seed + 2, SHAPE, CLASSES)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"loss": "kl"},
    {"no_logits": True},
    {"no_logits": True, "logit_correction": "min"},
    {"no_logits": True, "logit_correction": "mean"},
    {"logit_correction": "min"},  # without no_logits nothing is subtracted
    {"forward_differences": False},
    {"loss": "kl", "forward_differences": False},
]


@pytest.mark.parametrize("parity", [False, True])
@pytest.mark.parametrize("pre_x", [False, True])
@pytest.mark.parametrize("options", OPTIONS)
def test_equals_plain_torch(options: dict[str, Any], pre_x: bool, parity: bool, seed: int) -> None:
    """Check all options, with `num_classes` that is not the number of classes."""
    args, (victim, clone), x = arguments(**options), models(seed), plain.images(seed, N, *SHAPE)
    gradient, loss = compat.estimate_gradient_objective(
        args, victim, clone, x, 0.01, 6, num_classes=7, pre_x=pre_x, parity=parity, seed=seed
    )
    u = plain.directions(seed, x, 6, "sphere" if parity else "rademacher")
    mean, losses = plain.forward(
        lambda points: plain.dfme_losses(args, victim, clone, points, pre_x), x.detach(), u, 0.01
    )
    wanted = mean * plain.dfme_scale(args, x, 7, parity)
    assert not gradient.requires_grad
    torch.testing.assert_close(gradient, wanted, **SLOPES)
    torch.testing.assert_close(loss, losses.mean(), rtol=RTOL, atol=ATOL)


def test_pairs_equal_plain_torch(seed: int) -> None:
    args, (victim, clone), x = arguments(loss="kl"), models(seed), plain.images(seed, N, *SHAPE)
    gradient, loss = compat.estimate_gradient_objective(
        args, victim, clone, x, 0.01, 6, seed=seed, directions="gaussian", antithetic=True
    )
    u = plain.directions(seed, x, 3, "gaussian")
    mean, losses = plain.central(
        lambda points: plain.dfme_losses(args, victim, clone, points, False), x.detach(), u, 0.01
    )
    torch.testing.assert_close(gradient, mean * x[0].numel() / N, **SLOPES)
    torch.testing.assert_close(loss, losses.mean(), rtol=RTOL, atol=ATOL)
    with pytest.raises(InputError, match="antithetic=True goes with parity=False only"):
        compat.estimate_gradient_objective(
            args, victim, clone, x, parity=True, antithetic=True, seed=seed
        )


@pytest.mark.parametrize("kind", ["probabilities", "log_probabilities"])
@pytest.mark.parametrize("options", [{"loss": "kl"}, {"no_logits": True}])
def test_a_box_says_what_it_returns(options: dict[str, Any], kind: str, seed: int) -> None:
    """Check that probabilities give the same as the logits behind them: no second softmax."""
    args, (victim, clone), x = arguments(**options), models(seed), plain.images(seed, N, *SHAPE)
    for parity in (False, True):
        wanted, theirs = (
            compat.estimate_gradient_objective(
                args, box, clone, x, 0.01, 6, parity=parity, seed=seed
            )
            for box in (victim, plain.Box(victim, kind))
        )
        torch.testing.assert_close(theirs[0], wanted[0], **SLOPES)
        torch.testing.assert_close(theirs[1], wanted[1], rtol=RTOL, atol=ATOL)


def linear(seed: int) -> Callable[[Tensor], Tensor]:
    weights = plain.images(seed, 8, CLASSES).detach()
    return lambda at: at.flatten(1) @ weights


def quadratic(seed: int) -> Callable[[Tensor], Tensor]:
    weights = plain.images(seed, 8, CLASSES).detach()
    return lambda at: at.flatten(1).square() @ weights + at.flatten(1) @ weights.flip(0)


@pytest.mark.parametrize("antithetic", [False, True])
@pytest.mark.parametrize("loss", ["l1", "kl"])
@pytest.mark.parametrize("victim_of", [linear, quadratic])
def test_truth(victim_of: Any, loss: str, antithetic: bool, seed: int) -> None:
    """Check that the gradient is the true one of the returned loss (d = 8, m = 20000).

    The cosine is above 0.99 and the length within 5 %, whatever `forward_differences` says.
    """
    args = arguments(loss=loss, forward_differences=False)
    victim, x = victim_of(seed + 1), plain.images(seed, 2, 2, 2, 2)
    ours = plain.images(seed + 2, 8, CLASSES).detach()

    def clone(at: Tensor) -> Tensor:  # far from the victim: no difference of scores changes sign
        return at.flatten(1) @ ours + 100 * torch.tensor([1.0, -1.0, 2.0, 0.5])

    def small(at: Tensor) -> Tensor:  # no probability is 0
        return at.flatten(1) @ ours

    other = clone if loss == "l1" else small
    gradient, value = compat.estimate_gradient_objective(
        args, victim, other, x, 1e-4, 20000, seed=seed, antithetic=antithetic
    )
    true_loss = plain.dfme_losses(args, victim, other, x, False).mean()
    (truth,) = torch.autograd.grad(true_loss, x)
    torch.testing.assert_close(value, true_loss.detach(), rtol=RTOL, atol=ATOL)
    assert F.cosine_similarity(gradient.flatten(), truth.flatten(), dim=0) > 0.99
    assert abs(gradient.norm() / truth.norm() - 1) < 0.05


def test_modes(seed: int) -> None:
    """Check that models are asked in eval mode and put back, and with parity left as theirs."""
    victim, clone = (
        plain.with_batch_norm(seed + k, SHAPE, CLASSES).requires_grad_(False) for k in (1, 2)
    )
    x, args = plain.images(seed, N, *SHAPE), arguments()
    wanted = compat.estimate_gradient_objective(
        args, victim.eval(), clone.eval(), x, m=4, seed=seed
    )
    victim.train()
    clone.eval()[2].train()
    clone[3].eval()
    before = [[m.training for m in model.modules()] for model in (victim, clone)]
    mine = compat.estimate_gradient_objective(args, victim, clone, x, m=4, seed=seed)
    assert torch.equal(mine[0], wanted[0])  # no batch norm saw the batch
    assert [[m.training for m in model.modules()] for model in (victim, clone)] == before
    assert int(clone[2].num_batches_tracked) == 0
    assert not any(p.requires_grad for p in clone.parameters())

    def broken(images: Tensor) -> Tensor:
        raise RuntimeError("out of order")

    with pytest.raises(RuntimeError, match="out of order"):
        compat.estimate_gradient_objective(args, broken, clone, x, seed=seed)
    assert [m.training for m in clone.modules()] == before[1]

    compat.estimate_gradient_objective(args, victim, clone.eval(), x, seed=seed, parity=True)
    assert not any(m.training for m in victim.modules())
    assert all(m.training for m in clone.modules())


def test_calls_are_small_and_torch_seeds_them(seed: int) -> None:
    (victim, clone), args, sizes = models(seed), arguments(), []

    def watched(images: Tensor) -> Tensor:
        sizes.append(len(images))
        return victim(images)

    x = plain.images(seed, N, *SHAPE)
    drawn = []
    for again in (True, True, False):
        if again:
            torch.manual_seed(5)
        drawn.append(
            compat.estimate_gradient_objective(args, watched, clone, x, m=5, max_images=7)[0]
        )
    assert max(sizes) <= 7
    assert sum(sizes) == 3 * 6 * N
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_float32_images_and_old_calls(seed: int) -> None:
    """Check that float32 stays float32, that a mapping will do, and that device is ignored."""
    (victim, clone), x = models(seed), plain.images(seed, N, *SHAPE).detach().float()
    args = {"loss": "kl"}  # without parity nothing else is read
    gradient, loss = compat.estimate_gradient_objective(
        args, victim.float(), clone.float(), x, 1e-2, 6, False, CLASSES, "cuda:7", seed=seed
    )
    assert gradient.dtype == loss.dtype == torch.float32
    exact, _ = compat.estimate_gradient_objective(
        args, victim.double(), clone.double(), x.double(), 1e-2, 6, seed=seed
    )
    scale = float(exact.abs().max())  # float32 scores, whose differences are divided by 0.01
    torch.testing.assert_close(gradient.double(), exact, rtol=1e-3, atol=2e-3 * scale)


def test_bad_input(seed: int) -> None:
    (victim, clone), x = models(seed), plain.images(seed, N, *SHAPE)

    def call(args: Any, victim: Any = victim, clone: Any = clone, x: Any = x, **more: Any) -> None:
        compat.estimate_gradient_objective(args, victim, clone, x, **more)

    for args, more, message in (
        ({}, {}, "estimate_gradient_objective: args lacks 'loss'"),
        ({"loss": "l2"}, {}, "args.loss must be one of l1, kl; got 'l2'"),
        ({"loss": "l1"}, {}, "args lacks 'no_logits'"),
        ({"loss": "l1", "no_logits": 1}, {}, "args lacks 'logit_correction'"),
        ({"loss": "kl"}, {"parity": True}, "args lacks 'forward_differences'"),
        ({"loss": "kl"}, {"pre_x": True}, "args lacks 'G_activation'"),
        ({"loss": "kl", "G_activation": None}, {"pre_x": True}, "such as torch.tanh; got None"),
        ({"loss": "kl"}, {"m": 0}, "m must be at least 1; got 0"),
        ({"loss": "kl"}, {"epsilon": "1"}, "epsilon must be a number; got '1'"),
        ({"loss": "kl"}, {"victim": plain.Box(victim, "probabilities", True)}, "labels only"),
        ({"loss": "kl"}, {"victim": 3}, "victim_model must be callable on images; got int"),
        ({"loss": "kl"}, {"clone": lambda at: at.mean()}, r"clone_model must return scores \[N"),
        ({"loss": "kl"}, {"clone": lambda at: [1]}, "as a tensor; got list"),
        ({"loss": "kl"}, {"clone": lambda at: victim(at).argmax(1, True)}, "got torch.int64"),
        ({"loss": "kl"}, {"clone": lambda at: victim(at)[:, 1:]}, "same classes; got 4 and 3"),
        ({"loss": "kl"}, {"x": x.detach()[:0]}, "x must be .* with N >= 1; got .0, 2, 3, 5"),
        ({"loss": "kl"}, {"x": [1.0]}, r"x must be a floating-point tensor \[N, .*; got list"),
    ):
        with pytest.raises(InputError, match=message):
            call(args, **more)
