"""A step off the GPU is called as it is; on one, see python_tests/cuda."""

from __future__ import annotations

import torch

from bidfmkd_fast.repeated import RepeatedStep


def test_every_call_is_one_step() -> None:
    counter = torch.zeros(1)
    repeated = RepeatedStep(torch.device("cpu"))
    for _ in range(7):
        repeated(lambda: counter.add_(1))  # type: ignore[arg-type,return-value]
    assert counter.item() == 7
