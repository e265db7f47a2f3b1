"""Read one folder per class.

The class folders may lie in folders meta_train, meta_val and meta_test, or train, val and test.
"""

from __future__ import annotations

import posixpath
import re

from bidfmkd_fast.data.readers.images import is_image_name
from bidfmkd_fast.data.readers.left_out import endings
from bidfmkd_fast.data.readers.listing import Listing
from bidfmkd_fast.data.readers.split_list_formats import SPLIT_NAMES, Row
from bidfmkd_fast.data.readers.splits import Split, make_split
from bidfmkd_fast.data.readers.tree import Tree
from bidfmkd_fast.errors import InputError


def read(tree: Tree, split: Split | None) -> Listing:
    """List every image, with its folder as its class.

    A folder that holds all images is no part of a class name; the parts of deeper folders are
    joined by "/". Split folders are taken as the split unless `split` is given.

    Raises:
        InputError: an image lies outside all class folders, or a class in two split folders.
    """
    files = [name for name in tree.names if is_image_name(name)]
    if not files:
        held = f"; it holds {endings(tree.names)}" if tree.names else ""
        raise InputError(
            f"convert_dataset: class_folders: {tree.path} holds no images that can be read{held}"
        )
    top = posixpath.commonpath([posixpath.dirname(file) for file in files])
    parts = [posixpath.relpath(file, top or ".").split("/") for file in files]
    loose = next((file for file, part in zip(files, parts) if len(part) == 1), None)
    if loose is not None and top:
        raise InputError(
            f"convert_dataset: {tree.path} has one class folder, {top!r}; "
            "few-shot tasks need at least two classes"
        )
    if loose is not None:
        wanted = (
            "wanted a folder for each class, or lists of the images and their classes by --split"
        )
        raise InputError(f"convert_dataset: {tree.path}: {loose} lies in no class folder; {wanted}")
    if all(part[0] in SPLIT_NAMES and len(part) > 2 for part in parts):
        classes = ["/".join(part[1:-1]) for part in parts]
        if split is None:
            rows = [Row(SPLIT_NAMES[part[0]], name) for part, name in zip(parts, classes)]
            split = make_split(f"the folders of {tree.path}", rows)
    else:
        classes = ["/".join(part[:-1]) for part in parts]
    return Listing(tree.name, classes, tree, files, split=split, size=size_by_names(classes))


def size_by_names(classes: list[str]) -> int | None:
    """Return the size for classes named by WordNet numbers; None if a class is named otherwise.

    The size is 84, as for miniImageNet and tieredImageNet, which name their classes in this way.
    """
    return 84 if all(re.fullmatch(r"n\d{8}", name) for name in classes) else None
