"""Keep the training of one model in checkpoints, for methods of comparison that are no runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

import torch
from torch import nn

from bidfmkd_fast.files.checkpoints import Checkpoints
from bidfmkd_fast.runtime.signals import held_back
from bidfmkd_fast.runtime.training_state import Trained, restore_tensors, tensors_of
from bidfmkd_fast.training.run_folder import CHECKPOINTS
from bidfmkd_fast.training.step_records import StepRecords


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

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is not None and self._consistent:
            with suppress(Exception):  # what ended the steps is raised
                self._write()

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
