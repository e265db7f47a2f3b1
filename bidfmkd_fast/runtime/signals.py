"""Ctrl-C and SIGTERM: the command ends within two seconds, with one line, whatever its threads are waiting for."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

from bidfmkd_fast.runtime.streams import say

SIGNALS = (signal.SIGINT, signal.SIGTERM)
_SECONDS = 1.4  # for the main thread to keep what it has, before the process ends without it
_GRACE = 0.3  # more, for whoever is writing the last line already
_DOUBLE = 0.2  # two signals within this time are one: a shell and its terminal may both send it


class Terminated(KeyboardInterrupt):
    """The process was asked to end by SIGTERM; like Ctrl-C, no handler of ordinary errors takes
    it.
    """


@contextlib.contextmanager
def ended_by_signals(last_line: Callable[[int], str]) -> Iterator[None]:
    """End the process with `last_line(signal number)` on stderr and exit code 128 + number when a
    signal comes.

    The first signal raises KeyboardInterrupt in the main thread (`Terminated` for SIGTERM), and
    makes every request that waits for a service end, so that the block can keep what it has. Once
    it is left, or after `_SECONDS` where it is not, the process ends: threads that still wait are
    not joined. A second signal ends it at once. A signal that the process was started to ignore
    (`nohup`, a job in the background) stays ignored. To be used in the main thread.
    """
    from bidfmkd_fast.runtime.interrupt import interrupt_all

    ending = _Ending(last_line, interrupt_all)
    # The signal's number arrives in this pipe even while the main thread is inside a long operation
    # of a library.
    read, write = os.pipe()
    os.set_blocking(write, False)
    pipe_before = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    before = {
        number: signal.signal(number, ending.raise_in_main_thread)
        for number in SIGNALS
        if signal.getsignal(number) is not signal.SIG_IGN
    }
    watching = threading.Thread(target=ending.watch, args=(read,), name="signals", daemon=True)
    watching.start()
    try:
        yield
    except (
        BaseException
    ):  # what a signal makes of a request, or of a block that is being left, is of any kind
        if ending.number is None:
            raise
        ending.end()
    finally:
        signal.set_wakeup_fd(pipe_before)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(write)  # which ends the watching
        watching.join()
        os.close(read)


def end_at_once_while_loading() -> None:
    """End the process without a traceback if a signal comes before the command has begun, as while
    torch is loaded.
    """
    for number in SIGNALS:
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, lambda number, frame: os._exit(128 + number))


class _Ending:
    """One ending of the process, in the main thread or, where that does not get to it, in the one
    that watches.
    """

    def __init__(self, last_line: Callable[[int], str], interrupt: Callable[[], None]) -> None:
        self.number: int | None = None
        self._last_line, self._interrupt, self._since = last_line, interrupt, 0.0
        self._told = threading.Lock()

    def raise_in_main_thread(self, number: int, frame: FrameType | None) -> None:
        if self.number is None:
            self.number, self._since = number, time.monotonic()
            raise KeyboardInterrupt if number == signal.SIGINT else Terminated
        if time.monotonic() - self._since > _DOUBLE:
            os._exit(128 + self.number)

    def watch(self, read: int) -> None:
        """Wait for a signal, end what waits for services, and see to it that the process ends in
        time.
        """
        while not (came := _signals_in(os.read(read, 64))):
            if came is None:
                return
        number, end = came[0], time.monotonic() + _SECONDS
        self._interrupt()
        while (left := end - time.monotonic()) > 0:
            if select.select([read], [], [], left)[0] and _signals_in(os.read(read, 64)) is None:
                return
        self.end(number)

    def end(self, number: int | None = None) -> NoReturn:
        """Write the last line, unless the other thread is at it, and end the process."""
        number = self.number if number is None else number
        assert number is not None
        try:
            if self._told.acquire(blocking=False):
                with contextlib.suppress(OSError, ValueError):
                    if (
                        threading.current_thread() is threading.main_thread()
                        and sys.stdout is not None
                    ):
                        sys.stdout.flush()
                    say(self._last_line(number))
            else:
                time.sleep(_GRACE)
        finally:
            os._exit(128 + number)


def _signals_in(sent: bytes) -> list[int] | None:
    """Those of `SIGNALS` among the numbers that came through the pipe; None once it is closed."""
    return [number for number in sent if number in SIGNALS] if sent else None
