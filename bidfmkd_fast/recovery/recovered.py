"""Define `Recovered`, the set of images that one call to `recover` returns."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from bidfmkd_fast.recovery.picture_grid import grid_html

Record = dict[str, float]


@dataclass(frozen=True, repr=False)
class Recovered:
    """A set of recovered images, N = n_classes * n_per_class, sorted by wanted label.

    A slot is one of the N positions of the set. Every step of the recovery makes one candidate for
    each slot; the set keeps, slot by slot, the candidate with the lowest objective.

    Attributes:
        images: float32 `[N, C, H, W]` in the API's input range.
        labels: the wanted labels, int64 `[N]`.
        scores: the API's answer for exactly these images, float32 `[N, n_classes]`.
        losses: the objective of these images, float32 `[N]`.
        history: one record per step: `step`, `loss` (mean objective), `best_loss` (mean over the
            best candidates so far), `matched` (share of images that the API classifies as
            wanted), `queries` (asked by this recovery so far).
        complete: False when the budget ended before the last step.
        mu: step length (mu) of the gradient estimates; None where none were made.
    """

    images: Tensor
    labels: Tensor
    scores: Tensor
    losses: Tensor
    history: list[Record]
    complete: bool
    mu: float | None = None

    def __repr__(self) -> str:
        shape = "x".join(map(str, self.images.shape[1:]))
        images = f"{len(self.images)} images {shape} of {self.scores.shape[1]} classes"
        if len(self.images):
            matched = (self.scores.argmax(1) == self.labels).float().mean().item()
            images += f": {100 * matched:.0f} % as wanted, loss {self.losses.mean().item():.3g}"
        steps = f"{len(self.history)} steps" + ("" if self.mu is None else f" of mu={self.mu:.3g}")
        return f"Recovered({images}, {steps}{'' if self.complete else ', cut off'})"

    def _repr_html_(self) -> str:
        """Return the images as a grid, for notebooks."""
        return grid_html(repr(self), self.images, self.labels)
