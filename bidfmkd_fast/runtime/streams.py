"""Write to the standard streams, in whatever state the shell hands them over.

A stream may be a pipe whose reader is gone, a file on a full disk, limited to ASCII, or closed.

State of the process: `sys.stdout`, replaced inside the block of `guarded_stdout`, and its handler
of characters that it cannot encode.
"""

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
# A name of a folder or a label may hold escape sequences, which a terminal would obey.
_CONTROLS = {
    number: f"\\x{number:02x}"
    for number in (*range(32), *range(127, 160))
    if chr(number) not in "\n\t"
}


def visible(text: str) -> str:
    """Return the text without secrets, and with control characters written as `\\x1b`."""
    return scrub(text).translate(_CONTROLS)


class Output:
    """A stand-in for `sys.stdout` that keeps the first error in `error` instead of raising it.

    All later output is dropped. A command whose output cannot be written thus still does its work
    and keeps its files.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream
        self.error = OSError(errno.EBADF, "it is closed") if stream is None else None
        self._written = False

    def write(self, text: str) -> int:
        """Write `text` as `visible` gives it, unless a write has failed before."""
        self._written = True
        if self._stream is not None and self.error is None:
            try:
                self._stream.write(visible(text))
            except OSError as error:
                self._fail(error)
        return len(text)

    def flush(self) -> None:
        """Flush the stream, unless a write has failed before."""
        if self._stream is not None and self.error is None:
            try:
                self._stream.flush()
            except OSError as error:
                self._fail(error)

    def failure(self) -> tuple[int, str] | None:
        """Return the exit code and the reason if output was lost, else None.

        The code is 141 (128 + SIGPIPE) for a pipe without a reader, as in a shell, and 1 otherwise.
        """
        self.flush()
        if self.error is None or not self._written:
            return None
        code = 128 + signal.SIGPIPE if self.error.errno == errno.EPIPE else 1
        return code, self.error.strerror or str(self.error)

    def _fail(self, error: OSError) -> None:
        """Keep the error and drop all output from now on."""
        self.error = error
        if sys.__stdout__ is not None and self._stream is sys.__stdout__:
            # The rest of its buffer would fail once more when Python exits: send it to /dev/null.
            with contextlib.suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, sys.__stdout__.fileno())
                os.close(nowhere)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextlib.contextmanager
def guarded_stdout() -> Iterator[Output]:
    """Put an `Output` in the place of `sys.stdout` inside the block.

    Characters that the stream cannot encode are replaced by others, such as `+-` for `±`.
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
    """Write a line as `visible` gives it to stderr; do nothing if that fails."""
    if sys.stderr is not None:
        with contextlib.suppress(OSError):
            print(visible(line), file=sys.stderr, flush=True)


def open_missing() -> None:
    """Open `/dev/null` for every standard stream that is closed.

    Otherwise the next file to be opened would take the number of that stream, and what is written
    to the stream would land in the file.
    """
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)


def _in_plain_letters(error: UnicodeError) -> tuple[str, int]:
    """Return ASCII text for the characters that could not be encoded, and where they end."""
    assert isinstance(error, UnicodeEncodeError)
    letters = error.object[error.start : error.end]
    plain = "".join(
        _PLAIN.get(letter, letter.encode("ascii", "backslashreplace").decode())
        for letter in letters
    )
    return plain, error.end
