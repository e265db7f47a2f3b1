"""Check that procedural pictures are pure functions of seed and number, in range, and varied."""

from __future__ import annotations

import pytest
import torch

import bidfmkd_fast as bf
from bidfmkd_fast.errors import InputError
from bidfmkd_fast.priors import KINDS, draw_pictures, library, numbers

STEP = 1 / 255


def test_values_are_those_of_files(seed: int) -> None:
    pictures = bf.procedural_images(300, (3, 32, 32), seed=seed)
    assert pictures.min() >= 0 and pictures.max() <= 1
    assert torch.equal((pictures * 255).round() / 255, pictures)


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32)])
def test_hardly_any_picture_is_nearly_constant(shape: tuple[int, int, int], seed: int) -> None:
    """Before faint pictures were stretched, 3.6 % of the grey and 1.4 % of the others were."""
    pictures = bf.procedural_images(2000, shape, seed=seed)
    assert (pictures.flatten(1).std(1) < 0.02).sum() < 16


def test_only_faint_pictures_are_stretched(seed: int) -> None:
    torch.manual_seed(seed)
    noise = torch.rand(200, 3, 16, 16)
    noise = noise - noise.mean((2, 3), keepdim=True)
    noise /= noise.square().mean((1, 2, 3), keepdim=True).sqrt()
    wanted = torch.linspace(0, 0.03, 200)
    shown = library._visible(0.5 + wanted[:, None, None, None] * noise)
    spread = shown.std((2, 3), correction=0).square().mean(1).sqrt()
    plain = wanted > 0.0201
    torch.testing.assert_close(spread[plain], wanted[plain], rtol=1e-4, atol=0)
    faint = wanted < 0.0099
    torch.testing.assert_close(spread[faint], 20 * wanted[faint], rtol=1e-4, atol=1e-6)
    assert (spread[1:] - spread[:-1]).abs().max() < 40 * 0.03 / 199  # no jump


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
    kind = library.kinds_of(torch.arange(20_000))
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
