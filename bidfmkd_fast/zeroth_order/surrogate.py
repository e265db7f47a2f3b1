"""Put an estimated gradient into a graph, and raise a clear error where there is no graph."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bidfmkd_fast.errors import InputError


class _Once(torch.autograd.Function):
    """Return an estimate as it is, and raise an InputError if it is differentiated again.

    `once_differentiable` is not enough, since the transforms of `torch.func` pass over it and would
    return a second derivative of zero.
    """

    generate_vmap_rule = True  # jacrev maps over backward passes

    @staticmethod
    def forward(estimate: Tensor, x: Tensor, grad: Tensor) -> Tensor:
        return estimate.clone()

    @staticmethod
    def setup_context(context: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(context: Any, grad: Tensor) -> tuple[None, None, None]:
        raise InputError(
            "a gradient estimated from queries cannot be differentiated again; leave out "
            "create_graph=True, or the outer transform of torch.func"
        )


def once(estimate: Tensor, x: Tensor, grad: Tensor) -> Tensor:
    """Return the estimate that a backward pass computed from `x` and `grad`, to be used once."""
    return _Once.apply(estimate, x, grad)


class _Surrogate(torch.autograd.Function):
    """Return the mean loss forward, and a given estimate as its gradient backward."""

    @staticmethod
    def forward(x: Tensor, gradient: Tensor, loss: Tensor) -> Tensor:
        return loss.mean()

    @staticmethod
    def setup_context(context: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        x, gradient, _ = inputs
        context.save_for_backward(x, gradient)

    @staticmethod
    def backward(context: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        x, gradient = context.saved_tensors
        with torch.no_grad():
            # Scale before rounding to half precision, in which small gradients would vanish.
            scaled = (gradient * (grad / max(gradient.shape[0], 1))).to(x.dtype)
        return once(scaled, x, grad), None, None


class _WithoutGraph(torch.autograd.Function):
    """Return the mean loss forward, and raise an InputError backward."""

    @staticmethod
    def forward(leaf: Tensor, loss: Tensor, reason: str) -> Tensor:
        return loss.mean()

    @staticmethod
    def setup_context(context: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        context.reason = inputs[2]

    @staticmethod
    def backward(context: Any, grad: Tensor) -> tuple[None, None, None]:
        raise InputError(context.reason)


def mean_loss(op: str, x: Tensor, gradient: Tensor, loss: Tensor) -> Tensor:
    """Return `mean(loss)` for the losses `[B]`, with `gradient / B` as its gradient in `x`.

    Where `x` has no graph, or gradients are switched off, the mean is returned all the same, and
    only its backward pass raises an InputError.
    """
    if x.requires_grad and torch.is_grad_enabled():
        return _Surrogate.apply(x, gradient, loss)
    cause = (
        "was called inside torch.no_grad() or torch.inference_mode()"
        if not torch.is_grad_enabled()
        else "got images without a graph"
    )
    reason = (
        f"{op} {cause}, so backward() has nowhere to send the estimate; give it the images that "
        "require a gradient, or read the estimate from the attribute gradient"
    )
    with torch.inference_mode(False), torch.enable_grad():
        leaf = torch.zeros((), device=loss.device, requires_grad=True)
        return _WithoutGraph.apply(leaf, loss, reason)
