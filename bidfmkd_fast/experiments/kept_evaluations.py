"""Keep the evaluations of a meta-test that is under way, so that none is made twice."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from bidfmkd_fast.errors import InputError
from bidfmkd_fast.files.atomic import append_line
from bidfmkd_fast.meta import Evaluation
from bidfmkd_fast.secrets import scrubbed


class KeptEvaluations:
    """Evaluations by what was evaluated, each a line of JSON in a file.

    A line that a killed process has not finished is passed over.

    Args:
        file: where they are kept; None to keep none.
    """

    def __init__(self, file: Path | None) -> None:
        self._file = file
        self._held: dict[str, Evaluation] = {}
        content = file.read_bytes() if file is not None and file.is_file() else b""
        for line in content.decode(errors="replace").splitlines():
            with suppress(ValueError, KeyError, TypeError, InputError):
                key, record = json.loads(line)
                self._held[json.dumps(key)] = Evaluation.from_record(record)

    def once(self, make: Callable[[], Evaluation], *about: Any) -> Evaluation:
        """Return the evaluation of `about`, plain values; make it if it is not there."""
        key = json.dumps(about)
        if key not in self._held:
            self._held[key] = make()
            if self._file is not None:
                record = self._held[key].to_record()
                append_line(self._file, f"\n{json.dumps(scrubbed([about, record]))}")
        return self._held[key]

    def remove(self) -> None:
        """Remove the file, once the meta-test is finished."""
        if self._file is not None:
            self._file.unlink(missing_ok=True)
