"""Check that work larger than the memory of its device is refused in one line."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from bidfmkd_fast.errors import InputError
from bidfmkd_fast.runtime import memory


def test_the_whole_memory_is_the_limit() -> None:
    whole = memory.memory_of(torch.device("cpu"))
    assert whole > 2**28
    memory.check_memory("recover", "n=1", whole, "lower n")
    with pytest.raises(InputError, match="recover: n=1 takes at least .* GB of memory, and this"):
        memory.check_memory("recover", "n=1", whole + 1, "lower n")


def test_the_message_says_what_is_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "memory_of", lambda device: 16 * 10**9)
    wanted = "^recover: n=7 takes at least 1,000 GB of memory, and this machine has 16 GB; lower n$"
    with pytest.raises(InputError, match=wanted):
        memory.check_memory("recover", "n=7", 10**12, "lower n")
    with pytest.raises(InputError, match="this machine has 16 GB"):
        memory.check_memory("recover", "n=7", 10**1000, "lower n")


def test_a_gpu_has_its_own_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=10**9)
    )
    memory.check_memory("recover", "n=1", 10**9, "lower n", "cuda:1")
    with pytest.raises(InputError, match="2 GB of memory, and cuda:1 has 1 GB; lower n"):
        memory.check_memory("recover", "n=1", 10**9 + 1, "lower n", "cuda:1")
