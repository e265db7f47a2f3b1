"""Keep what outer steps give of methods that are no runs, in a `metrics.jsonl` as a run's."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from bidfmkd_fast.training.records import Records

STEPS = 25  # averaged into one record, as in a run


class StepRecords:
    """Records the means of `loss` and `accuracy` over every `STEPS` steps.

    Args:
        file: `metrics.jsonl`, which is not there yet; None to keep nothing.
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
        record["seconds"] = round(time.perf_counter() - self._started, 3)
        self._held = []
        self._records.add(record)
