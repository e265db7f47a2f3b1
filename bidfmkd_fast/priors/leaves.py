"""Draw dead leaves: opaque soft-edged shapes on top of each other, with texture.

Source of the model: Lee, Mumford and Huang, "Occlusion Models for Natural Images", IJCV 2001.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bidfmkd_fast.priors.canvas import Jitter, axis, colours, rotation
from bidfmkd_fast.priors.numbers import Draws
from bidfmkd_fast.priors.waves import N_TEXTURE_DRAWS, texture

MOST_LEAVES, _PALETTE = 36, 8
_BY_LEAF = 9
N_DRAWS = MOST_LEAVES * _BY_LEAF + 4 * _PALETTE + 8 + N_TEXTURE_DRAWS
N_MEMBER_DRAWS = MOST_LEAVES * _BY_LEAF


def draw(draws: Draws, member: Draws, jitter: Jitter, shape: tuple[int, int, int]) -> Tensor:
    """Draw n pictures of `shape` (C, H, W): `[n, C, H, W]`.

    Half of the classes keep their arrangement, which the jitter turns, scales and shifts; the
    others keep only its statistics: number, sizes, kinds, colours and texture.
    """
    channels, height, width = shape
    n_leaves = (3 + 33 * draws.uniform(0, 1)[:, 0] ** 2).long()
    palette = colours(draws, _PALETTE, channels)
    n_colours = draws.integer(2, _PALETTE)
    softness = draws.uniform(0.6, 3)
    kind = draws.uniform(0, 1)
    keeps = (draws.uniform(0, 1) < 0.5) | (jitter.points == 0)
    amount = draws.uniform(0, 0.35)[..., None, None]
    own = draws.uniform(0, 1, MOST_LEAVES * _BY_LEAF)
    other = member.uniform(0, 1, MOST_LEAVES * _BY_LEAF)
    leaf = torch.where(keeps, own, other).unflatten(1, (MOST_LEAVES, _BY_LEAF))
    grain = texture(draws, jitter, (height, width), 0.5, 2.0)[:, None]

    centre = jitter.moved(1.2 * leaf[..., :2] - 0.6)  # [n, leaves, 2]
    radius = (0.04 + 0.19 * leaf[..., 2:4] ** 1.5) * jitter.scale[:, None, None]
    bar = ((kind < 0.25) | (leaf[..., 4] < 0.15)) & (leaf[..., 4] < 0.6)
    radius = torch.where(bar[..., None], radius * radius.new_tensor([1.8, 0.35]), radius)
    cos, sin = rotation(leaf[..., 5])
    turn_cos, turn_sin = jitter.angle.cos()[:, None], jitter.angle.sin()[:, None]
    cos, sin = cos * turn_cos - sin * turn_sin, sin * turn_cos + cos * turn_sin
    # A leaf is where a mixture of the round, square and diamond distance is below 1.
    corner = torch.nn.functional.one_hot((3 * leaf[..., 6]).long().clamp(0, 2), 3).to(leaf.dtype)
    colour = (leaf[..., 7] * n_colours[:, None]).long().clamp(max=_PALETTE - 1)
    colour = palette.gather(1, colour[..., None].expand(-1, -1, channels))
    colour = (colour + 0.16 * (leaf[..., 8:9] - 0.5)).clamp(0.0, 1.0)

    # Sort the pictures by falling number of leaves, so that leaf k is drawn on the first n_with[k].
    order = n_leaves.argsort(descending=True, stable=True)
    n_with = (n_leaves[None] > torch.arange(MOST_LEAVES, device=order.device)[:, None]).sum(1)
    x, y = axis(width, radius), axis(height, radius)[:, None]
    rx, ry = radius[..., 0], radius[..., 1]
    edge = torch.minimum(rx, ry) * min(height, width) / softness
    # u = |c (x - cx) + s (y - cy)| / rx and v = |-s (x - cx) + c (y - cy)| / ry
    cx, cy = centre[..., 0], centre[..., 1]
    ux, uy, vx, vy = cos / rx, sin / rx, -sin / ry, cos / ry
    parts = [ux, uy, -(ux * cx + uy * cy), vx, vy, -(vx * cx + vy * cy), edge, *corner.unbind(2)]
    table = torch.stack(parts)[:, order].transpose(1, 2)[..., None, None].contiguous()
    colour = colour[order].transpose(0, 1)[..., None, None].contiguous()  # [leaves, n, C, 1, 1]
    picture = palette[order, 0, :, None, None].expand(-1, -1, height, width).clone()
    for k, m in enumerate(n_with.tolist()):
        if m == 0:
            break
        ux, uy, u0, vx, vy, v0, edge, round_, square, diamond = table[:, k, :m].unbind(0)
        u, v = (ux * x + (uy * y + u0)).abs_(), (vx * x + (vy * y + v0)).abs_()
        distance = torch.addcmul(u * u, v, v).sqrt_().mul_(round_)
        distance.addcmul_(torch.maximum(u, v), square).addcmul_(u.add_(v), diamond)
        cover = distance.neg_().add_(1).mul_(edge).add_(0.5).clamp_(0.0, 1.0)[:, None]
        picture[:m].lerp_(colour[k, :m], cover)
    result = torch.empty_like(picture)
    result[order] = picture
    return result + amount * 0.5 * grain
