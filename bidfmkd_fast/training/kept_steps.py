"""Keep the training of one model in checkpoints, for methods of comparison that are no runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from torch import nn

from bidfmkd_fast.files.checkpoints import Checkpoints
from bidfmkd_fast.runtime.progress import Bar
from bidfmkd_fast.runtime.signals import held_back
from bidfmkd_fast.runtime.training_state import Trained, restore_tensors, tensors_of
from bidfmkd_fast.training.run_folder import CHECKPOINTS
from bidfmkd_fast.training.step_records import STEPS, StepRecords


class KeptSteps:
    """The steps of one model, from where a process that was cut off has left them.

    Use it in a `with` block around the steps: if that is left early, a checkpoint is written.

    Args:
        folder: the folder of the method; None to keep nothing.
        module: the model, which is brought to the newest checkpoint.
        optimizer: its optimiser, likewise.
        records: the records of the steps, likewise.

    Attributes:
        done: the steps taken.
    """

    def __init__(
        self,
        folder: Path | None,
        module: nn.Module,
        optimizer: torch.optim.Optimizer,
        records: StepRecords,
    ) -> None:
        self.done = 0
        self._trained: Trained = {"module": module, "optimizer": optimizer}
        self._records, self._consistent = records, True
        self._checkpoints = Checkpoints(None if folder is None else folder / CHECKPOINTS)
        if found := self._checkpoints.newest():
            restore_tensors(self._trained, found.tensors)
            self.done = found.state["steps"]
            records.restore(found.state["records"])

    def __enter__(self) -> KeptSteps:
        return self

    def __exit__(self, kind: object, *error: object) -> None:
        if kind is not None and self._consistent:
            with suppress(Exception):  # what ended the steps is raised
                self._write()

    def train(
        self,
        n_steps: int,
        bar: Bar,
        step: Callable[[int], Mapping[str, float] | None],
        read: Callable[[], Sequence[Mapping[str, float]]] | None = None,
    ) -> None:
        """Take the steps up to number `n_steps`, record their metrics and show them on `bar`.

        Args:
            n_steps: how many there are.
            bar: the progress bar of all steps.
            step: takes the step of a number, and returns its `loss` and `accuracy`.
            read: returns the metrics of the steps since its last call, if the device holds them and
                `step` returns None; `STEPS` of them are then read together.
        """
        bar.skip(self.done)
        at_once = 1 if read is None else STEPS
        for first in range(self.done, n_steps, at_once):
            numbers = range(first, min(first + at_once, n_steps))
            with self.steps(len(numbers)):
                metrics = [step(number) for number in numbers]
                self._records.add([m for m in metrics if m] if read is None else read())
            bar.advance(len(numbers))
        self._records.write()

    @contextmanager
    def steps(self, n_steps: int) -> Iterator[None]:
        """Let no signal interrupt the block of `n_steps` steps; write a checkpoint if it is due."""
        with held_back():
            self._consistent = False
            yield
            self.done += n_steps
            self._consistent = True
        if self._checkpoints.due:
            self._write()

    def _write(self) -> None:
        state = {"steps": self.done, "records": self._records.state()}
        self._checkpoints.write(tensors_of(self._trained), state)
