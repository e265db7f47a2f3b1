"""Hold what a run returns: the recovered sets and the finished models."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bidfmkd_fast.black_box.ledger_file import LedgerRow
from bidfmkd_fast.meta import MetaModel, TaskMemory
from bidfmkd_fast.recovery import Recovered
from bidfmkd_fast.training.config import TrainConfig


@dataclass(frozen=True, eq=False, repr=False)
class RecoveredSet:
    """One set recovered from an API, as a run and its file hold it.

    Attributes:
        api_index: number of the API in the pool.
        api_name, class_names: from the API's spec.
        part: "support" or "query".
        recovered: what `recover` returned, but with the images in unit range, [0, 1].
    """

    api_index: int
    api_name: str
    class_names: tuple[str, ...]
    part: str
    recovered: Recovered

    @property
    def images(self) -> Tensor:
        """Return the images in unit range, float32 `[N, C, H, W]`."""
        return self.recovered.images

    @property
    def matched(self) -> Tensor:
        """Return which images the API classifies as wanted, bool `[N]`."""
        return self.recovered.scores.argmax(1) == self.recovered.labels

    def __repr__(self) -> str:
        return f"RecoveredSet({self.part} set of {self.api_name!r}: {self.recovered!r})"


@dataclass(frozen=True, eq=False, repr=False)
class Run:
    """The result of `BiDfMKD.fit`.

    Attributes:
        meta_model: the meta-learned model; `.adapt(images, labels)` returns a classifier.
        initial_model: the same model before training.
        memory: every recovered image by (data set, class).
        recovered: the recovered sets in order.
        history: the records of `metrics.jsonl`: one per epoch of the survey, per recovered set, per
            distillation step, and per 25 replay steps.
        queries, requests: what the run asked of all APIs together; every attempt counts.
        seconds: wall time per stage: "recovery", "distillation", "replay".
        complete: False if a budget ended before every API was recovered in full, or if a service
            was left out.
        config: the settings.
        budget_ended: whether a budget ended before every API was recovered in full.
        skipped: the services that were left out after all tries, by name, with the reason.
        ledger: what each API was asked and answered, in processes that were killed as well.
        labels_only: names of the APIs that give labels only. The survey learns from them, and
            nothing is recovered from them.
    """

    meta_model: MetaModel
    initial_model: MetaModel
    memory: TaskMemory
    recovered: list[RecoveredSet]
    history: list[dict[str, Any]]
    queries: int
    requests: int
    seconds: dict[str, float]
    complete: bool
    config: TrainConfig
    budget_ended: bool = False
    skipped: dict[str, str] = field(default_factory=dict)
    ledger: list[LedgerRow] = field(default_factory=list)
    labels_only: tuple[str, ...] = ()

    def __repr__(self) -> str:
        missing = "" if self.complete else ", not complete"
        return (
            f"Run({len(self.recovered)} sets from {self.n_apis} APIs for {self.queries:,} queries "
            f"in {self.requests:,} requests, {sum(self.seconds.values()):.0f} s{missing}; "
            f"{self.meta_model!r})"
        )

    @property
    def device(self) -> torch.device:
        """Return the device of the models."""
        return next(self.meta_model.module.parameters()).device

    @property
    def n_apis(self) -> int:
        """Return the number of APIs that answered or gave a set."""
        answered = {row.number for row in self.ledger if row.answered_queries}
        return len(answered | {recovered_set.api_index for recovered_set in self.recovered})

    def matched(self, part: str) -> float | None:
        """Return the share of images that their APIs classify as wanted, over all sets of `part`.

        `part` is "support" or "query". Returns None if there is no such set.
        """
        shares = [
            recovered_set.matched.float().mean().item()
            for recovered_set in self.recovered
            if recovered_set.part == part
        ]
        return sum(shares) / len(shares) if shares else None
