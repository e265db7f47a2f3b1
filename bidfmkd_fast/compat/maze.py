"""Estimate the generator's gradient as MAZE does (Kariyappa et al., 2021, arXiv 2005.03161)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bidfmkd_fast.compat import shared
from bidfmkd_fast.errors import InputError
from bidfmkd_fast.zeroth_order.queries import check_model

_OP = "zoge_backward"
_FAR = 0.01  # more than the rounding of half precision between x and tanh(x_pre)


def zoge_backward(
    args: Any,
    x_pre: Tensor,
    x: Tensor,
    S: nn.Module,
    T: Callable[[Tensor], Tensor],
    *,
    parity: bool = False,
    directions: str | None = None,
    max_images: int | None = None,
    seed: int | None = None,
    antithetic: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Send an estimated gradient of the generator's loss into `x_pre`; return the loss.

    The loss of an image is -KL(T || S), the target's probabilities against the clone's, summed over
    the classes. The gradient in `x_pre` is estimated from queries, and
    `x_pre.backward(gradient, retain_graph=True)` sends it on into the generator.

    By default the gradient is that of the returned loss, the mean over the images. The target is
    only asked, and modes and `requires_grad` of S stay as they are. Cosine and magnitude ratio are
    then NaN, since they compare with the true gradient, which only a target that is no black box
    has.

    S and T are asked in the mode that they are in. If any part of them is in training mode, they
    are asked for one direction (a batch) per call, so that batch norms never mix directions; the
    running statistics of S then move on with every call, as in the authors' code.

    With `parity=True` the authors' code is reproduced:

    - the gradient is divided by `args.batch_size`, also where there are fewer images (their own
      code fails there);
    - cosine and magnitude ratio come from the true gradient: T must be differentiable, and both
      models are asked at x a second time;
    - afterwards all parameters of S require gradients, also those that were frozen.

    Args:
        args: a namespace or mapping with `ndirs` (points per image besides the image itself) and
            `mu` (the step length along a unit direction); with `parity` also `batch_size`. A
            `device` is ignored: everything runs on the device of `x_pre`.
        x_pre: the generator's output before its last tanh, `[N, *S]`, with a graph.
        x: `tanh(x_pre)`.
        S: the clone, images to logits `[N, n_classes]`.
        T: the target, images to scores `[N, n_classes]`: any callable. The scores are logits,
            unless it has a `spec` whose `returned_kind` says otherwise.
        parity: reproduce the authors' scale and slips.
        directions: `rademacher`, `sphere` or `gaussian`; None for `sphere` with parity, as the
            authors draw them, and otherwise for `rademacher`, which is cheaper and has the same
            variance.
        max_images: most images per call of a model, if none of them is in training mode; None for
            200 on a CPU, and 600 on a GPU or for a service.
        seed: seed of the directions; None to draw it from torch's generator in each call.
        antithetic: make the points pairs `x_pre + mu u`, `x_pre - mu u`; not with parity.

    Returns:
        `(loss, cosine, magnitude_ratio)`: scalars in float32 (float64 if `x_pre` is), without a
        graph. The loss is the mean over the images. Cosine and ratio of the norms, estimate to
        truth, are means over the images.

    Raises:
        InputError: args lacks a field, a value is out of range, `x` is not `tanh(x_pre)`, `x_pre`
            has no graph, T gives labels only (with `parity`: is not differentiable), or a model
            returned anything but scores.
    """
    _check(x_pre, x)
    for name, model in (("S", S), ("T", T)):
        check_model(_OP, name, model)
    count = shared.read(_OP, args, "batch_size") if parity else len(x_pre)
    zo = shared.new_estimator(
        _OP,
        shared.read(_OP, args, "ndirs"),
        shared.read(_OP, args, "mu"),
        names=("args.ndirs", "args.mu"),
        parity=parity,
        directions=directions,
        seed=seed,
        antithetic=antithetic,
    )
    kind = shared.scores_kind_of(T)

    def losses_of(points: Tensor) -> Tensor:
        return _losses(points.tanh(), S, T, kind)

    by_row = shared.in_training(S, T)
    at_once = shared.images_at_once(max_images, x_pre, S, T)
    zo.estimate(losses_of, x_pre.detach(), at_once, by_row=by_row)
    gradient, losses = zo.gradient, zo.last_loss
    assert gradient is not None and losses is not None
    gradient, loss = gradient / count, losses.mean()
    cosine = ratio = torch.full((), torch.nan, device=x_pre.device)
    if parity:
        loss, truth = _true_gradient(x_pre, S, T, kind)
        estimate = gradient.flatten(1).to(truth.dtype)
        cosine = F.cosine_similarity(truth, estimate, dim=1).mean()
        ratio = (estimate.norm(dim=1) / truth.norm(dim=1)).mean()
    x_pre.backward(gradient.to(x_pre.dtype), retain_graph=True)
    if parity:
        S.requires_grad_(True)
    dtype = shared.full_dtype(x_pre)
    return loss.to(dtype), cosine.to(dtype), ratio.to(dtype)


def _check(x_pre: Tensor, x: Tensor) -> None:
    """Raise InputError unless `x_pre` has a graph and x is its tanh."""
    shared.check_images(_OP, "x_pre", x_pre)
    shared.check_images(_OP, "x", x)
    if x.shape != x_pre.shape:
        raise InputError(
            f"{_OP}: x and x_pre must have the same shape; "
            f"got {list(x.shape)} and {list(x_pre.shape)}"
        )
    if not x_pre.requires_grad:
        raise InputError(
            f"{_OP}: x_pre has no graph, so the estimate has nowhere to go; give the generator's "
            "output as it is, without detach() or torch.no_grad()"
        )
    if (x.detach() - x_pre.detach().tanh()).abs().max() > _FAR:
        raise InputError(
            f"{_OP}: x must be tanh(x_pre), since the models are asked at tanh(x_pre + mu u)"
        )


def _losses(images: Tensor, S: nn.Module, T: Callable[[Tensor], Tensor], kind: str) -> Tensor:
    """Return the losses `[N]` of images `[N, *S]` in float64; the clone is asked first."""
    student = shared.ask(_OP, "S", S, images)
    target = shared.ask(_OP, "T", T, images)
    shared.check_same_classes(_OP, ("S", "T"), student, target)
    return -shared.kl(target, kind, student)


def _true_gradient(
    x_pre: Tensor, S: nn.Module, T: Callable[[Tensor], Tensor], kind: str
) -> tuple[Tensor, Tensor]:
    """Return the mean loss and its true gradient in `x_pre`, `[N, d]`, by autograd through T.

    Other than in the authors' code, no gradient is added to the parameters of T.
    """
    leaf = x_pre.detach().clone().requires_grad_()
    target_graph: list[bool] = []

    def watched(images: Tensor) -> Tensor:
        scores = T(images)
        target_graph.append(isinstance(scores, Tensor) and scores.requires_grad)
        return scores

    with torch.enable_grad():
        loss = _losses(leaf.tanh(), S, watched, kind).mean()
    if not all(target_graph):
        raise InputError(
            f"{_OP}: with parity=True T must be differentiable, since the authors' code compares "
            "with the true gradient; leave parity out for a black box"
        )
    (truth,) = torch.autograd.grad(loss, leaf)
    return loss.detach(), truth.flatten(1)
