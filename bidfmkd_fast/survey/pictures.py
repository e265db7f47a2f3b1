"""Draw the pictures that all APIs are asked about, at the size that each of them takes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bidfmkd_fast.black_box import APISpec
from bidfmkd_fast.errors import InputError
from bidfmkd_fast.priors import procedural_images
from bidfmkd_fast.seeds import derive_seed

_CHUNK = 1024  # pictures drawn at once where all of them are kept as bytes


def check_drawable(
    spec: APISpec,
    operation: str = "survey",
    advice: str = "set survey.n_images to 0 to leave the survey out",
) -> None:
    """Raise InputError unless the picture library can draw images of the API's shape."""
    channels, height, width = spec.image_shape
    if channels not in (1, 3) or min(height, width) < 4:
        raise InputError(
            f"{operation}: {spec.name} takes images {list(spec.image_shape)}, but pictures have 1 "
            f"or 3 channels and sides of at least 4; {advice}"
        )


class SharedPictures:
    """The pictures 0, 1, ... of a survey: the same scenes for every API, at any size.

    Args:
        seed: the seed of the run.
    """

    def __init__(self, seed: int) -> None:
        self.seed = derive_seed(seed, "survey", "pictures")

    def of_shape(self, first: int, n: int, image_shape: Sequence[int]) -> Tensor:
        """Draw pictures `first`, ..., `first + n - 1`, float32 `[n, *image_shape]` in [0, 1]."""
        return procedural_images(n, image_shape, seed=self.seed, first=first)

    def for_api(self, first: int, n: int, spec: APISpec) -> Tensor:
        """Draw pictures in the shape and the input range of an API."""
        return spec.from_unit(self.of_shape(first, n, spec.image_shape))

    def as_bytes(self, n: int, image_shape: Sequence[int]) -> Tensor:
        """Draw the first `n` pictures as uint8, an exact copy in a quarter of the memory."""
        kept = torch.empty(n, *image_shape, dtype=torch.uint8)
        for first in range(0, n, _CHUNK):
            drawn = self.of_shape(first, min(_CHUNK, n - first), image_shape)
            kept[first : first + len(drawn)] = (255 * drawn).round_().to(torch.uint8)
        return kept
