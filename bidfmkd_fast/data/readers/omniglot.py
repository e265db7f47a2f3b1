"""Omniglot as its authors publish it (Lake et al., Science 2015): `images_background` and `images_evaluation`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from PIL import Image

from bidfmkd_fast.data.readers.images import is_image_name
from bidfmkd_fast.data.readers.listing import Listing
from bidfmkd_fast.data.readers.splits import Split, published_split
from bidfmkd_fast.data.readers.tree import Tree, open_tree
from bidfmkd_fast.errors import InputError

_PARTS = ("images_background", "images_evaluation")


def matches(tree: Tree) -> bool:
    """Whether the source holds one of the two folders or zips, or is one of the zips."""
    return any(_find(tree, part) is not None for part in _PARTS)


def read(tree: Tree, split: Split | None) -> Listing:
    """Each drawing as a grey image, wanted in 28 x 28; classes "background/<alphabet>/<character>",
    "evaluation/...".

    28 x 28 by the mean of the area, which keeps strokes of one pixel. The split is that of Vinyals
    et al. (NeurIPS 2016), without rotations, unless `split` is given. Raises `InputError` when one
    of the two parts is missing.
    """
    both = _Both(tree)
    classes = [name.rpartition("/")[0] for name in both.names]
    split = split or published_split("omniglot")
    resample = Image.Resampling.BOX
    return Listing(
        "omniglot", classes, both, both.names, split=split, size=28, resample=resample, mode="L"
    )


def _find(tree: Tree, part: str) -> str | None:
    """Where a part begins: the path of its folder, ending in "/", or of its zip."""
    for name in tree.names:
        before, found, _ = f"/{name}".partition(f"/{part}/")
        if found:
            return f"{before}{found}"[1:]
    return next((name for name in tree.names if f"/{name}".endswith(f"/{part}.zip")), None)


class _Both(Tree):
    """The images of both parts as "background/...", "evaluation/...", wherever each part lies."""

    def __init__(self, tree: Tree) -> None:
        self._files: dict[str, tuple[Tree, str]] = {}
        for part in _PARTS:
            place = _find(tree, part)
            if place is None:
                raise InputError(
                    f"convert_dataset: omniglot: {tree.path} lacks {part} (a folder, or {part}.zip in a folder)"
                )
            its, prefix = (
                (tree, place) if place.endswith("/") else (open_tree(tree.path / place), f"{part}/")
            )
            for name in its.names:
                if name.startswith(prefix) and is_image_name(name):
                    self._files[f"{part.removeprefix('images_')}/{name.removeprefix(prefix)}"] = (
                        its,
                        name,
                    )
        super().__init__(tree.path, self._files)

    def stream(self, names: Iterable[str]) -> Iterator[tuple[str, bytes]]:
        inner: dict[Tree, dict[str, str]] = {}
        for name in names:
            tree, its = self._files[name]
            inner.setdefault(tree, {})[its] = name
        for tree, wanted in inner.items():
            for its, content in tree.stream(wanted):
                yield wanted[its], content
