"""Read the JSON files of a run's folder; any fault in a file raises one error that names it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from bidfmkd_fast.black_box.ledger_file import LedgerRow
from bidfmkd_fast.errors import InputError
from bidfmkd_fast.files.json_files import read_json
from bidfmkd_fast.settings import check_values, fits, named, settings_from_values

Kept = TypeVar("Kept")

_OF_ALL = {"queries": int, "seconds": dict}  # the values in every summary
_OF_RUNS = {  # and those in the summary of a run
    **{"requests": int, "apis": int, "images": int, "matched": dict},
    **{"complete": bool, "budget_ended": bool, "skipped": dict},
}


def read_kept(kind: type[Kept], file: Path) -> Kept:
    """Read a dataclass of type `kind` from its JSON file.

    Raises:
        InputError: the file is not readable, lacks a field, or holds an unknown one or a value of
            another type.
    """
    values = read_json(file, "run folder")
    with named(f"run folder: {file}"):
        _refuse_missing([field.name for field in fields(kind)], values)  # type: ignore[arg-type]
        return settings_from_values(kind, values)


def read_summary(file: Path) -> dict[str, Any]:
    """Read the summary of a finished run, or of a method of an experiment that is no run.

    Only the summary of a run has "requests".

    Raises:
        InputError: the file is not readable, lacks a value, or holds one of another type.
    """
    content = read_json(file, "run folder")
    with named(f"run folder: {file}"):
        is_run = isinstance(content, dict) and "requests" in content
        needed = _OF_ALL | _OF_RUNS if is_run else _OF_ALL
        _refuse_missing(needed, content)
        for name, wanted in {**needed, "ledger": list, "labels_only": list}.items():
            if not fits(content.get(name, []), wanted):
                got = type(content[name]).__name__
                raise InputError(f"{name} must be of type {wanted.__name__}; got {got}")
        for row in content.get("ledger", []):
            _refuse_missing([field.name for field in fields(LedgerRow)], row)
            check_values(LedgerRow, row, "ledger: ")
    return dict(content)


def _refuse_missing(names: Iterable[str], values: Any) -> None:
    """Raise InputError unless `values` is a mapping that has all `names`."""
    if not isinstance(values, dict):
        raise InputError(f"it must hold values by name; got {type(values).__name__}")
    if missing := [name for name in names if name not in values]:
        raise InputError(f"it lacks {', '.join(missing)}; is it a file of this package?")
