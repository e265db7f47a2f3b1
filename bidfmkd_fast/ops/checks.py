"""Argument checks of the ops: one clear error before a kernel sees an address."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bidfmkd_fast.errors import InputError, InputTypeError
from bidfmkd_fast.ops.native import DIRECTIONS, DIVERGENCES, SCORES_KINDS

_FULL = (torch.float32, torch.float64)
_SCORES = (*_FULL, torch.float16, torch.bfloat16)


def _choice(op: str, name: str, value: str, allowed: Sequence[str]) -> None:
    if value not in allowed:
        raise InputError(f"{op}: {name} must be one of {', '.join(allowed)}; got {value!r}")


def _dtype(op: str, name: str, tensor: Tensor, allowed: Sequence[torch.dtype], hint: str = "") -> None:
    if tensor.dtype not in allowed:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        raise InputTypeError(f"{op}: {name} must be {wanted}; got {str(tensor.dtype).removeprefix('torch.')}{hint}")


def _device(op: str, wanted: torch.device, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != wanted:
            raise InputError(f"{op}: {name} must be on {wanted} like the other tensors; got {tensor.device}")


def _drawing(op: str, shape: Sequence[int], state: Tensor, mu: float, directions: str, grid: int, first: int) -> None:
    """What all ops that draw directions have in common."""
    _choice(op, "directions", directions, DIRECTIONS)
    if len(shape) < 2:
        raise InputError(f"{op}: images must have a batch dimension and more, [B, *S]; got shape {list(shape)}")
    if state.dtype != torch.int64 or tuple(state.shape) != (2,):
        got = f"{str(state.dtype).removeprefix('torch.')} {list(state.shape)}"
        raise InputTypeError(f"{op}: state must be an int64 tensor [seed, step]; got {got}")
    if not mu > 0 or mu == float("inf"):
        raise InputError(f"{op}: mu, the length of a step, must be a positive number; got {mu}")
    if first < 0:
        raise InputError(f"{op}: first_direction and first_image must not be negative; got {first}")
    if directions == "lowres":
        if len(shape) != 4:
            raise InputError(f"{op}: directions 'lowres' need images [B, C, H, W]; got shape {list(shape)}")
        if not 1 <= grid <= min(shape[2:]):
            raise InputError(f"{op}: grid must be from 1 to {min(shape[2:])}, the image's smaller side; got {grid}")
    elif grid != 0:
        raise InputError(f"{op}: grid goes with directions 'lowres' only; got grid={grid} with {directions!r}")


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
    op = "estimate_gradient"
    _dtype(op, "differences", differences, _FULL)
    _drawing(op, shape, state, mu, directions, grid, min(first_direction, first_image))
    _device(op, differences.device, state=state)
    if differences.dim() != 2 or differences.shape[1] != shape[0]:
        raise InputError(f"{op}: differences must be [q, B] with B = {shape[0]}; got {list(differences.shape)}")


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
    op = "zo_kd_gradient"
    _dtype(op, "scores", scores, _SCORES)
    _choice(op, "scores_kind", scores_kind, SCORES_KINDS)
    _choice(op, "divergence", divergence, DIVERGENCES)
    _drawing(op, shape, state, mu, directions, grid, min(first_direction, first_image))
    _device(op, scores.device, labels=labels, state=state, student_scores=student_scores)
    if scores.dim() != 3 or scores.shape[0] < 1 or scores.shape[1] != shape[0] or scores.shape[2] < 1:
        raise InputError(f"{op}: scores must be [1+q, B, n_classes] with B = {shape[0]}; got {list(scores.shape)}")
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
                f"{op}: student_scores must be [B, n_classes] = {wanted}; got {list(student_scores.shape)}"
            )
    elif boundary_weight != 0:
        raise InputError(f"{op}: boundary_weight {boundary_weight} needs student_scores [B, n_classes]; none came")


def check_labels(op: str, labels: Tensor, n_classes: int) -> None:
    """Labels in range; read on the CPU only, since elsewhere it would make the device wait."""
    if labels.device.type == "cpu" and labels.numel():
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= n_classes:
            raise InputError(f"{op}: labels must be from 0 to {n_classes - 1}; got {low if low < 0 else high}")


def check_kd_loss(student: Tensor, teacher: Tensor, temperature: float, divergence: str, scores_kind: str) -> None:
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
        raise InputError(f"{op}: needs at least one image and one class; got {list(student.shape)}")
    if not temperature > 0 or temperature == float("inf"):
        raise InputError(f"{op}: temperature must be a positive number; got {temperature}")
    if divergence == "l1" and scores_kind != "logits":
        raise InputError(f"{op}: divergence 'l1' compares logits with logits; for {scores_kind} take 'l1_prob' or 'kl'")
