"""Estimate gradients from queries: by `estimate`, or by ask, query and tell."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from bidfmkd_fast import ops
from bidfmkd_fast.arguments import check_integer
from bidfmkd_fast.errors import InputError
from bidfmkd_fast.ops.checks import check_labels, check_zo_kd_gradient
from bidfmkd_fast.ops.scores import objective
from bidfmkd_fast.zeroth_order.points import Pending
from bidfmkd_fast.zeroth_order.queries import (
    Function,
    check_arguments,
    check_images,
    check_tensors,
    full_precision,
    in_full_precision,
    is_mapped,
    losses_of_chunks,
    losses_told,
    plain,
    warn_of_probabilities,
)
from bidfmkd_fast.zeroth_order.sequence import DirectionSequence
from bidfmkd_fast.zeroth_order.surrogate import mean_loss
from bidfmkd_fast.zeroth_order.uncompiled import uncompiled


class _OfThread(threading.local):
    """The values that each thread has for itself: its pending ask and what its last tell found."""

    def __init__(self) -> None:
        # Set, not only declared: torch.compile watches which of them are there.
        self.pending: Pending | None = None
        self.last_loss: Tensor | None = None
        self.gradient: Tensor | None = None


class ZerothOrder(DirectionSequence):
    """Estimate gradients through a function that only answers queries.

    >>> zo, x = ZerothOrder(10, mu=0.05, seed=0), torch.rand(4, 3, 8, 8, requires_grad=True)
    >>> loss = zo.estimate(lambda images: images.flatten(1).norm(dim=1), x)  # [N, *S] -> [N]
    >>> loss.backward()  # the estimate flows into x's graph

    Where the queries are made elsewhere, `ask` and `tell` do the same in two steps:

    >>> points = zo.ask(x)  # [1 + q, B, *S]
    >>> loss = zo.tell(points.flatten(2).norm(dim=2))  # [1 + q, B] -> scalar

    Every ask draws new directions: `state` is `[seed, step]`, and the step counts the asks from 0.
    Each `ask` needs one `tell` or `tell_scores` before the next; `reset` drops an ask whose queries
    failed. Several threads may share an estimator: each has its own pending ask, `last_loss` and
    `gradient`, and no two asks draw the same directions.

    Images in half precision, as of a generator under autocast, have points in float32.

    Args:
        num_directions: q, the number of points per image besides the image itself. An ask for B
            images makes `(1 + q) * B` points to query.
        mu: the step length: L2 length of a step along a unit direction, in the units of x; from
            1e-30 to 1e30.
        directions: `rademacher`, `sphere`, `gaussian` or `lowres`; see `ops.perturb`.
        grid: side of the `lowres` field; 0 for all other directions.
        seed: seed of the directions, an integer from -2^63 to 2^63 - 1. With None it is drawn from
            torch's CPU generator, which moves on by one draw: `torch.manual_seed` then repeats the
            seed, and two estimators differ. The attribute `seed` holds the number drawn.
        antithetic: make pairs of points, `x + mu u` and `x - mu u`, for q/2 directions; q must then
            be even. The estimate has no error of first order in mu, and where the loss has a kink
            at x (max pooling over a constant background) it averages both sides. The images
            themselves are needed for the value of the loss only (`base`).

    Attributes:
        state: int64 `[seed, step]` of the last ask, on the device of its images; None before the
            first ask.
        last_loss: `[B]`, the objective at the images themselves, from the last tell of this thread.
            Without the base it is the mean over the pairs.
        gradient: `[B, *S]`, the estimate per image (not divided by B), from the last tell of this
            thread; None before the first.

    Raises:
        InputError: a value is out of range, `tell` was called without `ask`, or `ask` a second time
            before `tell`.
    """

    _of_process = ("_lock", "_own")
    _kind_checked = False

    def _start_in_process(self) -> None:
        super()._start_in_process()
        self._own = _OfThread()

    @property
    def last_loss(self) -> Tensor | None:
        """Return `[B]`, the objective at the images of this thread's last tell."""
        return self._own.last_loss

    @property
    def gradient(self) -> Tensor | None:
        """Return `[B, *S]`, the estimate per image of this thread's last tell."""
        return self._own.gradient

    def reset(self) -> None:
        """Drop the pending ask of this thread, if any; the next ask draws new directions."""
        self._own.pending = None

    @uncompiled
    def ask(self, x: Tensor, base: bool = True) -> Tensor:
        """Return the points to query: images `[B, *S]` -> `[1 + q, B, *S]`.

        `points[0]` is x. With antithetic pairs the next q/2 rows are `x + mu u_k`, and the last q/2
        rows `x - mu u_k`; `base=False` then leaves x out, and `[q, B, *S]` remain. The points carry
        no graph.
        """
        pending = self._new_pending("ask", x, base)
        points = pending.drawing.points(full_precision(x), base)
        self._own.pending = pending
        return points

    @uncompiled
    def ask_chunks(self, x: Tensor, max_images: int = 4096, base: bool = True) -> Iterator[Tensor]:
        """Return an iterator over the points in chunks `[r, B, *S]`.

        Concatenated over dim 0, the chunks are `ask(x, base)` bit for bit. A chunk holds as many
        whole rows of B images as fit in `max_images`, but at least one row. If the caller drops a
        chunk before it fetches the next, the next reuses its memory.
        """
        max_images = check_integer("ZerothOrder.ask_chunks", "max_images", max_images, 1)
        pending = self._own.pending = self._new_pending("ask_chunks", x, base)
        rows = max(1, max_images // max(x.shape[0], 1))
        return pending.drawing.chunks(full_precision(x), base, rows)

    @uncompiled
    def tell(self, losses: Tensor, return_gradient: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Return `mean(losses[0])` for the losses `[1 + q, B]` of the points.

        The backward pass of the result sends the estimated gradient of this mean into the graph of
        x. If x has no graph, or inside `torch.no_grad()`, the value and `gradient` are the same,
        and only `backward()` is an error.

        Args:
            losses: `[1 + q, B]`, a tensor or a NumPy array; `[q, B]` if the ask left out the base,
                and the mean over all points is then returned.
            return_gradient: return `(loss, gradient)`, the gradient `[B, *S]` per image.
        """
        pending = self._pending("tell")
        loss = self._finish(pending, losses_told(losses, pending.base, pending.shape, pending.x))
        assert self._own.gradient is not None
        return (loss, self._own.gradient) if return_gradient else loss

    @uncompiled
    def estimate(
        self,
        function: Function,
        x: Tensor,
        max_images: int = 600,
        *,
        arguments: Sequence[Tensor] = (),
        by_row: bool = False,
        base: bool = True,
    ) -> Tensor:
        """Ask a function for the losses of all points in chunks; return the mean loss at x.

        The backward pass of the result sends the estimated gradient of the mean loss into the graph
        of x; `gradient` then holds the estimate per image.

        Args:
            function: images `[N, *S]` to losses `[N]`, one per image, as a tensor or a NumPy array.
                It is called without autograd and outside of autocast, in chunks of rows of B
                images.
            x: the images `[B, *S]`.
            max_images: most images per call.
            arguments: tensors `[B, ...]` that belong to the images, such as labels; the function
                gets the entries of its images after them.
            by_row: give the function exactly the B images of one row (one direction) per call,
                however many they are. A student in training mode needs this, since its batch norms
                would mix the directions of a larger call.
            base: ask for x itself. Only with antithetic pairs may it be False.

        Raises:
            InputError: the function returned anything but a loss for each image.
        """
        max_images = check_integer("ZerothOrder.estimate", "max_images", max_images, 1)
        arguments = tuple(arguments)
        check_arguments(function, x, arguments)
        pending = self._new_pending("estimate", x, base)
        rows = 1 if by_row else max(1, max_images // max(x.shape[0], 1))
        with in_full_precision():
            losses = losses_of_chunks(
                function,
                pending.drawing.chunks(full_precision(x), base, rows),
                arguments,
                None if by_row else max_images,
            )
        return self._finish(pending, losses)

    @uncompiled
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

        Warns:
            ServiceWarning: the first scores on the CPU are probabilities, but `scores_kind` says
                logits.
        """
        pending = self._pending("tell_scores")
        x, drawing = pending.x, pending.drawing
        check_tensors("ZerothOrder.tell_scores", scores, labels, student_scores)
        if scores.dim() != 3 or scores.shape[0] != pending.shape[0]:
            rows = "1 + q" if pending.base else "q"
            raise InputError(
                f"ZerothOrder.tell_scores: scores must be [{rows}, B, n_classes] with "
                f"q = {self.num_directions}; got {list(scores.shape)}"
            )
        if not self._kind_checked:  # not on a GPU, since the host would wait for its values
            self._kind_checked = True
            if scores_kind == "logits" and not scores.is_cuda:
                warn_of_probabilities(scores, stacklevel=2)
        scores = scores.detach()
        student = None if student_scores is None else student_scores.detach()
        settings = (boundary_weight, scores_kind, divergence, self.directions, self.grid)
        given = (scores, labels, drawing.state, x.shape, self.mu, student, *settings)
        if self.antithetic:
            check_zo_kd_gradient(*given, 0, 0)
            check_labels("ZerothOrder.tell_scores", labels, scores.shape[2])
            losses = objective(scores, labels, student, *settings[:3])
            return self._finish(pending, losses, torch.promote_types(scores.dtype, torch.float32))
        gradient, loss = ops.zo_kd_gradient(*given)
        return self._keep(pending, gradient, loss)

    def _new_pending(self, op: str, x: Tensor, base: bool) -> Pending:
        if self._own.pending is not None:
            raise InputError(
                f"ZerothOrder.{op}: the losses of the previous ask have not been told yet, "
                "and would be attributed to other directions; call tell first, or reset() to drop "
                "that ask"
            )
        check_images(f"ZerothOrder.{op}", x)
        if is_mapped(x):
            raise InputError(
                f"ZerothOrder.{op}: torch.func.vmap cannot map over an estimate, whose directions "
                "and queries are those of a batch; give it the whole batch"
            )
        if not base and not self.antithetic:
            raise InputError(
                f"ZerothOrder.{op}: base=False needs antithetic=True, since forward differences "
                "are differences to the loss at the images themselves"
            )
        return Pending(x, self.draw(x.device), base)

    def _pending(self, op: str) -> Pending:
        if self._own.pending is None:
            raise InputError(
                f"ZerothOrder.{op}: there is no pending ask in this thread; "
                "call ask(x) first, and tell once per ask"
            )
        return self._own.pending

    def _finish(self, pending: Pending, losses: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Keep gradient and losses of a pending ask; return the mean loss, in `dtype` if given."""
        drawing = pending.drawing
        # Losses in half precision would lose, or overflow in, their differences.
        precise = losses.to(torch.promote_types(losses.dtype, torch.float32))
        differences = drawing.differences(precise, pending.base)
        # Subtract as precisely as the losses are; after that float32 will do (native kernels).
        if pending.x.dtype != torch.float64:
            differences = differences.float()
        loss = (losses[0] if pending.base else losses.mean(0)).to(dtype or losses.dtype)
        return self._keep(pending, drawing.gradient(differences, pending.x.shape), loss)

    def _keep(self, pending: Pending, gradient: Tensor, loss: Tensor) -> Tensor:
        mean = mean_loss("ZerothOrder", pending.x, gradient, loss)
        self._own.last_loss, self._own.gradient = plain(loss), plain(gradient)
        self._own.pending = None  # last, so that an error loses no answers that were paid for
        return mean
