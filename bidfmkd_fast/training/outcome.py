"""Hold what the recovery of one API has given: its two sets, or the error that prevented them."""

from __future__ import annotations

from dataclasses import dataclass, field

from bidfmkd_fast.black_box import BlackBox
from bidfmkd_fast.meta import DistillationTask
from bidfmkd_fast.training.run import RecoveredSet


@dataclass
class Outcome:
    """The result of recovering one API.

    Attributes:
        index: number of the API in the pool.
        sets: the support set and the boundary query set, as far as they are finished.
        error: what kept the API from giving both sets; None if nothing did.
        asked: whether the API was asked in this process, rather than its sets read from disk.
    """

    index: int
    sets: list[RecoveredSet] = field(default_factory=list)
    error: Exception | None = None
    asked: bool = False

    def task(self, api: BlackBox) -> DistillationTask | None:
        """Return both sets as a task of the distillation; None if a set is missing."""
        if len(self.sets) < 2:
            return None
        support, query = self.sets
        return DistillationTask(
            support.images,
            support.recovered.scores,
            query.images,
            query.recovered.scores,
            api.spec.returned_kind,
        )
