"""Test `compat.zoge_backward` against a rendering of MAZE in plain torch."""

from __future__ import annotations

import copy
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

N, SHAPE, CLASSES, MU = 4, (2, 3, 5), 4, 0.01
RTOL, ATOL = TOLERANCES["float64"]
# float64 losses, each rounded, whose differences are divided by a step of 0.01.
SLOPES = {"rtol": 1e-8, "atol": 1e-10}


def arguments(**fields: Any) -> SimpleNamespace:
    """Return arguments whose batch size is not the number of images."""
    return SimpleNamespace(**{"ndirs": 5, "mu": MU, "batch_size": 9, "device": "cuda:7", **fields})


def clone_and_target(seed: int) -> tuple[nn.Module, nn.Module]:
    return plain.network(seed + 1, SHAPE, CLASSES), plain.network(seed + 2, SHAPE, CLASSES)


def rendered(
    clone: Any, target: Any, x_pre: Tensor, u: Tensor, count: int
) -> tuple[Tensor, Tensor]:
    """Return the gradient, divided by `count`, and the mean loss."""
    mean, losses = plain.forward(
        lambda points: plain.maze_losses(target, clone, points), x_pre.detach(), u, MU
    )
    return mean * x_pre[0].numel() / count, losses.mean()


@pytest.mark.parametrize("n_directions", [1, 5])
@pytest.mark.parametrize("parity", [False, True])
def test_equals_plain_torch(parity: bool, n_directions: int, seed: int) -> None:
    S, T = clone_and_target(seed)
    x_pre, args = plain.images(seed, N, *SHAPE), arguments(ndirs=n_directions)
    loss, cosine, ratio = compat.zoge_backward(
        args, x_pre, x_pre.tanh(), S, T, parity=parity, seed=seed
    )
    u = plain.directions(seed, x_pre, n_directions, "sphere" if parity else "rademacher")
    gradient, wanted = rendered(S, T, x_pre, u, 9 if parity else N)
    torch.testing.assert_close(x_pre.grad, gradient, **SLOPES)
    torch.testing.assert_close(loss, wanted, rtol=RTOL, atol=ATOL)
    assert not loss.requires_grad
    if not parity:
        assert cosine.isnan()
        assert ratio.isnan()
        return
    (truth,) = torch.autograd.grad(plain.maze_losses(T, S, x_pre).mean(), x_pre)
    angles, lengths = [], []
    for mine, true in zip(gradient, truth):
        angles.append((mine * true).sum() / (mine.norm() * true.norm()))
        lengths.append(mine.norm() / true.norm())
    torch.testing.assert_close(cosine, torch.stack(angles).mean(), **SLOPES)
    torch.testing.assert_close(ratio, torch.stack(lengths).mean(), **SLOPES)


def test_pairs_equal_plain_torch(seed: int) -> None:
    S, T = clone_and_target(seed)
    x_pre = plain.images(seed, N, *SHAPE)
    args = {"ndirs": 6, "mu": MU}  # without parity no batch size is read
    keywords = {"directions": "gaussian", "antithetic": True, "seed": seed}
    compat.zoge_backward(args, x_pre, x_pre.tanh(), S, T, **keywords)
    u = plain.directions(seed, x_pre, 3, "gaussian")
    mean, _ = plain.central(lambda points: plain.maze_losses(T, S, points), x_pre.detach(), u, MU)
    torch.testing.assert_close(x_pre.grad, mean * x_pre[0].numel() / N, **SLOPES)
    with pytest.raises(InputError, match="antithetic=True goes with parity=False only"):
        compat.zoge_backward(arguments(), x_pre, x_pre.tanh(), S, T, parity=True, antithetic=True)


