"""Keep the records of a run: in memory, in `metrics.jsonl`, and for its callbacks."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bidfmkd_fast.files.atomic import append_line, write_exact
from bidfmkd_fast.secrets import scrubbed
from bidfmkd_fast.training.callbacks import Callback


class Records:
    """The records of a run, in order.

    A run that is continued begins with the records of its checkpoint, and makes those that the
    earlier process made after it again, with its own seconds. Until it has passed them, the file
    stays as it is and no callback is called. Then the file is written anew, so that it agrees with
    `history`.

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
        self._earlier = Counter(() if file is None else map(_subject, _lines_of(file)))
        self._agrees = False  # whether the file holds `history`

    def restore(self, history: Sequence[dict[str, Any]]) -> None:
        """Begin with the records of a checkpoint."""
        self.history = list(history)
        self._earlier -= Counter(map(_subject, self.history))

    def add(self, record: dict[str, Any]) -> None:
        """Append a record; write it and call the callbacks unless an earlier process did so."""
        self.history.append(record)
        subject = _subject(record)
        if self._earlier[subject]:
            self._earlier[subject] -= 1
            return
        if self._agrees and self._file is not None:
            append_line(self._file, _line(record))
        else:
            self.write()
        for callback in self._callbacks:
            callback.on_record(scrubbed(record))

    def write(self) -> None:
        """Write the whole file, unless it holds all records already."""
        if self._file is not None and not self._agrees:
            write_exact(self._file, "".join(f"{_line(record)}\n" for record in self.history))
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
