"""Define the baselines: what a user would write in torch without this package.

One follows the paper's order of operations, the others are the best we could do. All estimate, for
each of B images, the gradient of a loss with forward differences along unit directions. `losses`
stands for the black box and maps points `[n, B, *S]` to losses `[n, B]`.
"""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Callable

import torch
from torch import Tensor

Losses = Callable[[Tensor], Tensor]


def paper_order(x: Tensor, q: int, mu: float, kind: str, losses: Losses, splits: int = 5) -> Tensor:
    """Estimate as the authors' code does: draw, norm, divide, repeat, add, query, weight, sum.

    The q directions are taken in `splits` parts, 5 as the authors do. Unlike their code, this keeps
    the directions that are left over when `splits` does not divide q.
    """
    d = x[0].numel()
    base = losses(x[None])[0]  # [B]
    gradient = torch.zeros_like(x)
    for n in (len(part) for part in torch.arange(q).tensor_split(splits)):
        if kind == "sphere":
            u = torch.randn(n, *x.shape)
            u = u / u.flatten(2).norm(dim=2).view(n, -1, *[1] * (x.dim() - 1))
        else:
            u = (torch.randint(0, 2, (n, *x.shape)) * 2 - 1).float() / math.sqrt(d)
        u = u.to(x.device)  # drawn on the CPU in any case
        points = x.repeat(n, *[1] * x.dim()) + mu * u
        differences = losses(points) - base  # [n, B]
        weighted = differences.view(n, -1, *[1] * (x.dim() - 1)) * u
        gradient = gradient + d / (q * mu) * weighted.sum(0)
    return gradient


class BestEager:
    """The best estimate in eager torch: buffers reused, operations in place, one matrix product.

    The signs of Rademacher directions are the bits of random int64 words.
    """

    def __init__(self, x: Tensor, q: int, kind: str) -> None:
        self.q, self.kind = q, kind
        self.u = torch.empty(q, x.shape[0], x[0].numel(), device=x.device)
        self.bit = torch.empty(x.shape[0], x[0].numel(), dtype=torch.int64, device=x.device)
        self.points = torch.empty(q, x.shape[0], x[0].numel(), device=x.device)

    def directions(self) -> Tensor:
        """Draw directions `[q, B, d]` of length 1."""
        q, b, d = self.u.shape
        if self.kind == "sphere":
            self.u.normal_()
            return self.u.div_(self.u.norm(dim=2, keepdim=True))
        words = torch.empty(-(-q // 63), b, d, dtype=torch.int64, device=self.u.device).random_()
        for k in range(q):
            torch.bitwise_right_shift(words[k // 63], k % 63, out=self.bit)
            self.u[k].copy_(self.bit.bitwise_and_(1))
        return self.u.mul_(2 / math.sqrt(d)).sub_(1 / math.sqrt(d))

    def __call__(self, x: Tensor, mu: float, losses: Losses) -> Tensor:
        u = self.directions()
        torch.add(x.flatten(1), u, alpha=mu, out=self.points)
        base = losses(x[None])[0]
        differences = losses(self.points.view(self.q, *x.shape)) - base
        gradient = torch.bmm(differences.T[:, None, :], u.transpose(0, 1))[:, 0]  # [B, d]
        return gradient.mul_(x[0].numel() / (self.q * mu)).view_as(x)


def keyed_points(x: Tensor, q: int, mu: float) -> Callable[[], Tensor] | None:
    """Return a function that makes Gaussian points `[q, B, *S]` from torch's own keyed generator.

    `torch.func._random` draws by key and counter with Philox, as this package does. Return None,
    and say why, where this torch has no such generator for the device of x.
    """
    try:
        random = importlib.import_module("torch.func._random")
        key = random.key(0, device=x.device)
        random.normal_(key, torch.empty(4, device=x.device))
    except (ImportError, NotImplementedError) as error:
        reason = str(error).split(". ")[0]
        print(f"left out: torch.func._random on {x.device.type} ({reason})", file=sys.stderr)
        return None
    points = torch.empty(q, *x.shape, device=x.device)
    deviation = mu / math.sqrt(x[0].numel())
    return lambda: random.normal_(key, points, std=deviation).add_(x)


def functional(x: Tensor, q: int, mu: float, kind: str, losses: Losses) -> Tensor:
    """Estimate without buffers, for `torch.compile` to fuse."""
    b, d = x.shape[0], x[0].numel()
    if kind == "sphere":
        u = torch.randn(q, b, d)
        u = u / u.norm(dim=2, keepdim=True)
    else:
        u = torch.randint(0, 2, (q, b, d)) * (2 / math.sqrt(d)) - 1 / math.sqrt(d)
    points = (x.flatten(1) + mu * u).view(q, *x.shape)
    differences = losses(points) - losses(x[None])[0]
    return (differences[:, :, None] * u).sum(0).mul(d / (q * mu)).view_as(x)
