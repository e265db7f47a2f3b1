"""Draw tasks from a memory: which image rows a task has, and by how much they are turned.

The draw depends only on how many images each class holds. The images themselves are gathered by
`memory` on the CPU and by `replay_on_device` on the GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from bidfmkd_fast.data.episodes import check_rotations, draw_classes
from bidfmkd_fast.errors import InputError
from bidfmkd_fast.seeds import torch_generator


class TaskSize(NamedTuple):
    """The size of a task: classes, and support and query images per class."""

    n_way: int
    n_shot: int
    n_query: int


class TaskDraw(NamedTuple):
    """The classes of a task and their images.

    Attributes:
        classes: for each label 0, 1, ... the position of its class and the number of quarter turns.
        rows: int64 `[n_way, n_shot + n_query]`: for each label the rows of its images within their
            class, support images first.
    """

    classes: list[tuple[int, int]]
    rows: Tensor


def draw_task(
    counts: Sequence[int], size: TaskSize, *, seed: int, index: int, rotations: int = 1
) -> TaskDraw:
    """Draw task number `index` of the stream `seed` from classes that hold `counts` images each.

    The draw is a pure function of the arguments: n_way different classes, uniformly from all that
    hold at least n_shot + n_query images, and their images uniformly without replacement. With
    `rotations` 2 or 4 each class, turned by 180 or by multiples of 90 degrees, counts as that many
    classes.

    Raises:
        InputError: a size is below 1, or too few classes hold enough images.
    """
    check_rotations("sample_episode", rotations)
    for name, value in size._asdict().items():
        if value < 1:
            raise InputError(f"sample_episode: {name} must be 1 or more; got {value}")
    needed = size.n_shot + size.n_query
    rich = [position for position, count in enumerate(counts) if count >= needed]
    if len(rich) < size.n_way:
        raise InputError(
            f"sample_episode: wanted {size.n_way} classes with n_shot + n_query = {needed} images "
            f"each; {len(rich)} of the {len(counts)} classes held have as many; recover more "
            "images or lower n_query"
        )
    generator = torch_generator(seed, "replay", index)
    chosen = draw_classes(rich, size.n_way, rotations, generator)
    rows = [
        torch.randperm(counts[position], generator=generator)[:needed] for position, _ in chosen
    ]
    return TaskDraw(chosen, torch.stack(rows))
