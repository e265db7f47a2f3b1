"""Share what all drawings need: coordinates, the jitter of a class's members, colours."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from bidfmkd_fast.priors.numbers import Draws

N_JITTER = 16  # random numbers of one member's jitter


def axis(size: int, like: Tensor) -> Tensor:
    """Return the positions of `size` pixels on an axis that runs from -1/2 to 1/2, `[size]`.

    Device and dtype are those of `like`, never torch's default dtype, which a caller may have set.
    """
    return (torch.arange(size, dtype=like.dtype, device=like.device) + 0.5) / size - 0.5


@dataclass(frozen=True)
class Jitter:
    """How a member of a class differs from its drawing.

    A point p of the drawing goes to `matrix p + shift`; a value v of the picture goes to
    `mean + contrast (v - mean) + brightness`, by channel.

    Attributes:
        matrix: `[n, 2, 2]`, acting on (x, y).
        inverse: `[n, 2, 2]`, the inverse of `matrix`, in float64 for those who need it so exactly.
        shift: `[n, 2]`, in sides of the picture.
        angle, scale: `[n]`, the turn in radians and the mean factor of `matrix`.
        contrast: `[n]`.
        brightness: `[n, 3]`.
        points: `[n, 1]`, by how much control points move, in sides of the picture.
    """

    matrix: Tensor
    inverse: Tensor
    shift: Tensor
    angle: Tensor
    scale: Tensor
    contrast: Tensor
    brightness: Tensor
    points: Tensor

    @classmethod
    def drawn(cls, draws: Draws, size: Tensor) -> Jitter:
        """Draw the jitter of n members; `size` `[n]` scales it and is 0 for the drawing itself."""
        angle = draws.uniform(-0.2, 0.2)[:, 0] * size
        stretch = 1 + draws.uniform(-0.18, 0.18, 2) * size[:, None]
        shear = draws.uniform(-0.15, 0.15)[:, 0] * size
        shift = draws.uniform(-0.07, 0.07, 2) * size[:, None]
        cos, sin = angle.double().cos(), angle.double().sin()
        x, y = stretch[:, 0], stretch[:, 1]
        # [[a, b], [c, d]] is a rotation times [[x, y shear], [0, y]]: its determinant is x y.
        a, b, c, d = x * cos, y * (shear * cos - sin), x * sin, y * (shear * sin + cos)
        matrix = torch.stack([a, b, c, d], 1).view(-1, 2, 2)
        inverse = (torch.stack([d, -b, -c, a], 1) / (x * y)[:, None]).view(-1, 2, 2)
        contrast = 1 + draws.uniform(-0.2, 0.2)[:, 0] * size
        brightness = draws.uniform(-0.1, 0.1, 3) * size[:, None]
        return cls(
            matrix.to(angle.dtype),
            inverse,
            shift,
            angle,
            (x * y).sqrt(),
            contrast,
            brightness,
            0.035 * size[:, None],
        )

    def moved(self, points: Tensor) -> Tensor:
        """Return where the points `[n, k, 2]` of the drawing lie in the picture."""
        return torch.einsum("nij,nkj->nki", self.matrix, points) + self.shift[:, None]

    def shaded(self, pictures: Tensor) -> Tensor:
        """Apply contrast and brightness to pictures `[n, C, H, W]`."""
        mean = pictures.mean((2, 3), keepdim=True)
        brightness = self.brightness[:, : pictures.shape[1], None, None]
        return mean + self.contrast[:, None, None, None] * (pictures - mean) + brightness


def colours(draws: Draws, count: int, channels: int) -> Tensor:
    """Draw `count` colours for each picture, `[n, count, channels]` in [0, 1).

    Half of the palettes are colourful, the others close to grey, as photographs are.
    """
    grey = draws.uniform(0, 1, count)[:, :, None]
    chroma = draws.uniform(-0.5, 0.5, 3 * count).unflatten(1, (count, 3))[:, :, :channels]
    strength = draws.uniform(0, 1)[:, :, None]
    return (grey + chroma * (2 * strength - 0.6).clamp(0.0, 1.0) * (channels > 1)).clamp(0.0, 1.0)


def ridge(distance: Tensor, width: Tensor, pixel: float) -> Tensor:
    """Return 1 where `distance < width`, 0 outside, with an edge of about one pixel between."""
    return ((width - distance) / pixel + 0.5).clamp(0.0, 1.0)


def rotation(angle: Tensor) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of angles given in turns."""
    return (2 * math.pi * angle).cos(), (2 * math.pi * angle).sin()
