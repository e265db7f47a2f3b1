"""Provide the CUDA device of the tests in this folder; without a device they are skipped."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from bidfmkd_fast import ops
from bidfmkd_fast.ops import backend


@pytest.fixture
def device() -> Iterator[torch.device]:
    """Yield a CUDA device; fail, and do not skip, if the native kernels do not serve it."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device that torch can use")
    device = torch.device("cuda", torch.cuda.current_device())
    assert backend.device_problem(device) is None, backend.device_problem(device)
    with ops.use_backend("native"):
        yield device
