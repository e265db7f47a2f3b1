"""Repeat a step many times, on a CUDA device from a captured graph.

Replaying a graph leaves no gaps between its kernels, which launching them one by one does.

State of the process: whether a capture has failed, after which torch cannot capture any more.
"""

from __future__ import annotations

import gc
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

# Steps that run without a graph first. What torch makes lazily (optimiser state, the choice of
# convolution algorithms) must exist before the capture.
WARM_UP_STEPS = 3
_WAITS = "synchronizing CUDA operation"  # part of torch's warning about such an operation
_capture_failed = False


class RepeatedStep:
    """Call a step: on CUDA by replaying a graph that is captured once, elsewhere as it is.

    Every call does one step, the warm-up calls before the capture included, so the results are
    those of plain calls. No graph can hold a step that makes the host wait for the device: such a
    step keeps running without a graph, and a warning says so.

    Args:
        device: the device that the step works on.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._plain_left = WARM_UP_STEPS
        self._graph: torch.cuda.CUDAGraph | None = None
        self._always_plain = device.type != "cuda"
        # A stream of its own: cuBLAS has one workspace per stream, and graphs that were captured
        # with the same workspace cannot run at the same time.
        self._stream = None if self._always_plain else torch.cuda.Stream(device)

    def __call__(self, step: Callable[[], None]) -> None:
        """Run `step` once: the same step in every call, working in place on the same tensors.

        The step is an argument of each call instead of an attribute, since a reference to it would
        keep the graph and its memory alive longer than their owner.
        """
        if self._always_plain:
            step()
        elif self._plain_left > 0:
            self._plain_left -= 1
            if self._plain_left > 0:
                self._run_aside(step)
            elif waits := self._waits_of(step):
                self._give_up(waits)
        else:
            if self._graph is None:
                self._capture(step)
            step() if self._graph is None else self._graph.replay()

    def _run_aside(self, step: Callable[[], None]) -> None:
        """Run the step without a graph, on the stream of the capture."""
        current = torch.cuda.current_stream(self._device)
        assert self._stream is not None
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            step()
        current.wait_stream(self._stream)

    def _waits_of(self, step: Callable[[], None]) -> str:
        """Run the step; return where it first made the host wait, or an empty string."""
        before, own, waits = torch.cuda.get_sync_debug_mode(), threading.get_ident(), []
        show = warnings.showwarning

        def note(
            message: Warning | str, category: type[Warning], filename: str, lineno: int, *rest: Any
        ) -> None:
            if _WAITS not in str(message):
                show(message, category, filename, lineno, *rest)
            elif threading.get_ident() == own:  # other threads may wait for the device
                waits.append(f"{filename}:{lineno} makes the host wait for the device")

        with warnings.catch_warnings():
            warnings.filterwarnings("always", f".*{_WAITS}")
            warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
            warnings.showwarning = note  # type: ignore[assignment]
            torch.cuda.set_sync_debug_mode("warn")
            try:
                self._run_aside(step)
            finally:
                torch.cuda.set_sync_debug_mode(before)
        return waits[0] if waits else ""

    def _capture(self, step: Callable[[], None]) -> None:
        """Record the step as a graph without running it; on failure keep running it plainly."""
        global _capture_failed
        if _capture_failed:
            self._always_plain = True
            return
        graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self._device)
        try:
            recording = torch.cuda.graph(
                graph, stream=self._stream, capture_error_mode="thread_local"
            )
            with torch.cuda.device(self._device), _no_collection(), recording:
                step()
        except RuntimeError as error:
            _capture_failed = True
            torch.cuda.set_stream(current)
            self._give_up(str(error.__context__ or error).strip().splitlines()[0])
        else:
            self._graph = graph

    def _give_up(self, reason: str) -> None:
        """Run every later step without a graph, and warn about it."""
        self._always_plain = True
        warnings.warn(
            f"bidfmkd_fast: this step runs without a CUDA graph: {reason}",
            RuntimeWarning,
            stacklevel=4,
        )


@contextmanager
def _no_collection() -> Iterator[None]:
    """Switch garbage collection off: freeing another graph would break a capture in progress."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
