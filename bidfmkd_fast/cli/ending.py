"""The last line of a command that a signal ended: what is kept, what was asked, and the command that goes on."""

from __future__ import annotations

import shlex
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bidfmkd_fast.black_box.ledger import asked_by_this_process
from bidfmkd_fast.black_box.ledger_file import LedgerFile
from bidfmkd_fast.errors import InputError

_GO_ON = ("train", "compare", "sweep", "recover")  # in the same folder, with what is there


def last_line(command: str, arguments: Sequence[str], options: Any, number: int) -> str:
    """One line for a `command` that signal `number` ended; `options` are its parsed ones, None
    before there are any.

    Commands set `options.out` to the folder they chose, once they have one.
    """
    by = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
    name = f"bidfmkd {command}".strip()
    out = getattr(options, "out", None)
    folder = Path(out) if out is not None else None
    if command in ("", "serve"):  # nothing to keep, and nothing to go on with
        return f"{name}: ended by {by}"
    parts = [
        f"{name}: ended by {by}",
        _kept(command, folder),
        _asked(folder),
        _next(command, arguments, folder),
    ]
    return "; ".join(parts)


def _kept(command: str, folder: Path | None) -> str:
    if folder is None or not folder.is_dir():
        return "nothing to keep"
    if command == "pool":
        n_trained = len(list(folder.glob("api_*.safetensors")))
        return f"kept in {folder}: {n_trained} trained APIs, which are no whole pool"
    if command == "bench":
        files = [file.name for file in folder.glob("*.json")]
        return f"kept in {folder}: {', '.join(files)}" if files else "nothing to keep"
    n_sets = len(list(folder.rglob("recovered/*.safetensors")))
    n_begun = len(list(folder.rglob("*.journal/records")))
    begun = f" and the answers to {n_begun} under way" if n_begun else ""
    return f"kept in {folder}: {n_sets} recovered set{'' if n_sets == 1 else 's'}{begun}"


def _asked(folder: Path | None) -> str:
    """What this process has asked; also what the folder's ledgers say in all, where processes
    before it asked more.
    """
    queries, requests, cost = asked_by_this_process()
    text = _amount(queries, requests, cost)
    in_all = _ledgers(folder) if folder is not None and folder.is_dir() else (0, 0, 0.0)
    if in_all[0] > queries:
        text = f"{text} this time, {_amount(*in_all)} in all"
    return f"asked {text}" if queries or in_all[0] else "nothing was asked"


def _amount(queries: int, requests: int, cost: float) -> str:
    return f"{queries:,} queries in {requests:,} requests" + (
        f" at a cost of {cost:,.2f}" if cost else ""
    )


def _ledgers(folder: Path) -> tuple[int, int, float]:
    queries, requests, cost = 0, 0, 0.0
    for file in folder.rglob("ledger.sqlite"):
        try:
            ledger = LedgerFile(file)
        except (
            InputError
        ):  # this line is no place to complain of it; who opens the folder next is told
            continue
        for row in ledger.rows():
            queries, requests, cost = (
                queries + row.queries,
                requests + row.requests,
                cost + row.cost,
            )
        ledger.close()
    return queries, requests, cost


def _next(command: str, arguments: Sequence[str], folder: Path | None) -> str:
    typed = list(arguments)
    given = any(argument == "--out" or argument.startswith("--out=") for argument in typed)
    begun = folder is not None and folder.exists()
    if command in _GO_ON and begun and not given:
        typed += ["--out", str(folder)]
    told = shlex.join(["bidfmkd", *typed])
    if command in _GO_ON and begun:
        return f"go on with: {told}"
    if command in ("pool", "demo") and begun and given:
        return f"remove {folder} and start again with: {told}"
    return f"start again with: {told}"
