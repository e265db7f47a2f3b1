"""End a command on Ctrl-C or SIGTERM within two seconds, with one line, or when its time is up.

The command ends within this time whatever its threads are waiting for.

State of the process: the handlers of both signals and Python's wake-up pipe, replaced inside the
block of `ended_by_signals`.
"""

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

from bidfmkd_fast.errors import InputError
from bidfmkd_fast.runtime.interrupt import interrupt_all
from bidfmkd_fast.runtime.streams import say

# SIGALRM is the end of the time that `stop_after` has set.
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGALRM)
TIME_IS_UP = 75  # exit code after SIGALRM: EX_TEMPFAIL of sysexits.h, try again
# Seconds that the main thread has to save its work before the process ends without it. At the end
# of its time a process may finish a longer step first, since nobody waits for it.
_SECONDS, _SECONDS_AFTER_ALARM = 1.4, 30.0
_GRACE = 0.3  # seconds more if another thread is writing the last line already
# Two signals within this many seconds count as one, since a shell and its terminal may both send
# the signal.
_DOUBLE = 0.2


class Terminated(KeyboardInterrupt):
    """SIGTERM asked the process to end.

    This is a KeyboardInterrupt, so that no handler of ordinary errors catches it.
    """


@contextlib.contextmanager
def ended_by_signals(last_line: Callable[[int], str]) -> Iterator[None]:
    """End the process when a signal comes: with a last line on stderr and its exit code.

    The code is 128 + number, or `TIME_IS_UP` for SIGALRM.

    The first signal raises KeyboardInterrupt in the main thread (`Terminated` for SIGTERM). It also
    ends every wait for a service, so that the block can save its work. The process ends when the
    block has been left, but after `_SECONDS` at the latest; threads that still wait are not joined.
    A second signal ends the process at once, but SIGTERM after
    another signal does not. A signal that the process was started to ignore
    (`nohup`, a job in the background) stays ignored. Only the main thread may use this block.

    Args:
        last_line: returns the last line for the number of the signal; no line if it is empty.
    """
    ending = _Ending(last_line, interrupt_all)
    # Python calls signal handlers between bytecodes of the main thread, hence not during a long
    # operation of a library. The number of the signal arrives in this pipe nevertheless.
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
    except BaseException:  # a signal may cause an error of any kind, in a request for example
        if ending.number is None:
            raise
        ending.end()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.set_wakeup_fd(pipe_before)
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(write)  # ends the watching thread
        watching.join()
        os.close(read)


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Let no signal interrupt the block; one that came meanwhile is handled at its end.

    A training step changes parameters, moments and counters, which belong together. In other
    threads than the main thread nothing is held back, since no handler runs there.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[tuple[int, FrameType | None]] = []
    before: dict[int, Callable[[int, FrameType | None], object]] = {}
    for held in SIGNALS:
        if callable(handler := signal.getsignal(held)):
            before[held] = handler
            signal.signal(held, lambda number, frame: came.append((number, frame)))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number, frame in came[:1]:
            before[number](number, frame)


def stop_after(seconds: float) -> None:
    """End the process as a signal does when `seconds` have passed, with exit code `TIME_IS_UP`.

    Raises:
        InputError: the process does not belong to a command (see `ended_by_signals`).
    """
    if not callable(signal.getsignal(signal.SIGALRM)):
        raise InputError("--stop-after works on the command line only")
    signal.setitimer(signal.ITIMER_REAL, seconds)


def end_at_once_while_loading() -> None:
    """End the process without a traceback if a signal comes before the command has begun.

    Loading torch takes seconds, in which no other handler is in place.
    """
    for number in SIGNALS:
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, lambda number, frame: os._exit(128 + number))


class _Ending:
    """The end of the process: by the main thread or, if that is stuck, by the watching thread."""

    def __init__(self, last_line: Callable[[int], str], interrupt: Callable[[], None]) -> None:
        self.number: int | None = None
        self._last_line, self._interrupt, self._since = last_line, interrupt, 0.0
        self._last_line_taken = threading.Lock()  # held by the thread that writes the last line

    def raise_in_main_thread(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal: raise on the first, end the process on the second."""
        if self.number is None:
            self.number, self._since = number, time.monotonic()
            raise KeyboardInterrupt if number == signal.SIGINT else Terminated
        if number == signal.SIGTERM != self.number:
            return  # a queue or torchrun ends all its processes once one of them has been ended
        if time.monotonic() - self._since > _DOUBLE:
            os._exit(_exit_code(self.number))

    def watch(self, read: int) -> None:
        """Wait for a signal; end all waits for services, and the process when time is up."""
        while not (arrived := _signals_in(os.read(read, 64))):
            if arrived is None:
                return
        number, seconds = arrived[0], _SECONDS
        if number == signal.SIGALRM:
            seconds = _SECONDS_AFTER_ALARM
        end = time.monotonic() + seconds
        self._interrupt()
        while (left := end - time.monotonic()) > 0:
            if select.select([read], [], [], left)[0] and _signals_in(os.read(read, 64)) is None:
                return
        self.end(number)

    def end(self, number: int | None = None) -> NoReturn:
        """End the process; write the last line first, unless the other thread is writing it."""
        number = self.number if number is None else number
        assert number is not None
        try:
            if self._last_line_taken.acquire(blocking=False):
                with contextlib.suppress(OSError, ValueError):
                    if (
                        threading.current_thread() is threading.main_thread()
                        and sys.stdout is not None
                    ):
                        sys.stdout.flush()
                    if line := self._last_line(number):
                        say(line)
            else:
                time.sleep(_GRACE)
        finally:
            os._exit(_exit_code(number))


def _exit_code(number: int) -> int:
    return TIME_IS_UP if number == signal.SIGALRM else 128 + number


def _signals_in(sent: bytes) -> list[int] | None:
    """Return which of `SIGNALS` came through the pipe; None if the pipe was closed."""
    return [number for number in sent if number in SIGNALS] if sent else None