@pytest.mark.parametrize("parity", [False, True])
def test_batch_norms_never_mix_directions(parity: bool, seed: int) -> None:
    """Check a clone in training mode against a loop that asks for one direction after another."""
    S, T = plain.with_batch_norm(seed + 1, SHAPE, CLASSES), clone_and_target(seed)[1]
    S.train()
    other, x_pre = copy.deepcopy(S), plain.images(seed, N, *SHAPE)
    compat.zoge_backward(arguments(), x_pre, x_pre.tanh(), S, T, parity=parity, seed=seed)
    u = plain.directions(seed, x_pre, 5, "sphere" if parity else "rademacher")
    gradient, _ = rendered(other, T, x_pre, u, 9 if parity else N)
    if parity:  # their code asks at x once more, for the true gradient
        other(x_pre.tanh())
    torch.testing.assert_close(x_pre.grad, gradient, **SLOPES)
    assert S.training
    assert int(S[2].num_batches_tracked) == 6 + parity
    for mine, wanted in zip(S.buffers(), other.buffers()):
        torch.testing.assert_close(mine, wanted, rtol=RTOL, atol=ATOL)

    whole = plain.images(seed, N, *SHAPE)  # the same in eval mode is something else
    compat.zoge_backward(arguments(), whole, whole.tanh(), S.eval(), T, seed=seed)
    assert not torch.allclose(whole.grad, x_pre.grad)


@pytest.mark.parametrize("part", [0, 2])
def test_one_part_in_training_mode_is_enough(part: int, seed: int) -> None:
    """Check the size of the calls: rows as soon as a part of a model is in training mode."""
    S, T = plain.with_batch_norm(seed + 1, SHAPE, CLASSES).eval(), clone_and_target(seed)[1].eval()
    sizes: list[int] = []
    S[0].register_forward_hook(lambda module, given, output: sizes.append(len(output)))
    x_pre = plain.images(seed, N, *SHAPE)
    compat.zoge_backward(arguments(), x_pre, x_pre.tanh(), S, T, seed=seed)
    assert sizes == [6 * N]
    S[part].train()
    sizes.clear()
    compat.zoge_backward(arguments(), x_pre, x_pre.tanh(), S, T, seed=seed)
    assert sizes == [N] * 6


def test_flags_and_graph(seed: int) -> None:
    """Check that flags stay as they are but for parity, and that the generator's graph stays."""
    S, T = clone_and_target(seed)
    S[1].requires_grad_(False)
    z = plain.images(seed, N, 7)
    generator = plain.network(seed + 3, (7,), 30)
    x_pre = generator(z).view(N, *SHAPE)
    args = arguments()
    compat.zoge_backward(args, x_pre, x_pre.tanh(), S, T, seed=seed)
    first = z.grad.clone()
    assert [p.requires_grad for p in S.parameters()] == [False, False, True, True]
    assert all(p.grad is None for model in (S, T) for p in model.parameters())
    compat.zoge_backward(args, x_pre, x_pre.tanh(), S, T, seed=seed)  # retain_graph
    torch.testing.assert_close(z.grad, 2 * first)
    compat.zoge_backward(args, x_pre, x_pre.tanh(), S, T, seed=seed, parity=True)
    assert all(p.requires_grad for p in S.parameters())
    assert all(p.grad is None for model in (S, T) for p in model.parameters())


@pytest.mark.parametrize("curved", [False, True])
def test_truth(curved: bool, seed: int) -> None:
    """Check that the gradient is the true one of the returned loss (d = 8, 20000 directions).

    The cosine is above 0.99 and the length within 5 %, for a linear and a quadratic target.
    """
    weights, ours = (plain.images(seed + k, 8, CLASSES).detach() for k in (1, 2))
    S = nn.Sequential(nn.Flatten(), nn.Linear(8, CLASSES, bias=False)).double().eval()
    S[1].weight.data.copy_(ours.T)

    def T(at: Tensor) -> Tensor:
        return (at.square() if curved else at).flatten(1) @ weights

    x_pre = plain.images(seed, 2, 2, 2, 2)
    args = arguments(ndirs=20000, mu=1e-4)
    loss, _, _ = compat.zoge_backward(args, x_pre, x_pre.tanh(), S, T, seed=seed)
    estimate, x_pre.grad = x_pre.grad, None
    true_loss = plain.maze_losses(T, S, x_pre).mean()
    (truth,) = torch.autograd.grad(true_loss, x_pre)
    torch.testing.assert_close(loss, true_loss.detach(), rtol=RTOL, atol=ATOL)
    assert F.cosine_similarity(estimate.flatten(), truth.flatten(), dim=0) > 0.99
    assert abs(estimate.norm() / truth.norm() - 1) < 0.05


