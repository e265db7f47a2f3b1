"""Draw the random directions in plain torch: the specification of csrc/random/.

Element `j` of direction `k` of image `b` at `[seed, step]` depends on those five numbers alone,
through the counter-based generator Philox4x32 (Salmon et al., "Parallel random numbers: as easy as
1, 2, 3", SC 2011). Any part of the directions can therefore be drawn again, by itself, on any
device.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

DIRECTIONS = ("rademacher", "sphere", "gaussian", "lowres")  # as Directions in csrc/random/

PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)
SIGN_ROUNDS = 10
NORMAL_ROUNDS = 7  # the fewest rounds that pass BigCrush, according to the paper cited above
_U32 = 0xFFFFFFFF


def philox4x32(
    counter: Sequence[Tensor], key: Sequence[Tensor], rounds: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the 4 words that Philox4x32 makes of a counter of 4 words and a key of 2 words.

    All words are int64 tensors with values in [0, 2^32); their shapes broadcast.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        # The 64-bit product wraps into the sign bit, but shift-and-mask still finds its halves.
        p0, p1 = c0 * PHILOX_MULTIPLIERS[0], c2 * PHILOX_MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (p1 >> 32) & _U32 ^ c1 ^ k0,
            p1 & _U32,
            (p0 >> 32) & _U32 ^ c3 ^ k1,
            p0 & _U32,
        )
        k0, k1 = (k0 + PHILOX_WEYL[0]) & _U32, (k1 + PHILOX_WEYL[1]) & _U32
    return c0, c1, c2, c3


def random_words(
    state: Tensor, n_images: int, n_counters: int, third: int, rounds: int, first_image: int = 0
) -> Tensor:
    """Return random words `[n_images, n_counters, 4]`, int64 in [0, 2^32).

    Counter `i` of image `b` is `(i, first_image + b, third, step)`; the key is the seed.
    """
    device = state.device
    seed, step = state[0], state[1]
    counters = torch.arange(n_counters, device=device)[None, :]
    images = torch.arange(first_image, first_image + n_images, device=device)[:, None] & _U32
    counter = (counters, images, torch.tensor(third & _U32, device=device), step & _U32)
    words = torch.broadcast_tensors(
        *philox4x32(counter, (seed & _U32, (seed >> 32) & _U32), rounds)
    )
    return torch.stack(words, dim=-1)


def _sign_words(
    state: Tensor, n_images: int, n_elements: int, group: int, first_image: int
) -> Tensor:
    """Return words `[n_images, n_elements]`: bit `i` is the sign in direction `32 * group + i`."""
    words = random_words(state, n_images, -(-n_elements // 4), group, SIGN_ROUNDS, first_image)
    return words.flatten(1)[:, :n_elements]


@functools.cache
def _normal_table() -> Tensor:
    """Return the standard normal that belongs to each pattern of 16 bits: `[2^16]` in float64.

    The top bit is the sign, and the other 15 bits are a rank. The size of the normal is the
    quantile in the middle of one of 2^15 equally likely shares, as an integer in units of 1/7500,
    approximated by cubic polynomials in integer arithmetic. csrc/random/normal.h holds the
    coefficients as a table; this function derives them.
    """

    def quantile(rank: Tensor) -> Tensor:
        return -7500 * torch.special.ndtri((rank.double() + 0.5) / 2**16)

    sizes = quantile(torch.arange(2**15)).round().long()  # kept as it is for the 32 outermost ranks
    chebyshev = torch.cos((2 * torch.arange(4, dtype=torch.float64) + 1) * torch.pi / 8)
    # Two sizes of segments, since the quantile bends most at the outermost ranks: segments of 32
    # ranks up to rank 1024, segments of 1024 ranks from there on.
    for n_ranks in (32, 1024):
        # The first rank of each of 31 segments, [31, 1]. Segment 0 is left out: it holds the
        # outermost ranks, or the finer segments.
        first = torch.arange(1, 32)[:, None] * n_ranks
        powers = torch.linalg.solve(
            chebyshev[:, None] ** torch.arange(4),
            quantile(first + n_ranks / 2 * (1 + chebyshev)).T,
        ).T
        # The size is `constant + linear (v/2) + square (v/2)^2 + cube (v/2)^3` with v in [-1, 1):
        # a power of v/2 instead of v doubles its coefficient. Each `>> 16` below rounds down, by
        # half a unit on average, and the 0.5 added here makes up for that.
        powers = powers * torch.tensor([1, 2, 4, 8]) + torch.tensor([0.5, 0.5, 0.5, 0.0])
        constant, linear, square, cube = powers.round().long().T[:, :, None]
        position = torch.arange(n_ranks)
        # The bits of the position read as a signed integer, in units of 2^-15: t is 2^15 v. This
        # exchanges the two halves of a segment, which does not change the distribution.
        t = (position - n_ranks * (position >= n_ranks // 2)) * (2**16 // n_ranks)
        values = cube * t >> 16
        values = (square + values) * t >> 16
        values = (linear + values) * t >> 16
        sizes[n_ranks : 32 * n_ranks] = (constant + values).flatten()
    sizes = sizes.double() / sizes.double().square().mean().sqrt()
    return torch.cat([sizes, -sizes])


def _normals(
    state: Tensor, n_images: int, n_elements: int, direction: int, first_image: int
) -> Tensor:
    """Return standard normals `[n_images, n_elements]` in float64, each made of 16 random bits."""
    words = random_words(
        state, n_images, -(-n_elements // 8), direction, NORMAL_ROUNDS, first_image
    )
    halves = torch.cat([words & 0xFFFF, words >> 16], dim=-1).flatten(1)[:, :n_elements]
    return _normal_table().to(halves.device)[halves]


def span_dimension(shape: Sequence[int], directions: str, grid: int) -> int:
    """Return `s`, the dimension of the space that the directions span.

    The dimension is C * grid^2 for `lowres` and d = C * H * W for all others.
    """
    return shape[1] * grid * grid if directions == "lowres" else math.prod(shape[1:])


def unit_directions(
    shape: Sequence[int],
    state: Tensor,
    num_directions: int,
    directions: str = "rademacher",
    grid: int = 0,
    first_direction: int = 0,
    first_image: int = 0,
) -> Iterator[Tensor]:
    """Yield the directions `u_k` for k = first_direction, first_direction + 1, ...

    Each is a float64 tensor `[B, *S]`, of length 1 for every image (`gaussian`: of length 1 in the
    mean square).
    """
    n_images, d = shape[0], math.prod(shape[1:])
    words, group_of_words = None, -1
    for k in range(first_direction, first_direction + num_directions):
        if directions == "rademacher":
            if words is None or group_of_words != k // 32:
                group_of_words = k // 32
                words = _sign_words(state, n_images, d, group_of_words, first_image)
            flat = (1.0 - 2.0 * ((words >> (k % 32)) & 1)).double() / math.sqrt(max(d, 1))
        elif directions == "gaussian":
            flat = _normals(state, n_images, d, k, first_image) / math.sqrt(max(d, 1))
        elif directions == "sphere":
            flat = _normals(state, n_images, d, k, first_image)
            flat = flat / flat.norm(dim=1, keepdim=True)
        else:
            channels, height, width = shape[1:]
            field = _normals(state, n_images, channels * grid * grid, k, first_image)
            field = field.view(n_images, channels, grid, grid)
            flat = F.interpolate(
                field, (height, width), mode="bilinear", align_corners=False
            ).flatten(1)
            flat = flat / flat.norm(dim=1, keepdim=True)
        yield flat.view(tuple(shape))
