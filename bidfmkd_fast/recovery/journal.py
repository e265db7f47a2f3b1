"""Keep the answers of a recovery on disk as they come, so that paid answers outlive the process.

A journal is a folder of two files. `records` (see `journal_records`) is only appended to and holds
every answer of the API. `snapshot` (see `snapshot_file`) is replaced as a whole every few steps and
holds latents, generator, optimiser and the best images so far. A process that continues a journal
starts from the snapshot and makes the steps after it again from the recorded answers. The snapshot
only saves time: the records alone give the same result.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from bidfmkd_fast.black_box import BlackBox
from bidfmkd_fast.errors import InputError
from bidfmkd_fast.recovery.config import RecoveryConfig
from bidfmkd_fast.recovery.journal_records import (
    Recorded,
    pack_answers,
    pack_mu,
    pack_settings,
    read_records,
)
from bidfmkd_fast.recovery.record_file import RecordFile
from bidfmkd_fast.recovery.snapshot_file import Snapshot, read_snapshot, write_snapshot

RECORDS, SNAPSHOT = "records", "snapshot"
# A snapshot is due after this many steps if making them again would take this long.
SNAPSHOT_STEPS, SNAPSHOT_SECONDS = 10, 1.0

# Fields of a spec that do not change what is recovered.
_WITHOUT_EFFECT = ("price_per_1000", "max_batch")


class Journal:
    """The journal of one set in `folder`: what an earlier process left, and what this one adds.

    `recover(..., journal=...)` reads and writes it. The folder is made when there is something to
    keep. Once the set is saved elsewhere, `remove` the journal. Use it in a `with` block, which
    closes the file, and in one thread at a time.

    Attributes:
        mu: the measured step length; None if none was measured.
        steps: how many steps were begun, so how often a student was asked.
        queries: how many images the recorded answers are for, without those that measured mu.
        state: state of the `ImageMaker` after the last step of the snapshot, tensors by name;
            empty without a snapshot.
        best, history: the best images so far and the record of every step, up to the snapshot.

    Raises:
        InputError: the folder holds something else, or cannot be read.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._read()

    def _read(self) -> None:
        """Read what the folder holds, or begin empty."""
        self._records = RecordFile(self._path(RECORDS))
        recorded, snapshot = Recorded(), Snapshot({}, [], [])
        # Checked here and not at the first answer, since that is paid for by then.
        if self.folder.exists() and not (
            self.folder.is_dir() and os.access(self.folder, os.W_OK | os.X_OK)
        ):
            raise InputError(
                f"recover: the journal {self.folder} must be a folder that can be written to; "
                "it is not"
            )
        if self._path(RECORDS).exists():
            snapshot = read_snapshot(self._path(SNAPSHOT))
            recorded = self._read_records(first_step=len(snapshot.history))
        self.mu, self.steps, self.queries = recorded.mu, recorded.steps, recorded.queries
        self.state, self.best, self.history = snapshot
        self._settings, self._answers = recorded.settings, recorded.answers
        self._snapshot_step, self._snapshot_time = len(self.history), time.monotonic()

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *exception: object) -> None:
        self._records.close()

    def begin(self, settings: dict[str, Any]) -> None:
        """Start or continue the recovery with these `settings`, plain values by name.

        Raises:
            InputError: the journal belongs to other settings.
        """
        if self._records.is_open:  # an earlier attempt in this process has added records
            self._records.close()
            self._read()
        settings = json.loads(json.dumps(settings))
        if self._records.end and settings != self._settings:
            held, keys = self._settings, [*settings, *self._settings]
            key = next(key for key in keys if held.get(key) != settings.get(key))
            raise InputError(
                f"recover: {self.folder} keeps the answers of another recovery ({key} is "
                f"{held.get(key)!r} there; got {settings.get(key)!r}); use those settings, or "
                "remove the folder to ask anew"
            )
        self._settings = settings

    def answers(self, step: int, device: torch.device) -> tuple[Tensor | None, list[Tensor]]:
        """Return the recorded answers of a step.

        Returns:
            The student's scores `[B, n_classes]`, or None, and the API's scores of each call,
            `[rows, B, n_classes]`, in the order in which the points are asked.
        """
        student_scores, calls = self._answers.get(step, (None, []))
        return None if student_scores is None else student_scores.to(device), [
            scores.to(device) for scores in calls
        ]

    def add_mu(self, mu: float) -> None:
        """Record the measured step length."""
        self._append(pack_mu(mu))
        self.mu = mu

    def add_answers(self, step: int, scores: Tensor, student_scores: Tensor | None) -> None:
        """Record the scores `[rows, B, n_classes]` of one call.

        `student_scores` `[B, n_classes]` are those of the student in this step.
        """
        self._append(pack_answers(step, scores, student_scores))

    def keep_state(
        self,
        state: Callable[[], dict[str, Tensor]],
        best: list[Tensor],
        history: list[dict[str, float]],
    ) -> None:
        """Replace the snapshot if one is due.

        `state`, `best` and `history` are as the attributes of that name, after the last step.
        """
        now, step = time.monotonic(), len(history)
        if (
            step < self._snapshot_step + SNAPSHOT_STEPS
            or now < self._snapshot_time + SNAPSHOT_SECONDS
        ):
            return
        snapshot = Snapshot(state(), best, history)
        with self._naming_folder("cannot write to"):
            write_snapshot(self._path(SNAPSHOT), snapshot)
        self._snapshot_step, self._snapshot_time = step, time.monotonic()

    def remove(self) -> None:
        """Remove the folder, once the set is saved or no longer wanted."""
        self._records.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _append(self, payload: bytes) -> None:
        """Append a record, and make the folder for the first one."""
        with self._naming_folder("cannot write to"):
            if not self._records.end:
                self.folder.mkdir(parents=True, exist_ok=True)
                # Only the records say which recovery a snapshot belongs to.
                self._path(SNAPSHOT).unlink(missing_ok=True)
            self._records.append(payload, first=pack_settings(self._settings))

    def _read_records(self, first_step: int) -> Recorded:
        """Read all records, but not the answers of steps before `first_step`."""
        recorded = None  # it stays None if another program wrote one of the records
        with self._naming_folder("cannot read"), suppress(TypeError, ValueError, struct.error):
            recorded = read_records(self._records.read(), first_step)
        if recorded is None or not self._records.end:
            raise InputError(
                f"recover: {self._path(RECORDS)} is damaged, or no journal of a recovery; remove "
                f"{self.folder} to ask anew"
            )
        if self._records.cut_off:
            warnings.warn(
                f"recover: the last {self._records.cut_off:,} bytes of {self._path(RECORDS)} were "
                "cut off or are damaged; the answers in them are asked for again",
                stacklevel=3,
            )
        return recorded

    def _path(self, name: str) -> Path:
        return self.folder / name

    @contextmanager
    def _naming_folder(self, what: str) -> Iterator[None]:
        """Turn an OSError inside the block into an InputError that names the folder."""
        try:
            yield
        except OSError as error:
            raise InputError(
                f"recover: {what} the journal {self.folder}: {error.strerror or error}"
            ) from error


def settings_of(
    api: BlackBox,
    n_per_class: int,
    config: RecoveryConfig,
    generator: nn.Module | None,
    seed: int,
    paper_compat: bool,
) -> dict[str, Any]:
    """Return the settings that decide which images a recovery makes.

    The student is not among them, since its scores are recorded step by step.
    """
    settings: dict[str, Any] = {
        "n_per_class": n_per_class,
        "seed": seed,
        "paper_compat": paper_compat,
    }
    settings |= {
        f"spec.{name}": value
        for name, value in vars(api.spec).items()
        if name not in _WITHOUT_EFFECT
    }
    settings |= {f"config.{name}": value for name, value in vars(config).items()}
    if generator is not None:
        shapes = {name: list(tensor.shape) for name, tensor in generator.state_dict().items()}
        settings["generator"] = [type(generator).__qualname__, shapes]
    return settings
