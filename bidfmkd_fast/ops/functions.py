"""Define what users call: `perturb`, `estimate_gradient`, `zo_kd_gradient` and `kd_loss`.

Each function fills in the defaults and calls the op `torch.ops.bidfmkd.<name>` that
`registration.py` registers (`kd_loss` takes a shorter way where it can).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bidfmkd_fast.errors import InputError
from bidfmkd_fast.ops.kd_loss_autograd import differentiable_kd_loss


def perturb(
    x: Tensor,
    state: Tensor,
    num_directions: int,
    mu: float,
    directions: str = "rademacher",
    grid: int = 0,
    out: Tensor | None = None,
    *,
    first_direction: int = 0,
    first_image: int = 0,
) -> Tensor:
    """Return the points to query for a zeroth-order gradient.

    These are the images themselves and, for every image, `num_directions` points one small step
    away, each along a random unit direction `u`.

    >>> x, state = torch.rand(4, 3, 8, 8), torch.tensor([0, 1])  # seed and step
    >>> points = perturb(x, state, num_directions=10, mu=0.05)
    >>> points.shape, bool(((points[1:] - x).flatten(2).norm(dim=2) - 0.05).abs().max() < 1e-5)
    (torch.Size([11, 4, 3, 8, 8]), True)

    Args:
        x: images `[B, *S]`, float32 (native) or float64 (reference).
        state: int64 `[seed, step]` on the device of `x`. The kernel reads it on the device, so that
            a captured graph draws new directions once it changes. Only the low 32 bits of the step
            matter.
        num_directions: q, the number of directions per image.
        mu: length of a step along a unit direction, in the units of `x`.
        directions: `rademacher` (entries +-1/sqrt(d), where d is the number of elements of an
            image), `sphere` (normals, scaled to length 1), `gaussian` (entries N(0, 1/d), not
            scaled) or `lowres` (for each channel a `grid` x `grid` field of normals, enlarged to
            the image by bilinear interpolation and scaled to length 1).
        grid: side of the `lowres` field, from 1 to the smaller side of the image; 0 for all other
            directions.
        out: `[1 + q, B, *S]` to write into; `x` must then need no gradient. `x` may be `out[0]`
            itself, which saves a copy, but must not overlap `out` in any other way.
        first_direction: index of the first direction drawn here, for directions drawn in pieces.
        first_image: index of `x[0]` in the whole batch, for images given in pieces.

    Returns:
        `[1 + q, B, *S]`, contiguous: row 0 is `x`, and row `1 + k` is `x + mu * u_k`.
        Differentiable in `x`.

    Raises:
        InputError: an argument has a wrong shape, dtype, device, name or range.
    """
    if out is None:
        return torch.ops.bidfmkd.perturb(
            x, state, num_directions, mu, directions, grid, first_direction, first_image
        )
    if x.requires_grad and torch.is_grad_enabled():
        raise InputError(
            "perturb: out= keeps no graph, but x requires a gradient; "
            "pass x.detach(), or call without out="
        )
    torch.ops.bidfmkd.perturb_out(
        x, state, num_directions, mu, directions, grid, first_direction, first_image, out
    )
    return out


def estimate_gradient(
    differences: Tensor,
    state: Tensor,
    shape: Sequence[int],
    mu: float,
    directions: str = "rademacher",
    grid: int = 0,
    *,
    first_direction: int = 0,
    first_image: int = 0,
) -> Tensor:
    """Return the zeroth-order gradient of each image from loss differences (paper, section 3.3).

    The gradient of image b is `s / (q mu) * sum_k differences[k, b] * u_kb`, where `s` is the
    dimension of the space that the directions `u` span. The directions are drawn again from
    `state`, so that no output of `perturb` has to be kept.

    >>> x, state = torch.rand(4, 3, 8, 8), torch.tensor([0, 1])
    >>> losses = perturb(x, state, 10, 0.05).flatten(2).norm(dim=2)  # [1 + q, B]
    >>> estimate_gradient(losses[1:] - losses[0], state, x.shape, 0.05).shape
    torch.Size([4, 3, 8, 8])

    Args:
        differences: `[q, B]`, float32 or float64: `L(x_b + mu u_kb) - L(x_b)`, where L is the loss.
        shape: `x.shape`, `[B, *S]`.
        state, mu, directions, grid, first_direction, first_image: as given to `perturb`.

    Returns:
        `[B, *S]`: one gradient per image, not divided by B. It is float64 if the differences are,
        and float32 otherwise.

    Raises:
        InputError: an argument has a wrong shape, dtype, device, name or range.
    """
    return torch.ops.bidfmkd.estimate_gradient(
        differences, state, tuple(shape), mu, directions, grid, first_direction, first_image
    )


def zo_kd_gradient(
    scores: Tensor,
    labels: Tensor,
    state: Tensor,
    shape: Sequence[int],
    mu: float,
    student_scores: Tensor | None = None,
    boundary_weight: float = 0.0,
    scores_kind: str = "logits",
    divergence: str = "l1",
    directions: str = "rademacher",
    grid: int = 0,
    *,
    first_direction: int = 0,
    first_image: int = 0,
) -> tuple[Tensor, Tensor]:
    """Return the zeroth-order gradient of the recovery objective, from the API's scores.

    For a point x with the wanted class y, the API A and the student f, the objective is

        CE(A(x), y) - boundary_weight * [argmax A(x) == argmax f(x)] * D(A(x), f(x))

    (paper, section 3.3). The student is evaluated at the image itself only and counts as constant.

    Args:
        scores: `[1 + q, B, n_classes]`, the API's answers at the points of `perturb`; float32,
            float64, float16 or bfloat16.
        labels: `[B]` int64, the wanted classes, from 0 to n_classes - 1 (checked on the CPU only,
            since a check on a GPU would make the host wait).
        state, mu, directions, grid, first_direction, first_image: as given to `perturb`.
        shape: `x.shape`, `[B, *S]`.
        student_scores: `[B, n_classes]` in the same kind as `scores`.
        boundary_weight: the paper's lambda; needs `student_scores` unless it is 0.
        scores_kind: `logits`, `probabilities` (those below 1e-7 count as 1e-7 in logarithms) or
            `log_probabilities`.
        divergence: D: `l1` (the sum over classes of the differences of the scores as given),
            `l1_prob` (the same of the probabilities) or `kl` (KL(API || student)).

    Returns:
        The gradient `[B, *S]`, one per image, and the objective at the images themselves, `[B]`.
        Both are float64 if the scores are, and float32 otherwise.

    Raises:
        InputError: an argument has a wrong shape, dtype, device, name or range.
    """
    return torch.ops.bidfmkd.zo_kd_gradient(
        scores,
        labels,
        state,
        tuple(shape),
        mu,
        student_scores,
        boundary_weight,
        scores_kind,
        divergence,
        directions,
        grid,
        first_direction,
        first_image,
    )


def kd_loss(
    student_logits: Tensor,
    teacher_scores: Tensor,
    temperature: float = 1.0,
    divergence: str = "kl",
    scores_kind: str = "logits",
) -> Tensor:
    """Return the knowledge-distillation loss `T^2 * mean_n D(teacher_n, student_n)`.

    D is summed over the classes, and both sides are softened by the temperature T (Hinton et al.,
    2015).

    Args:
        student_logits: `[N, n_classes]`; leading task dimensions `[*E, N, n_classes]` give one loss
            per task.
        teacher_scores: the same shape, of `scores_kind`; constant (no gradient flows to it).
        temperature: T.
        divergence: D: `kl` (KL(teacher || student)), `l1_prob` (differences of probabilities) or
            `l1` (differences of logits).
        scores_kind: what the teacher's scores are: `logits`, `probabilities` or
            `log_probabilities`.

    Returns:
        A scalar (or `[*E]`) in the dtype of the student. Differentiable twice in `student_logits`,
        also under `torch.func` (`grad`, `vmap`, `jvp`, `hessian`).

    Raises:
        InputError: an argument has a wrong shape, dtype, device, name or range.
    """
    return differentiable_kd_loss(
        student_logits, teacher_scores, temperature, divergence, scores_kind
    )
