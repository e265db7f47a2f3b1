"""What a reader finds: which images show which class, and how large and in which colours they are wanted."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image

from bidfmkd_fast.data.readers.splits import Split
from bidfmkd_fast.data.readers.tree import Tree


@dataclass(frozen=True)
class Listing:
    """Images and their classes as one layout tells them.

    `classes` names the class of each image: of `files` in `tree`, or of `pixels` uint8 `[N, H, W,
    3]` where the source holds arrays. `split` is what the source itself or its publishers say, or
    None. `size` is the side that the papers use, or None for the images' own.
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
