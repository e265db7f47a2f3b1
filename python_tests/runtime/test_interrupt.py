"""Test stops of the process and of threads, and the time limit of a call."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from bidfmkd_fast.runtime import interrupt


@pytest.fixture(autouse=True)
def _reset() -> Iterator[None]:
    yield
    interrupt.reset()


def test_reset_and_nested_stops() -> None:
    outer = interrupt.Stop()
    inner = interrupt.Stop(outer)
    outer.set()
    assert inner.is_set()
    outer.clear()
    inner.set()
    assert not outer.is_set()
    interrupt.interrupt_all()
    with pytest.raises(interrupt.Interrupted):
        interrupt.pause(0)
    interrupt.reset()
    interrupt.pause(0)


def test_wait_for_returns_raises_or_times_out() -> None:
    assert interrupt.wait_for(lambda: 3, 60) == 3
    with pytest.raises(KeyError):
        interrupt.wait_for(lambda: {}["no"], 60)
    ended = threading.Event()
    with pytest.raises(interrupt.DeadlinePassed):
        interrupt.wait_for(lambda: ended.wait(60), 0.1, ended.set)
    assert ended.is_set()
