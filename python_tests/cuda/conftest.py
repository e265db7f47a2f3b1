"""Tests on a CUDA device: they skip, saying so, where there is none."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from bidfmkd_fast import ops
from bidfmkd_fast.ops import backend


@pytest.fixture
def device() -> Iterator[torch.device]:
    """A CUDA device with the native kernels; a device that they do not serve is a failure, not a
    skip.
    """
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device that torch can use")
    device = torch.device("cuda", torch.cuda.current_device())
    assert backend.device_problem(device) is None, backend.device_problem(device)
    with ops.use_backend("native"):
        yield device
