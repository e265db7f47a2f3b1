"""Augment recovered images: one random crop and horizontal flip per step, before the API sees them.

`augment` serves the loop on the host. `augment_at` computes the same from a crop in a tensor on the
device, so that a CUDA graph can hold it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from bidfmkd_fast.seeds import torch_generator


def crop_of(seed: int, step: int, height: int, width: int) -> tuple[int, int, int]:
    """Draw the crop of a step as a pure function of (seed, step).

    Returns the crop's first line and first column in the padded images, and 1 if they are flipped.
    """
    draw = torch.rand(3, generator=torch_generator(seed, "recovery", "augment", step)).tolist()
    return (
        int(draw[0] * (2 * (height // 8) + 1)),
        int(draw[1] * (2 * (width // 8) + 1)),
        int(draw[2] < 0.5),
    )


def augment(images: Tensor, seed: int, step: int) -> Tensor:
    """Crop and flip a whole batch alike, after padding each side with zeros by H/8 and W/8.

    Takes `[B, C, H, W]` in unit range and returns the same shape; differentiable.
    """
    height, width = images.shape[-2:]
    top, left, flip = crop_of(seed, step, height, width)
    cropped = _padded(images)[..., top : top + height, left : left + width]
    return cropped.flip(-1) if flip else cropped


def augment_at(images: Tensor, crop: Tensor) -> Tensor:
    """Compute `augment` for a crop on the images' device: int64 `[3]` from `crop_of`."""
    height, width = images.shape[-2:]
    lines = torch.arange(height, device=images.device) + crop[0]
    columns = torch.arange(width, device=images.device)
    columns = torch.where(crop[2] == 1, width - 1 - columns, columns) + crop[1]
    return _padded(images).index_select(-2, lines).index_select(-1, columns)


def _padded(images: Tensor) -> Tensor:
    """Pad each side with zeros by H/8 and W/8."""
    height, width = (side // 8 for side in images.shape[-2:])
    return functional.pad(images, (width, width, height, height))
