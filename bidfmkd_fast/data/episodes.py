"""Few-shot episodes of real images."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from bidfmkd_fast.data.dataset import Dataset
from bidfmkd_fast.errors import InputError
from bidfmkd_fast.seeds import torch_generator


@dataclass(frozen=True, eq=False)
class Episode:
    """One few-shot task; images float32 in [0, 1], labels 0..n_way-1 and sorted.

    `support_images` `[n_way * n_shot, C, H, W]`, `support_labels` int64 `[n_way * n_shot]`, `query_images` and
    `query_labels` the same with n_query; `classes` are the data set's indices behind labels 0, 1, ...
    """

    support_images: Tensor
    support_labels: Tensor
    query_images: Tensor
    query_labels: Tensor
    classes: tuple[int, ...]


class EpisodeSampler:
    """Draws episodes of `n_way` classes of one split, with `n_shot` support and `n_query` query images per class.

    Raises `InputError` at once when a number is below 1, the split has too few classes, or a class too few images.
    """

    def __init__(self, dataset: Dataset, split: str, n_way: int, n_shot: int, n_query: int, seed: int) -> None:
        for name, value in (("n_way", n_way), ("n_shot", n_shot), ("n_query", n_query)):
            if value < 1:
                raise InputError(f"EpisodeSampler: {name} must be at least 1; got {value}")
        self._classes = dataset.classes(split)
        if n_way > len(self._classes):
            held = f"{split} of data set {dataset.name!r} has {len(self._classes)} classes"
            raise InputError(f"EpisodeSampler: {held}; n_way={n_way} needs more")
        for index in self._classes:
            count = len(dataset.rows_of(index))
            if count < n_shot + n_query:
                held = f"class {dataset.class_names[index]!r} of data set {dataset.name!r} has {count} images"
                raise InputError(f"EpisodeSampler: {held}; n_shot + n_query = {n_shot} + {n_query} needs more")
        self.dataset, self.split, self.seed = dataset, split, seed
        self.n_way, self.n_shot, self.n_query = n_way, n_shot, n_query

    def episode(self, index: int) -> Episode:
        """Episode number `index`: a pure function of the seed and the index (given data set, split and sizes)."""
        generator = torch_generator(self.seed, "episode", self.split, index)
        chosen = torch.randperm(len(self._classes), generator=generator)[: self.n_way]
        classes = tuple(self._classes[i] for i in chosen.tolist())
        support_rows, query_rows = [], []
        for class_index in classes:
            rows = self.dataset.rows_of(class_index)
            rows = rows[torch.randperm(len(rows), generator=generator)[: self.n_shot + self.n_query]]
            support_rows.append(rows[: self.n_shot])
            query_rows.append(rows[self.n_shot :])
        labels = torch.arange(self.n_way)
        return Episode(
            support_images=self.dataset.take(torch.cat(support_rows)),
            support_labels=labels.repeat_interleave(self.n_shot),
            query_images=self.dataset.take(torch.cat(query_rows)),
            query_labels=labels.repeat_interleave(self.n_query),
            classes=classes,
        )
