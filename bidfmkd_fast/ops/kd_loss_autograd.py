"""Give `kd_loss` its derivatives, by three routes that compute the same numbers.

No single route serves every caller, so each of the three is there for one of them:

- `torch.compile` traces the registered op with its registered derivatives. It refuses an
  `autograd.Function` that defines `jvp`, as the second route needs.
- `torch.func` (`grad`, `vmap`, `jvp`, `hessian`) and forward-mode differentiation take
  `TransformedKDLoss`. They find no derivative of a registered op, but differentiate an
  `autograd.Function` that defines `setup_context` and `jvp`.
- Plain autograd takes `PlainKDLoss`, which calls the implementation directly. On few images the
  kernel is so short that the route decides the time of a call: for 40 images, forward and two
  derivatives take 160 us by this route, 230 us by the first and more than 400 us by the second.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bidfmkd_fast.ops import registration

_op = torch.ops.bidfmkd


def differentiable_kd_loss(*arguments: Any) -> Tensor:
    """Return `kd_loss` by the route that serves the caller; the arguments are those of the op."""
    if torch.compiler.is_compiling():
        return _op.kd_loss(*arguments)
    if torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0:
        return TransformedKDLoss.apply(*arguments)
    return PlainKDLoss.apply(*arguments)


# Plain autograd


class PlainKDLoss(torch.autograd.Function):
    """Compute the loss from its implementation, without torch's dispatcher."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, *kd: Any) -> Tensor:
        ctx.save_for_backward(student, teacher)
        ctx.kd = kd
        return registration.kd_loss(student, teacher, *kd)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return PlainKDLossBackward.apply(grad, *ctx.saved_tensors, *ctx.kd), None, None, None, None


class PlainKDLossBackward(torch.autograd.Function):
    """Compute `grad * d kd_loss / d student`; there is no derivative above the second."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, student: Tensor, teacher: Tensor, *kd: Any) -> Tensor:
        ctx.save_for_backward(grad, student, teacher)
        ctx.kd = kd
        return registration.kd_loss_backward(grad, student, teacher, *kd)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        grads = registration.kd_loss_double_backward(grad_out, *ctx.saved_tensors, *ctx.kd)
        return *grads, None, None, None, None


# torch.compile


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """Keep the tensors, and the three settings that end the arguments of every op."""
    tensors, ctx.kd = inputs[:-3], inputs[-3:]
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return _op.kd_loss_backward(grad, *ctx.saved_tensors, *ctx.kd), None, None, None, None


def _double_backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    grads = _op.kd_loss_double_backward(grad_out, *ctx.saved_tensors, *ctx.kd)
    return *grads, None, None, None, None


for _name, _derivative in (("kd_loss", _backward), ("kd_loss_backward", _double_backward)):
    torch.library.register_autograd(
        f"bidfmkd::{_name}", _derivative, setup_context=_save, lib=registration.library
    )


# torch.func and forward mode


def _save_for_both_modes(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _save(ctx, inputs, output)
    ctx.save_for_forward(*inputs[:-3])


class TransformedKDLoss(torch.autograd.Function):
    """Compute the loss from the op, which `vmap` can batch, with derivatives in both modes."""

    generate_vmap_rule = True

    @staticmethod
    def forward(student: Tensor, teacher: Tensor, *kd: Any) -> Tensor:
        return _op.kd_loss(student, teacher, *kd)

    setup_context = staticmethod(_save_for_both_modes)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        first = TransformedKDLossBackward.apply(grad, *ctx.saved_tensors, *ctx.kd)
        return first, None, None, None, None

    @staticmethod
    def jvp(ctx: Any, student_tangent: Tensor, *_: Any) -> Tensor:
        student, teacher = ctx.saved_tensors
        ones = torch.ones(student.shape[:-2], dtype=student.dtype, device=student.device)
        first = TransformedKDLossBackward.apply(ones, student, teacher, *ctx.kd)
        return (first * student_tangent).sum((-2, -1))


class TransformedKDLossBackward(torch.autograd.Function):
    """Compute `grad * d kd_loss / d student` from the op, with derivatives in both modes."""

    generate_vmap_rule = True

    @staticmethod
    def forward(grad: Tensor, student: Tensor, teacher: Tensor, *kd: Any) -> Tensor:
        return _op.kd_loss_backward(grad, student, teacher, *kd)

    setup_context = staticmethod(_save_for_both_modes)
    backward = staticmethod(_double_backward)

    @staticmethod
    def jvp(
        ctx: Any, grad_tangent: Tensor | None, student_tangent: Tensor | None, *_: Any
    ) -> Tensor:
        grad, student, teacher = ctx.saved_tensors
        tangent = torch.zeros_like(student)
        if student_tangent is not None:
            # The Hessian is symmetric, so the op that serves reverse mode serves forward mode too.
            arguments = (student_tangent, grad, student, teacher)
            tangent = tangent + _op.kd_loss_double_backward(*arguments, *ctx.kd)[1]
        if grad_tangent is not None:
            tangent = tangent + _op.kd_loss_backward(grad_tangent, student, teacher, *ctx.kd)
        return tangent


def _vmap_rule(op: Any, n_tensors: int, out_dims: Any) -> Any:
    """Return the rule by which `vmap` batches `op`.

    The ops take any leading task dimensions, so the mapped dimension becomes one more of them.
    """

    def rule(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> Any:
        tensors = [
            tensor.unsqueeze(0).expand(info.batch_size, *tensor.shape)
            if dim is None
            else tensor.movedim(dim, 0)
            for tensor, dim in zip(arguments[:n_tensors], in_dims)
        ]
        return op(*tensors, *arguments[n_tensors:]), out_dims

    return rule


for _name, _n_tensors, _out_dims in (
    ("kd_loss", 2, 0),
    ("kd_loss_backward", 3, 0),
    ("kd_loss_double_backward", 4, (0, 0)),
):
    torch.library.register_vmap(
        f"bidfmkd::{_name}",
        _vmap_rule(getattr(_op, _name), _n_tensors, _out_dims),
        lib=registration.library,
    )
