"""Read CIFAR-100 as published for Python (Krizhevsky, 2009): pickles `train`, `test`, `meta`."""

from __future__ import annotations

import numpy as np

from bidfmkd_fast.data.readers.listing import Listing
from bidfmkd_fast.data.readers.pickled_arrays import load_arrays
from bidfmkd_fast.data.readers.splits import Split, published_split
from bidfmkd_fast.data.readers.tree import Tree
from bidfmkd_fast.errors import InputError

_FILES = ("meta", "train", "test")


def matches(tree: Tree) -> bool:
    """Return True if one folder of the source holds all three pickles."""
    return tree.folder_of(*_FILES) is not None


def read(tree: Tree, split: Split | None) -> Listing:
    """List all 600 images of each class, those of `train` first.

    The split is that of CIFAR-FS unless `split` is given.

    Raises:
        InputError: a file is missing, damaged, of another form, or tries to run code.
    """
    folder = tree.folder_of(*_FILES)
    if folder is None:
        raise InputError(
            f"convert_dataset: cifar100: {tree.path} holds no folder with the files "
            f"{', '.join(_FILES)}"
        )
    meta, *parts = (
        load_arrays(content, f"{tree.path}: {folder}{name}")
        for name, content in zip(_FILES, tree.read(*(folder + name for name in _FILES)))
    )
    names = meta.get("fine_label_names")
    if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
        raise InputError(
            f"convert_dataset: {tree.path}: {folder}meta: wanted fine_label_names, "
            "a list of class names"
        )
    classes: list[str] = []
    for name, part in zip(_FILES[1:], parts):
        classes += _classes(part, names, f"{tree.path}: {folder}{name}")
    rows = np.concatenate([part["data"] for part in parts])
    pixels = rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    if split is not None:
        return Listing("cifar100", classes, tree, pixels=pixels, split=split)
    return Listing("cifar_fs", classes, tree, pixels=pixels, split=published_split("cifar_fs"))


def _classes(part: dict, names: list[str], where: str) -> list[str]:
    """Return the class name of each image of one pickle, once its arrays are checked."""
    rows, labels = part.get("data"), part.get("fine_labels")
    if not isinstance(rows, np.ndarray) or rows.ndim != 2 or rows.shape[1] != 3072:
        came = (
            f"an array {list(rows.shape)}" if isinstance(rows, np.ndarray) else type(rows).__name__
        )
        raise InputError(
            f"convert_dataset: {where}: data must be [N, 3072], images of 3 x 32 x 32; got {came}"
        )
    if not isinstance(labels, list) or len(labels) != len(rows):
        raise InputError(
            f"convert_dataset: {where}: fine_labels must be a list of {len(rows)} numbers"
        )
    if not all(type(label) is int and 0 <= label < len(names) for label in labels):
        raise InputError(f"convert_dataset: {where}: fine_labels must be in 0..{len(names) - 1}")
    return [names[label] for label in labels]
