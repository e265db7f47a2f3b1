"""Loads the native module `_C` once, keeps its error, and runs its kernels on torch tensors.

`_C` knows neither torch nor Python objects: it takes addresses, sizes and (on CUDA) a stream.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from bidfmkd_fast.errors import InputError
from bidfmkd_fast.runtime.allocator import empty_reused

_C: ModuleType | None
load_error: str | None = None
try:
    from bidfmkd_fast import _C  # type: ignore[attr-defined, no-redef]
except ImportError as error:
    _C = None
    load_error = f"{type(error).__name__}: {error}"
    if (Path(__file__).parents[2] / "CMakeLists.txt").is_file():
        load_error += (
            "; this is the source tree, which hides an installed package: run from another folder"
        )

_devices = () if _C is None else tuple(_C.build_info()["devices"])

DIRECTIONS = ("rademacher", "sphere", "gaussian", "lowres")
SCORES_KINDS = ("logits", "probabilities", "log_probabilities")
DIVERGENCES = ("l1", "l1_prob", "kl")
SCORE_TYPES = (torch.float32, torch.float16, torch.bfloat16)
BACKENDS = ("auto", "native", "reference")
# Elements that perturb writes and the gradient sums: below, a thread costs more than it saves
# (docs/architecture.md).
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
ELEMENTS_PER_NORM_THREAD = 1 << 22  # one pass over memory: a second thread gains little

_backend = "auto"
_warned = False


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Which code runs the ops inside the block, in the whole process: `auto`, `native` or
    `reference`.

    `auto` takes a native kernel where there is one and the reference elsewhere (float64, no build
    for the device); `native` raises where there is none instead of falling back; `reference` is
    plain torch.

    Raises:
        InputError: an unknown name, or `native` when the native module could not be loaded.
    """
    global _backend
    if name not in BACKENDS:
        raise InputError(f"use_backend: name must be one of {', '.join(BACKENDS)}; got {name!r}")
    if name == "native" and _C is None:
        raise InputError(
            f"use_backend: the native module is not available ({load_error}); reinstall bidfmkd-fast"
        )
    before, _backend = _backend, name
    try:
        yield
    finally:
        _backend = before


def build_info() -> dict[str, Any] | None:
    """What `_C` was built for and runs with, or None when it could not be loaded (`load_error`
    says why).
    """
    return None if _C is None else dict(_C.build_info())


def selects(op: str, *tensors: Tensor) -> bool:
    """Whether the native kernel serves this call; raises if the caller insists on native and it
    does not.
    """
    if _backend == "reference":
        return False
    reason = _why_not(*tensors)
    if reason is None:
        return True
    if _backend == "native":
        raise InputError(f"{op}: backend 'native' was asked for, but {reason}")
    _warn_once(reason)
    return False


def device_problem(device: torch.device) -> str | None:
    """Why the kernels in `_C` do not serve float32 tensors on this device; None if they do."""
    if _C is None:
        return f"the native module could not be loaded ({load_error})"
    if device.type not in _devices:
        hint = (
            "; install it again with BIDFMKD_CUDA=ON in the environment"
            if device.type == "cuda"
            else ""
        )
        return f"this build has no kernels for device '{device.type}'{hint}"
    return _cuda_problem(device.index or 0) if device.type == "cuda" else None


@functools.cache
def _cuda_problem(index: int) -> str | None:
    assert _C is not None
    if not (problem := _C.cuda_problem(index)):
        return None
    built = ", ".join(_C.build_info()["cuda_architectures"])
    return f"the CUDA kernels, built for {built}, do not run on cuda:{index}: {problem}"


def _why_not(*tensors: Tensor) -> str | None:
    for tensor in tensors:
        if (problem := device_problem(tensor.device)) is not None:
            return problem
        if tensor.dtype == torch.float64:
            return "the kernels compute in float32 and a float64 tensor came"
    return None


def _warn_once(reason: str) -> None:
    """Reasons that reinstalling would remove are told once; float64 and other devices are the
    caller's choice.
    """
    global _warned
    if not _warned and (_C is None or "CUDA" in reason):
        _warned = True
        warnings.warn(
            f"bidfmkd_fast: {reason}; plain torch is used, which is many times slower. "
            "`python -m bidfmkd_fast` shows the details.",
            RuntimeWarning,
            stacklevel=3,
        )


