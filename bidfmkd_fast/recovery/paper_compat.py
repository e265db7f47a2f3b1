"""Recovery as in the authors' public code, where that departs from the paper: for exact comparisons only.

Two slips change numbers: directions that do not fill a split are dropped but still divided by, and the images kept are
those of the step whose surrogate `mean_i <x_i, g_i>`, not whose loss, was lowest, the whole set at once.
"""

from __future__ import annotations

import torch

from bidfmkd_fast.errors import InputError

SPLITS = 5  # of the authors' runs


def directions_left(num_directions: int) -> int:
    """How many of `num_directions` are drawn. Raises InputError if none would be."""
    if num_directions < SPLITS:
        raise InputError(
            f"recover: with paper_compat num_directions must be at least {SPLITS}, the authors' number of splits; got "
            f"{num_directions}"
        )
    return num_directions // SPLITS * SPLITS


def surrogate(loss: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """`mean_i <x_i, g_i>` as `[B]`, the same for every image, from the loss that carries `g / B`
    into images `x`.
    """
    (gradient,) = torch.autograd.grad(loss, x, retain_graph=True)
    return (x.detach() * gradient).sum().expand(len(x))
