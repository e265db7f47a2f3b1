"""`kd_loss` under `torch.func`: the same op with rules for vmap, reverse over reverse and forward mode.

An op registered with `torch.library` has no derivative inside `torch.func.grad`; an `autograd.Function` has. Under
`torch.compile` it is the other way round, so `kd_loss` takes the door that is open.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    tensors, ctx.kd = inputs[:-3], inputs[-3:]
    ctx.save_for_backward(*tensors)
    ctx.save_for_forward(*tensors)


def _to_front(info: Any, in_dims: tuple[int | None, ...], tensors: tuple[Tensor, ...]) -> list[Tensor]:
    """The ops take any leading task dimensions, so the mapped dimension becomes one more of them."""
    return [
        tensor.unsqueeze(0).expand(info.batch_size, *tensor.shape) if dim is None else tensor.movedim(dim, 0)
        for tensor, dim in zip(tensors, in_dims, strict=False)
    ]


class KDLossBackward(torch.autograd.Function):
    """`grad * d kd_loss / d student_logits`."""

    @staticmethod
    def forward(grad: Tensor, student: Tensor, teacher: Tensor, *kd: Any) -> Tensor:
        return torch.ops.bidfmkd.kd_loss_backward(grad, student, teacher, *kd)

    setup_context = staticmethod(_save)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        grads = torch.ops.bidfmkd.kd_loss_double_backward(grad_out, *ctx.saved_tensors, *ctx.kd)
        return *grads, None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Tensor, int]:
        return KDLossBackward.apply(*_to_front(info, in_dims, inputs[:3]), *inputs[3:]), 0

    @staticmethod
    def jvp(ctx: Any, grad_tangent: Tensor | None, student_tangent: Tensor | None, *_: Any) -> Tensor:  # type: ignore[override]
        grad, student, teacher = ctx.saved_tensors
        tangent = torch.zeros_like(student)
        if student_tangent is not None:  # the Hessian is symmetric: its product serves both modes
            arguments = (student_tangent, grad, student, teacher)
            tangent = tangent + torch.ops.bidfmkd.kd_loss_double_backward(*arguments, *ctx.kd)[1]
        if grad_tangent is not None:
            tangent = tangent + torch.ops.bidfmkd.kd_loss_backward(grad_tangent, student, teacher, *ctx.kd)
        return tangent


class KDLoss(torch.autograd.Function):
    """The loss itself; see `ops.kd_loss`."""

    @staticmethod
    def forward(student: Tensor, teacher: Tensor, *kd: Any) -> Tensor:
        return torch.ops.bidfmkd.kd_loss(student, teacher, *kd)

    setup_context = staticmethod(_save)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        return KDLossBackward.apply(grad, *ctx.saved_tensors, *ctx.kd), None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Tensor, int]:
        return KDLoss.apply(*_to_front(info, in_dims, inputs[:2]), *inputs[2:]), 0

    @staticmethod
    def jvp(ctx: Any, student_tangent: Tensor, *_: Any) -> Tensor:  # type: ignore[override]
        student, teacher = ctx.saved_tensors
        one = torch.ones(student.shape[:-2], dtype=student.dtype, device=student.device)
        return (KDLossBackward.apply(one, student, teacher, *ctx.kd) * student_tangent).sum((-2, -1))
