"""Compare Philox with its published answers, and the normals with the exact quantiles."""

from __future__ import annotations

import pytest
import torch
from tolerances import TOLERANCES

from bidfmkd_fast.ops import backend, directions

FULL = 0xFFFFFFFF
# Random123's test vectors for philox4x32: rounds, counter, key, words.
KNOWN_ANSWERS = [
    (10, [0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    (10, [FULL] * 4, [FULL] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        10,
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
    (7, [0] * 4, [0] * 2, [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]),
    (7, [FULL] * 4, [FULL] * 2, [0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662]),
]


@pytest.mark.parametrize(("rounds", "counter", "key", "words"), KNOWN_ANSWERS)
def test_known_answers(rounds: int, counter: list[int], key: list[int], words: list[int]) -> None:
    tensors = [torch.tensor([value]) for value in (*counter, *key)]
    assert [int(word) for word in directions.philox4x32(tensors[:4], tensors[4:], rounds)] == words
    assert backend._C is not None
    assert backend._C.philox4x32(counter, key, rounds) == words


def test_normals() -> None:
    """Compare all 2^16 normals of the kernels with the reference's, and check their moments.

    The normals lie close to the exact quantiles.
    """
    halves = torch.arange(2**16)
    assert backend._C is not None
    kernel = torch.tensor([backend._C.normal_from_half(int(half)) for half in halves])
    normals = directions._normal_table()
    unit = kernel.double().square().mean().sqrt()
    assert torch.equal((normals * unit).round().long(), kernel)
    torch.testing.assert_close(normals * unit, kernel.double(), **_tolerance("float64"))
    shares = (
        torch.arange(2**15).double() + 0.5
    ) / 2**16  # of what lies beyond; the bits are not in this order
    for half, sign in ((normals[: 2**15], 1), (normals[2**15 :], -1)):
        exact = -torch.special.ndtri(shares)
        torch.testing.assert_close(
            (sign * half).sort(descending=True).values, exact, rtol=0.0, atol=2.5e-4
        )
    assert float(normals.sum()) == 0
    assert abs(float(normals.square().mean()) - 1) < 1e-12
    assert abs(float(normals.pow(4).mean()) - 3) < 1e-3


def test_words_depend_on_every_coordinate(seed: int) -> None:
    def words(seed_: int = seed, step: int = 3, image: int = 0, third: int = 1) -> torch.Tensor:
        return directions.random_words(torch.tensor([seed_, step]), 1, 4, third, 10, image)

    same = words()
    assert torch.equal(same, words())
    others = (
        words(seed_=seed + 1),
        words(seed_=seed + 2**32),
        words(step=4),
        words(image=1),
        words(third=2),
    )
    for other in others:
        assert (same != other).all()  # 16 words: a chance match has probability 4e-9


def test_moments(seed: int) -> None:
    shape, q = (4, 3, 16, 16), 64
    state = torch.tensor([seed, 0])
    for kind, grid in (("rademacher", 0), ("sphere", 0), ("gaussian", 0), ("lowres", 4)):
        u = torch.stack(list(directions.unit_directions(shape, state, q, kind, grid)))
        lengths = u.flatten(2).norm(dim=-1)
        if kind == "gaussian":
            # The squared length is chi-squared(768) / 768: standard deviation 0.05.
            assert (lengths**2 - 1).abs().max() < 0.35
        else:
            torch.testing.assert_close(lengths, torch.ones_like(lengths), **_tolerance("float64"))
        # A direction's sum is sqrt(768) times its cosine with (1, ..., 1): of variance 768 /
        # independent numbers.
        independent = 48 if kind == "lowres" else 768
        assert (
            abs(float(u.sum())) < 6 * (256 * 768 / independent) ** 0.5
        )  # six standard deviations of 256 of them


def _tolerance(name: str) -> dict[str, float]:
    rtol, atol = TOLERANCES[name]
    return {"rtol": rtol, "atol": atol}
