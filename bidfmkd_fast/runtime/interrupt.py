"""Cooperative stop: whoever waits for a service, or for the time to ask it again, can be made to stop waiting.

A blocking call in a thread cannot be ended from outside. So a request runs in a daemon thread of its own, and the
thread that wants its answer looks every `_TICK` seconds whether it is to go on waiting. Stopping sets a plain attribute
and takes no lock, so `interrupt_all` is safe inside a signal handler.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")

_TICK = 0.05  # seconds between two looks
_local = threading.local()


class Interrupted(KeyboardInterrupt):
    """The wait was ended from outside, by `interrupt_all` or because the work it belongs to has
    ended.

    It is a KeyboardInterrupt, so that no handler of ordinary errors takes it for a service's
    failure.
    """


class DeadlinePassed(Exception):
    """A call took longer than it may."""


class Stop:
    """A request to stop, for the threads that adopted it and those that they start in turn."""

    def __init__(self, parent: Stop | None = None) -> None:
        self._is_set, self._parent = False, parent

    def set(self) -> None:
        """Make every wait under this stop raise `Interrupted`."""
        self._is_set = True

    def clear(self) -> None:
        """Let waits go on again."""
        self._is_set = False

    def is_set(self) -> bool:
        """Return True if this stop or one above it was set."""
        return self._is_set or (self._parent is not None and self._parent.is_set())

    def adopt(self) -> None:
        """Make it the stop of the current thread; an initializer for thread pools."""
        _local.stop = self


_EVERYTHING = Stop()


def interrupt_all() -> None:
    """End every wait for a service in this process, now and until `reset`. Safe inside a signal
    handler.
    """
    _EVERYTHING.set()


def reset() -> None:
    """Allow services to be waited for again after `interrupt_all`."""
    _EVERYTHING.clear()


def current() -> Stop:
    """Return the stop of the current thread."""
    stop: Stop = getattr(_local, "stop", _EVERYTHING)
    return stop


def check() -> None:
    """Raise `Interrupted` if the current thread is to stop."""
    if current().is_set():
        raise Interrupted


def pause(seconds: float) -> None:
    """Sleep; raise `Interrupted` as soon as the current thread is to stop."""
    end = time.monotonic() + seconds
    check()
    while (left := end - time.monotonic()) > 0:
        time.sleep(min(_TICK, left))
        check()


def wait_for(call: Callable[[], T], seconds: float, cancel: Callable[[], None] = lambda: None) -> T:
    """Return what `call` returns, or raise what it raises; it runs in a daemon thread.

    Args:
        call: anything that may block.
        seconds: how long it may take.
        cancel: makes `call` end where the wait for it ends first; what it gives then is dropped.

    Raises:
        DeadlinePassed: it took longer than `seconds`. Interrupted: the current thread is to stop.
    """
    check()
    done = threading.Event()
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(call())
        except BaseException as error:  # handed to the thread that waits
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
    except BaseException:  # KeyboardInterrupt included: the main thread may be the one that waits
        cancel()
        raise
    if errors:
        raise errors[0]
    return results[0]
