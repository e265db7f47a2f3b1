"""Number the classes of a task: from the labels of a user to the outputs of a module and back."""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Integral
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bidfmkd_fast.errors import InputError, InputTypeError
from bidfmkd_fast.meta.checks import MOST_CLASSES


class Classes(NamedTuple):
    """The classes of a task.

    Attributes:
        names: the user's labels, sorted and unique: int64 or text `[n_classes]`.
        outputs: the output of the module for each of them, int64 `[n_classes]`.
        as_tensor: whether predictions are an int64 tensor, as the labels were; else an array.
    """

    names: np.ndarray
    outputs: Tensor
    as_tensor: bool

    @property
    def n_outputs(self) -> int:
        """Return how many outputs the module needs."""
        return int(self.outputs.max()) + 1

    def labels_of(self, positions: Tensor) -> Tensor | np.ndarray:
        """Return the user's labels at these positions in `names`, int64 `[N]`."""
        if self.as_tensor:
            return torch.from_numpy(self.names).to(positions.device)[positions]
        return self.names[positions.cpu().numpy()]


def number_classes(operation: str, labels: object) -> tuple[Classes, Tensor]:
    """Return the classes of these labels, and the output of each label, int64 `[N]` on the CPU.

    Labels are strings or integers. An int64 tensor numbered from 0 names the outputs themselves, so
    that label 2 belongs to output 2; the classes of all other labels are numbered in sorted order.

    Raises:
        InputError: there are fewer than 2 or more than 1,000 classes; `InputTypeError` if labels
            are neither all strings nor all integers.
    """
    values = label_values(operation, labels)
    names, positions = np.unique(values, return_inverse=True)
    if not 2 <= len(names) <= MOST_CLASSES:
        came = f"{len(names):,}" + (f", {names[0].item()!r}" if len(names) == 1 else "")
        raise InputError(
            f"{operation}: labels must name 2 to {MOST_CLASSES:,} classes; got {came}; a task "
            "needs pictures of each class that is to be told apart"
        )
    as_tensor = isinstance(labels, Tensor)
    outputs = torch.arange(len(names))
    if as_tensor and names[0] >= 0 and names[-1] < MOST_CLASSES:
        outputs = torch.from_numpy(names)
    return Classes(names, outputs, as_tensor), outputs[torch.from_numpy(positions.reshape(-1))]


def label_values(operation: str, labels: object) -> np.ndarray:
    """Return labels as an array `[N]` of int64 or text.

    Raises:
        InputTypeError: the labels are neither all strings nor all integers.
        InputError: they are not `[N]`, or an integer does not fit into int64.
    """
    wanted = f"{operation}: labels must be strings or integers, one per image"
    if isinstance(labels, Tensor):
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise InputTypeError(
                f"{wanted}, such as an int64 tensor; got a tensor of {labels.dtype}; use .long()"
            )
        if labels.ndim != 1 or len(labels) == 0:
            raise InputError(f"{wanted}, [N] with N >= 1; got {list(labels.shape)}")
        return labels.detach().cpu().numpy().astype(np.int64)
    if isinstance(labels, (str, bytes)) or not isinstance(labels, Iterable):
        raise InputTypeError(f"{wanted}; got {type(labels).__name__}")
    if isinstance(labels, np.ndarray) and labels.ndim != 1:
        raise InputError(f"{wanted}, [N]; got {list(labels.shape)}")
    items: list[Any] = list(labels)
    if not items:
        raise InputError(f"{wanted}; got none")
    if all(isinstance(item, str) for item in items):
        return np.array(items, dtype=np.str_)
    if all(isinstance(item, Integral) and not isinstance(item, bool) for item in items):
        try:
            return np.array([int(item) for item in items], dtype=np.int64)
        except OverflowError:
            raise InputError(f"{wanted}; an integer must fit into 64 bits") from None
    kinds = ", ".join(sorted({type(item).__name__ for item in items})[:4])
    raise InputTypeError(f"{wanted}, all of one kind; got {kinds}")
