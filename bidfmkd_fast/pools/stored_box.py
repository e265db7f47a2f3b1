"""Serve the classifiers of a large pool from their files, with few of them in memory at once."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from bidfmkd_fast.black_box.local.local_box import LocalBlackBox
from bidfmkd_fast.black_box.local.torch_module import TorchBlackBox

if TYPE_CHECKING:
    from bidfmkd_fast.black_box.budget import Budget
    from bidfmkd_fast.black_box.spec import APISpec

MOST_LOADED = 64  # modules of one pool in memory


class Loaded:
    """The boxes of a pool whose modules are in memory, the last `most` that were asked.

    Safe under threads.
    """

    def __init__(self, most: int) -> None:
        self._most, self._lock = most, threading.Lock()
        self._boxes: OrderedDict[int, TorchBlackBox] = OrderedDict()

    def get(self, key: int, make: Callable[[], TorchBlackBox]) -> TorchBlackBox:
        """Return the box of a key; `make` it if it is not there, in the place of the oldest."""
        with self._lock:
            if (held := self._boxes.get(key)) is not None:
                self._boxes.move_to_end(key)
                return held
        made = make()  # outside of the lock, since it may wait for another thread
        with self._lock:
            self._boxes.setdefault(key, made)
            self._boxes.move_to_end(key)
            while len(self._boxes) > self._most:
                self._boxes.popitem(last=False)
            return self._boxes[key]


class StoredBlackBox(TorchBlackBox):
    """A classifier on the CPU whose module is read when it is asked, and may be dropped after.

    It answers as a `TorchBlackBox` of the same module does, bit for bit.

    Args:
        load: reads the module.
        spec: what is known of the API.
        loaded: the boxes of the pool that are in memory.
        number: of this one among them.
        budget: cap on what it may cost; None for no cap.
    """

    def __init__(
        self,
        load: Callable[[], nn.Module],
        spec: APISpec,
        loaded: Loaded,
        number: int,
        *,
        budget: Budget | None = None,
    ) -> None:
        LocalBlackBox.__init__(self, spec, budget=budget)
        self.device = torch.device("cpu")

        def box() -> TorchBlackBox:
            return loaded.get(number, lambda: TorchBlackBox(load(), spec))

        self._box, self._answer = box, lambda images: box().score(images)

    def __call__(self, images: Tensor) -> Tensor:
        """Return the scores of a batch, as any box does.

        Raises InputError if the module's file is missing or damaged by now; nothing is counted
        then.
        """
        self._box()
        return super().__call__(images)
