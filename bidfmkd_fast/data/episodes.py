"""Draw few-shot episodes from a data set of real images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bidfmkd_fast.arguments import check_integer
from bidfmkd_fast.data.dataset import Dataset
from bidfmkd_fast.errors import InputError
from bidfmkd_fast.seeds import torch_generator


@dataclass(frozen=True, eq=False, repr=False)
class Episode:
    """One few-shot task; images are float32 in [0, 1], labels are 0..n_way-1 and sorted.

    `support_images` is `[n_way * n_shot, C, H, W]`, `support_labels` int64 `[n_way * n_shot]`;
    `query_images` and `query_labels` are the same with n_query. `classes` has the data set's index
    of the class behind each label. If the class was turned k times by 90 degrees, k times the
    number of all classes is added to the index.
    """

    support_images: Tensor
    support_labels: Tensor
    query_images: Tensor
    query_labels: Tensor
    classes: tuple[int, ...]

    def __repr__(self) -> str:
        shape = "x".join(map(str, self.support_images.shape[1:]))
        sizes = (
            f"{len(self.support_images)} support and {len(self.query_images)} query images {shape}"
        )
        return f"Episode({len(self.classes)}-way: {sizes})"


class EpisodeSampler:
    """Draws episodes of `n_way` classes of one split.

    Each class has `n_shot` support and `n_query` query images. With `rotations` 2, a class turned
    by 180 degrees is a further class; with 4, so is a class turned by 90, 180 or 270 degrees.

    >>> from bidfmkd_fast import load_dataset
    >>> sampler = EpisodeSampler(load_dataset("glyphs"), "meta_test", 5, 1, n_query=15, seed=0)
    >>> sampler.episode(0)  # always the same episode
    Episode(5-way: 5 support and 75 query images 1x28x28)

    Raises:
        InputError: a number is below 1, the split has too few classes, or a class has too few
            images. The constructor finds this, before an episode is drawn.
    """

    def __init__(
        self,
        dataset: Dataset,
        split: str,
        n_way: int,
        n_shot: int,
        n_query: int,
        seed: int,
        rotations: int = 1,
    ) -> None:
        check_rotations("EpisodeSampler", rotations)
        for name, value in (("n_way", n_way), ("n_shot", n_shot), ("n_query", n_query)):
            check_integer("EpisodeSampler", name, value, 1)
        self._classes = dataset.classes(split)
        if n_way > len(self._classes):
            held = f"{split} of data set {dataset.name!r} has {len(self._classes)} classes"
            raise InputError(f"EpisodeSampler: {held}; n_way={n_way} needs more")
        for index in self._classes:
            count = len(dataset.rows_of(index))
            if count < n_shot + n_query:
                name = dataset.class_names[index]
                held = f"class {name!r} of data set {dataset.name!r} has {count} images"
                raise InputError(
                    f"EpisodeSampler: {held}; n_shot + n_query = {n_shot} + {n_query} needs more"
                )
        self.dataset, self.split, self.seed = dataset, split, seed
        self.n_way, self.n_shot, self.n_query, self.rotations = n_way, n_shot, n_query, rotations

    def __repr__(self) -> str:
        return (
            f"EpisodeSampler({self.split} of {self.dataset.name!r}: {self.n_way}-way "
            f"{self.n_shot}-shot, {self.n_query} query images per class, seed {self.seed})"
        )

    def episode(self, index: int) -> Episode:
        """Return episode number `index`, which depends only on `index` and on this sampler."""
        generator = torch_generator(self.seed, "episode", self.split, index)
        chosen = draw_classes(self._classes, self.n_way, self.rotations, generator)
        support, query = [], []
        for class_index, turns in chosen:
            rows = self.dataset.rows_of(class_index)
            rows = rows[
                torch.randperm(len(rows), generator=generator)[: self.n_shot + self.n_query]
            ]
            images = turned(self.dataset.take(rows), turns)
            support.append(images[: self.n_shot])
            query.append(images[self.n_shot :])
        n_classes = len(self.dataset.class_names)
        return episode_of(
            support, query, tuple(index + turns * n_classes for index, turns in chosen)
        )


def check_rotations(operation: str, rotations: int) -> None:
    """Raise InputError unless `rotations` is 1, 2 or 4."""
    if rotations not in (1, 2, 4):
        raise InputError(
            f"{operation}: rotations must be 1 (none), 2 (by 180 degrees) or 4 (by 90); "
            f"got {rotations!r}"
        )


def draw_classes(
    classes: Sequence[int], n_way: int, rotations: int, generator: torch.Generator
) -> list[tuple[int, int]]:
    """Draw `n_way` different pairs uniformly: a class of `classes`, and how many quarter turns."""
    drawn = torch.randperm(len(classes) * rotations, generator=generator)[:n_way].tolist()
    return [(classes[n // rotations], n % rotations * (4 // rotations)) for n in drawn]


def turned(images: Tensor, turns: int) -> Tensor:
    """Return `images` `[..., H, W]`, each turned `turns` times by 90 degrees."""
    return torch.rot90(images, turns, (-2, -1)) if turns else images


def episode_of(
    support: Sequence[Tensor], query: Sequence[Tensor], classes: tuple[int, ...]
) -> Episode:
    """Return the episode with these support and query images of each class."""
    labels = torch.arange(len(classes))
    return Episode(
        support_images=torch.cat(list(support)),
        support_labels=labels.repeat_interleave(len(support[0])),
        query_images=torch.cat(list(query)),
        query_labels=labels.repeat_interleave(len(query[0])),
        classes=classes,
    )
