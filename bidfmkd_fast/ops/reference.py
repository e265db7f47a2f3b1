"""Compute every op in plain torch: the specification that the native kernels are tested against.

`directions.py` draws the random directions and `scores.py` computes the recovery objective. The
sums run in float64, so that the difference between a kernel and its twin here is the error of the
kernel alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from bidfmkd_fast.ops.directions import span_dimension, unit_directions
from bidfmkd_fast.ops.scores import log_probabilities_of, objective


def perturb_out(
    x: Tensor,
    state: Tensor,
    num_directions: int,
    mu: float,
    directions: str,
    grid: int,
    first_direction: int,
    first_image: int,
    out: Tensor,
) -> None:
    """Write `out[0] = x` and `out[1 + k] = x + mu * u_k`, where `out` is `[1 + q, B, *S]`."""
    out[0] = x
    drawn = unit_directions(
        x.shape, state, num_directions, directions, grid, first_direction, first_image
    )
    for k, u in enumerate(drawn):
        # Round the step to the dtype of x before adding it, as the kernels do: then the points of
        # rademacher directions agree with the kernels' bit for bit.
        out[1 + k] = x + (mu * u).to(x.dtype)


def estimate_gradient(
    differences: Tensor,
    state: Tensor,
    shape: Sequence[int],
    mu: float,
    directions: str,
    grid: int,
    first_direction: int,
    first_image: int,
) -> Tensor:
    """Return the zeroth-order gradient: loss differences `[q, B]` -> `[B, *S]`.

    The gradient of image b is `s / (q mu) * sum_k differences[k, b] * u_kb`, where s is the
    dimension of the space that the directions span (paper, section 3.3).
    """
    num_directions = differences.shape[0]
    total = torch.zeros(tuple(shape), dtype=torch.float64, device=differences.device)
    drawn = unit_directions(
        shape, state, num_directions, directions, grid, first_direction, first_image
    )
    for k, u in enumerate(drawn):
        total += differences[k].double().view(-1, *[1] * (len(shape) - 1)) * u
    scale = (
        span_dimension(shape, directions, grid) / (num_directions * mu) if num_directions else 0.0
    )
    return (scale * total).to(
        torch.float64 if differences.dtype == torch.float64 else torch.float32
    )


def zo_kd_gradient(
    scores: Tensor,
    labels: Tensor,
    state: Tensor,
    shape: Sequence[int],
    mu: float,
    student_scores: Tensor | None,
    boundary_weight: float,
    scores_kind: str,
    divergence: str,
    directions: str,
    grid: int,
    first_direction: int,
    first_image: int,
) -> tuple[Tensor, Tensor]:
    """Return the gradient `[B, *S]` and the objective at the images themselves `[B]`.

    `scores` `[1 + q, B, n_classes]` are the API's answers at all points.
    """
    losses = objective(scores, labels, student_scores, boundary_weight, scores_kind, divergence)
    dtype = torch.float64 if scores.dtype == torch.float64 else torch.float32
    differences = losses[1:] - losses[:1]
    gradient = estimate_gradient(
        differences, state, shape, mu, directions, grid, first_direction, first_image
    )
    return gradient.to(dtype), losses[0].to(dtype)


def _teacher_probabilities(scores: Tensor, scores_kind: str, temperature: float) -> Tensor:
    """Return the teacher's probabilities at temperature T: softmax(logits / T).

    From probabilities p the same numbers are computed as p^(1/T), normalised to a sum of 1.
    """
    if scores_kind == "logits":
        return (scores / temperature).softmax(-1)
    return (log_probabilities_of(scores, scores_kind) / temperature).softmax(-1)


def kd_loss(
    student: Tensor, teacher: Tensor, temperature: float, divergence: str, scores_kind: str
) -> Tensor:
    """Return `T^2 * mean_n D(teacher_n, student_n)`, both sides at temperature T.

    Both inputs are `[*E, N, n_classes]`; the result is `[*E]`, computed in float64.
    """
    dtype, student, teacher = student.dtype, student.double(), teacher.double()
    if divergence == "l1":
        per_image = (student - teacher).abs().sum(-1) / temperature
    else:
        p_teacher = _teacher_probabilities(teacher, scores_kind, temperature)
        if divergence == "l1_prob":
            per_image = ((student / temperature).softmax(-1) - p_teacher).abs().sum(-1)
        else:
            log_student = (student / temperature).log_softmax(-1)
            terms = torch.xlogy(p_teacher, p_teacher) - p_teacher * log_student
            per_image = torch.where(p_teacher == 0, 0.0, terms).sum(-1)  # 0 log 0 is 0
    return (temperature**2 * per_image.mean(-1)).to(dtype)


def kd_loss_backward(
    grad: Tensor,
    student: Tensor,
    teacher: Tensor,
    temperature: float,
    divergence: str,
    scores_kind: str,
) -> Tensor:
    """Return `grad * d kd_loss / d student`, `[*E, N, n_classes]`; `grad` is `[*E]`."""
    dtype, student, teacher = student.dtype, student.double(), teacher.double()
    if divergence == "l1":
        jacobian = (student - teacher).sign()
    else:
        p = (student / temperature).softmax(-1)
        p_teacher = _teacher_probabilities(teacher, scores_kind, temperature)
        if divergence == "kl":
            jacobian = p - p_teacher
        else:
            sign = (p - p_teacher).sign()
            jacobian = p * (sign - (p * sign).sum(-1, keepdim=True))
    scale = grad.double() * (temperature / max(student.shape[-2], 1))
    return (scale[..., None, None] * jacobian).to(dtype)


def kd_loss_double_backward(
    grad_out: Tensor,
    grad: Tensor,
    student: Tensor,
    teacher: Tensor,
    temperature: float,
    divergence: str,
    scores_kind: str,
) -> tuple[Tensor, Tensor]:
    """Return the derivatives of `<grad_out, kd_loss_backward(grad, student)>`.

    The first is with respect to `grad`, `[*E]`; the second with respect to `student`.
    """
    dtype = student.dtype
    ones = torch.ones_like(grad, dtype=torch.float64)
    jacobian = kd_loss_backward(
        ones, student.double(), teacher, temperature, divergence, scores_kind
    )
    v = grad_out.double()
    grad_grad = (v * jacobian).sum((-2, -1)).to(dtype)
    if divergence == "l1":
        return grad_grad, torch.zeros_like(student)
    p = (student.double() / temperature).softmax(-1)
    centred = p * (v - (p * v).sum(-1, keepdim=True))
    if divergence == "kl":
        hessian_v = centred
    else:
        sign = (p - _teacher_probabilities(teacher.double(), scores_kind, temperature)).sign()
        offset = sign - (p * sign).sum(-1, keepdim=True)
        hessian_v = centred * offset - p * (p * offset * v).sum(-1, keepdim=True)
    scale = grad.double() / max(student.shape[-2], 1)
    return grad_grad, (scale[..., None, None] * hessian_v).to(dtype)


def norm_pool(images: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Return `relu(max_pool2d(batch_norm(images), 2))`, with the statistics of this batch.

    Torch can differentiate this function. `autograd.grad` of it is therefore the specification of
    the derivatives that the kernels compute.
    """
    normed = functional.batch_norm(images, None, None, weight, bias, training=True, eps=eps)
    return functional.relu(functional.max_pool2d(normed, 2))
