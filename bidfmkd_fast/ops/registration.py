"""The ops as torch sees them: schema, checks, fake, implementation and derivative of each.

A public function below is a thin door to `torch.ops.bidfmkd.<name>`. The implementation picks the native kernel or the
reference (`native.selects`), so eager code, `torch.compile`, CUDA graphs and `torch.func` all take the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bidfmkd_fast.errors import InputError
from bidfmkd_fast.ops import native, reference
from bidfmkd_fast.ops.checks import (
    check_estimate_gradient,
    check_kd_loss,
    check_labels,
    check_memory,
    check_perturb,
    check_zo_kd_gradient,
)
from bidfmkd_fast.ops.kd_loss_autograd import kd_loss_by, plain_kd_loss, register_vmap_rules

_DRAWING = "float mu, str directions, int grid, SymInt first_direction, SymInt first_image"
_KD = "float temperature, str divergence, str scores_kind"

_library = torch.library.Library("bidfmkd", "DEF")
_library.define(f"perturb(Tensor x, Tensor state, SymInt num_directions, {_DRAWING}) -> Tensor")
_library.define(
    f"perturb_out(Tensor x, Tensor state, SymInt num_directions, {_DRAWING}, Tensor(a!) out) -> ()"
)
_library.define(
    f"estimate_gradient(Tensor differences, Tensor state, SymInt[] shape, {_DRAWING}) -> Tensor"
)
_library.define(
    "zo_kd_gradient(Tensor scores, Tensor labels, Tensor state, SymInt[] shape, float mu, Tensor? student_scores, "
    "float boundary_weight, str scores_kind, str divergence, str directions, int grid, SymInt first_direction, "
    "SymInt first_image) -> (Tensor, Tensor)"
)
_library.define(f"kd_loss(Tensor student, Tensor teacher, {_KD}) -> Tensor")
_library.define(f"kd_loss_backward(Tensor grad, Tensor student, Tensor teacher, {_KD}) -> Tensor")
_library.define(
    f"kd_loss_double_backward(Tensor grad_out, Tensor grad, Tensor student, Tensor teacher, {_KD}) -> (Tensor, Tensor)"
)


def _perturb(x: Tensor, state: Tensor, num_directions: int, *drawing: Any) -> Tensor:
    check_perturb(x, state, num_directions, *drawing)
    if native.selects("perturb", x):
        out = native.empty_points(x, num_directions)
        native.perturb_out(x, state, num_directions, *drawing, out)  # type: ignore[call-arg]
    else:
        out = x.new_empty((1 + num_directions, *x.shape))
        reference.perturb_out(x, state, num_directions, *drawing, out)  # type: ignore[call-arg]
    return out


def _perturb_out(x: Tensor, state: Tensor, num_directions: int, *drawing_and_out: Any) -> None:
    check_perturb(x, state, num_directions, *drawing_and_out)
    check_memory(x, state, drawing_and_out[-1])
    backend = native if native.selects("perturb", x) else reference
    backend.perturb_out(x, state, num_directions, *drawing_and_out)


def _estimate_gradient(differences: Tensor, *arguments: Any) -> Tensor:
    check_estimate_gradient(differences, *arguments)
    backend = native if native.selects("estimate_gradient", differences) else reference
    return backend.estimate_gradient(differences, *arguments)


def _zo_kd_gradient(scores: Tensor, labels: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    check_zo_kd_gradient(scores, labels, *arguments)
    check_labels("zo_kd_gradient", labels, scores.shape[2])
    backend = native if native.selects("zo_kd_gradient", scores) else reference
    return backend.zo_kd_gradient(scores, labels, *arguments)


def _kd_loss(student: Tensor, teacher: Tensor, *kd: Any) -> Tensor:
    check_kd_loss(student, teacher, *kd)
    backend = native if native.selects("kd_loss", student, teacher) else reference
    return backend.kd_loss(student, teacher, *kd)


def _kd_loss_backward(grad: Tensor, student: Tensor, teacher: Tensor, *kd: Any) -> Tensor:
    check_kd_loss(student, teacher, *kd)
    backend = native if native.selects("kd_loss", grad, student, teacher) else reference
    return backend.kd_loss_backward(grad, student, teacher, *kd)


def _kd_loss_double_backward(
    grad_out: Tensor, grad: Tensor, student: Tensor, teacher: Tensor, *kd: Any
) -> tuple[Tensor, Tensor]:
    check_kd_loss(student, teacher, *kd)
    backend = native if native.selects("kd_loss", grad_out, grad, student, teacher) else reference
    return backend.kd_loss_double_backward(grad_out, grad, student, teacher, *kd)


_plain_kd_loss = plain_kd_loss(_kd_loss, _kd_loss_backward, _kd_loss_double_backward)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _perturb_fake(x: Tensor, state: Tensor, num_directions: int, *drawing: Any) -> Tensor:
    check_perturb(x, state, num_directions, *drawing)
    return x.new_empty((1 + num_directions, *x.shape))


def _perturb_out_fake(x: Tensor, state: Tensor, num_directions: int, *drawing_and_out: Any) -> None:
    check_perturb(x, state, num_directions, *drawing_and_out)


def _estimate_gradient_fake(
    differences: Tensor, state: Tensor, shape: Sequence[int], *drawing: Any
) -> Tensor:
    check_estimate_gradient(differences, state, shape, *drawing)
    return differences.new_empty(shape, dtype=_wide(differences))


def _zo_kd_gradient_fake(
    scores: Tensor, labels: Tensor, state: Tensor, shape: Sequence[int], *arguments: Any
) -> tuple[Tensor, Tensor]:
    check_zo_kd_gradient(scores, labels, state, shape, *arguments)
    dtype = _wide(scores)
    return scores.new_empty(shape, dtype=dtype), scores.new_empty(shape[:1], dtype=dtype)


def _kd_loss_fake(student: Tensor, teacher: Tensor, *kd: Any) -> Tensor:
    check_kd_loss(student, teacher, *kd)
    return student.new_empty(student.shape[:-2])


def _kd_loss_backward_fake(grad: Tensor, student: Tensor, *arguments: Any) -> Tensor:
    return student.new_empty(student.shape)


def _kd_loss_double_backward_fake(
    grad_out: Tensor, grad: Tensor, student: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor]:
    return student.new_empty(grad.shape), student.new_empty(student.shape)


for _name, _implementation, _fake in (
    ("perturb", _perturb, _perturb_fake),
    ("perturb_out", _perturb_out, _perturb_out_fake),
    ("estimate_gradient", _estimate_gradient, _estimate_gradient_fake),
    ("zo_kd_gradient", _zo_kd_gradient, _zo_kd_gradient_fake),
    ("kd_loss", _kd_loss, _kd_loss_fake),
    ("kd_loss_backward", _kd_loss_backward, _kd_loss_backward_fake),
    ("kd_loss_double_backward", _kd_loss_double_backward, _kd_loss_double_backward_fake),
):
    for _key in ("CPU", "CUDA"):
        _library.impl(_name, _implementation, _key)
    torch.library.register_fake(f"bidfmkd::{_name}", _fake, lib=_library)


# perturb is linear in x with coefficient 1 for every point.
torch.library.register_autograd(
    "bidfmkd::perturb",
    lambda context, grad: (grad.sum(0), *[None] * 7),
    lib=_library,
)


def _save_kd(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.temperature, ctx.divergence, ctx.scores_kind = inputs
    ctx.save_for_backward(*tensors)


def _kd(context: Any) -> tuple[float, str, str]:
    return context.temperature, context.divergence, context.scores_kind


def _kd_loss_autograd(context: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    student, teacher = context.saved_tensors
    out = torch.ops.bidfmkd.kd_loss_backward(grad, student, teacher, *_kd(context))
    return out, None, None, None, None


def _kd_loss_backward_autograd(context: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    grad, student, teacher = context.saved_tensors
    grads = torch.ops.bidfmkd.kd_loss_double_backward(
        grad_out, grad, student, teacher, *_kd(context)
    )
    return *grads, None, None, None, None


torch.library.register_autograd(
    "bidfmkd::kd_loss", _kd_loss_autograd, setup_context=_save_kd, lib=_library
)
torch.library.register_autograd(
    "bidfmkd::kd_loss_backward", _kd_loss_backward_autograd, setup_context=_save_kd, lib=_library
)
register_vmap_rules(_library)


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
    return kd_loss_by(
        _plain_kd_loss, student_logits, teacher_scores, temperature, divergence, scores_kind
    )
