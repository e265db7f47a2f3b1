"""Standard output as the shell gives it: a pipe whose reader is gone, a full disk, an alphabet of 128 letters, none."""

from __future__ import annotations

import codecs
import contextlib
import errno
import io
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any, TextIO

from bidfmkd_fast.secrets import scrub

_PLAIN = {"±": "+-", "\N{MULTIPLICATION SIGN}": "x", "\N{EN DASH}": "-", "…": "...", "µ": "u"}
_ERRORS = "bidfmkd_fast.plain"


class Output:
    """Stands for `sys.stdout`: the first write that fails is kept in `error`, and what follows it
    goes nowhere.

    So a command whose output nobody takes still does its work and keeps its files.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        self.error = OSError(errno.EBADF, "it is closed") if stream is None else None
        self._written = False

    def write(self, text: str) -> int:
        """Write `text`, if nothing has failed yet."""
        self._written = True
        if self._stream is not None and self.error is None:
            try:
                self._stream.write(scrub(text))
            except OSError as error:
                self._fail(error)
        return len(text)

    def flush(self) -> None:
        """Send what is written on its way."""
        if self._stream is not None and self.error is None:
            try:
                self._stream.flush()
            except OSError as error:
                self._fail(error)

    def failure(self) -> tuple[int, str] | None:
        """The exit code and the reason if anything written was lost: 141 for a pipe without a
        reader, else 1.
        """
        self.flush()
        if self.error is None or not self._written:
            return None
        code = 128 + signal.SIGPIPE if self.error.errno == errno.EPIPE else 1
        return code, self.error.strerror or str(self.error)

    def _fail(self, error: OSError) -> None:
        self.error = error
        if sys.__stdout__ is not None and self._stream is sys.__stdout__:
            # What is left in its buffer would fail once more when Python ends.
            with contextlib.suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, sys.__stdout__.fileno())
                os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def guarded_stdout() -> Iterator[Output]:
    """Inside the block `sys.stdout` is an `Output`, and writes letters it cannot show in others
    (`+-` for `±`).
    """
    codecs.register_error(_ERRORS, _in_plain_letters)
    before = sys.stdout
    output = Output(before)
    strict = before if isinstance(before, io.TextIOWrapper) and before.errors == "strict" else None
    if strict is not None:
        strict.reconfigure(errors=_ERRORS)
    sys.stdout = output
    try:
        yield output
    finally:
        output.flush()
        sys.stdout = before
        if strict is not None:
            strict.reconfigure(errors="strict")


def say(line: str) -> None:
    """Write a line to stderr, if anybody takes it."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError):
            print(scrub(line), file=sys.stderr, flush=True)


def open_missing() -> None:
    """Open `/dev/null` where a standard stream is closed: the next file to be opened would take
    its place.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)


def _in_plain_letters(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeEncodeError)
    letters = error.object[error.start : error.end]
    plain = "".join(
        _PLAIN.get(one, one.encode("ascii", "backslashreplace").decode()) for one in letters
    )
    return plain, error.end
