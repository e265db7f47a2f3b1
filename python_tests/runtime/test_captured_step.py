"""Test when a step is captured, with stand-ins for torch.cuda, and that none is on the CPU."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch

from bidfmkd_fast.runtime import captured_step as repeated
from bidfmkd_fast.runtime.captured_step import WARM_UP_STEPS, RepeatedStep

CUDA = torch.device("cuda", 0)


class Stream:
    def __init__(self, device: object = None) -> None:
        self.device = device

    def wait_stream(self, other: object) -> None:
        pass


class Graph:
    """A stand-in for a CUDA graph: it records nothing, and counts its replays."""

    replays = 0

    def replay(self) -> None:
        self.replays += 1


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Return the streams of all captures, in their order."""
    captured: list[object] = []

    def record(graph: Graph, stream: Stream, capture_error_mode: str) -> object:
        captured.append(stream)
        return nullcontext()

    stand_ins: dict[str, object] = {
        "Stream": Stream,
        "current_stream": Stream,
        "set_stream": lambda stream: None,
        "stream": nullcontext,
        "device": nullcontext,
        "CUDAGraph": Graph,
        "graph": record,
        "get_sync_debug_mode": lambda: 0,
        "set_sync_debug_mode": lambda mode: None,
    }
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(repeated, "_capture_failed", False)
    return captured


def wait() -> None:
    warnings.warn(
        "called a synchronizing CUDA operation (Triggered internally)", UserWarning, stacklevel=1
    )


def call(step: Callable[[], None], times: int) -> RepeatedStep:
    repeated = RepeatedStep(CUDA)
    for _ in range(times):
        repeated(step)
    return repeated


def test_every_call_is_one_step() -> None:
    counter = torch.zeros(1)
    repeated = RepeatedStep(torch.device("cpu"))
    for _ in range(7):
        repeated(lambda: counter.add_(1))  # type: ignore[arg-type,return-value]
    assert counter.item() == 7


def test_captured_once_then_replayed(cuda: list[object]) -> None:
    calls: list[int] = []
    first = call(lambda: calls.append(1), WARM_UP_STEPS + 4)
    other = call(lambda: calls.append(1), WARM_UP_STEPS + 1)
    assert len(calls) == 2 * (WARM_UP_STEPS + 1)  # plainly, and as each is recorded
    assert first._graph is not None
    assert first._graph.replays == 4  # type: ignore[attr-defined]
    assert cuda == [first._stream, other._stream]
    assert first._stream is not other._stream


# The filter is for the warnings of the steps before the watched step.
@pytest.mark.filterwarnings("ignore:called a synchronizing:UserWarning")
def test_a_step_that_waits_is_never_captured(cuda: list[object]) -> None:
    with pytest.warns(
        RuntimeWarning,
        match=r"without a CUDA graph: .*test_captured_step.py:\d+ makes the host wait",
    ):
        call(wait, WARM_UP_STEPS + 3)
    assert not cuda


@pytest.mark.filterwarnings("ignore:called a synchronizing:UserWarning")
def test_what_other_threads_wait_for_is_their_own(cuda: list[object]) -> None:
    def step() -> None:
        other = threading.Thread(target=wait)
        other.start()
        other.join()

    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        call(step, WARM_UP_STEPS + 1)
    assert len(cuda) == 1


def test_after_a_failed_capture_no_other_is_tried(
    cuda: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **settings: object) -> object:
        cuda.append("tried")
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(torch.cuda, "graph", fail)
    with pytest.warns(
        RuntimeWarning,
        match="without a CUDA graph: operation not permitted when stream is capturing$",
    ):
        call(lambda: None, WARM_UP_STEPS + 2)
    call(lambda: None, WARM_UP_STEPS + 2)
    assert cuda == ["tried"]