def _place(tensor: Tensor, elements: int = 0, per_thread: int = 1) -> tuple[int, int, int]:
    """Threads, CUDA device and stream of a call of `elements` elements: where `tensor` is, on
    torch's stream there.
    """
    if tensor.is_cuda:
        return 1, tensor.get_device(), torch.cuda.current_stream(tensor.device).cuda_stream
    return max(1, min(torch.get_num_threads(), elements // per_thread)), -1, 0


def _workspace(like: Tensor, name: str, *sizes: int) -> Tensor | None:
    """What the CUDA kernels of a call keep between each other."""
    if not like.is_cuda:
        return None
    n = getattr(_C, f"{name}_workspace")(*sizes, like.get_device())
    return torch.empty(n, dtype=torch.float32, device=like.device)


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def _geometry(
    shape: Sequence[int], directions: str, grid: int
) -> tuple[int, int, int, int, int, int, int]:
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
    """The kernel behind `perturb`; see `reference.perturb_out`."""
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
        *_place(target, target.numel(), WRITTEN_PER_THREAD[directions]),
    )
    if target is not out:
        out.copy_(target)


def empty_points(x: Tensor, num_directions: int) -> Tensor:
    """An uninitialised `[1 + q, B, *S]` for `perturb_out`, from memory kept warm between calls."""
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
    """The kernel behind `estimate_gradient`; see `reference.estimate_gradient`."""
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
        *_place(gradient, gradient.numel() * num_directions, SUMMED_PER_THREAD[directions]),
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
    """The kernel behind `zo_kd_gradient`; see `reference.zo_kd_gradient`."""
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
        *_place(gradient, gradient.numel() * num_directions, SUMMED_PER_THREAD[directions]),
    )
    return gradient, loss


def kd_loss(
    student: Tensor, teacher: Tensor, temperature: float, divergence: str, scores_kind: str
) -> Tensor:
    """The kernel behind `kd_loss`; see `reference.kd_loss`."""
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
    """The kernel behind the derivative of `kd_loss`; see `reference.kd_loss_backward`."""
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
    """The kernel behind the second derivative of `kd_loss`; see
    `reference.kd_loss_double_backward`.
    """
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


Saved = tuple[Tensor, ...]  # place, normalised, mean, r; see csrc/cpu/kernels.h


def norm_pool(images: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Saved]:
    """The kernel behind `ops.norm_pool`, on images in `norm_pool_format`; its output and what the
    derivatives need.
    """
    assert _C is not None
    n_images, channels, height, width = images.shape
    cells = torch.empty(
        (n_images, channels, height // 2, width // 2),
        device=images.device,
        memory_format=norm_pool_format(images),
    )
    saved = (
        torch.empty_like(cells, dtype=torch.int32),
        torch.empty_like(cells),
        *images.new_empty(2, channels),
    )
    _C.norm_pool(
        *_norm_pool(images),
        *_addresses(images, weight, bias),
        eps,
        *_addresses(cells, *saved),
        *_norm_place(images),
    )
    return cells, saved


def norm_pool_backward(
    grad: Tensor, images: Tensor, weight: Tensor, saved: Saved
) -> tuple[Tensor, Tensor, Tensor]:
    """The kernel behind its derivative: gradients of images, weight and bias."""
    assert _C is not None
    out = (torch.empty_like(images), torch.empty_like(weight), torch.empty_like(weight))
    _C.norm_pool_backward(
        *_norm_pool(images),
        *_addresses(grad, images, weight, *saved),
        *_addresses(*out),
        *_norm_place(images),
    )
    return out


def norm_pool_double_backward(
    grad_images: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    grad: Tensor,
    images: Tensor,
    weight: Tensor,
    saved: Saved,
) -> tuple[Tensor, Tensor, Tensor]:
    """The kernel behind the second derivative: gradients of `grad`, images and weight."""
    assert _C is not None
    out = (torch.empty_like(grad), torch.empty_like(images), torch.empty_like(weight))
    _C.norm_pool_double_backward(
        *_norm_pool(images),
        *_addresses(grad_images, grad_weight, grad_bias, grad, images, weight, *saved),
        *_addresses(*out),
        *_norm_place(images),
    )
    return out


def _norm_pool(images: Tensor) -> tuple[int, int, int, int]:
    n_images, channels, height, width = images.shape
    return n_images, height, width, channels


def _addresses(*tensors: Tensor) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]


def norm_pool_format(images: Tensor) -> torch.memory_format:
    """How norm_pool's kernels want images and gradients in memory."""
    return torch.contiguous_format if images.is_cuda else torch.channels_last


def _norm_place(images: Tensor) -> tuple[int, int, int]:
    return _place(images, images.numel(), ELEMENTS_PER_NORM_THREAD)


def _kd(
    student: Tensor, temperature: float, divergence: str, scores_kind: str
) -> tuple[int, int, int, float, int, int, int, int, int]:
    n_images, n_classes = student.shape[-2:]
    kinds = (SCORES_KINDS.index(scores_kind), DIVERGENCES.index(divergence))
    return math.prod(student.shape[:-2]), n_images, n_classes, temperature, *kinds, *_place(student)
