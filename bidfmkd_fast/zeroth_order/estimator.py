"""Estimate gradients by ask and tell: ask for points, query them, tell their losses or scores."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bidfmkd_fast import ops
from bidfmkd_fast.arguments import check_integer, check_number
from bidfmkd_fast.errors import InputError
from bidfmkd_fast.ops.checks import check_grid, check_mu


class _Surrogate(torch.autograd.Function):
    """Return the mean loss forward, and a given estimate as its gradient backward."""

    @staticmethod
    def forward(context: Any, x: Tensor, gradient: Tensor, loss: Tensor) -> Tensor:
        context.save_for_backward(gradient)
        return loss.mean()

    @staticmethod
    def backward(context: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = context.saved_tensors
        return gradient * (grad / max(gradient.shape[0], 1)), None, None


class _Pending(NamedTuple):
    """An ask whose losses have not been told: its images, and the `[seed, step]` it drew from."""

    x: Tensor
    state: Tensor


class _OfThread(threading.local):
    """The values that each thread has for itself: its pending ask and its last losses."""

    pending: _Pending | None = None
    last_loss: Tensor | None = None


class ZerothOrder:
    """Estimate gradients through a function that only answers queries.

    >>> zo = ZerothOrder(num_directions=10, mu=0.05)
    >>> points = zo.ask(x)                    # [1 + q, B, *S]
    >>> loss = zo.tell(query_losses(points))  # [1 + q, B] -> scalar
    >>> loss.backward()                       # the estimate flows into x's graph

    Every `ask` draws new directions: `state` is `[seed, step]`, and the step counts the asks from
    0. Each `ask` needs one `tell` or `tell_scores` before the next `ask`; `reset` drops an ask
    whose queries failed. Several threads may share an estimator: each has its own pending ask and
    `last_loss`, and no two asks draw the same directions.

    Args:
        num_directions: q, the number of random directions per image. An `ask` for B images makes
            `(1 + q) * B` points to query.
        mu: the step length: L2 length of a step along a unit direction, in the units of x; from
            1e-30 to 1e30.
        directions: `rademacher`, `sphere`, `gaussian` or `lowres`; see `ops.perturb`.
        grid: side of the `lowres` field; 0 for all other directions.
        seed: seed of the directions, an integer from -2^63 to 2^63 - 1. With None it is drawn from
            torch's CPU generator, which moves on by one draw: `torch.manual_seed` then repeats the
            seed, and two estimators differ. The attribute `seed` holds the number drawn.

    Attributes:
        state: int64 `[seed, step]` of the last ask, on the device of its images; None before the
            first ask.
        last_loss: `[B]`, the objective at the images themselves, from the last `tell` or
            `tell_scores` of this thread.

    Raises:
        InputError: a value is out of range, `tell` was called without `ask`, or `ask` a second time
            before `tell`.
    """

    def __init__(
        self,
        num_directions: int = 10,
        mu: float = 0.05,
        directions: str = "rademacher",
        grid: int = 0,
        seed: int | None = None,
    ) -> None:
        op = "ZerothOrder"
        self.num_directions = check_integer(op, "num_directions", num_directions, 1)
        self.mu = check_number(op, "mu", mu)
        check_mu(op, self.mu)
        self.directions = directions
        self.grid = check_integer(op, "grid", grid, 0)
        check_grid(op, directions, self.grid)
        self.seed = _drawn_seed() if seed is None else _checked_seed(op, seed)
        self.state: Tensor | None = None
        self._lock = threading.Lock()
        self._own = _OfThread()

    @property
    def last_loss(self) -> Tensor | None:
        """Return `[B]`, the objective at the images of this thread's last tell."""
        return self._own.last_loss

    def state_dict(self) -> dict[str, int]:
        """Return the seed and the step of the next ask; on a GPU this waits for the device."""
        return {"seed": self.seed, "step": 0 if self.state is None else int(self.state[1]) + 1}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Continue from the position of the estimator that returned `state`.

        The next ask draws the directions that the next ask of that estimator would have drawn. A
        pending ask of this thread is dropped.

        Raises:
            InputError: `state` is not a dict as `state_dict` returns it.
        """
        op = "ZerothOrder.load_state_dict"
        if not isinstance(state, Mapping) or set(state) != {"seed", "step"}:
            got = sorted(state) if isinstance(state, Mapping) else type(state).__name__
            raise InputError(
                f"{op}: state must hold seed and step, as state_dict() returns them; got {got}"
            )
        seed, step = (
            _checked_seed(op, state["seed"]),
            check_integer(op, "step", state["step"], 0, 2**63 - 1),
        )
        with self._lock, torch.inference_mode(False):
            self.seed = seed
            self.state = torch.tensor([seed, step - 1], dtype=torch.int64) if step else None
        self.reset()

    def reset(self) -> None:
        """Drop the pending ask of this thread, if any; the next ask draws new directions."""
        self._own.pending = None

    def draw(self, device: torch.device) -> Tensor:
        """Advance to the next step; return its int64 `[seed, step]` on `device` as a new tensor.

        The lock keeps two threads from drawing the same step. Inference mode is switched off, since
        its tensors could not be advanced in place later.
        """
        with self._lock, torch.inference_mode(False):
            if self.state is None or self.state.device != device:
                step = -1 if self.state is None else int(self.state[1])
                self.state = torch.tensor([self.seed, step], dtype=torch.int64, device=device)
            # Advance in place, so that the replay of a captured CUDA graph does so too.
            self.state[1] += 1
            return self.state.clone()

    def _check_free(self, op: str) -> None:
        if self._own.pending is not None:
            raise InputError(
                f"ZerothOrder.{op}: the losses of the previous ask have not been told yet, "
                "and would be attributed to other directions; call tell first, or reset() to drop "
                "that ask"
            )

    def __getstate__(self) -> dict[str, Any]:
        """Return all state but that of this process and its threads.

        A copy starts without a pending ask.
        """
        return {
            name: value for name, value in self.__dict__.items() if name not in ("_lock", "_own")
        }

    def __setstate__(self, values: dict[str, Any]) -> None:
        self.__dict__.update(values)
        self._lock, self._own = threading.Lock(), _OfThread()

    def __repr__(self) -> str:
        grid = f", grid={self.grid}" if self.grid else ""
        return (
            f"ZerothOrder(num_directions={self.num_directions}, mu={self.mu:g}, "
            f"directions={self.directions!r}{grid}, seed={self.seed})"
        )

    def ask(self, x: Tensor) -> Tensor:
        """Return the points to query: images `[B, *S]` -> `[1 + q, B, *S]`.

        `points[0]` is x. The points carry no graph.
        """
        self._check_free("ask")
        state = self.draw(x.device)
        points = ops.perturb(
            x.detach(), state, self.num_directions, self.mu, self.directions, self.grid
        )
        self._own.pending = _Pending(x, state)
        return points

    def ask_chunks(self, x: Tensor, max_images: int = 4096) -> Iterator[Tensor]:
        """Return an iterator over the points in chunks `[r, B, *S]`.

        Concatenated over dim 0, the chunks are `ask(x)` bit for bit. A chunk holds as many whole
        rows of B images as fit in `max_images`, but at least one row. If the caller drops a chunk
        before it fetches the next, the next reuses its memory.
        """
        max_images = check_integer("ZerothOrder.ask_chunks", "max_images", max_images, 1)
        self._check_free("ask_chunks")
        state = self.draw(x.device)
        self._own.pending = _Pending(x, state)
        rows = max(1, max_images // max(x.shape[0], 1))
        return self._chunks(x.detach(), state, rows)

    def _chunks(self, x: Tensor, state: Tensor, rows: int) -> Iterator[Tensor]:
        for start in range(0, 1 + self.num_directions, rows):
            n_rows = min(rows, 1 + self.num_directions - start)
            # Row 0 of the op's result is x itself, which belongs to the first chunk only.
            count, first = (n_rows - 1, 0) if start == 0 else (n_rows, start - 1)
            points = ops.perturb(
                x, state, count, self.mu, self.directions, self.grid, first_direction=first
            )
            yield points if start == 0 else points[1:]
            del points

    def tell(self, losses: Tensor) -> Tensor:
        """Return `mean(losses[0])` for the losses `[1 + q, B]` of the points.

        The backward pass of the result sends the estimated gradient of this mean into the graph of
        x.
        """
        x, state = self._pending("tell")
        wanted = [1 + self.num_directions, x.shape[0]]
        if list(losses.shape) != wanted:
            raise InputError(
                f"ZerothOrder.tell: losses must be [1 + q, B] = {wanted}; got {list(losses.shape)}"
            )
        losses = losses.detach()
        gradient = ops.estimate_gradient(
            losses[1:] - losses[:1], state, x.shape, self.mu, self.directions, self.grid
        )
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
        """Return the mean recovery objective for the scores `[1 + q, B, n_classes]` of the points.

        The backward pass of the result sends the estimated gradient into the graph of x.
        `ops.zo_kd_gradient` defines the objective and explains the other arguments.
        """
        x, state = self._pending("tell_scores")
        if scores.dim() != 3 or scores.shape[0] != 1 + self.num_directions:
            raise InputError(
                "ZerothOrder.tell_scores: scores must be [1 + q, B, n_classes] with "
                f"q = {self.num_directions}; got {list(scores.shape)}"
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

    def _pending(self, op: str) -> _Pending:
        if self._own.pending is None:
            raise InputError(
                f"ZerothOrder.{op}: there is no pending ask in this thread; "
                "call ask(x) first, and tell once per ask"
            )
        return self._own.pending

    def _finish(self, x: Tensor, gradient: Tensor, loss: Tensor) -> Tensor:
        self._own.pending = None
        self._own.last_loss = loss
        return _Surrogate.apply(x, gradient.to(x.dtype), loss)


def _drawn_seed() -> int:
    return int(torch.randint(2**63 - 1, (), dtype=torch.int64, device="cpu"))


def _checked_seed(op: str, seed: object) -> int:
    """Return `seed` as an int; refuse what an int64 tensor cannot hold."""
    return check_integer(op, "seed", seed, -(2**63), 2**63 - 1)
