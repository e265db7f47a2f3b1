"""Register each op with torch: its schema, argument checks, implementation and fake tensors.

The implementation of an op picks the native kernel or the reference for each call
(`backend.selects`), so that eager code, `torch.compile`, CUDA graphs and `torch.func` all choose
alike. A fake tells `torch.compile` the shape and dtype of the result. `functions.py` holds what
users call; `kd_loss_autograd.py` holds the derivatives of `kd_loss`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bidfmkd_fast.ops import backend, native, reference
from bidfmkd_fast.ops.checks import (
    check_estimate_gradient,
    check_kd_loss,
    check_labels,
    check_memory,
    check_perturb,
    check_zo_kd_gradient,
)

_DRAWING = "float mu, str directions, int grid, SymInt first_direction, SymInt first_image"
_KD = "float temperature, str divergence, str scores_kind"

library = torch.library.Library("bidfmkd", "DEF")
library.define(f"perturb(Tensor x, Tensor state, SymInt num_directions, {_DRAWING}) -> Tensor")
library.define(
    f"perturb_out(Tensor x, Tensor state, SymInt num_directions, {_DRAWING}, Tensor(a!) out) -> ()"
)
library.define(
    f"estimate_gradient(Tensor differences, Tensor state, SymInt[] shape, {_DRAWING}) -> Tensor"
)
library.define(
    "zo_kd_gradient(Tensor scores, Tensor labels, Tensor state, SymInt[] shape, float mu, "
    "Tensor? student_scores, float boundary_weight, str scores_kind, str divergence, "
    "str directions, int grid, SymInt first_direction, SymInt first_image) -> (Tensor, Tensor)"
)
library.define(f"kd_loss(Tensor student, Tensor teacher, {_KD}) -> Tensor")
library.define(f"kd_loss_backward(Tensor grad, Tensor student, Tensor teacher, {_KD}) -> Tensor")
library.define(
    "kd_loss_double_backward(Tensor grad_out, Tensor grad, Tensor student, Tensor teacher, "
    f"{_KD}) -> (Tensor, Tensor)"
)


def _perturb(x: Tensor, state: Tensor, num_directions: int, *drawing: Any) -> Tensor:
    check_perturb(x, state, num_directions, *drawing)
    if backend.selects("perturb", x):
        out = native.empty_points(x, num_directions)
        native.perturb_out(x, state, num_directions, *drawing, out)  # type: ignore[call-arg]
    else:
        out = x.new_empty((1 + num_directions, *x.shape))
        reference.perturb_out(x, state, num_directions, *drawing, out)  # type: ignore[call-arg]
    return out


def _perturb_out(x: Tensor, state: Tensor, num_directions: int, *drawing_and_out: Any) -> None:
    check_perturb(x, state, num_directions, *drawing_and_out)
    check_memory(x, state, drawing_and_out[-1])
    chosen = native if backend.selects("perturb", x) else reference
    chosen.perturb_out(x, state, num_directions, *drawing_and_out)


def _estimate_gradient(differences: Tensor, *arguments: Any) -> Tensor:
    check_estimate_gradient(differences, *arguments)
    chosen = native if backend.selects("estimate_gradient", differences) else reference
    return chosen.estimate_gradient(differences, *arguments)


def _zo_kd_gradient(scores: Tensor, labels: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    check_zo_kd_gradient(scores, labels, *arguments)
    check_labels("zo_kd_gradient", labels, scores.shape[2])
    chosen = native if backend.selects("zo_kd_gradient", scores) else reference
    return chosen.zo_kd_gradient(scores, labels, *arguments)


def kd_loss(student: Tensor, teacher: Tensor, *kd: Any) -> Tensor:
    """Check the arguments and run the chosen implementation of `kd_loss`."""
    check_kd_loss(student, teacher, *kd)
    chosen = native if backend.selects("kd_loss", student, teacher) else reference
    return chosen.kd_loss(student, teacher, *kd)


def kd_loss_backward(grad: Tensor, student: Tensor, teacher: Tensor, *kd: Any) -> Tensor:
    """Check the arguments and run the chosen first derivative of `kd_loss`."""
    check_kd_loss(student, teacher, *kd)
    chosen = native if backend.selects("kd_loss", grad, student, teacher) else reference
    return chosen.kd_loss_backward(grad, student, teacher, *kd)


def kd_loss_double_backward(
    grad_out: Tensor, grad: Tensor, student: Tensor, teacher: Tensor, *kd: Any
) -> tuple[Tensor, Tensor]:
    """Check the arguments and run the chosen second derivative of `kd_loss`."""
    check_kd_loss(student, teacher, *kd)
    chosen = native if backend.selects("kd_loss", grad_out, grad, student, teacher) else reference
    return chosen.kd_loss_double_backward(grad_out, grad, student, teacher, *kd)


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
    ("kd_loss", kd_loss, _kd_loss_fake),
    ("kd_loss_backward", kd_loss_backward, _kd_loss_backward_fake),
    ("kd_loss_double_backward", kd_loss_double_backward, _kd_loss_double_backward_fake),
):
    for _key in ("CPU", "CUDA"):
        library.impl(_name, _implementation, _key)
    torch.library.register_fake(f"bidfmkd::{_name}", _fake, lib=library)


# Every point is x plus a constant, so the derivative is the identity for each of the 1 + q points.
torch.library.register_autograd(
    "bidfmkd::perturb",
    lambda context, grad: (grad.sum(0), *[None] * 7),
    lib=library,
)
