"""Check the arguments of the ops, so that an error comes before a kernel sees an address."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bidfmkd_fast.errors import InputError, InputTypeError
from bidfmkd_fast.ops.directions import DIRECTIONS
from bidfmkd_fast.ops.scores import DIVERGENCES, SCORES_KINDS

_FULL = (torch.float32, torch.float64)
_SCORES = (*_FULL, torch.float16, torch.bfloat16)
# Limits of mu. A step of length mu is added to float32 images, and the estimate is divided by mu:
# between these limits both results stay finite.
_SHORTEST_STEP, _LONGEST_STEP = 1e-30, 1e30


def _choice(op: str, name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise InputError(f"{op}: {name} must be one of {', '.join(allowed)}; got {value!r}")


def _dtype(
    op: str, name: str, tensor: Tensor, allowed: Sequence[torch.dtype], hint: str = ""
) -> None:
    if tensor.dtype not in allowed:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        raise InputTypeError(
            f"{op}: {name} must be {wanted}; got {str(tensor.dtype).removeprefix('torch.')}{hint}"
        )


def _device(op: str, wanted: torch.device, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != wanted:
            raise InputError(
                f"{op}: {name} must be on {wanted} like the other tensors; got {tensor.device}"
            )


def _drawing(
    op: str, shape: Sequence[int], state: Tensor, mu: float, directions: str, grid: int, first: int
) -> None:
    """Check the arguments that all ops with random directions share."""
    _choice(op, "directions", directions, DIRECTIONS)
    if len(shape) < 2:
        raise InputError(
            f"{op}: images must have a batch dimension and more, [B, *S]; got shape {list(shape)}"
        )
    if state.dtype != torch.int64 or tuple(state.shape) != (2,):
        got = f"{str(state.dtype).removeprefix('torch.')} {list(state.shape)}"
        raise InputTypeError(f"{op}: state must be an int64 tensor [seed, step]; got {got}")
    check_mu(op, mu)
    if first < 0:
        raise InputError(f"{op}: first_direction and first_image must not be negative; got {first}")
    if directions == "lowres":
        if len(shape) != 4:
            raise InputError(
                f"{op}: directions 'lowres' need images [B, C, H, W]; got shape {list(shape)}"
            )
        if not 1 <= grid <= min(shape[2:]):
            raise InputError(
                f"{op}: grid must be from 1 to the image's smaller side, {min(shape[2:])}; "
                f"got {grid}"
            )
    check_grid(op, directions, grid)


def check_mu(op: str, mu: float) -> None:
    """Refuse a `mu` for which float32 points or gradients would not be finite."""
    if not mu > 0 or mu == float("inf"):
        raise InputError(f"{op}: the step length (mu) must be a positive number; got {mu}")
    if not _SHORTEST_STEP <= mu <= _LONGEST_STEP:
        wanted = f"from {_SHORTEST_STEP:g} to {_LONGEST_STEP:g}, which float32 holds"
        raise InputError(f"{op}: the step length (mu) must be {wanted}; got {mu:g}")


def check_grid(op: str, directions: str, grid: int) -> None:
    """Refuse unknown `directions`, and a `grid` that fits no image with these directions."""
    _choice(op, "directions", directions, DIRECTIONS)
    if directions == "lowres" and grid < 1:
        raise InputError(
            f"{op}: grid must be from 1 to the image's smaller side with directions 'lowres'; "
            f"got {grid}"
        )
    if directions != "lowres" and grid != 0:
        raise InputError(
            f"{op}: grid must be 0 with directions {directions!r}, since only 'lowres' uses it; "
            f"got {grid}"
        )


def check_perturb(
    x: Tensor,
    state: Tensor,
    num_directions: int,
    mu: float,
    directions: str,
    grid: int,
    first_direction: int,
    first_image: int,
    out: Tensor | None = None,
) -> None:
    """Check the arguments of `perturb`, with or without `out`."""
    op = "perturb"
    _dtype(op, "x", x, _FULL, "; half precision would drown the differences: call .float()")
    _drawing(op, x.shape, state, mu, directions, grid, min(first_direction, first_image))
    _device(op, x.device, state=state, out=out)
    if num_directions < 0:
        raise InputError(f"{op}: num_directions must not be negative; got {num_directions}")
    if out is not None:
        _dtype(op, "out", out, (x.dtype,))
        wanted = [1 + num_directions, *x.shape]
        if list(out.shape) != wanted:
            raise InputError(f"{op}: out must be [1 + q, B, *S] = {wanted}; got {list(out.shape)}")


def check_memory(x: Tensor, state: Tensor, out: Tensor) -> None:
    """Refuse an `out` of perturb that overlaps its inputs in memory.

    The kernel would overwrite inputs that it has yet to read. Only `x` may be exactly `out[0]`,
    since row 0 is written with the values it holds. Views that interleave in one block of memory
    count as overlapping.
    """
    first, stop = _extent(out)
    for name, tensor in (("x", x), ("state", state)):
        low, high = _extent(tensor)
        is_row_0 = (
            low == first and tensor.shape == out.shape[1:] and tensor.stride() == out.stride()[1:]
        )
        if max(low, first) < min(high, stop) and not is_row_0:
            raise InputError(
                f"perturb: {name} must not share memory with out, except that x may be out[0]; "
                f"pass {name}.clone() or another out"
            )
    if out.numel() and any(
        stride == 0 and size > 1 for size, stride in zip(out.shape, out.stride())
    ):
        raise InputError(
            "perturb: the elements of out must not share memory, but it is an expanded tensor; "
            "pass a full one"
        )


def _extent(tensor: Tensor) -> tuple[int, int]:
    """Return the address of the first element of a tensor, and the address behind the last."""
    if tensor.numel() == 0:
        return 0, 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


def check_estimate_gradient(
    differences: Tensor,
    state: Tensor,
    shape: Sequence[int],
    mu: float,
    directions: str,
    grid: int,
    first_direction: int,
    first_image: int,
) -> None:
    """Check the arguments of `estimate_gradient`."""
    op = "estimate_gradient"
    _dtype(op, "differences", differences, _FULL)
    _drawing(op, shape, state, mu, directions, grid, min(first_direction, first_image))
    _device(op, differences.device, state=state)
    if differences.dim() != 2 or differences.shape[1] != shape[0]:
        raise InputError(
            f"{op}: differences must be [q, B] with B = {shape[0]}; got {list(differences.shape)}"
        )


def check_zo_kd_gradient(
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
) -> None:
    """Check the arguments of `zo_kd_gradient`, but not the values of the labels."""
    op = "zo_kd_gradient"
    _dtype(op, "scores", scores, _SCORES)
    _choice(op, "scores_kind", scores_kind, SCORES_KINDS)
    _choice(op, "divergence", divergence, DIVERGENCES)
    _drawing(op, shape, state, mu, directions, grid, min(first_direction, first_image))
    _device(op, scores.device, labels=labels, state=state, student_scores=student_scores)
    if (
        scores.dim() != 3
        or scores.shape[0] < 1
        or scores.shape[1] != shape[0]
        or scores.shape[2] < 1
    ):
        raise InputError(
            f"{op}: scores must be [1 + q, B, n_classes] with B = {shape[0]}; "
            f"got {list(scores.shape)}"
        )
    _dtype(op, "labels", labels, (torch.int64,))
    if list(labels.shape) != [shape[0]]:
        raise InputError(f"{op}: labels must be [B] = [{shape[0]}]; got {list(labels.shape)}")
    if boundary_weight != boundary_weight or abs(boundary_weight) == float("inf"):
        raise InputError(f"{op}: boundary_weight must be a finite number; got {boundary_weight}")
    if student_scores is not None:
        _dtype(op, "student_scores", student_scores, _SCORES)
        if list(student_scores.shape) != list(scores.shape[1:]):
            wanted = list(scores.shape[1:])
            raise InputError(
                f"{op}: student_scores must be [B, n_classes] = {wanted}; "
                f"got {list(student_scores.shape)}"
            )
    elif boundary_weight != 0:
        raise InputError(
            f"{op}: boundary_weight {boundary_weight} needs student_scores [B, n_classes]; "
            "pass them, or boundary_weight=0"
        )


def check_labels(op: str, labels: Tensor, n_classes: int) -> None:
    """Refuse labels out of range, if they are on the CPU.

    On a GPU the check would make the host wait for the device.
    """
    if labels.device.type == "cpu" and labels.numel():
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= n_classes:
            raise InputError(
                f"{op}: labels must be from 0 to {n_classes - 1}; got {low if low < 0 else high}"
            )


def check_kd_loss(
    student: Tensor, teacher: Tensor, temperature: float, divergence: str, scores_kind: str
) -> None:
    """Check the arguments of `kd_loss` and of its derivatives."""
    op = "kd_loss"
    _dtype(op, "student_logits", student, _SCORES)
    _dtype(op, "teacher_scores", teacher, _SCORES)
    _choice(op, "divergence", divergence, DIVERGENCES)
    _choice(op, "scores_kind", scores_kind, SCORES_KINDS)
    _device(op, student.device, teacher_scores=teacher)
    if student.dim() < 2 or student.shape != teacher.shape:
        raise InputError(
            f"{op}: student_logits and teacher_scores must both be [N, n_classes]; "
            f"got {list(student.shape)} and {list(teacher.shape)}"
        )
    if student.shape[-2] < 1 or student.shape[-1] < 1:
        raise InputError(
            f"{op}: student_logits must hold at least one image and one class; "
            f"got {list(student.shape)}"
        )
    if not temperature > 0 or temperature == float("inf"):
        raise InputError(f"{op}: temperature must be a positive number; got {temperature}")
    if divergence == "l1" and scores_kind != "logits":
        raise InputError(
            f"{op}: divergence 'l1' compares logits with logits; for {scores_kind} use 'l1_prob' "
            "or 'kl'"
        )


def check_norm_pool(images: Tensor, weight: Tensor, bias: Tensor) -> None:
    """Refuse shapes, types and devices with which the kernels would read foreign memory."""
    op = "norm_pool"
    if images.dim() != 4 or min(images.shape[2:]) < 2:
        raise InputError(
            f"{op}: images must be [N, C, H, W], H and W at least 2; got {list(images.shape)}"
        )
    n_channels = images.shape[1:2]
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor.shape != n_channels:
            raise InputError(
                f"{op}: {name} must be [C] = {[*n_channels]}; got {list(tensor.shape)}"
            )
        if images.dtype == torch.float32:
            _dtype(op, name, tensor, (torch.float32,), ", and images are float32")
    _device(op, images.device, weight=weight, bias=bias)
