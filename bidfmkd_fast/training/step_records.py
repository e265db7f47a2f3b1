"""Keep what outer steps give of methods that are no runs, in a `metrics.jsonl` as a run's."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bidfmkd_fast.training.records import Records

STEPS = 25  # averaged into one record, as in a run


class StepRecords:
    """Records the means of `loss` and `accuracy` over every `STEPS` steps.

    Args:
        file: `metrics.jsonl`; None to keep nothing.
        stage: what the steps are, such as "replay".
        queries: those that were asked before the first step.
        started: `time.perf_counter()` at the start of the training; now if it is None.
    """

    def __init__(
        self,
        file: Path | None,
        stage: str = "replay",
        queries: int = 0,
        started: float | None = None,
    ) -> None:
        self._records, self._stage, self._queries = Records(file), stage, queries
        self._started, self._step = time.perf_counter() if started is None else started, 0
        self._held: list[Mapping[str, float]] = []

    @property
    def seconds(self) -> float:
        """Return the seconds since the start, those of processes that were cut off included."""
        return time.perf_counter() - self._started

    def state(self) -> dict[str, Any]:
        """Return everything as plain values for a checkpoint."""
        return {
            "step": self._step,
            "held": [dict(step) for step in self._held],
            "seconds": self.seconds,
            "history": self._records.history,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` has returned."""
        self._step, self._held = state["step"], list(state["held"])
        self._started = time.perf_counter() - state["seconds"]
        self._records.restore(state["history"])

    def add(self, steps: Sequence[Mapping[str, float]]) -> None:
        """Add the `loss` and the `accuracy` of further steps."""
        for step in steps:
            self._step += 1
            self._held.append(step)
            if len(self._held) == STEPS:
                self.write()

    def write(self) -> None:
        """Write a record of the steps since the last one, if there are any."""
        if not self._held:
            return
        means = {
            name: sum(step[name] for step in self._held) / len(self._held)
            for name in ("loss", "accuracy")
        }
        record = {"stage": self._stage, "step": self._step, **means, "queries": self._queries}
        record["seconds"] = round(self.seconds, 3)
        self._held = []
        self._records.add(record)
        self._records.tell()
