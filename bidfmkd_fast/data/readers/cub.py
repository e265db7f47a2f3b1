"""Read CUB-200-2011 as published (Wah et al., 2011), by its lists of images, labels and classes."""

from __future__ import annotations

from bidfmkd_fast.data.readers.listing import Listing
from bidfmkd_fast.data.readers.split_list_formats import Row
from bidfmkd_fast.data.readers.splits import Split, make_split
from bidfmkd_fast.data.readers.tree import Tree
from bidfmkd_fast.errors import InputError

_LISTS = ("image_class_labels.txt", "classes.txt", "images.txt")
_TURNS = ("meta_train", "meta_val", "meta_train", "meta_test")


def matches(tree: Tree) -> bool:
    """Return True if one folder of the source holds the three lists."""
    return tree.folder_of(*_LISTS) is not None


def read(tree: Tree, split: Split | None) -> Listing:
    """List every image of `images.txt`, to be read as 84 x 84 RGB.

    Unless `split` is given, the classes are split 100 / 50 / 50 in the order of their names, as in
    Chen et al. (ICLR 2019) and in the lists of BiDf-MKD's authors: the first, third, fifth, ... are
    meta_train; the others are meta_val and meta_test in turn.

    Raises:
        InputError: the lists contradict each other, or an image is missing.
    """
    folder = tree.folder_of(*_LISTS)
    if folder is None:
        raise InputError(
            f"convert_dataset: cub: {tree.path} holds no folder with {', '.join(_LISTS)}"
        )
    where = f"{tree.path}: {folder}"
    labels, names, images = (
        _numbered(content, where + name)
        for name, content in zip(_LISTS, tree.read(*(folder + name for name in _LISTS)))
    )
    there = set(tree.names)
    files, classes = [], []
    for number, image in images.items():
        name = names.get(labels.get(number, ""))
        if name is None:
            raise InputError(
                f"convert_dataset: {where}image_class_labels.txt gives image {number}, {image}, "
                "no class of classes.txt"
            )
        if (file := f"{folder}images/{image}") not in there:
            raise InputError(
                f"convert_dataset: {where}images.txt lists {image}, but there is no {file}"
            )
        files.append(file)
        classes.append(name)
    if split is None:
        rows = [Row(_TURNS[turn % 4], name) for turn, name in enumerate(sorted(names.values()))]
        split = make_split("the published split of cub", rows)
    return Listing("cub", classes, tree, files, split=split, size=84, mode="RGB")


def _numbered(content: bytes, where: str) -> dict[str, str]:
    """Return the values of lines of a number, a space and a value, by number."""
    values: dict[str, str] = {}
    for line, text in enumerate(content.decode("utf-8", "replace").splitlines(), 1):
        number, _, value = text.strip().partition(" ")
        if not value or number in values:
            raise InputError(
                f"convert_dataset: {where}, line {line}: wanted a new number, a space and a value; "
                f"got {text!r}"
            )
        values[number] = value
    return values
