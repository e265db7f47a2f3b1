"""Jitter pictures: what the backbone sees of them changes a little from epoch to epoch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, grid_sample

N_DRAWS = 4  # random numbers of one picture
_SHIFT = 0.6  # sides, for a jitter of 1


def jittered(images: Tensor, draws: Tensor, amount: float) -> Tensor:
    """Turn, scale and shift images; what comes in from outside is their mirror image.

    Args:
        images: `[N, C, H, W]`.
        draws: `[N, 4]` in [0, 1), on the same device.
        amount: the largest turn in radians and the largest change of scale; `_SHIFT` times it is
            the largest shift, in sides.

    Returns:
        `[N, C, H, W]`, by bilinear interpolation.
    """
    height, width = images.shape[2:]
    angle, stretch, right, down = (amount * (2 * draws - 1)).unbind(1)
    cos, sin = (1 + stretch) * angle.cos(), (1 + stretch) * angle.sin()
    # Where a pixel comes from, in coordinates from -1 to 1 on both axes.
    across = torch.stack([cos, -sin * (height / width), 2 * _SHIFT * right], 1)
    downwards = torch.stack([sin * (width / height), cos, 2 * _SHIFT * down], 1)
    grid = affine_grid(torch.stack([across, downwards], 1), list(images.shape), align_corners=False)
    return grid_sample(images, grid, padding_mode="reflection", align_corners=False)
