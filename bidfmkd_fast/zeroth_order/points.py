"""Make the points of an ask, and the gradient from the differences of their losses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from bidfmkd_fast import ops


class Drawing(NamedTuple):
    """One draw of directions `u_k`, from which both the points and the gradient follow.

    The rows of points are, in this order: the images x themselves (if the base is asked), then
    `x + mu u_k` for each direction, and with antithetic pairs `x - mu u_k` for each direction.

    Args:
        state: int64 `[seed, step]` on the device of the images.
        n_points: q, the number of points per image besides the image itself.
        mu, directions, grid: as for `ops.perturb`.
        antithetic: q/2 directions with two points each, instead of q directions with one.
    """

    state: Tensor
    n_points: int
    mu: float
    directions: str
    grid: int
    antithetic: bool

    @property
    def n_directions(self) -> int:
        """Return how many directions are drawn per image."""
        return self.n_points // 2 if self.antithetic else self.n_points

    def points(self, x: Tensor, base: bool) -> Tensor:
        """Return all points of images `[B, *S]`: `[base + q, B, *S]`."""
        if not self.antithetic:
            return self._along(x, 0, self.n_directions)
        out = torch.empty((1 + self.n_points, *x.shape), dtype=x.dtype, device=x.device)
        plus, minus = out[: 1 + self.n_directions], out[1 + self.n_directions :]
        ops.perturb(x, self.state, self.n_directions, self.mu, self.directions, self.grid, out=plus)
        torch.sub(2 * x, plus[1:], out=minus)
        return out if base else out[1:]

    def chunks(self, x: Tensor, base: bool, rows: int) -> Iterator[Tensor]:
        """Yield the rows of `points` in chunks `[r, B, *S]` of at most `rows` rows.

        No chunk holds both points along directions and points against them. If the caller drops a
        chunk before it fetches the next, the next reuses its memory.
        """
        n_rows = base + self.n_directions
        for start in range(0, n_rows, rows):
            count = min(rows, n_rows - start)
            # Row 0 of what the op returns is x itself, which belongs to the first chunk only.
            with_x = base and start == 0
            points = self._along(x, max(start - base, 0), count - with_x)
            yield points if with_x else points[1:]
            del points
        for start in range(0, self.n_directions if self.antithetic else 0, rows):
            points = self._along(x, start, min(rows, self.n_directions - start))[1:]
            # Reflect the rounded point itself, so that the two lie symmetrically about x.
            yield torch.sub(2 * x, points, out=points)
            del points

    def differences(self, losses: Tensor, base: bool) -> Tensor:
        """Return what stands before each direction: losses `[base + q, B]` -> `[n_directions, B]`.

        It is `L(x + mu u) - L(x)`, or with pairs `(L(x + mu u) - L(x - mu u)) / 2`.
        """
        if not self.antithetic:
            return losses[1:] - losses[:1]
        plus, minus = losses[int(base) :].chunk(2)
        return (plus - minus) / 2

    def gradient(self, differences: Tensor, shape: torch.Size) -> Tensor:
        """Return the estimate per image, `[B, *S]`, from what `differences` returned."""
        return ops.estimate_gradient(
            differences, self.state, shape, self.mu, self.directions, self.grid
        )

    def _along(self, x: Tensor, first: int, count: int) -> Tensor:
        return ops.perturb(
            x, self.state, count, self.mu, self.directions, self.grid, first_direction=first
        )


class Pending(NamedTuple):
    """An ask whose losses have not been told."""

    x: Tensor
    drawing: Drawing
    base: bool  # whether the images themselves are among the points

    @property
    def shape(self) -> tuple[int, int]:
        """Return the shape of the losses that are wanted."""
        return self.base + self.drawing.n_points, self.x.shape[0]
