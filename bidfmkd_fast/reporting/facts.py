"""Gather what the folder of a run holds, whether the run is finished or not; nothing is written."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from bidfmkd_fast.black_box.ledger_file import LedgerRow, read_ledger
from bidfmkd_fast.errors import InputError
from bidfmkd_fast.meta.memory import ClassKey
from bidfmkd_fast.survey.answers import KeptAnswers
from bidfmkd_fast.training.comparison import Comparison, read_comparisons
from bidfmkd_fast.training.config import TrainConfig
from bidfmkd_fast.training.grids import first_answers
from bidfmkd_fast.training.recovered_set import read_set
from bidfmkd_fast.training.run import RecoveredSet
from bidfmkd_fast.training.run_folder import (
    CONFIG,
    LEDGER,
    MEMORY,
    META_MODEL,
    METRICS,
    SUMMARY,
    RunFolder,
)
from bidfmkd_fast.training.spending import Spending, read_spending
from bidfmkd_fast.training.status import is_run, state_of

SHOWN_APIS = 4  # APIs whose recovered images or answers are shown
SHOWN_PICTURES = 8  # pictures of the survey that are shown


class SetCourse(NamedTuple):
    """How the recovery of one set went: a record per step, and the share that came as wanted."""

    api_name: str
    part: str
    history: list[dict[str, float]]
    matched: float


@dataclass(frozen=True)
class RunFacts:
    """What is known of a run.

    Attributes:
        name: name of the folder.
        state: such as "finished".
        config: the settings; None if the folder has none yet.
        summary: what a finished run has kept; None before.
        spending: what run and control have asked, with plan and cap.
        ledger: what each API was asked for the run itself.
        metrics: the records of `metrics.jsonl` with finite numbers.
        comparisons: what `evaluate` has found.
        sets: how the recovery of each set went.
        shown: the recovered sets of the first APIs, in pairs where both are there.
        answers: the first answers of the first APIs to the survey.
        memory: the number of images of each class in the task memory.
    """

    name: str
    state: str
    spending: Spending
    config: TrainConfig | None = None
    summary: dict[str, Any] | None = None
    ledger: Sequence[LedgerRow] = ()
    metrics: Sequence[dict[str, Any]] = ()
    comparisons: Sequence[Comparison] = ()
    sets: Sequence[SetCourse] = ()
    shown: Sequence[Sequence[RecoveredSet]] = ()
    answers: Sequence[KeptAnswers] = ()
    memory: dict[ClassKey, int] = field(default_factory=dict)

    @property
    def is_finished(self) -> bool:
        """Return True if the run has ended by itself."""
        return self.summary is not None

    def of_stage(self, stage: str) -> list[dict[str, Any]]:
        """Return the records of a stage, such as "replay"."""
        return [record for record in self.metrics if record.get("stage") == stage]


def read_facts(path: Path) -> RunFacts:
    """Read the facts of the run in the folder `path`.

    Raises:
        InputError: the folder holds no run of its own, or a file of the run is damaged.
    """
    if not is_run(path):
        if not path.is_dir():
            raise InputError(f"report: there is no folder {path}")
        begun = is_run(path / "control")
        held = "only the control of a run, which has not begun" if begun else "no run"
        raise InputError(f"report: {path} holds {held}; give a folder that `bidfmkd train` wrote")
    folder = RunFolder(path)
    finished = (path / META_MODEL).is_file() and (path / SUMMARY).is_file()
    sets, shown = read_sets(sorted((path / "recovered").glob("api_*.safetensors")))
    memory = folder.memory() if finished and (path / MEMORY).is_file() else None
    return RunFacts(
        name=path.resolve().name,
        state=state_of(path),
        spending=read_spending(path),
        config=folder.config() if (path / CONFIG).is_file() else None,
        summary=folder.summary() if finished else None,
        ledger=_read_ledger(folder, finished),
        metrics=read_metrics(path / METRICS),
        comparisons=read_comparisons(path),
        sets=sets,
        shown=shown,
        answers=first_answers(folder, SHOWN_APIS, SHOWN_PICTURES),
        memory={} if memory is None else dict(zip(memory.classes, memory.counts)),
    )


def _read_ledger(folder: RunFolder, finished: bool) -> list[LedgerRow]:
    """Read the counts of each API: of a finished run from its summary, else from the ledger."""
    if finished and (kept := folder.summary().get("ledger")):
        return [LedgerRow(**row) for row in kept]
    file = folder.path / LEDGER
    return read_ledger(file) if file.is_file() else []


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """Read the records of `metrics.jsonl` as far as they are whole; none if there is no file.

    A process that was killed may have left the last line unfinished.
    """
    if not file.is_file():
        return []
    records = []
    lines = file.read_bytes().splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict):
                raise ValueError(f"wanted an object, got {type(record).__name__}")
        except ValueError as error:
            if number == len(lines) and not line.endswith(b"\n"):
                break
            raise InputError(
                f"report: {file} is damaged (line {number}: {error}); remove it to go without it"
            ) from None
        records.append(record)
    return records


def read_sets(files: Iterable[Path]) -> tuple[list[SetCourse], list[list[RecoveredSet]]]:
    """Read the course of every set, and keep the images of the first APIs, support set first."""
    courses, shown = [], dict[int, list[RecoveredSet]]()
    for file in files:
        found = read_set(file)
        history = [
            record for record in found.recovered.history if math.isfinite(record.get("loss", 0))
        ]
        matched = float(found.matched.float().mean())
        courses.append(SetCourse(found.api_name, found.part, history, matched))
        if found.api_index in shown or len(shown) < SHOWN_APIS:
            shown.setdefault(found.api_index, []).append(found)
    courses.sort(key=lambda course: course.part == "query")
    pairs = [sorted(pair, key=lambda one: one.part == "query") for pair in shown.values()]
    return courses, pairs
