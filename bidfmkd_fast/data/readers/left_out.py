"""Say what a conversion passes over, so that nothing of a source vanishes unseen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import PurePosixPath

from bidfmkd_fast.data.readers.images import HEIF_SUFFIXES, is_image_name
from bidfmkd_fast.data.readers.splits import is_split_list
from bidfmkd_fast.data.readers.tree import Tree

_MOST_NAMED = 5


def left_out_lines(tree: Tree, files: Collection[str]) -> tuple[str, ...]:
    """Return a line for each kind of thing in `tree` that is not among `files`, the images read."""
    read = set(files)
    rest = [name for name in tree.names if name not in read and not is_split_list(name)]
    unread = [name for name in rest if not is_image_name(name)]
    with_images = {str(folder) for name in read for folder in PurePosixPath(name).parents}
    without: dict[str, list[str]] = {}
    for name in unread:
        if (folder := str(PurePosixPath(name).parent)) not in with_images:
            without.setdefault(folder, []).append(name)
    bare = [f"{folder} ({endings(names)})" for folder, names in without.items()]
    unlisted = [name for name in rest if is_image_name(name)]
    kinds = (
        (len(bare), "folders without an image that can be read", _some(bare)),
        (len(unread), "files that are no image of a kind that is read", endings(unread)),
        (len(unlisted), "images that are in no list", _some(unlisted)),
        (len(tree.hidden), "hidden files or files of a system", _some(tree.hidden)),
    )
    return tuple(f"{count:,} {what}: {which}" for count, what, which in kinds if count)


def endings(names: Sequence[str]) -> str:
    """Count the endings of these files, and say what would read them: "9 .heic (...), 2 .txt"."""
    counts = Counter(PurePosixPath(name).suffix.lower() or "without ending" for name in names)
    hint = " (`pip install pillow-heif` reads them)"
    return _some(
        [f"{n:,} {end}{hint if end in HEIF_SUFFIXES else ''}" for end, n in counts.most_common()]
    )


def _some(texts: Sequence[str]) -> str:
    more = f" and {len(texts) - _MOST_NAMED:,} more" if len(texts) > _MOST_NAMED else ""
    return ", ".join(texts[:_MOST_NAMED]) + more
