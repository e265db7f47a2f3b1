"""Stop threads that wait for a service, or for the time to ask it again.

A blocking call in a thread cannot be ended from outside. Therefore each request runs in a daemon
thread of its own, and the thread that wants the answer checks every `_TICK` seconds whether it
should stop waiting. To stop it, a plain attribute is set and no lock is taken, so that
`interrupt_all` is safe inside a signal handler.

State of the process: the stop above all others, which `interrupt_all` sets, and the stop that each
thread has adopted.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

_TICK = 0.05  # seconds between two checks
_local = threading.local()


class Interrupted(KeyboardInterrupt):
    """The wait was ended from outside: by `interrupt_all`, or since nobody needs its result.

    This is a KeyboardInterrupt, so that no handler of ordinary errors mistakes it for a failure of
    the service.
    """


class DeadlinePassed(Exception):
    """A call took longer than its time limit."""


class Stop:
    """A request to stop, for all threads that adopted this stop or one below it."""

    def __init__(self, parent: Stop | None = None) -> None:
        self._is_set, self._parent = False, parent

    def set(self) -> None:
        """Make every wait under this stop raise `Interrupted`."""
        self._is_set = True

    def clear(self) -> None:
        """Allow waits under this stop again."""
        self._is_set = False

    def is_set(self) -> bool:
        """Return True if this stop or one above it was set."""
        return self._is_set or (self._parent is not None and self._parent.is_set())

    def adopt(self) -> None:
        """Make this the stop of the current thread; usable as `initializer` of a thread pool."""
        _local.stop = self


_EVERYTHING = Stop()


def interrupt_all() -> None:
    """End every wait for a service in this process, now and until `reset`.

    This function may be called inside a signal handler.
    """
    _EVERYTHING.set()


def reset() -> None:
    """Allow waits for services again after `interrupt_all`."""
    _EVERYTHING.clear()


def current() -> Stop:
    """Return the stop of the current thread."""
    stop: Stop = getattr(_local, "stop", _EVERYTHING)
    return stop


def check() -> None:
    """Raise `Interrupted` if the current thread should stop."""
    if current().is_set():
        raise Interrupted


def pause(seconds: float) -> None:
    """Sleep; raise `Interrupted` as soon as the current thread should stop."""
    end = time.monotonic() + seconds
    check()
    while (left := end - time.monotonic()) > 0:
        time.sleep(min(_TICK, left))
        check()


def wait_for(call: Callable[[], T], seconds: float, cancel: Callable[[], None] = lambda: None) -> T:
    """Run `call` in a daemon thread; return what it returns or raise what it raises.

    Args:
        call: a function that may block.
        seconds: time limit.
        cancel: called if the wait ends before `call` does, to make `call` end; its result is then
            dropped.

    Raises:
        DeadlinePassed: `call` took longer than `seconds`.
        Interrupted: the current thread should stop.
    """
    check()
    done = threading.Event()
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(call())
        except BaseException as error:  # raised again in the waiting thread
            errors.append(error)
        finally:
            done.set()

    end = time.monotonic() + seconds
    threading.Thread(target=run, name="request", daemon=True).start()
    try:
        while not done.wait(max(0.0, min(_TICK, end - time.monotonic()))):
            check()
            if time.monotonic() >= end:
                raise DeadlinePassed
    except BaseException:  # KeyboardInterrupt included, since the main thread may wait here
        cancel()
        raise
    if errors:
        raise errors[0]
    return results[0]
