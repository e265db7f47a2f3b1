"""Hold a data set in memory: images, labels, and the split of each class."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from bidfmkd_fast.errors import InputError, InputTypeError

SPLITS = ("meta_train", "meta_val", "meta_test")


@dataclass(frozen=True, eq=False, repr=False)
class Dataset:
    """Labelled images whose classes are split into meta_train, meta_val and meta_test.

    `images` is uint8 `[N, C, H, W]`; `labels` is int64 `[N]`, indices into `class_names` and
    `split_of_class`. `inverted` notes that the images are 255 minus those of the file. Raises
    `InputError` or `InputTypeError`, naming the data set, when the parts do not fit together.
    """

    name: str
    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...]
    split_of_class: tuple[str, ...]
    inverted: bool = False
    _rows: tuple[Tensor, ...] = field(init=False)

    def __post_init__(self) -> None:
        self._check()
        counts = torch.bincount(self.labels, minlength=len(self.class_names))
        for class_name, count in zip(self.class_names, counts.tolist()):
            if count == 0:
                raise InputError(f"data set {self.name!r}: class {class_name!r} has no images")
        rows = torch.argsort(self.labels, stable=True).split(counts.tolist())
        object.__setattr__(self, "_rows", rows)

    def _check(self) -> None:
        where = f"data set {self.name!r}"
        for name, value in (("images", self.images), ("labels", self.labels)):
            if not isinstance(value, Tensor):
                raise InputTypeError(
                    f"{where}: {name} must be a torch tensor; got {type(value).__name__}"
                )
        if self.images.dtype != torch.uint8 or self.labels.dtype != torch.int64:
            came = f"{self.images.dtype} and {self.labels.dtype}"
            raise InputTypeError(f"{where}: images must be uint8 and labels int64; got {came}")
        if (
            self.images.ndim != 4
            or self.images.shape[1] not in (1, 3)
            or 0 in self.images.shape[2:]
        ):
            raise InputError(
                f"{where}: images must be [N, 1 or 3, H, W]; got {list(self.images.shape)}"
            )
        if len(self.images) == 0:
            raise InputError(f"{where}: there are no images")
        if self.labels.shape != (len(self.images),):
            came = f"{list(self.labels.shape)} for {len(self.images)} images"
            raise InputError(f"{where}: labels must be one per image; got {came}")
        if len(self.split_of_class) != len(self.class_names):
            came = f"{len(self.split_of_class)} for {len(self.class_names)} class names"
            raise InputError(f"{where}: split_of_class must be one per class; got {came}")
        if len(set(self.class_names)) != len(self.class_names):
            twice = next(name for name in self.class_names if self.class_names.count(name) > 1)
            raise InputError(f"{where}: class names must differ; {twice!r} comes twice")
        for class_name, split in zip(self.class_names, self.split_of_class):
            if split not in SPLITS:
                raise InputError(
                    f"{where}: split of class {class_name!r} must be one of {SPLITS}; got {split!r}"
                )
        low, high = int(self.labels.min()), int(self.labels.max())
        if low < 0 or high >= len(self.class_names):
            wanted = f"0..{len(self.class_names) - 1}, one of {len(self.class_names)} classes"
            raise InputError(f"{where}: labels must be in {wanted}; got {low}..{high}")

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Return the shape of an image, (C, H, W)."""
        _, channels, height, width = self.images.shape
        return channels, height, width

    def classes(self, split: str) -> list[int]:
        """Return the indices of the classes of `split`, ascending.

        Raises:
            InputError: there is no such split.
        """
        if split not in SPLITS:
            raise InputError(
                f"data set {self.name!r}: split must be one of {SPLITS}; got {split!r}"
            )
        return [index for index, name in enumerate(self.split_of_class) if name == split]

    def rows_of(self, class_index: int) -> Tensor:
        """Return the rows of `images` that show this class: int64 `[n]`, ascending.

        Raises:
            InputError: there is no such class.
        """
        if not 0 <= class_index < len(self._rows):
            raise InputError(
                f"data set {self.name!r}: class must be in 0..{len(self._rows) - 1}; "
                f"got {class_index}"
            )
        return self._rows[class_index]

    def take(self, rows: Tensor) -> Tensor:
        """Return the images of these rows, float32 `[n, C, H, W]` in [0, 1]."""
        return self.images[rows].float().div_(255)

    def images_of(self, class_index: int) -> Tensor:
        """Return all images of one class, float32 `[n, C, H, W]` in [0, 1]."""
        return self.take(self.rows_of(class_index))

    def __repr__(self) -> str:
        channels, height, width = self.image_shape
        splits = ", ".join(f"{split} {len(self.classes(split))}" for split in SPLITS)
        inverted = ", inverted" if self.inverted else ""
        return (
            f"Dataset({self.name!r}{inverted}: {len(self.images)} images "
            f"{channels}x{height}x{width}, {len(self.class_names)} classes: {splits})"
        )
