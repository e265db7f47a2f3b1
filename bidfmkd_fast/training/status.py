"""Say how far the runs in a folder are and what they have spent (`bidfmkd status`)."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path

from bidfmkd_fast.black_box.ledger_file import read_ledger
from bidfmkd_fast.errors import InputError
from bidfmkd_fast.files.folder_lock import LOCK
from bidfmkd_fast.recovery.cost import Cost
from bidfmkd_fast.survey.answers import count_answers
from bidfmkd_fast.training.run_folder import (
    CONFIG,
    LEDGER,
    META_MODEL,
    STAND_INS,
    SUMMARY,
    RunFolder,
)
from bidfmkd_fast.training.spending import Cap, Spending, read_plan, read_spending, read_spent
from bidfmkd_fast.training.tables import text_table

FINISHED, CUT_OFF, BEGUN = "finished", "cut off", "the control is made first, the run has not begun"


def status_text(path: str | Path) -> str:
    """Describe the run in a folder, or every run below it, as in a comparison or a sweep.

    Nothing is written and no lock is taken, so that runs under way are not disturbed.

    Raises:
        InputError: there is no run, or a file of a run is damaged.
    """
    folder = Path(path)
    if is_run(folder) or is_run(folder / "control"):
        return f"{folder}: {state_of(folder)}\n\n{text_table(read_spending(folder).rows())}"
    if not folder.is_dir():
        raise InputError(f"status: there is no folder {folder}")
    runs = list(_runs_below(folder))
    if not runs:
        holder = _holder(folder)
        raise InputError(
            f"status: {holder} works in {folder} and has asked nothing yet"
            if holder
            else f"status: {folder} holds no run; give a folder of `bidfmkd train`, `demo`, "
            "`compare` or `sweep`"
        )
    names = {run: str(run.relative_to(folder)).removesuffix(".partial") for run in runs}
    states = [["run", "state"], *([name, state_of(run)] for run, name in names.items())]
    parts = {name: spent for run, name in names.items() if (spent := read_spent(run)) is not None}
    plans = [plan for run in runs if (plan := read_plan(run)) is not None]
    planned = sum((plan.planned for plan in plans), Cost()) if len(plans) == len(parts) else None
    return f"{text_table(states)}\n\n{text_table(Spending(parts, planned, Cap()).rows())}"


def is_run(folder: Path) -> bool:
    """Return True if a run has begun in `folder`."""
    return (folder / CONFIG).is_file() or (folder / LEDGER).is_file()


def state_of(folder: Path) -> str:
    """Say whether a run is finished, under way or cut off, and how many of its sets there are."""
    if (folder / META_MODEL).is_file():
        return FINISHED + _shortcoming(folder)
    holder = _holder(folder)
    state = f"under way ({holder})" if holder else CUT_OFF
    if not is_run(folder):
        return f"{state}; {BEGUN}" if is_run(folder / "control") else state
    n_sets = len(list((folder / "recovered").glob("*.safetensors")))
    plan = read_plan(folder)
    if plan is not None and not plan.sets:  # all APIs give labels only
        return f"{state}, {_survey_of(folder)}nothing to recover"
    of = "" if plan is None else f" of {plan.sets}"
    return f"{state}, {_survey_of(folder)}{n_sets}{of} sets recovered"


def _survey_of(folder: Path) -> str:
    """Say how many answers of a survey there are; nothing for a run without one."""
    n_images = RunFolder(folder).config().survey.n_images if (folder / CONFIG).is_file() else 0
    if not n_images:
        return ""
    answered = sum(count_answers(file) for file in (folder / "survey").glob("*.answers"))
    n_apis = len(read_ledger(folder / LEDGER)) if (folder / LEDGER).is_file() else 0
    of = f" of {n_images * n_apis:,}" if n_apis else ""
    return f"the survey has {answered:,}{of} answers, "


def _shortcoming(folder: Path) -> str:
    """Say in brackets what a finished run lacks; nothing if it is complete."""
    summary = RunFolder(folder).summary() if (folder / SUMMARY).is_file() else {}
    reasons = ["a budget ended it early"] if summary.get("budget_ended") else []
    reasons += [f"{name} was left out" for name in summary.get("skipped", ())]
    return f" ({'; '.join(reasons)})" if reasons else ""


def _runs_below(folder: Path) -> Iterator[Path]:
    """Yield every folder below `folder` with a run or a finished method, in order of names."""
    found = {file.parent for name in (LEDGER, SUMMARY) for file in folder.rglob(name)}
    yield from sorted(run for run in found if run.name != STAND_INS)


def _holder(folder: Path) -> str | None:
    """Name the living process that has locked a folder, or a folder above it; else return None."""
    for place in (folder, *folder.resolve().parents[:4]):
        try:
            holder = (place / LOCK).read_text(encoding="utf-8").strip()
        except OSError:
            continue
        match = re.fullmatch(r"process (\d+) on (.*)", holder)
        if match is None or match[2] != socket.gethostname() or _is_alive(int(match[1])):
            return holder or "another process"
    return None


def _is_alive(pid: int) -> bool:
    """Return True if the process exists on this machine."""
    try:
        os.kill(pid, 0)  # signal 0 only checks whether the process exists
    except ProcessLookupError:
        return False
    except PermissionError:  # the process belongs to another user
        return True
    return True
