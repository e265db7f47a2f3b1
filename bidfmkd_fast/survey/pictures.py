"""Draw the pictures that all APIs are asked about, at the size that each of them takes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bidfmkd_fast.black_box import APISpec
from bidfmkd_fast.errors import InputError
from bidfmkd_fast.priors import draw_pictures
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

    They are the scenes 0, 1, ... of the picture library, until some are chosen.

    Args:
        seed: the seed of the run.
    """

    def __init__(self, seed: int) -> None:
        self.seed = derive_seed(seed, "survey", "pictures")
        self._n_first = 0
        self._chosen: Tensor | None = None
        self._kept: dict[tuple[int, ...], Tensor] = {}  # by shape, what `as_bytes` has drawn

    def choose(self, n_first: int, scenes: Tensor) -> None:
        """Let the pictures from number `n_first` on be these scenes of the library, int64 `[n]`."""
        self._n_first, self._chosen = n_first, scenes
        self._kept = {shape: kept[:n_first] for shape, kept in self._kept.items()}

    def scenes(self, first: int, n: int) -> Tensor:
        """Return which scenes of the library the pictures `first`, ... are, int64 `[n]`."""
        numbers = torch.arange(first, first + n)
        if self._chosen is None:
            return numbers
        chosen = numbers >= self._n_first
        numbers[chosen] = self._chosen[numbers[chosen] - self._n_first]
        return numbers

    def of_shape(self, first: int, n: int, image_shape: Sequence[int]) -> Tensor:
        """Draw pictures `first`, ..., `first + n - 1`, float32 `[n, *image_shape]` in [0, 1]."""
        kept = self._kept.get(tuple(image_shape))
        if kept is not None and first + n <= len(kept):
            return kept[first : first + n].float() / 255
        scenes = self.scenes(first, n)
        return draw_pictures(scenes, torch.zeros_like(scenes), image_shape, self.seed)

    def for_api(self, first: int, n: int, spec: APISpec) -> Tensor:
        """Draw pictures in the shape and the input range of an API."""
        return spec.from_unit(self.of_shape(first, n, spec.image_shape))

    def as_bytes(self, n: int, image_shape: Sequence[int]) -> Tensor:
        """Draw the first `n` pictures as uint8, an exact copy in a quarter of the memory.

        They are kept, so that none of this shape is drawn again.
        """
        old = self._kept.get(tuple(image_shape), torch.empty(0, *image_shape, dtype=torch.uint8))
        if len(old) < n:
            kept = torch.empty(n, *image_shape, dtype=torch.uint8)
            kept[: len(old)] = old
            for first in range(len(old), n, _CHUNK):
                drawn = self.of_shape(first, min(_CHUNK, n - first), image_shape)
                kept[first : first + len(drawn)] = (255 * drawn).round_().to(torch.uint8)
            self._kept[tuple(image_shape)] = kept
        return self._kept[tuple(image_shape)][:n]
