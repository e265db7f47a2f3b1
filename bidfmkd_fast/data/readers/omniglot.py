"""Read Omniglot as published (Lake et al., Science 2015), in its two parts."""

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
    """Return True if the source holds one of the two parts as a folder or zip, or is such a zip."""
    return any(_find(tree, part) is not None for part in _PARTS)


def read(tree: Tree, split: Split | None) -> Listing:
    """List every drawing, to be read as a grey image of 28 x 28.

    Classes are "background/<alphabet>/<character>" and "evaluation/<alphabet>/<character>". A pixel
    becomes the mean of its area, which keeps strokes that are one pixel wide. The split is that of
    Vinyals et al. (NeurIPS 2016), without rotations, unless `split` is given.

    Raises:
        InputError: one of the two parts is missing.
    """
    both = _Both(tree)
    classes = [name.rpartition("/")[0] for name in both.names]
    split = split or published_split("omniglot")
    resample = Image.Resampling.BOX
    return Listing(
        "omniglot", classes, both, both.names, split=split, size=28, resample=resample, mode="L"
    )


def _find(tree: Tree, part: str) -> str | None:
    """Return the path of a part's folder, ending in "/", or of its zip; None without either."""
    for name in tree.names:
        before, found, _ = f"/{name}".partition(f"/{part}/")
        if found:
            return f"{before}{found}"[1:]
    return next((name for name in tree.names if f"/{name}".endswith(f"/{part}.zip")), None)


class _Both(Tree):
    """The images of both parts as "background/..." and "evaluation/...", wherever the parts lie."""

    def __init__(self, tree: Tree) -> None:
        self._files: dict[str, tuple[Tree, str]] = {}
        for part in _PARTS:
            place = _find(tree, part)
            if place is None:
                raise InputError(
                    f"convert_dataset: omniglot: {tree.path} lacks {part} "
                    f"(a folder, or {part}.zip in a folder)"
                )
            if place.endswith("/"):
                source, prefix = tree, place
            else:
                source, prefix = open_tree(tree.path / place), f"{part}/"
            short = part.removeprefix("images_")
            for name in source.names:
                if name.startswith(prefix) and is_image_name(name):
                    self._files[f"{short}/{name.removeprefix(prefix)}"] = (source, name)
        super().__init__(tree.path, self._files)

    def stream(self, names: Iterable[str]) -> Iterator[tuple[str, bytes]]:
        by_source: dict[Tree, dict[str, str]] = {}  # of each source: its own name -> our name
        for name in names:
            source, own_name = self._files[name]
            by_source.setdefault(source, {})[own_name] = name
        for source, wanted in by_source.items():
            for own_name, content in source.stream(wanted):
                yield wanted[own_name], content
