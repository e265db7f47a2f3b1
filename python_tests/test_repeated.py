"""A step off the GPU is called as it is; on one, see python_tests/cuda."""

from __future__ import annotations

import torch

from bidfmkd_fast.repeated import RepeatedStep


def test_every_call_is_one_step() -> None:
    counter = torch.zeros(1)
    repeated = RepeatedStep(lambda: counter.add_(1), torch.device("cpu"))  # type: ignore[arg-type,return-value]
    for _ in range(7):
        repeated()
    assert counter.item() == 7
