"""A step that is repeated many times: on a CUDA device from a captured graph, without gaps between its kernels."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch

WARM_UP_STEPS = 3  # run plainly: what is made lazily (optimiser state, plans of convolutions) must be there by then


class RepeatedStep:
    """Calls `step`, on CUDA from a graph that is captured once, elsewhere as it is.

    Every call is one step, the plain ones before the capture too, so the results are those of plain calls. A step that
    cannot be captured runs plainly on, with a warning that says why.

    Args:
        step: works in place on the same tensors at every call and never makes the host wait for the device.
        device: where it works.
    """

    def __init__(self, step: Callable[[], None], device: torch.device) -> None:
        self._step, self._device = step, device
        self._plain_left = WARM_UP_STEPS
        self._graph: torch.cuda.CUDAGraph | None = None
        self._always_plain = device.type != "cuda"

    def __call__(self) -> None:
        if self._always_plain:
            self._step()
        elif self._plain_left > 0:
            self._plain_left -= 1
            self._run_aside()
        else:
            if self._graph is None:
                self._capture()
            self._step() if self._graph is None else self._graph.replay()

    def _run_aside(self) -> None:
        """Plainly, on a stream of its own, as a capture will."""
        current, aside = torch.cuda.current_stream(self._device), torch.cuda.Stream(self._device)
        aside.wait_stream(current)
        with torch.cuda.stream(aside):
            self._step()
        current.wait_stream(aside)

    def _capture(self) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.device(self._device), torch.cuda.graph(graph, capture_error_mode="thread_local"):
                self._step()
        except RuntimeError as error:
            self._always_plain = True
            reason = str(error).strip().splitlines()[0]
            warnings.warn(f"bidfmkd_fast: this step runs without a CUDA graph: {reason}", RuntimeWarning, stacklevel=3)
        else:
            self._graph = graph
