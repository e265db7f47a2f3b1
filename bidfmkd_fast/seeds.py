"""Derive seeds by name.

Two parts of a run then never share random numbers, and no part's random numbers depend on the order
of the work.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_turn = threading.RLock()


def derive_seed(seed: int, *names: str | int) -> int:
    """Return a seed in [0, 2^63) that depends on `seed` and `names` alone.

    Names are for example `"api", 3, "support"`.
    """
    text = repr((int(seed), *names)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def torch_generator(seed: int, *names: str | int) -> torch.Generator:
    """Return a CPU random generator, seeded with `derive_seed(seed, *names)`."""
    return torch.Generator().manual_seed(derive_seed(seed, *names))


@contextmanager
def seeded(seed: int, *names: str | int) -> Iterator[None]:
    """Seed torch's global CPU generator with `derive_seed(seed, *names)` inside the block.

    After the block the generator is as it was before. Use this for code that can draw from the
    global generator only, such as the initialisation of `torch.nn` layers. The process has only one
    global generator, so threads take turns. The generators of CUDA devices in use are seeded too,
    but not restored. While a CUDA graph is captured, the generators of CUDA devices are left alone:
    the replays of the graph continue from the last seed.
    """
    own = derive_seed(seed, *names)
    with _turn, torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(own)
        if torch.cuda.is_initialized() and not torch.cuda.is_current_stream_capturing():
            torch.cuda.manual_seed_all(own)
        yield
