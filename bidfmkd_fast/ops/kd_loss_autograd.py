"""`kd_loss` with its derivatives, by the shortest way that is open.

An op registered with `torch.library` has no derivative inside `torch.func.grad`; an `autograd.Function` has. Under
`torch.compile` it is the other way round. Where neither is at work, plain Functions around the implementation save the
dispatcher and the binding of arguments, which cost more than the kernel does on a few hundred images.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    tensors, ctx.kd = inputs[:-3], inputs[-3:]
    ctx.save_for_backward(*tensors)
    ctx.save_for_forward(*tensors)


def register_vmap_rules(library: torch.library.Library) -> None:
    """The ops take any leading task dimensions, so the dimension mapped by vmap becomes one more
    of them.
    """
    for name, n_tensors, out_dims in (
        ("kd_loss", 2, 0),
        ("kd_loss_backward", 3, 0),
        ("kd_loss_double_backward", 4, (0, 0)),
    ):
        op = getattr(torch.ops.bidfmkd, name)
        torch.library.register_vmap(
            f"bidfmkd::{name}", _vmap_rule(op, n_tensors, out_dims), lib=library
        )


def _vmap_rule(op: Any, n_tensors: int, out_dims: Any) -> Any:
    def rule(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> Any:
        tensors = [
            tensor.unsqueeze(0).expand(info.batch_size, *tensor.shape)
            if dim is None
            else tensor.movedim(dim, 0)
            for tensor, dim in zip(arguments[:n_tensors], in_dims)
        ]
        return op(*tensors, *arguments[n_tensors:]), out_dims

    return rule


class KDLossBackward(torch.autograd.Function):
    """`grad * d kd_loss / d student_logits`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(grad: Tensor, student: Tensor, teacher: Tensor, *kd: Any) -> Tensor:
        return torch.ops.bidfmkd.kd_loss_backward(grad, student, teacher, *kd)

    setup_context = staticmethod(_save)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        grads = torch.ops.bidfmkd.kd_loss_double_backward(grad_out, *ctx.saved_tensors, *ctx.kd)
        return *grads, None, None, None, None

    @staticmethod
    def jvp(
        ctx: Any, grad_tangent: Tensor | None, student_tangent: Tensor | None, *_: Any
    ) -> Tensor:
        grad, student, teacher = ctx.saved_tensors
        tangent = torch.zeros_like(student)
        if student_tangent is not None:  # the Hessian is symmetric: its product serves both modes
            arguments = (student_tangent, grad, student, teacher)
            tangent = tangent + torch.ops.bidfmkd.kd_loss_double_backward(*arguments, *ctx.kd)[1]
        if grad_tangent is not None:
            tangent = tangent + torch.ops.bidfmkd.kd_loss_backward(
                grad_tangent, student, teacher, *ctx.kd
            )
        return tangent


class KDLoss(torch.autograd.Function):
    """The loss itself; see `ops.kd_loss`."""

    generate_vmap_rule = True

    @staticmethod
    def forward(student: Tensor, teacher: Tensor, *kd: Any) -> Tensor:
        return torch.ops.bidfmkd.kd_loss(student, teacher, *kd)

    setup_context = staticmethod(_save)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return KDLossBackward.apply(grad, *ctx.saved_tensors, *ctx.kd), None, None, None, None

    @staticmethod
    def jvp(ctx: Any, student_tangent: Tensor, *_: Any) -> Tensor:
        student, teacher = ctx.saved_tensors
        one = torch.ones(student.shape[:-2], dtype=student.dtype, device=student.device)
        return (KDLossBackward.apply(one, student, teacher, *ctx.kd) * student_tangent).sum(
            (-2, -1)
        )


def plain_kd_loss(
    loss: Callable[..., Tensor], derivative: Callable[..., Tensor], second: Callable[..., Any]
) -> Any:
    """`KDLoss` for tensors that no transform has wrapped, from the implementations of the three
    ops.
    """

    class PlainBackward(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, grad: Tensor, student: Tensor, teacher: Tensor, *kd: Any) -> Tensor:
            ctx.save_for_backward(grad, student, teacher)
            ctx.kd = kd
            return derivative(grad, student, teacher, *kd)

        @staticmethod
        @once_differentiable
        def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
            return *second(grad_out, *ctx.saved_tensors, *ctx.kd), None, None, None, None

    class Plain(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, student: Tensor, teacher: Tensor, *kd: Any) -> Tensor:
            ctx.save_for_backward(student, teacher)
            ctx.kd = kd
            return loss(student, teacher, *kd)

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
            return PlainBackward.apply(grad, *ctx.saved_tensors, *ctx.kd), None, None, None, None

    return Plain.apply


def kd_loss_by(plain: Any, *arguments: Any) -> Tensor:
    """`kd_loss` through the compiler's door, that of `torch.func`, or `plain`."""
    if torch.compiler.is_compiling():
        return torch.ops.bidfmkd.kd_loss(*arguments)
    transformed = (
        torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0
    )
    return KDLoss.apply(*arguments) if transformed else plain(*arguments)