@pytest.mark.parametrize("kind", ["probabilities", "log_probabilities"])
def test_a_box_says_what_it_returns(kind: str, seed: int) -> None:
    S, T = clone_and_target(seed)
    x_pre, other = plain.images(seed, N, *SHAPE), plain.images(seed, N, *SHAPE)
    loss, _, _ = compat.zoge_backward(arguments(), x_pre, x_pre.tanh(), S, T, seed=seed)
    theirs, _, _ = compat.zoge_backward(
        arguments(), other, other.tanh(), S, plain.Box(T, kind), seed=seed
    )
    torch.testing.assert_close(other.grad, x_pre.grad, **SLOPES)
    torch.testing.assert_close(theirs, loss, rtol=RTOL, atol=ATOL)


def test_torch_seeds_the_calls(seed: int) -> None:
    S, T = clone_and_target(seed)
    drawn = []
    for again in (True, True, False):
        if again:
            torch.manual_seed(5)
        x_pre = plain.images(seed, N, *SHAPE)
        compat.zoge_backward(arguments(), x_pre, x_pre.tanh(), S, T)
        drawn.append(x_pre.grad)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


def test_float32_stays_float32(seed: int) -> None:
    S, T = (model.float() for model in clone_and_target(seed))
    x_pre = plain.images(seed, N, *SHAPE).detach().float().requires_grad_()
    values = compat.zoge_backward(arguments(), x_pre, x_pre.tanh(), S, T, parity=True, seed=seed)
    assert [value.dtype for value in (x_pre.grad, *values)] == [torch.float32] * 4


def test_bad_input(seed: int) -> None:
    S, T = clone_and_target(seed)
    x_pre = plain.images(seed, N, *SHAPE)

    def call(args: Any, pre: Any = x_pre, x: Any = None, T: Any = T, **more: Any) -> None:
        compat.zoge_backward(args, pre, x_pre.tanh() if x is None else x, S, T, **more)

    for args, more, message in (
        ({"mu": MU}, {}, "zoge_backward: args lacks 'ndirs'"),
        ({"ndirs": 5}, {}, "zoge_backward: args lacks 'mu'"),
        ({"ndirs": 5, "mu": MU}, {"parity": True}, "zoge_backward: args lacks 'batch_size'"),
        (arguments(ndirs=0), {}, "args.ndirs must be at least 1; got 0"),
        (arguments(), {"T": plain.Box(T, "probabilities", True)}, "shop gives labels only"),
        (arguments(), {"T": plain.Box(T, "logits"), "parity": True}, "T must be differentiable"),
        (arguments(), {"T": lambda at: T(at)[:-1]}, r"T must return scores \[N, n_classes\], N ="),
        (arguments(), {"T": lambda at: T(at)[:, 1:]}, "same classes; got 4 and 3"),
        (arguments(), {"pre": x_pre.detach()}, "x_pre has no graph"),
        (arguments(), {"x": x_pre.sigmoid()}, r"x must be tanh\(x_pre\)"),
        (arguments(), {"x": x_pre.tanh()[:2]}, "same shape; got .2, 2, 3, 5. and .4, 2, 3, 5"),
    ):
        with pytest.raises(InputError, match=message):
            call(args, **more)
    assert x_pre.grad is None
