"""Draw the random numbers of a picture: a pure function of a seed, a name and an index."""

from __future__ import annotations

import torch
from torch import Tensor

from bidfmkd_fast.ops.directions import philox4x32
from bidfmkd_fast.seeds import derive_seed

_U32 = 0xFFFFFFFF
_ROUNDS = 10


def uniforms(seed: int, name: str, indices: Tensor, count: int) -> Tensor:
    """Return `count` numbers in [0, 1) for each index: int64 `[n]` -> float32 `[n, count]`.

    Row i depends on (seed, name, indices[i]) alone. A number has 24 random bits, so it is the same
    float on every machine. Source: Philox4x32-10 (Salmon et al., SC 2011), with the derived seed as
    key and (block, low and high half of the index, 0) as counter.
    """
    key = derive_seed(seed, "priors", name)
    blocks = torch.arange(-(-count // 4), device=indices.device)[None]
    low, high = (indices & _U32)[:, None], ((indices >> 32) & _U32)[:, None]
    zero = torch.zeros((), dtype=torch.int64, device=indices.device)
    counter = torch.broadcast_tensors(blocks, low, high, zero)
    words = torch.stack(philox4x32(counter, (zero + (key & _U32), zero + (key >> 32)), _ROUNDS), 2)
    return (words.flatten(1)[:, :count] >> 8).float() * 2.0**-24


class Draws:
    """Hands out the columns of `uniforms` one after the other, scaled as wanted.

    A drawing asks for its numbers in a fixed order, so that each has a column of its own.

    Args:
        values: `[n, count]` in [0, 1).
    """

    def __init__(self, values: Tensor) -> None:
        self._values, self._next = values, 0

    def uniform(self, low: float, high: float, count: int = 1) -> Tensor:
        """Return the next `count` columns, `[n, count]` in [low, high)."""
        columns = self._values[:, self._next : self._next + count]
        if columns.shape[1] < count:
            raise IndexError(
                f"Draws: {self._next + count} numbers wanted of {len(self._values[0])}"
            )
        self._next += count
        return low + (high - low) * columns

    def integer(self, low: int, high: int) -> Tensor:
        """Return the next column as integers from `low` to `high`, both included, int64 `[n]`."""
        return self.uniform(low, high + 1)[:, 0].long().clamp(low, high)
