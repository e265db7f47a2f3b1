"""Read images that lie anywhere, by lists that give the class of each.

The lists are CSV with `filename,label` (Ravi and Larochelle's miniImageNet, and the lists of
BiDf-MKD's authors), or JSON with `image_names`, `image_labels` and `label_names` (Chen et al., "A
Closer Look at Few-shot Classification", ICLR 2019).
"""

from __future__ import annotations

from itertools import takewhile

from bidfmkd_fast.data.readers.class_folders import size_by_names
from bidfmkd_fast.data.readers.images import is_image_name
from bidfmkd_fast.data.readers.listing import Listing
from bidfmkd_fast.data.readers.splits import Split
from bidfmkd_fast.data.readers.tree import Tree
from bidfmkd_fast.errors import InputError


def read(tree: Tree, split: Split | None) -> Listing:
    """List every image that the lists name; the others are left out.

    Raises:
        InputError: there are no lists of images, or a listed image is missing or listed twice.
    """
    if split is None or split.images is None:
        came = "there are none" if split is None else f"{split.where} lists classes only"
        raise InputError(
            f"convert_dataset: image_lists: {tree.path}: wanted lists of image files, "
            f"here or by --split; {came}"
        )
    by_file: dict[str, list[tuple[str, ...]]] = {}
    for name in filter(is_image_name, tree.names):
        parts = tuple(name.split("/"))
        by_file.setdefault(parts[-1], []).append(parts)
    files: dict[str, None] = {}
    for listed, _ in split.images:
        file = _find(listed, by_file, split.where, tree)
        if file in files:
            raise InputError(f"convert_dataset: {split.where} lists the image {file} twice")
        files[file] = None
    classes = [name for _, name in split.images]
    return Listing(tree.name, classes, tree, list(files), split=split, size=size_by_names(classes))


def _find(listed: str, by_file: dict[str, list[tuple[str, ...]]], where: str, tree: Tree) -> str:
    """Return the file whose path shares the longest end with the path `listed`.

    If both paths have a folder, the shared end must include it. Paths cannot be compared whole,
    because published lists hold paths of their authors' machines, and those of miniImageNet hold
    bare file names.
    """
    wanted = [part for part in listed.replace("\\", "/").split("/") if part not in ("", ".")]
    candidates = {
        parts: _common_end(parts, wanted) for parts in by_file.get(wanted[-1] if wanted else "", [])
    }
    best = max(candidates.values(), default=0)
    enough = {parts for parts in candidates if best >= min(2, len(wanted), len(parts))}
    found = [parts for parts, common in candidates.items() if common == best and parts in enough]
    if not found:
        raise InputError(
            f"convert_dataset: {where} lists the image {listed!r}, which {tree.path} lacks"
        )
    if len(found) > 1:
        both = " and ".join("/".join(parts) for parts in found[:2])
        raise InputError(
            f"convert_dataset: {where} lists the image {listed!r}, which may be {both}"
        )
    return "/".join(found[0])


def _common_end(a: tuple[str, ...], b: list[str]) -> int:
    """Return how many parts two paths share at their ends."""
    return len(list(takewhile(lambda pair: pair[0] == pair[1], zip(reversed(a), reversed(b)))))
