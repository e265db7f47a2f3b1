"""The ask-and-tell estimator: ask for points, query them yourself, tell the losses or the scores."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from bidfmkd_fast import ops
from bidfmkd_fast.errors import InputError


class _Surrogate(torch.autograd.Function):
    """The value of the mean loss, with a given estimate as its gradient."""

    @staticmethod
    def forward(context: Any, x: Tensor, gradient: Tensor, loss: Tensor) -> Tensor:
        context.save_for_backward(gradient)
        return loss.mean()

    @staticmethod
    def backward(context: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = context.saved_tensors
        return gradient * (grad / max(gradient.shape[0], 1)), None, None


class ZerothOrder:
    """Zeroth-order gradients through a function that only answers queries.

    >>> zo = ZerothOrder(num_directions=10, mu=0.05)
    >>> points = zo.ask(x)                    # [1 + q, B, *S]
    >>> loss = zo.tell(query_losses(points))  # [1 + q, B] -> scalar
    >>> loss.backward()                       # the estimate flows into x's graph

    Every `ask` draws new directions: `state` is `[seed, step]` and the step counts the asks, from 0.

    Args:
        num_directions: q, random directions per image; one `ask` costs `(1 + q) * B` queries.
        mu: L2 length of a step along a unit direction, in the units of x.
        directions: `rademacher`, `sphere`, `gaussian` or `lowres`; see `ops.perturb`.
        grid: side of the `lowres` field; 0 for the others.
        seed: of the directions, any 64-bit integer.

    Attributes:
        state: int64 `[seed, step]` of the last ask, on the device of its images; None before the first.
        last_loss: `[B]`, the objective at the images themselves, from the last `tell` or `tell_scores`.

    Raises:
        InputError: values out of range; `tell` without `ask`.
    """

    def __init__(
        self, num_directions: int = 10, mu: float = 0.05, directions: str = "rademacher", grid: int = 0, seed: int = 0
    ) -> None:
        if num_directions < 1:
            raise InputError(f"ZerothOrder: num_directions must be at least 1; got {num_directions}")
        if not 0 < mu < float("inf"):
            raise InputError(f"ZerothOrder: mu, the length of a step, must be a positive number; got {mu}")
        self.num_directions = num_directions
        self.mu = mu
        self.directions = directions
        self.grid = grid
        self.seed = seed
        self.state: Tensor | None = None
        self.last_loss: Tensor | None = None
        self._asked: Tensor | None = None

    def _begin(self, x: Tensor) -> Tensor:
        if self.state is None or self.state.device != x.device:
            step = -1 if self.state is None else int(self.state[1])
            self.state = torch.tensor([self.seed, step], dtype=torch.int64, device=x.device)
        # In place, so that a captured graph advances it.
        self.state[1] += 1
        self._asked = x
        return self.state

    def ask(self, x: Tensor) -> Tensor:
        """The points to query: images `[B, *S]` -> `[1 + q, B, *S]` without a graph; `points[0]` is x."""
        state = self._begin(x)
        return ops.perturb(x.detach(), state, self.num_directions, self.mu, self.directions, self.grid)

    def ask_chunks(self, x: Tensor, max_images: int = 4096) -> Iterator[Tensor]:
        """The same points in chunks `[r, B, *S]`, whose concatenation over dim 0 is `ask(x)` bit for bit.

        A chunk holds as many whole rows of B images as fit in `max_images`, and at least one. A chunk that is dropped
        before the next is asked for gives it its memory.
        """
        state = self._begin(x)
        rows = max(1, max_images // max(x.shape[0], 1))
        return self._chunks(x.detach(), state, rows)

    def _chunks(self, x: Tensor, state: Tensor, rows: int) -> Iterator[Tensor]:
        for start in range(0, 1 + self.num_directions, rows):
            n_rows = min(rows, 1 + self.num_directions - start)
            # Row 0 of the op is x itself: it belongs to the first chunk only.
            count, first = (n_rows - 1, 0) if start == 0 else (n_rows, start - 1)
            points = ops.perturb(x, state, count, self.mu, self.directions, self.grid, first_direction=first)
            yield points if start == 0 else points[1:]
            del points

    def tell(self, losses: Tensor) -> Tensor:
        """Losses `[1 + q, B]` of the points -> `mean(losses[0])`; its backward sends estimate / B into x's graph."""
        x, state = self._take()
        wanted = [1 + self.num_directions, x.shape[0]]
        if list(losses.shape) != wanted:
            raise InputError(f"ZerothOrder.tell: losses must be [1 + q, B] = {wanted}; got {list(losses.shape)}")
        losses = losses.detach()
        gradient = ops.estimate_gradient(losses[1:] - losses[:1], state, x.shape, self.mu, self.directions, self.grid)
        return self._finish(x, gradient, losses[0])

    def tell_scores(
        self,
        scores: Tensor,
        labels: Tensor,
        student_scores: Tensor | None = None,
        boundary_weight: float = 0.0,
        scores_kind: str = "logits",
        divergence: str = "l1",
    ) -> Tensor:
        """Scores `[1 + q, B, n_classes]` of the points -> mean recovery objective; see `ops.zo_kd_gradient`."""
        x, state = self._take()
        if scores.dim() != 3 or scores.shape[0] != 1 + self.num_directions:
            raise InputError(
                f"ZerothOrder.tell_scores: scores must be [1 + q, B, n_classes] with q = {self.num_directions}; "
                f"got {list(scores.shape)}"
            )
        gradient, loss = ops.zo_kd_gradient(
            scores.detach(),
            labels,
            state,
            x.shape,
            self.mu,
            None if student_scores is None else student_scores.detach(),
            boundary_weight,
            scores_kind,
            divergence,
            self.directions,
            self.grid,
        )
        return self._finish(x, gradient, loss)

    def _take(self) -> tuple[Tensor, Tensor]:
        if self._asked is None or self.state is None:
            raise InputError("ZerothOrder: tell needs the points of an ask; call ask(x) first, and tell once per ask")
        return self._asked, self.state

    def _finish(self, x: Tensor, gradient: Tensor, loss: Tensor) -> Tensor:
        self._asked = None
        self.last_loss = loss
        return _Surrogate.apply(x, gradient.to(x.dtype), loss)
