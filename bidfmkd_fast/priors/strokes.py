"""Draw strokes: one to four quadratic Bezier curves in ink on paper, as handwriting is."""

from __future__ import annotations

import torch
from torch import Tensor

from bidfmkd_fast.priors.canvas import Jitter, axis, colours
from bidfmkd_fast.priors.numbers import Draws

MOST_CURVES, _SAMPLES = 4, 20
N_DRAWS, N_MEMBER_DRAWS = 48, 6 * MOST_CURVES


def draw(draws: Draws, member: Draws, jitter: Jitter, shape: tuple[int, int, int]) -> Tensor:
    """Draw n pictures of `shape` (C, H, W): `[n, C, H, W]`.

    A curve is a row of Gaussian dots, whose sum over all dots is one matrix product of their
    profiles along x and y. With dots of weight ds / (s sqrt(2 pi)), ds apart, the sum has the
    profile exp(-r^2 / 2 s^2) across the curve whatever the spacing. Ink is where it exceeds 1/2.
    """
    channels, height, width = shape
    pixel = 1 / min(height, width)
    n_curves = draws.integer(1, MOST_CURVES)
    control = draws.uniform(-0.36, 0.36, 6 * MOST_CURVES).unflatten(1, (MOST_CURVES, 3, 2))
    # Half of the time a curve begins where the previous curve ends.
    joined = draws.uniform(0, 1, MOST_CURVES)
    for k in range(1, MOST_CURVES):
        joins = joined[:, k, None] < 0.5
        control[:, k, 0] = torch.where(joins, control[:, k - 1, 2], control[:, k, 0])
    moves = member.uniform(-1, 1, 6 * MOST_CURVES).unflatten(1, (MOST_CURVES, 3, 2))
    control = jitter.moved((control + moves * jitter.points[:, :, None, None]).flatten(1, 2))
    control = control.unflatten(1, (MOST_CURVES, 3))
    t = torch.arange(_SAMPLES, dtype=control.dtype, device=control.device)[:, None]
    t = (t + 0.5) / _SAMPLES
    start, middle, end = (control[:, :, None, i] for i in range(3))
    dots = (1 - t) ** 2 * start + 2 * t * (1 - t) * middle + t**2 * end  # [n, curves, samples, 2]
    speed = (2 * (1 - t) * (middle - start) + 2 * t * (end - middle)).norm(dim=-1)
    sigma = (draws.uniform(0.018, 0.05) * jitter.scale[:, None]).clamp(min=0.55 * pixel)  # [n, 1]
    drawn = torch.arange(MOST_CURVES, device=control.device) < n_curves[:, None]
    weight = speed / _SAMPLES / (2.5066 * sigma[:, :, None]) * drawn[:, :, None]
    x, y = (dots[..., i].flatten(1) for i in range(2))
    scale = -0.5 / sigma[:, :, None] ** 2
    columns = (scale * (axis(width, x) - x[:, :, None]) ** 2).exp()
    lines = (scale * (axis(height, y) - y[:, :, None]) ** 2).exp() * weight.flatten(1)[..., None]
    profile = lines.transpose(1, 2) @ columns  # [n, H, W]
    # At 1/2 the profile falls by 0.59 / sigma a side: this slope makes the edge one pixel wide.
    ink = ((profile - 0.5) * (sigma[:, :, None] / (0.59 * pixel)) + 0.5).clamp(0.0, 1.0)[:, None]
    pair = colours(draws, 2, channels)
    # In six of ten pictures the two colours are white and black, in either order.
    plain, order = draws.uniform(0, 1)[:, :, None], draws.integer(0, 1)[:, None, None]
    ends = ink.new_tensor([0.0, 1.0])[None, :, None].expand(len(ink), 2, channels)
    ends = torch.where(order == 1, ends, 1 - ends)
    pair = torch.where(plain < 0.6, ends, pair)[..., None, None]
    return torch.lerp(pair[:, 0], pair[:, 1], ink)
