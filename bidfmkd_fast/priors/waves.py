"""Add up plane waves: textures whose spectrum falls as 1/f^a, from noise to clouds; gratings."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from bidfmkd_fast.priors.canvas import Jitter, axis, colours
from bidfmkd_fast.priors.numbers import Draws

_WAVES = 40
N_TEXTURE_DRAWS = 3 * _WAVES + 8
N_DRAWS, N_GRATING_DRAWS = N_TEXTURE_DRAWS + 16, 24


def texture(draws: Draws, jitter: Jitter, size: tuple[int, int], low: float, high: float) -> Tensor:
    """Draw n fields with mean 0 and variance about 1, `[n, H, W]`.

    The amplitude of frequency f falls as 1/f^a, where the exponent a is drawn from [low, high).
    Frequencies are log-uniform up to the Nyquist frequency. A wave therefore stands for a band as
    wide as f, and gets the amplitude f^(1-a).
    """
    height, width = size
    exponent = draws.uniform(low, high)
    nyquist = min(height, width) / 2.2
    frequency = (draws.uniform(0, 1, _WAVES) * math.log(nyquist)).exp()  # cycles per side
    angle = draws.uniform(0, math.pi, _WAVES)
    phase = draws.uniform(0, 2 * math.pi, _WAVES)
    amplitude = frequency ** (1 - exponent)
    amplitude = amplitude / (0.5 * amplitude**2).sum(1, keepdim=True).sqrt()
    vector = torch.stack([frequency * angle.cos(), frequency * angle.sin()], 2)
    return _sum_of_waves(vector, phase, amplitude, jitter, size)


def _sum_of_waves(
    vector: Tensor, phase: Tensor, amplitude: Tensor, jitter: Jitter, size: tuple[int, int]
) -> Tensor:
    """Add up waves `[n, K]`: cos(A + B) = cos A cos B - sin A sin B makes it one matrix product.

    The jitter moves a point p to M p + s, so a wave cos(2 pi k p) becomes one with the vector
    M^-T k and the phase less 2 pi M^-T k s.
    """
    vector = torch.einsum("nji,nkj->nki", jitter.inverse.to(vector.dtype), vector)
    phase = phase - 2 * math.pi * (vector * jitter.shift[:, None]).sum(2)
    across = 2 * math.pi * vector[:, :, :1] * axis(size[1], vector)
    down = 2 * math.pi * vector[:, :, 1:] * axis(size[0], vector) + phase[:, :, None]
    lines = torch.cat([down.cos(), -down.sin()], 1) * amplitude.repeat(1, 2)[..., None]
    return lines.transpose(1, 2) @ torch.cat([across.cos(), across.sin()], 1)


def draw_texture(
    draws: Draws, member: Draws, jitter: Jitter, shape: tuple[int, int, int]
) -> Tensor:
    """Draw n pictures of noise (a = 0) to clouds (a = 2): `[n, C, H, W]`."""
    channels, *size = shape
    field = texture(draws, jitter, (size[0], size[1]), 0.0, 2.2)[:, None]
    ends = colours(draws, 2, channels)[..., None, None]
    return torch.lerp(ends[:, 0], ends[:, 1], (0.5 + 0.35 * field).clamp(0.0, 1.0))


def draw_grating(
    draws: Draws, member: Draws, jitter: Jitter, shape: tuple[int, int, int]
) -> Tensor:
    """Draw n pictures of one to three gratings, from sine waves to stripes: `[n, C, H, W]`."""
    channels, height, width = shape
    n_waves = draws.integer(1, 3)
    frequency = (draws.uniform(0, 1, 3) * math.log(min(height, width) / 4)).exp() * 1.2
    angle, phase = draws.uniform(0, math.pi, 3), draws.uniform(0, 2 * math.pi, 3)
    present = torch.arange(3, device=angle.device) < n_waves[:, None]
    vector = torch.stack([frequency * angle.cos(), frequency * angle.sin()], 2)
    field = _sum_of_waves(vector, phase, present.float(), jitter, (height, width))
    sharpness = draws.uniform(0.5, 4)[:, :, None]
    ends = colours(draws, 2, channels)[..., None, None]
    return torch.lerp(ends[:, 0], ends[:, 1], (0.5 + sharpness * field).clamp(0.0, 1.0)[:, None])
