"""A step that is repeated many times: on a CUDA device from a captured graph, without gaps between its kernels."""

from __future__ import annotations

import gc
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

# run plainly: what is made lazily (optimiser state, plans of convolutions) must be there by then
WARM_UP_STEPS = 3
_WAITS = "synchronizing CUDA operation"  # in torch's warning of one
_capture_failed = False  # torch cannot capture again in a process where one capture was cut off


class RepeatedStep:
    """Calls a step, on CUDA from a graph that is captured once, elsewhere as it is.

    Every call is one step, the plain ones before the capture too, so the results are those of plain
    calls. A step that makes the host wait, which no graph can hold, runs plainly on, with a warning
    that says so.

    Args:
        device: where the step works.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._plain_left = WARM_UP_STEPS
        self._graph: torch.cuda.CUDAGraph | None = None
        self._always_plain = device.type != "cuda"
        # Of its own: cuBLAS has a workspace for each stream, and graphs recorded with the same one
        # cannot run at once.
        self._stream = None if self._always_plain else torch.cuda.Stream(device)

    def __call__(self, step: Callable[[], None]) -> None:
        """`step()`; the same step at every call, which works in place on the same tensors.

        It is handed in anew each time, so that a graph and its memory end with whoever owns both.
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
        """Plainly, on the stream of the capture."""
        current = torch.cuda.current_stream(self._device)
        assert self._stream is not None
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            step()
        current.wait_stream(self._stream)

    def _waits_of(self, step: Callable[[], None]) -> str:
        """Runs the step once more; where it first makes the host wait, or nothing."""
        before, own, waits = torch.cuda.get_sync_debug_mode(), threading.get_ident(), []
        show = warnings.showwarning

        def note(
            message: Warning | str, category: type[Warning], filename: str, lineno: int, *rest: Any
        ) -> None:
            if _WAITS not in str(message):
                show(message, category, filename, lineno, *rest)
            elif threading.get_ident() == own:  # other threads wait for their own reasons
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
        self._always_plain = True
        warnings.warn(
            f"bidfmkd_fast: this step runs without a CUDA graph: {reason}",
            RuntimeWarning,
            stacklevel=4,
        )


@contextmanager
def _no_collection() -> Iterator[None]:
    """Without garbage collection: one that frees another graph would cut off the capture."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
