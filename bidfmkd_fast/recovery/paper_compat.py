"""Reproduce the slips of the authors' public code, for exact comparisons only.

Two slips change numbers. Directions that do not fill a split (a batch of directions) are dropped
but still divided by. And the images kept are the whole set of the step whose surrogate
`mean_i <x_i, g_i>` was lowest, g_i the gradient estimate for image x_i, instead of each image with
the lowest loss.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bidfmkd_fast.errors import InputError

SPLITS = 5  # of the authors' runs


def directions_left(num_directions: int) -> int:
    """Return how many of `num_directions` are drawn.

    Raises:
        InputError: none would be drawn.
    """
    if num_directions < SPLITS:
        raise InputError(
            f"recover: with paper_compat num_directions must be at least {SPLITS}, the authors' "
            f"number of splits; got {num_directions}"
        )
    return num_directions // SPLITS * SPLITS


def surrogate(loss: Tensor, x: Tensor) -> Tensor:
    """Compute `mean_i <x_i, g_i>` as `[B]`, the same value for every image.

    `loss` carries the gradient g / B into the images x.
    """
    (gradient,) = torch.autograd.grad(loss, x, retain_graph=True)
    return (x.detach() * gradient).sum().expand(len(x))
