"""Show the progress of long work.

A terminal or a notebook shows a bar. Anywhere else a plain line is written to stderr once a minute.

State of the process: the list of open bars, and the times of the last line and of the last end of a
bar.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

from bidfmkd_fast.runtime.streams import say

T = TypeVar("T")

EVERY = 60.0  # seconds between two lines
_REFRESH = 1.0  # seconds after which a bar is drawn again, even if nothing has advanced
_COLUMNS, _ROWS = 80, 24  # assumed size of a terminal that reports no size
_PAUSE = 5.0  # after this many seconds without a bar, the next line comes `EVERY` seconds later
# Open bars, outer to inner. Where lines are written in place of bars, the outermost bar writes one
# line for all of them.
_open: list[Bar] = []
_spoke = _closed = float("-inf")  # time of the last line, and time when the last bar was closed


class Bar:
    """The progress of one piece of work, shown while its `with` block runs.

    All methods may be called from any thread.

    Args:
        what: name of the work, such as "recover (control)".
        total: number of units of the work.
        unit: name of the units, in the plural.
        progress: whether to show anything.
        position: returns the number of units done so far; for work that does not call `advance`.
        keep: whether the bar stays on the screen after the block.
    """

    def __init__(
        self,
        what: str,
        total: int,
        unit: str,
        progress: bool,
        *,
        position: Callable[[], int] | None = None,
        keep: bool = True,
    ) -> None:
        self.what, self.total, self.unit = what, total, unit
        self.progress = progress and sys.stderr is not None
        self._position, self._keep = position, keep
        self._n = self._skipped = 0
        self._values: dict[str, float] = {}
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._started = time.monotonic()
        self._tqdm: Any = None
        self._ticker: threading.Thread | None = None

    def __enter__(self) -> Bar:
        global _spoke
        if self.progress:
            if not _open and time.monotonic() - _closed > _PAUSE:
                _spoke = time.monotonic()
            self._tqdm = _tqdm_bar(self.what, self.total, self.unit, self._keep)
            _open.append(self)
            self._ticker = threading.Thread(target=self._tick, name="progress", daemon=True)
            self._ticker.start()
        return self

    def __exit__(self, *exception: object) -> None:
        global _closed
        if self._ticker is None:
            return
        _open.remove(self)
        _closed = time.monotonic()
        self._ended.set()
        self._ticker.join()
        if self._tqdm is not None:
            self._draw()
            self._tqdm.close()

    def advance(self, n: int = 1) -> None:
        """Count `n` more units as done."""
        with self._lock:
            self._n += n
            if self._tqdm is not None:
                self._tqdm.update(n)

    def over(self, items: Iterable[T]) -> Iterator[T]:
        """Yield the items; each counts as a unit, done when the next item is requested."""
        for item in items:
            yield item
            self.advance()

    def skip(self, n: int) -> None:
        """Count `n` units as done without time, such as those that an earlier process did."""
        with self._lock:
            self._skipped += n
            self._n += n
            if self._tqdm is not None:
                self._tqdm.initial += n
                self._tqdm.n += n
                self._tqdm.last_print_n += n  # keeps these units out of the rate

    def show(self, **values: float) -> None:
        """Show these values, such as a loss, beside the progress from now on."""
        with self._lock:
            self._values |= values

    def line(self) -> str:
        """Return the progress as one line of text."""
        n, seconds = self._done(), time.monotonic() - self._started
        text = f"{self.what}: {n:,} of {self.total:,} {self.unit} after {duration(seconds)}"
        fresh = n - self._skipped
        if fresh > 0 and seconds > 0:
            rate = fresh / seconds
            text += f", {_rate(rate, self.unit)}, {duration(max(0, self.total - n) / rate)} left"
        return text + "".join(f", {name} {value:.4g}" for name, value in self._values.items())

    def _done(self) -> int:
        """Return the number of units done so far, skipped ones included."""
        if self._position is None:
            return self._n
        return min(self.total, self._skipped + self._position())

    def _tick(self) -> None:
        """Draw the bar again every `_REFRESH` seconds, or write a line when it is due."""
        global _spoke
        while not self._ended.wait(_REFRESH):
            if self._tqdm is not None:
                self._draw()
            elif _open[:1] == [self] and time.monotonic() - _spoke >= EVERY:
                _spoke = time.monotonic()
                say("; ".join(bar.line() for bar in list(_open)))

    def _draw(self) -> None:
        with self._lock:
            self._tqdm.n = self._done()
            if self._values:
                self._tqdm.set_postfix(self._values, refresh=False)
            self._tqdm.refresh()


def in_notebook() -> bool:
    """Return True if the code runs in a notebook, that is inside a kernel of IPython."""
    ipython = sys.modules.get("IPython")
    shell = None if ipython is None else ipython.get_ipython()
    return shell is not None and "IPKernelApp" in shell.config


def _tqdm_bar(what: str, total: int, unit: str, keep: bool) -> Any:
    """Return a tqdm bar for the notebook or the terminal; None if the output goes to neither."""
    settings: dict[str, Any] = {
        "desc": what,
        "total": total,
        "unit": f" {unit}",
        "unit_scale": total >= 10_000,
    }
    if in_notebook():
        from tqdm.auto import tqdm as notebook_bar

        return notebook_bar(**settings, leave=keep)
    if not sys.stderr.isatty():
        return None
    from tqdm import tqdm

    try:
        columns, rows = os.get_terminal_size(sys.stderr.fileno())
    except (OSError, ValueError):
        columns = rows = 0
    # tqdm shows nothing in a terminal that reports no rows, as new pseudo-terminals do.
    return tqdm(**settings, leave=keep, ncols=columns or _COLUMNS, nrows=rows or _ROWS)


def _rate(rate: float, unit: str) -> str:
    return f"{rate:,.1f} {unit}/s" if rate >= 1 else f"{60 * rate:.2g} {unit}/min"


def duration(seconds: float) -> str:
    """Return seconds, minutes or hours as text, whichever reads best."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
