"""Compare our Philox words with those of torch's own keyed generator, where it has kernels."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import Tensor

from bidfmkd_fast.ops.directions import philox4x32


def torchs_uniform(device: str, seed: int, n: int) -> Tensor:
    """Return torch's n uniform numbers for the key (seed, 0), or skip the test, saying why."""
    try:
        random = importlib.import_module("torch.func._random")
    except ImportError:
        pytest.skip(f"torch {torch.__version__} has no torch.func._random")
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device that torch can use")
    try:
        return random.uniform(random.key(seed, device=torch.device(device)), n).cpu()
    except NotImplementedError:
        pytest.skip(f"torch {torch.__version__} has no kernel of _philox_uniform_ on {device}")


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_words(device: str) -> None:
    """Check that torch's numbers are words of Philox4x32-10 with the same key and counters.

    torch makes a float32 number of 24 of the 32 bits, on CUDA of the first and on the CPU of the
    last, and may take the words in another order, so sets are compared, with one unit of rounding.
    """
    seed, n_counters = 20261127, 64
    given = torchs_uniform(device, seed, 4 * n_counters).double()
    counters = [torch.arange(n_counters), *[torch.zeros(n_counters, dtype=torch.int64)] * 3]
    words = torch.cat(
        [word.flatten() for word in philox4x32(counters, (torch.tensor(seed), torch.tensor(0)), 10)]
    )
    drawn = (given * 2**24).round().long().tolist()
    known = max(
        sum(bool({n - 1, n, n + 1} & bits) for n in drawn)
        for bits in (set((words >> 8).tolist()), set((words & 0xFFFFFF).tolist()))
    )
    assert known == len(drawn), f"{known} of {len(drawn)} are words of the same key"
