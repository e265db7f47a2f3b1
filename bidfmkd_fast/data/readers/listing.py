"""Define what a reader finds: the images with their classes, and how they are to be decoded."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from bidfmkd_fast.data.readers.splits import Split
from bidfmkd_fast.data.readers.tree import Tree


@dataclass(frozen=True)
class Listing:
    """Images and their classes, as a reader of one layout found them.

    Attributes:
        name: the name of the data set.
        classes: the class of each image.
        tree: the source.
        files: the images as files of `tree`; None if the source holds arrays.
        pixels: the images as an array, uint8 `[N, H, W, 3]`; None if the source holds files.
        split: the split of the source or of its publishers; None if they give none.
        size: height and width that the papers use; None keeps those of the images.
        resample: how images are brought to that size.
        mode: "L" (grey), "RGB", or None for the mode of each file.
    """

    name: str
    classes: list[str]
    tree: Tree
    files: list[str] | None = None
    pixels: np.ndarray | None = None
    split: Split | None = None
    size: int | None = None
    resample: Image.Resampling = Image.Resampling.BILINEAR
    mode: str | None = None
