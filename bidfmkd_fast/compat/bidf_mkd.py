"""Compute the recovery loss of BiDf-MKD's authors (Hu et al., ICML 2023, arXiv 2305.18413)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bidfmkd_fast.arguments import check_integer, check_number
from bidfmkd_fast.compat import shared
from bidfmkd_fast.errors import InputError, InputTypeError
from bidfmkd_fast.ops.checks import check_labels
from bidfmkd_fast.ops.scores import as_scores, log_probabilities_of, probabilities_of
from bidfmkd_fast.zeroth_order.queries import check_model, full_precision, in_full_precision
from bidfmkd_fast.zeroth_order.surrogate import mean_loss

_OP = "zero_order_loss"

Model = Callable[[Tensor], Tensor]


def zero_order_loss(
    args: Any,
    teacher: Model,
    inputs: Tensor,
    targets: Tensor,
    student: Model | None = None,
    oh: float = 1.0,
    adv: float = 1.0,
    *,
    parity: bool = False,
    directions: str | None = None,
    max_images: int | None = None,
    seed: int | None = None,
    antithetic: bool = False,
) -> Tensor:
    """Return the loss of recovered images, with a graph into `inputs`.

    With `args.ZO` the teacher is only asked, and the gradient is estimated from queries. The
    objective of an image x with label y is then::

        oh * CE(teacher(x), y)
            - adv * [argmax student == argmax teacher] * sum over classes |teacher - student|

    The student is asked at `inputs` only and counts as constant, and the bracket is found anew at
    every point. Without `args.ZO` the teacher must be differentiable, and the second term is
    `- adv * [argmax student == argmax teacher] * KL(teacher || student)`, with a constant student
    too. Without a student the second term is left out. The models are asked in the mode that they
    are in; a teacher in training mode is asked for one direction (a batch) per call.

    By default the value is the objective, a mean over the images, and the gradient is that of the
    value for a constant student. With `parity=True` the authors' code is reproduced. With
    `args.ZO`:

    - the directions are drawn in `args.numsplit` parts of `q // numsplit`, so that the remainder
      is dropped, but the sum is still divided by q;
    - `oh` is ignored: the cross entropy has the weight 1;
    - the value is the surrogate `mean_i <x_i, g_i>`, where g_i is the estimate for image i. Its
      gradient is the estimate, but it is not the objective.

    Without `args.ZO` they give `kl_div` probabilities where log-probabilities are due, with teacher
    and student in each other's place: the distance is the sum over classes of
    `s * (log s - t)`, where s and t are the probabilities of student and teacher.

    Args:
        args: a namespace or mapping with `ZO`; if that is true also `q` (points per image besides
            the image itself) and `mu` (the step length along a unit direction), and with `parity`
            also `numsplit`. Without parity `numsplit` is ignored: `max_images` bounds the calls.
        teacher: images `[N, *S]` to scores `[N, n_classes]`: any callable. The scores are logits,
            unless it has a `spec` whose `returned_kind` says otherwise; the student's logits are
            then converted to the same kind.
        inputs: the images `[N, *S]`.
        targets: their labels, int64 `[N]`.
        student: images to logits `[N, n_classes]`, or None.
        oh, adv: weights of the two terms.
        parity: reproduce the authors' scale and slips.
        directions: `rademacher`, `sphere` or `gaussian`; None for `sphere` with parity, as the
            authors draw them, and otherwise for `rademacher`, which is cheaper and has the same
            variance.
        max_images: most images per call of the teacher, if it is not in training mode; None for
            200 on a CPU, and 600 on a GPU or for a service.
        seed: seed of the directions; None to draw it from torch's generator in each call.
        antithetic: make the q points pairs `x + mu u`, `x - mu u`; not with parity.

    Returns:
        A scalar in float32 (float64 if the inputs are). Only its backward pass needs inputs with a
        graph.

    Raises:
        InputError: args lacks a field, a value is out of range, the teacher gives labels only
            (without `args.ZO`: is not differentiable), or a model returned anything but scores.
    """
    shared.check_images(_OP, "inputs", inputs)
    _check_targets(inputs, targets)
    check_model(_OP, "teacher", teacher)
    if student is not None:
        check_model(_OP, "student", student)
    oh, adv = check_number(_OP, "oh", oh), check_number(_OP, "adv", adv)
    if not shared.read(_OP, args, "ZO"):
        loss = _white_box(teacher, inputs, targets, student, oh, adv, parity)
        return loss.to(shared.full_dtype(inputs))

    q = check_integer(_OP, "args.q", shared.read(_OP, args, "q"), 1)
    n_drawn = _n_drawn(args, q) if parity else q
    zo = shared.new_estimator(
        _OP,
        n_drawn,
        shared.read(_OP, args, "mu"),
        names=("args.q", "args.mu"),
        parity=parity,
        directions=directions,
        seed=seed,
        antithetic=antithetic,
    )
    kind = shared.scores_kind_of(teacher)
    arguments = [targets.to(inputs.device)]
    if student is not None:
        with in_full_precision():
            scores = shared.ask(_OP, "student", student, full_precision(inputs))
            arguments.append(as_scores(scores, kind))

    def losses_of(points: Tensor, labels: Tensor, student_scores: Tensor | None = None) -> Tensor:
        scores = shared.ask(_OP, "teacher", teacher, points)
        check_labels(_OP, labels, scores.shape[-1])
        loss = (1.0 if parity else oh) * _cross_entropy(scores, labels, kind)
        if student_scores is None:
            return loss
        shared.check_same_classes(_OP, ("teacher", "student"), scores, student_scores)
        distance = (scores - student_scores).abs().sum(-1)
        return loss - adv * _where_agreed(distance, scores, student_scores)

    at_once = shared.images_at_once(max_images, inputs, teacher)
    loss = zo.estimate(
        losses_of, inputs, at_once, arguments=arguments, by_row=shared.in_training(teacher)
    )
    if parity:
        assert zo.gradient is not None
        gradient = (zo.gradient * (n_drawn / q)).to(inputs.dtype)
        loss = mean_loss(_OP, inputs, gradient, (inputs.detach() * gradient).flatten(1).sum(1))
    return loss.to(shared.full_dtype(inputs))


def _n_drawn(args: Any, q: int) -> int:
    """Return how many of q directions the authors' code draws.

    Raises:
        InputError: none would be drawn.
    """
    n_parts = check_integer(_OP, "args.numsplit", shared.read(_OP, args, "numsplit"), 1)
    if q < n_parts:
        raise InputError(
            f"{_OP}: with parity args.q must be at least args.numsplit = {n_parts}, or no "
            f"direction would be drawn; got {q}"
        )
    return n_parts * (q // n_parts)


def _check_targets(inputs: Tensor, targets: object) -> None:
    wanted = f"{_OP}: targets must be int64 labels [N] of the {len(inputs)} inputs"
    if not isinstance(targets, Tensor):
        raise InputTypeError(f"{wanted}; got {type(targets).__name__}")
    if targets.dtype != torch.int64:
        raise InputTypeError(f"{wanted}; got {targets.dtype}")
    if targets.shape != (len(inputs),):
        raise InputError(f"{wanted}; got {list(targets.shape)}")


def _cross_entropy(scores: Tensor, labels: Tensor, kind: str) -> Tensor:
    """Return the cross entropy `[N]` of scores `[N, n_classes]` of the given kind."""
    return -log_probabilities_of(scores, kind).gather(-1, labels[:, None])[:, 0]


def _where_agreed(distance: Tensor, scores: Tensor, student_scores: Tensor) -> Tensor:
    """Return the distance where both models name the same class, and 0 elsewhere."""
    return torch.where(scores.argmax(-1) == student_scores.argmax(-1), distance, 0.0)


def _white_box(
    teacher: Model,
    inputs: Tensor,
    targets: Tensor,
    student: Model | None,
    oh: float,
    adv: float,
    parity: bool,
) -> Tensor:
    """Return the loss of a differentiable teacher, with an ordinary graph into `inputs`."""
    kind = shared.scores_kind_of(teacher)
    scores = shared.ask(_OP, "teacher", teacher, inputs)
    check_labels(_OP, targets, scores.shape[-1])
    if inputs.requires_grad and torch.is_grad_enabled() and not scores.requires_grad:
        raise InputError(
            f"{_OP}: without args.ZO the teacher must be differentiable, but its scores have no "
            "graph; set args.ZO for a black box"
        )
    loss = oh * _cross_entropy(scores, targets.to(inputs.device), kind)
    if student is not None:
        with torch.no_grad():  # constant, as with args.ZO and in the authors' code
            logits = shared.ask(_OP, "student", student, inputs)
        shared.check_same_classes(_OP, ("teacher", "student"), scores, logits)
        if parity:
            teacher_p, student_p = probabilities_of(scores, kind), logits.softmax(-1)
            distance = F.kl_div(teacher_p, student_p, reduction="none").sum(-1)
        else:
            distance = shared.kl(scores, kind, logits)
        loss = loss - adv * _where_agreed(distance, scores, logits)
    return loss.mean()
