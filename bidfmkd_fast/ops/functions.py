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
    """Points to query for a zeroth-order gradient: the images and `num_directions` small steps away
    from each.

    Args:
        x: images `[B, *S]`, float32 (native) or float64 (reference).
        state: int64 `[seed, step]` on the device of `x`; read by the kernel, so a captured graph
            draws anew when it changes. Only the low 32 bits of the step count.
        num_directions: q.
        mu: length of a step along a unit direction, in the units of `x`.
        directions: `rademacher` (entries +-1/sqrt(d)), `sphere` (normals, normalised), `gaussian`
            (entries N(0, 1/d), not normalised) or `lowres` (per channel a `grid` x `grid` field of
            normals, bilinear, normalised).
        grid: side of the `lowres` field, from 1 to the smaller side of the image; 0 for the others.
        out: `[1 + q, B, *S]` to write into; `x` must then need no gradient. Of its memory `x` may
            be `out[0]` itself, which costs no copy, and nothing else.
        first_direction: index of the first direction drawn here, when the directions are drawn in
            pieces.
        first_image: index of `x[0]` in the whole batch, when the images are split.

    Returns:
        `[1 + q, B, *S]`, contiguous; row 0 is `x`, row `1 + k` is `x + mu * u_k`. Differentiable in
        `x`.

    Raises:
        InputError: a wrong shape, dtype, device, name or range; the message says which.
    """
    if out is None:
        return torch.ops.bidfmkd.perturb(
            x, state, num_directions, mu, directions, grid, first_direction, first_image
        )
    if x.requires_grad and torch.is_grad_enabled():
        raise InputError(
            "perturb: out= keeps no graph, and x requires a gradient; pass x.detach() or leave out= away"
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
    """Zeroth-order gradient of each image from loss differences (paper, equation 4).

    `g_b = s / (q mu) * sum_k differences[k, b] * u_kb`, where `s` is the dimension of the space the
    directions span. The directions are drawn again from `state`; nothing of `perturb`'s output is
    needed.

    Args:
        differences: `[q, B]`, `L(x_b + mu u_kb) - L(x_b)`, float32 or float64.
        shape: `x.shape`, `[B, *S]`.
        state, mu, directions, grid, first_direction, first_image: as given to `perturb`.

    Returns:
        `[B, *S]`, one gradient per image, not divided by B; float64 if the differences are, else
        float32.

    Raises:
        InputError: a wrong shape, dtype, device, name or range; the message says which.
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
    """Zeroth-order gradient of the recovery objective, straight from the black box's scores.

    The objective of a point is `CE(A(x), y) - boundary_weight * [argmax A(x) == argmax f(x)] *
    D(A(x), f(x))` (paper, equations 3 and 8); the student `f` is asked at the image itself only,
    and held constant.

    Args:
        scores: `[1 + q, B, n_classes]`, the answers at the points of `perturb`; float32, float64,
            float16 or bfloat16.
        labels: `[B]` int64, the wanted classes, 0..n_classes-1 (checked on the CPU only).
        state, mu, directions, grid, first_direction, first_image: as given to `perturb`.
        shape: `x.shape`, `[B, *S]`.
        student_scores: `[B, n_classes]` in the same kind as `scores`.
        boundary_weight: lambda; needs `student_scores` unless 0.
        scores_kind: `logits`, `probabilities` (floored at 1e-7 inside logarithms) or
            `log_probabilities`.
        divergence: `l1` (sum over classes of the scores as given), `l1_prob` (of probabilities),
            `kl` (API || student).

    Returns:
        gradient `[B, *S]`, per image, and loss `[B]`, the full objective at the images; float64 if
        the scores are, else float32.

    Raises:
        InputError: a wrong shape, dtype, device, name or range; the message says which.
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
    """Knowledge-distillation loss: `T^2 * mean_n D(teacher_n, student_n)`, summed over classes
    (Hinton et al., 2015).

    Args:
        student_logits: `[N, n_classes]`; leading task dimensions `[*E, N, n_classes]` give one loss
            per task.
        teacher_scores: the same shape, of `scores_kind`; constant (no gradient flows to it).
        temperature: T; both sides are softened by it.
        divergence: `kl` (KL(teacher || student)), `l1_prob` or `l1` (logits against logits).
        scores_kind: `logits`, `probabilities` or `log_probabilities`, of the teacher.

    Returns:
        A scalar (or `[*E]`) in the dtype of the student. Differentiable twice in `student_logits`,
        also under `torch.func` (`grad`, `vmap`, `jvp`, `hessian`).

    Raises:
        InputError: a wrong shape, dtype, device, name or range; the message says which.
    """
    return differentiable_kd_loss(
        student_logits, teacher_scores, temperature, divergence, scores_kind
    )
