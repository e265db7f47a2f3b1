"""Seeds derived by name, so that no two parts of a run share random numbers and none depends on the order of work."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_turn = threading.RLock()


def derive_seed(seed: int, *names: str | int) -> int:
    """A seed in [0, 2^63) that is a pure function of `seed` and `names` (for example `("api", 3,
    "support")`).
    """
    text = repr((int(seed), *names)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def torch_generator(seed: int, *names: str | int) -> torch.Generator:
    """A CPU random generator seeded with `derive_seed(seed, *names)`."""
    return torch.Generator().manual_seed(derive_seed(seed, *names))


@contextmanager
def seeded(seed: int, *names: str | int) -> Iterator[None]:
    """Torch's global CPU generator under `derive_seed(seed, *names)` inside the block, as it was
    before outside it.

    For code that draws from the global generator only, such as the initialisation of `torch.nn`
    layers. Threads take turns, since there is one such generator. Those of CUDA devices in use are
    seeded too and not put back; while a graph is captured they are left alone, and its replays go
    on from what was seeded last.
    """
    own = derive_seed(seed, *names)
    with _turn, torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(own)
        if torch.cuda.is_initialized() and not torch.cuda.is_current_stream_capturing():
            torch.cuda.manual_seed_all(own)
        yield
