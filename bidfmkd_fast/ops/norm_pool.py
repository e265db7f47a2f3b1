"""Run batch norm, 2x2 max pooling and ReLU, the end of a Conv4 block, as one op.

The op is differentiable twice. One kernel computes each derivative in two passes over the images;
torch's second derivative of batch norm alone takes about twenty passes, each a kernel of its own on
a GPU.

Unlike the other ops this one is not registered with `torch.library`, so it has no schema, no fake
and no opcheck test. Only `meta/stacked.py` calls it, under plain autograd, thousands of times in a
training step: `torch.compile` and `torch.func` never see it, and with the dispatcher a small call
with both derivatives took 1.8 times as long (370 us instead of 200 us). Its twin in plain torch is
`reference.norm_pool`, with which the tests compare it in float64.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from bidfmkd_fast.ops import backend, native_norm_pool, reference
from bidfmkd_fast.ops.checks import check_norm_pool


def norm_pool(images: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """Return `relu(max_pool2d(batch_norm(images), 2))`.

    Every channel is normalised by the mean and the biased variance of this batch. The kernels
    serve float32; all else takes `reference.norm_pool`.

    Args:
        images: `[N, C, H, W]`; fast in channels-last memory on the CPU and in contiguous memory on
            CUDA, copied to that format otherwise.
        weight: `[C]`, the factor of each channel after normalisation.
        bias: `[C]`, added to each channel after that.
        eps: added to the variance before its root is taken.

    Returns:
        `[N, C, H // 2, W // 2]`, differentiable twice in images, weight and bias.

    Raises:
        InputError: a wrong shape or device.
    """
    check_norm_pool(images, weight, bias)
    served = images.device.type in ("cpu", "cuda") and images.dtype not in (
        torch.float16,
        torch.bfloat16,
    )
    if served and backend.selects("norm_pool", images, weight, bias):
        images = images.contiguous(memory_format=native_norm_pool.norm_pool_format(images))
        return _NormPool.apply(images, weight, bias, eps)
    return reference.norm_pool(images, weight, bias, eps)


class _NormPool(torch.autograd.Function):
    """Compute the op from its kernel."""

    @staticmethod
    def forward(ctx: Any, images: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        output, saved = native_norm_pool.norm_pool(
            images, weight.contiguous(), bias.contiguous(), eps
        )
        ctx.save_for_backward(images, weight, *saved)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *_NormPoolBackward.apply(grad, *ctx.saved_tensors), None


class _NormPoolBackward(torch.autograd.Function):
    """Compute the first derivative from its kernel; there is no derivative above the second."""

    @staticmethod
    def forward(
        ctx: Any, grad: Tensor, images: Tensor, weight: Tensor, *saved: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        grad = grad.contiguous(memory_format=native_norm_pool.norm_pool_format(grad))
        ctx.save_for_backward(grad, images, weight, *saved)
        return native_norm_pool.norm_pool_backward(grad, images, weight.contiguous(), saved)

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_images: Tensor, grad_weight: Tensor, grad_bias: Tensor
    ) -> tuple[Tensor | None, ...]:
        grad, images, weight, *saved = ctx.saved_tensors
        upstream = (
            grad_images.contiguous(memory_format=native_norm_pool.norm_pool_format(images)),
            grad_weight.contiguous(),
            grad_bias.contiguous(),
        )
        grads = native_norm_pool.norm_pool_double_backward(
            upstream, grad, images, weight.contiguous(), tuple(saved)
        )
        return *grads, None, None, None, None
