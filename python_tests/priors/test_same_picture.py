"""A picture is the same whatever is drawn beside it, whatever torch's settings and its rounding.

Every test draws all kinds, so that none of them is held up by luck.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import bidfmkd_fast as bf
from bidfmkd_fast.priors import KINDS, draw_pictures, library

STEP = 1.001 / 255  # a rounding may move a value to the next step
SHAPES = [
    *((1, 28, 28), (3, 32, 32), (1, 4, 4), (1, 7, 9), (3, 9, 7), (3, 20, 36)),
    *((1, 31, 150), (3, 84, 84), (1, 224, 224), (3, 224, 224)),
]


def scenes_of_all_kinds(seed: int, per_kind: int) -> Tensor:
    """Return the first `per_kind` scenes of each kind, kind after kind."""
    kind = library.kinds_of(torch.arange(400 * per_kind), seed)
    found = [(kind == number).nonzero()[:per_kind, 0] for number in range(len(KINDS))]
    assert [len(some) for some in found] == [per_kind] * len(KINDS)
    return torch.cat(found)


def how_many(shape: tuple[int, int, int]) -> int:
    """Return how many scenes of a kind are drawn: fewer where a picture takes long."""
    return 2 if shape[1] > 100 else 10 if shape[1] > 50 else 40


@pytest.fixture
def two_threads() -> Iterator[None]:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.mark.parametrize("shape", SHAPES)
def test_it_depends_on_seed_and_number_alone(shape: tuple[int, int, int], seed: int) -> None:
    n = 150 if shape[1] < 50 else 12
    whole = bf.procedural_images(n, shape, seed=seed, first=40)
    assert whole.shape == (n, *shape) and whole.dtype == torch.float32
    for first, count in ((40, 1), (43, 7), (39 + n, 1), (38, 6)):
        part = bf.procedural_images(count, shape, seed=seed, first=first)
        wanted = whole[max(0, first - 40) : first - 40 + count]
        assert (part[max(0, 40 - first) :] - wanted).abs().max() <= STEP
    other = bf.procedural_images(n, shape, seed=seed + 1, first=40)
    assert (other - whole).abs().mean() > 0.05


@pytest.mark.parametrize("shape", SHAPES)
def test_every_kind_is_the_same_alone_and_in_another_order(
    shape: tuple[int, int, int], seed: int
) -> None:
    scenes = scenes_of_all_kinds(seed, min(4, how_many(shape)))
    together = draw_pictures(scenes, scenes % 3, shape, seed)
    backwards = draw_pictures(scenes.flip(0), scenes.flip(0) % 3, shape, seed).flip(0)
    alone = [draw_pictures(scene, scene % 3, shape, seed) for scene in scenes.split(1)]
    assert (backwards - together).abs().max() <= STEP
    assert (torch.cat(alone) - together).abs().max() <= STEP


@pytest.mark.parametrize("shape", SHAPES)
def test_it_is_the_same_on_two_threads(
    shape: tuple[int, int, int], seed: int, two_threads: None
) -> None:
    scenes = scenes_of_all_kinds(seed, min(10, how_many(shape)))
    on_two = draw_pictures(scenes, scenes % 3, shape, seed)
    torch.set_num_threads(1)
    assert (on_two - draw_pictures(scenes, scenes % 3, shape, seed)).abs().max() <= STEP


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_it_is_the_same_under_other_settings_of_torch(dtype: torch.dtype, seed: int) -> None:
    scenes = scenes_of_all_kinds(seed, 10)
    wanted = draw_pictures(scenes, scenes % 3, (3, 32, 32), seed)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_default_dtype(dtype)
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", torch.bfloat16):
            got = draw_pictures(scenes, scenes % 3, (3, 32, 32), seed)
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_float32_matmul_precision(before)
    assert got.dtype == torch.float32
    assert torch.equal(got, wanted)


class ExactDraws(library.Draws):
    """Random numbers in float64, so that all that is computed from them is too.

    A number is first scaled in float32, as it is on every machine: these are one multiplication and
    one addition, which IEEE 754 defines to the last bit.
    """

    def uniform(self, low: float, high: float, count: int = 1) -> Tensor:
        return super().uniform(low, high, count).double()


@pytest.mark.parametrize("shape", SHAPES)
def test_float32_draws_what_float64_draws(
    monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int, int], seed: int
) -> None:
    """Where float32 is within 1/255 of float64, so are two machines that round differently."""
    scenes = scenes_of_all_kinds(seed, how_many(shape))
    got = draw_pictures(scenes, scenes % 3, shape, seed)
    drawn, exact = library._drawn, []

    def noted(*arguments: Any) -> Tensor:
        exact.append(drawn(*arguments))
        return exact[-1]

    monkeypatch.setattr(library, "Draws", ExactDraws)
    monkeypatch.setattr(library, "_drawn", noted)
    wanted = draw_pictures(scenes, scenes % 3, shape, seed)
    assert {picture.dtype for picture in exact} == {torch.float64}
    assert (got - wanted).abs().max() <= STEP
