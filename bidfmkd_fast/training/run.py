"""What a run yields: the recovered sets and the finished models."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

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
        """The images in unit range, float32 `[N, C, H, W]`."""
        return self.recovered.images

    @property
    def matched(self) -> Tensor:
        """True for images that the API classifies as wanted, bool `[N]`."""
        return self.recovered.scores.argmax(1) == self.recovered.labels

    def __repr__(self) -> str:
        return f"RecoveredSet({self.part} set of {self.api_name!r}: {self.recovered!r})"


@dataclass(frozen=True, eq=False, repr=False)
class Run:
    """What `BiDfMKD.fit` gives.

    Attributes:
        meta_model: the meta-learned model; `.adapt(images, labels)` gives a classifier.
        initial_model: the same model before anything was learned.
        memory: every recovered image by (data set, class).
        recovered: the recovered sets in order.
        history: the records that `metrics.jsonl` holds, one per recovered set, distillation step
            and 25 replay steps.
        queries, requests: what the run asked of all APIs together, every attempt counted.
        seconds: wall time per stage: "recovery", "distillation", "replay".
        complete: False when a budget ended before every API was recovered in full, or one was left
            out.
        config: the settings.
        budget_ended: whether a budget ended before every API was recovered in full.
        skipped: services that were left out after all tries, by name, with the reason.
        ledger: what each API was asked and answered, before a kill included.
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

    def __repr__(self) -> str:
        n_apis = len({one.api_index for one in self.recovered})
        missing = "" if self.complete else ", not complete"
        return (
            f"Run({len(self.recovered)} sets from {n_apis} APIs for {self.queries:,} queries in {self.requests:,} "
            f"requests, {sum(self.seconds.values()):.0f} s{missing}; {self.meta_model!r})"
        )

    def matched(self, part: str) -> float | None:
        """Share of the images of all "support" or "query" sets that got their wanted label; None
        if there is no set.
        """
        flags = [one.matched.float().mean().item() for one in self.recovered if one.part == part]
        return sum(flags) / len(flags) if flags else None
