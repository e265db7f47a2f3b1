"""Run the kernels of `norm_pool` and of its two derivatives on torch tensors.

csrc/norm/norm_pool.h derives the formulas. All images, gradients and outputs must lie in memory as
`norm_pool_format` says.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bidfmkd_fast.ops.backend import _C
from bidfmkd_fast.ops.native import place

# What the forward pass keeps for the derivatives: place, normalised, mean, r, as NormPoolSaved in
# csrc/norm/norm_pool.h defines them.
Saved = tuple[Tensor, ...]

# Each derivative is a pass over memory, which one thread nearly saturates: a second thread pays off
# only for large images.
ELEMENTS_PER_THREAD = 1 << 22


def norm_pool_format(images: Tensor) -> torch.memory_format:
    """Return the memory format that the kernels need on the device of `images`."""
    return torch.contiguous_format if images.is_cuda else torch.channels_last


def norm_pool(images: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Saved]:
    """Return the output of `reference.norm_pool`, and what the derivatives need."""
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
        *_sizes(images),
        *_addresses(images, weight, bias),
        eps,
        *_addresses(cells, *saved),
        *_place(images),
    )
    return cells, saved


def norm_pool_backward(
    grad: Tensor, images: Tensor, weight: Tensor, saved: Saved
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of images, weight and bias, from the gradient of the output."""
    assert _C is not None
    out = (torch.empty_like(images), torch.empty_like(weight), torch.empty_like(weight))
    _C.norm_pool_backward(
        *_sizes(images),
        *_addresses(grad, images, weight, *saved),
        *_addresses(*out),
        *_place(images),
    )
    return out


def norm_pool_double_backward(
    upstream: tuple[Tensor, Tensor, Tensor],
    grad: Tensor,
    images: Tensor,
    weight: Tensor,
    saved: Saved,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of `grad`, images and weight.

    `upstream` holds the gradients of the three results of `norm_pool_backward`, in their order.
    """
    assert _C is not None
    out = (torch.empty_like(grad), torch.empty_like(images), torch.empty_like(weight))
    _C.norm_pool_double_backward(
        *_sizes(images),
        *_addresses(*upstream, grad, images, weight, *saved),
        *_addresses(*out),
        *_place(images),
    )
    return out


def _sizes(images: Tensor) -> tuple[int, int, int, int]:
    n_images, channels, height, width = images.shape
    return n_images, height, width, channels


def _addresses(*tensors: Tensor) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]


def _place(images: Tensor) -> tuple[int, int, int]:
    return place(images, images.numel(), ELEMENTS_PER_THREAD)
