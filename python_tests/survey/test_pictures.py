"""Test the shared pictures: every API sees the same scenes, in its own size, channels and range."""

from __future__ import annotations

import pytest
import torch

from bidfmkd_fast.black_box import APISpec
from bidfmkd_fast.errors import InputError
from bidfmkd_fast.survey.pictures import SharedPictures, check_drawable


def test_pictures_depend_on_seed_and_number_only(seed: int) -> None:
    pictures, shape = SharedPictures(seed), (3, 16, 16)
    whole = pictures.of_shape(0, 30, shape)
    assert torch.equal(pictures.of_shape(7, 11, shape), whole[7:18])
    assert not torch.equal(SharedPictures(seed + 1).of_shape(0, 30, shape), whole)


def test_pictures_come_in_the_range_of_the_api(seed: int) -> None:
    pictures = SharedPictures(seed)
    spec = APISpec(4, (1, 20, 12), (-1.0, 3.0))
    torch.testing.assert_close(
        pictures.for_api(3, 5, spec), 4 * pictures.of_shape(3, 5, (1, 20, 12)) - 1
    )


def test_bytes_are_an_exact_copy(seed: int) -> None:
    pictures, shape = SharedPictures(seed), (3, 8, 8)
    kept = pictures.as_bytes(1030, shape)  # more than one chunk
    assert kept.dtype == torch.uint8
    assert torch.equal(kept.float() / 255, pictures.of_shape(0, 1030, shape))


@pytest.mark.parametrize("other", [(3, 64, 64), (1, 32, 32)])
def test_scenes_are_the_same_in_every_size(other: tuple[int, int, int]) -> None:
    """Pictures of one number are alike across sizes and channels; of different numbers not."""
    pictures, n = SharedPictures(0), 200
    grey = [
        torch.nn.functional.adaptive_avg_pool2d(
            pictures.of_shape(0, n, shape).mean(1, keepdim=True), 8
        ).flatten(1)
        for shape in ((3, 32, 32), other)
    ]
    ours, theirs = (torch.nn.functional.normalize(x - x.mean(1, keepdim=True)) for x in grey)
    alike = (ours * theirs).sum(1)
    unlike = (ours * theirs.roll(1, 0)).sum(1)
    assert alike.abs().median() > 0.9
    assert unlike.abs().median() < 0.4


@pytest.mark.parametrize("shape", [(2, 32, 32), (4, 32, 32), (3, 3, 32)])
def test_an_api_whose_images_cannot_be_drawn_is_named(shape: tuple[int, int, int]) -> None:
    with pytest.raises(InputError, match=r"survey: mine takes images .*set survey.n_images to 0"):
        check_drawable(APISpec(2, shape, name="mine"))
