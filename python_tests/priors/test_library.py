"""Check that procedural pictures are pure functions of seed and number, in range, and varied."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import bidfmkd_fast as bf
from bidfmkd_fast.errors import InputError
from bidfmkd_fast.priors import KINDS, draw_pictures, library, numbers

STEP = 1 / 255
SHAPES = [(1, 28, 28), (3, 32, 32), (3, 20, 36), (1, 5, 4)]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_picture_depends_on_seed_and_number_alone(shape: tuple[int, int, int], seed: int) -> None:
    whole = bf.procedural_images(150, shape, seed=seed, first=40)
    assert whole.shape == (150, *shape) and whole.dtype == torch.float32
    for first, n in ((40, 1), (77, 13), (189, 1)):
        part = bf.procedural_images(n, shape, seed=seed, first=first)
        assert (part - whole[first - 40 : first - 40 + n]).abs().max() <= STEP * 1.001
    other = bf.procedural_images(150, shape, seed=seed + 1, first=40)
    assert (other - whole).abs().mean() > 0.05


def test_values_are_those_of_files(seed: int) -> None:
    pictures = bf.procedural_images(300, (3, 32, 32), seed=seed)
    assert pictures.min() >= 0 and pictures.max() <= 1
    assert torch.equal((pictures * 255).round() / 255, pictures)


def test_float32_draws_what_float64_draws(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Check that both agree to 1/255, so that rounding differs between machines by no more."""
    scenes, members = torch.arange(400), torch.arange(400) % 3
    got = draw_pictures(scenes, members, (3, 32, 32), seed)
    drawn = numbers.uniforms

    def exactly(*arguments: object) -> Tensor:
        return drawn(*arguments).double()  # type: ignore[arg-type]

    monkeypatch.setattr(library, "uniforms", exactly)
    torch.set_default_dtype(torch.float64)
    try:
        wanted = draw_pictures(scenes, members, (3, 32, 32), seed)
    finally:
        torch.set_default_dtype(torch.float32)
    assert wanted.dtype == torch.float64
    assert (got.double() - wanted).abs().max() <= 1.001 * STEP


def test_members_are_closer_than_other_scenes(seed: int) -> None:
    scenes = torch.arange(120)
    pictures = draw_pictures(scenes, torch.zeros_like(scenes), (1, 28, 28), seed)
    copies = draw_pictures(scenes, torch.ones_like(scenes), (1, 28, 28), seed)
    own = (pictures - copies).flatten(1).norm(dim=1)
    other = (pictures - copies.roll(1, 0)).flatten(1).norm(dim=1)
    assert (own > 0).float().mean() > 0.95  # a copy is no repetition; a flat picture may stay
    assert own.median() < 0.75 * other.median()


def test_shares_of_the_kinds() -> None:
    share = torch.tensor([kind.share for kind in KINDS.values()])
    assert share.sum() == pytest.approx(1.0)
    kind = torch.bucketize(
        numbers.uniforms(0, "kind", torch.arange(20_000), 1)[:, 0], share.cumsum(0)[:-1], right=True
    )
    counts = torch.bincount(kind, minlength=len(share)) / 20_000
    assert (counts - share).abs().max() < 4 * (0.25 / 20_000) ** 0.5


def test_known_pictures() -> None:
    """Compare the means of pictures 0 to 7 with those of the first release: they never change."""
    means = bf.procedural_images(8, (3, 32, 32)).mean((1, 2, 3))
    torch.testing.assert_close(means, torch.tensor(KNOWN), rtol=0, atol=0.3 * STEP)


def test_numbers_are_uniform_and_keyed(seed: int) -> None:
    values = numbers.uniforms(seed, "test", torch.arange(2000), 50)
    assert values.min() >= 0 and values.max() < 1
    assert abs(values.mean() - 0.5) < 4 * (1 / 12 / values.numel()) ** 0.5
    assert torch.equal(numbers.uniforms(seed, "test", torch.tensor([1234]), 50)[0], values[1234])
    high = numbers.uniforms(seed, "test", torch.tensor([1234 + 2**32]), 50)[0]
    assert not torch.equal(high, values[1234])
    assert not torch.equal(numbers.uniforms(seed, "other", torch.tensor([1234]), 50)[0], high)


def test_none_and_bad_input() -> None:
    assert bf.procedural_images(0, (3, 32, 32)).shape == (0, 3, 32, 32)
    for arguments, message in (
        ((-1, (3, 32, 32)), "n must be at least 0; got -1"),
        ((1, (2, 32, 32)), r"image_shape must be \(C, H, W\)"),
        ((1, (3, 32)), r"image_shape must be \(C, H, W\)"),
        ((1, (3, 3, 32)), r"image_shape must be \(C, H, W\)"),
        ((1, (3, 32, 32), 0, 1.5), "first must be an integer"),
    ):
        with pytest.raises(InputError, match=message):
            bf.procedural_images(*arguments)  # type: ignore[arg-type]


KNOWN = [0.02498, 0.34924, 0.63879, 0.24584, 0.04696, 0.53844, 0.49619, 0.15342]
