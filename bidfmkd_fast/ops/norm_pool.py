"""Batch norm with batch statistics, 2x2 max pooling and ReLU as one op, differentiable twice: the end of a Conv4 block.

One kernel does each derivative in two passes over the images; torch's second derivative of batch norm alone takes some
twenty, each a kernel of its own on a GPU. Elsewhere, and in other types than float32, it is torch's three operations.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from bidfmkd_fast.ops import native


def norm_pool(images: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """`relu(max_pool2d(batch_norm(images), 2))`: `[N, C, H, W]`, weight and bias `[C]` -> `[N, C, H
    // 2, W // 2]`.

    Normalised by the mean and the biased variance of each channel of this batch. Fast on
    channels-last memory on the CPU, on contiguous memory on CUDA.
    """
    served = images.device.type in ("cpu", "cuda") and images.dtype not in (
        torch.float16,
        torch.bfloat16,
    )
    if served and native.selects("norm_pool", images, weight, bias):
        return _NormPool.apply(
            images.contiguous(memory_format=native.norm_pool_format(images)), weight, bias, eps
        )
    normed = functional.batch_norm(images, None, None, weight, bias, training=True, eps=eps)
    return functional.relu(functional.max_pool2d(normed, 2))


class _NormPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx, images, weight, bias, eps):  # type: ignore[no-untyped-def]
        output, saved = native.norm_pool(images, weight.contiguous(), bias.contiguous(), eps)
        ctx.save_for_backward(images, weight, *saved)
        return output

    @staticmethod
    def backward(ctx, grad):  # type: ignore[no-untyped-def]
        return *_NormPoolBackward.apply(grad, *ctx.saved_tensors), None


class _NormPoolBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, grad, images, weight, *saved):  # type: ignore[no-untyped-def]
        grad = grad.contiguous(memory_format=native.norm_pool_format(grad))
        ctx.save_for_backward(grad, images, weight, *saved)
        return native.norm_pool_backward(grad, images, weight.contiguous(), saved)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_images, grad_weight, grad_bias):  # type: ignore[no-untyped-def]
        grad, images, weight, *saved = ctx.saved_tensors
        upstream = (
            grad_images.contiguous(memory_format=native.norm_pool_format(images)),
            grad_weight.contiguous(),
            grad_bias.contiguous(),
        )
        grads = native.norm_pool_double_backward(
            *upstream, grad, images, weight.contiguous(), saved
        )
        return *grads, None, None, None, None
