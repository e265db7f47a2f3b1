"""Run the kernels of `_C` that draw directions or compare scores on torch tensors.

`_C` knows neither torch nor Python objects: each call hands over addresses, sizes, and the place
where the kernel runs (threads, or a CUDA device and stream). Every function here computes what
the function of the same name in `reference.py` specifies. `native_norm_pool.py` holds the kernels
of `norm_pool`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from bidfmkd_fast.ops.backend import _C
from bidfmkd_fast.ops.directions import DIRECTIONS
from bidfmkd_fast.ops.scores import DIVERGENCES, SCORES_KINDS
from bidfmkd_fast.runtime.allocator import empty_reused

SCORE_TYPES = (torch.float32, torch.float16, torch.bfloat16)  # as ScoreType in csrc/loss/half.h
# Elements per thread that perturb writes, and that the gradient sums. With fewer elements, starting
# a thread costs more time than the thread saves (docs/architecture.md).
WRITTEN_PER_THREAD = {
    "rademacher": 1 << 21,
    "sphere": 1 << 20,
    "gaussian": 1 << 20,
    "lowres": 1 << 20,
}
SUMMED_PER_THREAD = {
    "rademacher": 1 << 22,
    "sphere": 1 << 20,
    "gaussian": 1 << 20,
    "lowres": 1 << 20,
}


def place(tensor: Tensor, elements: int = 0, per_thread: int = 1) -> tuple[int, int, int]:
    """Return threads, CUDA device and stream for a kernel that works where `tensor` is.

    On CUDA the kernel runs on torch's current stream. On the CPU (device -1) it gets a thread for
    every `per_thread` of its `elements`, at most as many as torch uses.
    """
    if tensor.is_cuda:
        return 1, tensor.get_device(), torch.cuda.current_stream(tensor.device).cuda_stream
    return max(1, min(torch.get_num_threads(), elements // per_thread)), -1, 0


def _workspace(like: Tensor, name: str, *sizes: int) -> Tensor | None:
    """Return the memory in which the CUDA kernels of one call pass values on; None on the CPU."""
    if not like.is_cuda:
        return None
    n = getattr(_C, f"{name}_workspace")(*sizes, like.get_device())
    return torch.empty(n, dtype=torch.float32, device=like.device)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _geometry(
    shape: Sequence[int], directions: str, grid: int
) -> tuple[int, int, int, int, int, int, int]:
    """Return the fields of `Geometry` in csrc/random/directions.h."""
    channels, height, width = shape[1:] if directions == "lowres" else (1, 1, 1)
    return (
        shape[0],
        math.prod(shape[1:]),
        DIRECTIONS.index(directions),
        channels,
        height,
        width,
        grid,
    )


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
    """Write the points to query into `out`; see `reference.perturb_out`."""
    assert _C is not None
    x, state = x.contiguous(), state.contiguous()
    target = (
        out if out.is_contiguous() else torch.empty_like(out, memory_format=torch.contiguous_format)
    )
    geometry = _geometry(x.shape, directions, grid)
    workspace = _workspace(target, "perturb", num_directions, *geometry)
    _C.perturb(
        x.data_ptr(),
        state.data_ptr(),
        _address(workspace),
        target.data_ptr(),
        num_directions,
        *geometry,
        mu,
        first_direction,
        first_image,
        *place(target, target.numel(), WRITTEN_PER_THREAD[directions]),
    )
    if target is not out:
        out.copy_(target)


def empty_points(x: Tensor, num_directions: int) -> Tensor:
    """Return an uninitialised `[1 + q, B, *S]` for `perturb_out`, in memory that is reused."""
    return empty_reused((1 + num_directions, *x.shape), x)


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
    """Return the gradient estimated from loss differences; see `reference.estimate_gradient`."""
    assert _C is not None
    differences, state = differences.float().contiguous(), state.contiguous()
    gradient = torch.empty(tuple(shape), dtype=torch.float32, device=differences.device)
    num_directions = differences.shape[0]
    geometry = _geometry(shape, directions, grid)
    workspace = _workspace(gradient, "gradient", num_directions, *geometry)
    _C.estimate_gradient(
        differences.data_ptr(),
        state.data_ptr(),
        _address(workspace),
        gradient.data_ptr(),
        num_directions,
        *geometry,
        mu,
        first_direction,
        first_image,
        *place(gradient, gradient.numel() * num_directions, SUMMED_PER_THREAD[directions]),
    )
    return gradient


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
    """Return the gradient estimated from scores, and the losses; see `reference.zo_kd_gradient`."""
    assert _C is not None
    same = student_scores is None or student_scores.dtype == scores.dtype
    dtype = scores.dtype if scores.is_cuda and same else torch.float32
    scores, labels, state = scores.to(dtype).contiguous(), labels.contiguous(), state.contiguous()
    student = None if student_scores is None else student_scores.to(dtype).contiguous()
    gradient = torch.empty(tuple(shape), dtype=torch.float32, device=scores.device)
    loss = torch.empty(shape[0], dtype=torch.float32, device=scores.device)
    num_directions = scores.shape[0] - 1
    geometry = _geometry(shape, directions, grid)
    workspace = _workspace(gradient, "gradient", num_directions, *geometry)
    _C.zo_kd_gradient(
        scores.data_ptr(),
        labels.data_ptr(),
        _address(student),
        state.data_ptr(),
        _address(workspace),
        gradient.data_ptr(),
        loss.data_ptr(),
        SCORE_TYPES.index(dtype),
        num_directions,
        scores.shape[2],
        *geometry,
        mu,
        boundary_weight,
        SCORES_KINDS.index(scores_kind),
        DIVERGENCES.index(divergence),
        first_direction,
        first_image,
        *place(gradient, gradient.numel() * num_directions, SUMMED_PER_THREAD[directions]),
    )
    return gradient, loss


def kd_loss(
    student: Tensor, teacher: Tensor, temperature: float, divergence: str, scores_kind: str
) -> Tensor:
    """Return the distillation loss; see `reference.kd_loss`."""
    assert _C is not None
    dtype = student.dtype
    student, teacher = _floats(student, teacher)
    loss = torch.empty(student.shape[:-2], dtype=torch.float32, device=student.device)
    _C.kd_loss(
        student.data_ptr(),
        teacher.data_ptr(),
        loss.data_ptr(),
        *_kd(student, temperature, divergence, scores_kind),
    )
    return loss.to(dtype)


def kd_loss_backward(
    grad: Tensor,
    student: Tensor,
    teacher: Tensor,
    temperature: float,
    divergence: str,
    scores_kind: str,
) -> Tensor:
    """Return the derivative of `kd_loss`; see `reference.kd_loss_backward`."""
    assert _C is not None
    dtype = student.dtype
    grad, student, teacher = _floats(grad, student, teacher)
    out = torch.empty_like(student)
    _C.kd_loss_backward(
        grad.data_ptr(),
        student.data_ptr(),
        teacher.data_ptr(),
        out.data_ptr(),
        *_kd(student, temperature, divergence, scores_kind),
    )
    return out.to(dtype)


def kd_loss_double_backward(
    grad_out: Tensor,
    grad: Tensor,
    student: Tensor,
    teacher: Tensor,
    temperature: float,
    divergence: str,
    scores_kind: str,
) -> tuple[Tensor, Tensor]:
    """Return the second derivative of `kd_loss`; see `reference.kd_loss_double_backward`."""
    assert _C is not None
    dtype = student.dtype
    grad_out, grad, student, teacher = _floats(grad_out, grad, student, teacher)
    grad_grad, grad_student = torch.empty_like(grad), torch.empty_like(student)
    _C.kd_loss_double_backward(
        grad_out.data_ptr(),
        grad.data_ptr(),
        student.data_ptr(),
        teacher.data_ptr(),
        grad_grad.data_ptr(),
        grad_student.data_ptr(),
        *_kd(student, temperature, divergence, scores_kind),
    )
    return grad_grad.to(dtype), grad_student.to(dtype)


def _floats(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.float().contiguous() for tensor in tensors)


def _kd(
    student: Tensor, temperature: float, divergence: str, scores_kind: str
) -> tuple[int, int, int, float, int, int, int, int, int]:
    """Return the sizes, the settings and the place that end every kd_loss call of `_C`."""
    n_images, n_classes = student.shape[-2:]
    kinds = (SCORES_KINDS.index(scores_kind), DIVERGENCES.index(divergence))
    return math.prod(student.shape[:-2]), n_images, n_classes, temperature, *kinds, *place(student)
