"""Draw blobs and fractals: smooth hills of light, and Julia sets."""

from __future__ import annotations

import torch
from torch import Tensor

from bidfmkd_fast.priors.canvas import Jitter, axis, colours
from bidfmkd_fast.priors.numbers import Draws

_BLOBS, _ITERATIONS = 12, 7
N_BLOB_DRAWS, N_FRACTAL_DRAWS = 4 * _BLOBS + 40, 24


def draw_blobs(draws: Draws, member: Draws, jitter: Jitter, shape: tuple[int, int, int]) -> Tensor:
    """Draw n pictures of two to twelve Gaussian blobs that add their colours: `[n, C, H, W]`."""
    channels, height, width = shape
    count = draws.integer(2, _BLOBS)
    centre = jitter.moved(draws.uniform(-0.45, 0.45, 2 * _BLOBS).unflatten(1, (_BLOBS, 2)))
    sigma = (draws.uniform(0.04, 0.2, _BLOBS) * jitter.scale[:, None])[..., None]
    present = (torch.arange(_BLOBS, device=count.device) < count[:, None])[..., None]
    columns = (-0.5 * ((axis(width, centre) - centre[..., :1]) / sigma) ** 2).exp()
    lines = (-0.5 * ((axis(height, centre) - centre[..., 1:]) / sigma) ** 2).exp() * present
    ground = colours(draws, 1, channels)[:, 0, :, None, None]
    tint = 1.6 * colours(draws, _BLOBS // 2, channels).repeat(1, 2, 1) - 0.8
    weighted = lines[:, None] * tint.transpose(1, 2)[..., None]  # [n, C, blobs, H]
    return ground + weighted.transpose(2, 3) @ columns[:, None]


def draw_fractal(
    draws: Draws, member: Draws, jitter: Jitter, shape: tuple[int, int, int]
) -> Tensor:
    """Draw n Julia sets, coloured by how far a point has come after a few steps: `[n, C, H, W]`.

    A step z <- z^2 + c multiplies an error by |2 z|, so seven of them can make a visible difference
    of a rounding of float32. The steps are therefore computed in float64.
    """
    channels, height, width = shape
    c = draws.uniform(-0.9, 0.5, 2)[..., None, None].double()
    zoom, centre = draws.uniform(1.2, 3.2)[..., None], draws.uniform(-0.4, 0.4, 2)
    inverse = jitter.inverse * zoom
    x = axis(width, c) - jitter.shift[:, :1, None]
    y = axis(height, c)[:, None] - jitter.shift[:, 1:, None]
    a = inverse[:, 0, 0, None, None] * x + inverse[:, 0, 1, None, None] * y + centre[:, :1, None]
    b = inverse[:, 1, 0, None, None] * x + inverse[:, 1, 1, None, None] * y + centre[:, 1:, None]
    for _ in range(_ITERATIONS):
        a, b = (a * a - b * b + c[:, 0]).clamp(-4.0, 4.0), (2 * a * b + c[:, 1]).clamp(-4.0, 4.0)
    level = ((a * a + b * b).sqrt().log1p() / 2.0).clamp(0.0, 1.0)[:, None]
    stops = colours(draws, 3, channels)[..., None, None]
    level = level.to(stops.dtype)
    low = torch.lerp(stops[:, 0], stops[:, 1], (2 * level).clamp(max=1.0))
    return torch.lerp(low, stops[:, 2], (2 * level - 1).clamp(min=0.0))
