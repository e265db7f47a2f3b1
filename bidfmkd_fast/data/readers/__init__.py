"""Read the layouts that `convert` understands, and recognise those of publishers."""

from __future__ import annotations

from collections.abc import Callable

from bidfmkd_fast.data.readers import cifar100, class_folders, cub, image_lists, omniglot
from bidfmkd_fast.data.readers.listing import Listing
from bidfmkd_fast.data.readers.splits import Split
from bidfmkd_fast.data.readers.tree import Tree

READERS: dict[str, Callable[[Tree, Split | None], Listing]] = {
    "class_folders": class_folders.read,
    "image_lists": image_lists.read,
    "cifar100": cifar100.read,
    "cub": cub.read,
    "omniglot": omniglot.read,
}
# These layouts are recognised by file names alone. Their classes are split as published, unless the
# caller gives split lists.
PUBLISHED: dict[str, Callable[[Tree], bool]] = {
    "cifar100": cifar100.matches,
    "cub": cub.matches,
    "omniglot": omniglot.matches,
}
