"""Load a data set by name, or from its `.npz` file."""

from __future__ import annotations

import os
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch

from bidfmkd_fast.data.dataset import Dataset
from bidfmkd_fast.data.glyphs import make_glyphs
from bidfmkd_fast.errors import InputError, InputTypeError

DATA_VARIABLE = "BIDFMKD_DATA"
_KEYS = ("images", "labels", "class_names", "split_of_class")


def load_dataset(name_or_path: str | Path, *, invert: bool = False) -> Dataset:
    """Load "glyphs", the file at a path that ends in `.npz`, or else `$BIDFMKD_DATA/<name>.npz`.

    The file holds `images` uint8 `[N, H, W]` or `[N, H, W, 3]`, `labels` integers `[N]`,
    `class_names` and `split_of_class`; further keys are ignored. `invert` replaces each pixel by
    255 minus the pixel: Omniglot is black on white, and networks learn better from white on black.

    >>> dataset = load_dataset("glyphs")  # drawn by this package; needs no file
    >>> dataset.images.shape[1:], len(dataset.classes("meta_test"))
    (torch.Size([1, 28, 28]), ...)

    Raises:
        InputError: the file is missing, damaged, or no such data set.
    """
    name = str(name_or_path)
    dataset = make_glyphs() if name == "glyphs" else _read(_find(name))
    if not invert:
        return dataset
    return Dataset(
        dataset.name,
        255 - dataset.images,
        dataset.labels,
        dataset.class_names,
        dataset.split_of_class,
        inverted=True,
    )


def _find(name_or_path: str) -> Path:
    if name_or_path.endswith(".npz"):
        path = Path(name_or_path).expanduser()
        if not path.is_file():
            raise InputError(f"load_dataset: there is no file {path}")
        return path
    folder = os.environ.get(DATA_VARIABLE, "")
    if not folder:
        raise InputError(
            f"load_dataset: to find data set {name_or_path!r}, set {DATA_VARIABLE} to the folder "
            f"that holds {name_or_path}.npz; or give a path ending in .npz, or 'glyphs'"
        )
    root = Path(folder).expanduser()
    path = root / f"{name_or_path}.npz"
    if not path.is_file():
        there = ", ".join(sorted(file.stem for file in root.glob("*.npz"))) or "no .npz file"
        is_path = "; a path must end in .npz" if "/" in name_or_path else ""
        holds = f"holds {there}" if root.is_dir() else "is not a folder"
        raise InputError(
            f"load_dataset: there is no file {path} ({DATA_VARIABLE}={folder} {holds}){is_path}"
        )
    return path


def _read(path: Path) -> Dataset:
    try:
        with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
            missing = [key for key in _KEYS if key not in archive]
            if missing:
                raise InputError(
                    f"load_dataset: {path} lacks {missing}; "
                    f"it has {sorted(archive)}, needs {list(_KEYS)}"
                )
            images, labels, class_names, splits = (archive[key] for key in _KEYS)
    except InputError:
        raise
    except (
        OSError,
        EOFError,
        ValueError,
        TypeError,
        AttributeError,
        zipfile.BadZipFile,
        zlib.error,
    ) as error:
        raise InputError(
            f"load_dataset: {path} is not a readable .npz of plain arrays: {error}"
        ) from None
    if images.dtype != np.uint8 or labels.dtype.kind not in "iu":
        came = f"{images.dtype} and {labels.dtype}"
        raise InputTypeError(
            f"load_dataset: {path}: images must be uint8 and labels integers; got {came}"
        )
    if class_names.dtype.kind != "U" or splits.dtype.kind != "U":
        came = f"{class_names.dtype} and {splits.dtype}"
        raise InputTypeError(
            f"load_dataset: {path}: class_names and split_of_class must be text; got {came}"
        )
    if images.ndim not in (3, 4) or (images.ndim == 4 and images.shape[3] != 3):
        raise InputError(
            f"load_dataset: {path}: images must be [N, H, W] or [N, H, W, 3]; "
            f"got {list(images.shape)}"
        )
    if class_names.ndim != 1 or splits.ndim != 1:
        came = f"{list(class_names.shape)} and {list(splits.shape)}"
        raise InputError(
            f"load_dataset: {path}: class_names and split_of_class must be [n_classes]; got {came}"
        )
    channels_first = images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2)
    return Dataset(
        path.stem,
        torch.from_numpy(np.ascontiguousarray(channels_first)),
        torch.from_numpy(labels.astype(np.int64)),
        tuple(class_names.tolist()),
        tuple(splits.tolist()),
    )
