"""Compose the last line of a killed command: what it kept, what it asked, and how to go on."""

from __future__ import annotations

import shlex
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bidfmkd_fast.black_box.ledger import asked_by_this_process
from bidfmkd_fast.black_box.ledger_file import read_ledger
from bidfmkd_fast.errors import InputError
from bidfmkd_fast.runtime import job
from bidfmkd_fast.training.run_folder import LEDGER, STAND_INS

# Commands that continue in the same folder.
_RESUMED = ("pool", "train", "compare", "sweep", "recover")


def last_line(command: str, arguments: Sequence[str], options: Any, number: int) -> str:
    """Return the line for a `command` that the signal `number` ended.

    `arguments` is the command line. `options` are the parsed options, or None if the signal came
    before they were parsed; a command sets `options.out` to its folder once it has chosen one.
    """
    names = {signal.SIGINT: "Ctrl-C", signal.SIGALRM: "--stop-after"}
    by = names.get(signal.Signals(number), signal.Signals(number).name)
    name = f"bidfmkd {command}".strip()
    out = getattr(options, "out", None)
    folder = Path(out) if out is not None else None
    if command in ("", "serve"):  # these keep nothing and cannot continue
        return f"{name}: ended by {by}"
    lost = [f"{lost} has died"] if (lost := job.lost()) else []
    parts = [
        f"{name}: {'; '.join([*lost, f'ended by {by}'])}",
        _kept(command, folder),
        _asked(folder),
        _next(command, arguments, folder),
    ]
    return "; ".join(parts)


def _kept(command: str, folder: Path | None) -> str:
    if folder is None or not folder.is_dir():
        return "nothing to keep"
    if command == "pool":
        n_trained = _n_trained(folder)
        return f"kept in {folder}: {n_trained} trained APIs" if n_trained else "nothing to keep"
    if command == "bench":
        files = [file.name for file in folder.glob("*.json")]
        return f"kept in {folder}: {', '.join(files)}" if files else "nothing to keep"
    n_sets = len(list(folder.rglob("recovered/*.safetensors")))
    n_begun = len(list(folder.rglob("*.journal/records")))
    begun = f" and the answers to {n_begun} under way" if n_begun else ""
    surveyed = {file.name for file in folder.rglob("survey/*.answers")}  # a control has them too
    if surveyed:
        apis = "API" if len(surveyed) == 1 else "APIs"
        begun += f" and answers of {len(surveyed)} {apis} to the survey"
    return f"kept in {folder}: {n_sets} recovered set{'' if n_sets == 1 else 's'}{begun}"


def _asked(folder: Path | None) -> str:
    """Say what this process has asked, and the total if earlier processes asked too.

    The total is the sum of the ledgers in the folder, which outlive the process.
    """
    queries, requests, cost = asked_by_this_process()
    text = _amount(queries, requests, cost)
    total = _ledger_total(folder) if folder is not None and folder.is_dir() else (0, 0, 0.0)
    if job.n_started() > 1:  # this process has asked a part of it
        return f"asked {_amount(*total)} in all" if total[0] else "nothing was asked"
    if total[0] > queries:
        text = f"{text} this time, {_amount(*total)} in all"
    return f"asked {text}" if queries or total[0] else "nothing was asked"


def _amount(queries: int, requests: int, cost: float) -> str:
    price = f" at a cost of {cost:,.2f}" if cost else ""
    return f"{queries:,} queries in {requests:,} requests{price}"


def _ledger_total(folder: Path) -> tuple[int, int, float]:
    """Return the queries, requests and cost of all ledgers in a folder."""
    queries, requests, cost = 0, 0, 0.0
    for file in folder.rglob(LEDGER):
        if file.parent.name == STAND_INS:
            continue
        try:
            rows = read_ledger(file)
        except InputError:  # damaged: the next command that opens the folder reports it
            continue
        for row in rows:
            queries += row.queries
            requests += row.requests
            cost += row.cost
    return queries, requests, cost


def _next(command: str, arguments: Sequence[str], folder: Path | None) -> str:
    typed = list(arguments)
    given = any(argument == "--out" or argument.startswith("--out=") for argument in typed)
    begun = folder is not None and folder.exists()
    if command == "pool" and folder is not None:
        begun = _n_trained(folder) > 0
    if command in _RESUMED and begun and not given:
        typed += ["--out", str(folder)]
    again = shlex.join(["bidfmkd", *typed])
    if job.n_started() > 1:
        again += " (under torchrun or without)"
    if command in _RESUMED and begun:
        return f"go on with: {again}"
    if command == "demo" and begun and given:
        return f"remove {folder} and start again with: {again}"
    return f"start again with: {again}"


def _n_trained(folder: Path) -> int:
    return len(list(folder.glob("api_*.safetensors")))
