"""Keep the records of a run: in memory, in `metrics.jsonl`, and for its callbacks."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bidfmkd_fast.files.atomic import append_line, write_exact
from bidfmkd_fast.secrets import scrubbed
from bidfmkd_fast.training.callbacks import Callback

_SPENT = ("queries", "seconds")  # what a record holds of the run up to it


class Records:
    """The records of a run, in order.

    A run that is continued begins with the records of its checkpoint, and makes those that the
    earlier process made after it again. They keep the numbers of queries and seconds that the file
    has. Until the run has passed them, the file stays as it is and no callback gets one. Then the
    file is written anew, so that it agrees with `history`.

    Args:
        file: `metrics.jsonl`; None to keep the records in memory only.
        callbacks: what to call for every new record.

    Attributes:
        history: the records so far.
    """

    def __init__(self, file: Path | None, callbacks: Sequence[Callback] = ()) -> None:
        self.history: list[dict[str, Any]] = []
        self._file, self._callbacks = file, callbacks
        # Services may answer in another order than before, so records are known by what they are
        # about rather than by their place.
        self._earlier: dict[str, list[dict[str, Any]]] = {}
        for record in () if file is None else _lines_of(file):
            self._earlier.setdefault(_subject(record), []).append(record)
        self._agrees = False  # whether the file holds `history`
        self._untold: list[dict[str, Any]] = []

    def restore(self, history: Sequence[dict[str, Any]]) -> None:
        """Begin with the records of a checkpoint; `tell` tells of those that the file lacks."""
        self.history = list(history)
        for record in self.history:
            if earlier := self._earlier.get(_subject(record)):
                earlier.pop(0)
            else:
                self._untold.append(record)

    def add(self, record: dict[str, Any]) -> None:
        """Append a record, which `tell` tells of unless an earlier process did so."""
        if earlier := self._earlier.get(_subject(record)):
            held = earlier.pop(0)
            # Of the queries, some of this process may have been asked after the record.
            self.history.append(record | {name: held[name] for name in _SPENT if name in held})
            return
        self.history.append(record)
        self._untold.append(record)

    def tell(self) -> None:
        """Write the new records to the file, and call the callbacks for them, one by one."""
        while self._untold:
            record = self._untold.pop(0)
            if self._agrees and self._file is not None:
                append_line(self._file, _line(record))
            else:
                self.write()
            for callback in self._callbacks:
                callback.on_record(scrubbed(record))

    def write(self) -> None:
        """Write the whole file, unless it holds all records already that were told of."""
        if self._file is not None and not self._agrees:
            untold = set(map(id, self._untold))
            told = [record for record in self.history if id(record) not in untold]
            write_exact(self._file, "".join(f"{_line(record)}\n" for record in told))
        self._agrees = True


def _line(record: dict[str, Any]) -> str:
    return json.dumps(scrubbed(record))


def _subject(record: dict[str, Any]) -> str:
    """Return what a record is about, in a form that its line in the file gives as well."""
    about = [record.get(name) for name in ("stage", "step", "epoch", "api", "set")]
    return json.dumps(scrubbed(about))


def _lines_of(file: Path) -> list[dict[str, Any]]:
    """Return the records in a file; none if there is no file.

    A line that is no record is left out, since a process may have been killed while it wrote one.
    """
    records = []
    content = file.read_bytes() if file.is_file() else b""
    for line in content.decode(errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records
