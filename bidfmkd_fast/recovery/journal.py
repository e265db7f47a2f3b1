"""Keep the answers of a recovery on disk as they come, so that paid answers outlive the process.

A journal is a folder of two files. `records` (see `record_file`) is only appended to and holds
every answer of the API. `snapshot` is replaced as a whole every few steps and holds latents,
generator, optimiser and the best images so far. A process that continues a journal starts from the
snapshot and makes the steps after it again from the recorded answers. The snapshot only saves time:
the records alone give the same result.

The first byte of a record is its kind:

- `S`, the first record: the settings of the recovery as JSON;
- `M`: the measured step length (mu), `<f8`;
- `A`: the answers of one call: `<u4` step, rows, images, classes, and 1 if student scores follow;
  then the student scores, `<f4` `[images, classes]`, if there are any; then the API's scores,
  `<f4` `[rows, images, classes]`.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import time
import warnings
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bidfmkd_fast.black_box import BlackBox
from bidfmkd_fast.errors import InputError
from bidfmkd_fast.recovery.config import RecoveryConfig
from bidfmkd_fast.recovery.record_file import RecordFile

RECORDS, SNAPSHOT = "records", "snapshot"
COLUMNS = ("step", "loss", "best_loss", "matched", "queries")  # of a recovery's history
# A snapshot is due after this many steps if making them again would take this long.
SNAPSHOT_STEPS, SNAPSHOT_SECONDS = 10, 1.0

_SHAPE = struct.Struct("<IIIII")
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
        self.mu: float | None = None
        self.steps = self.queries = 0
        self.state: dict[str, Tensor] = {}
        self.best: list[Tensor] = []
        self.history: list[dict[str, float]] = []
        self._settings: dict[str, Any] = {}
        self._answers: dict[int, tuple[Tensor | None, list[Tensor]]] = {}
        # Noticed here and not at the first answer, which is paid for by then.
        if self.folder.exists() and not (
            self.folder.is_dir() and os.access(self.folder, os.W_OK | os.X_OK)
        ):
            raise InputError(
                f"recover: the journal {self.folder} must be a folder that can be written to; "
                "it is not"
            )
        if self._path(RECORDS).exists():
            self._read_snapshot()
            self._read_records(first_step=len(self.history))
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
        if self._records.is_open:  # an earlier attempt of this process has added to it
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
        self._append(b"M" + struct.pack("<d", mu))
        self.mu = mu

    def add_answers(self, step: int, scores: Tensor, student_scores: Tensor | None) -> None:
        """Record the scores `[rows, B, n_classes]` of one call.

        `student_scores` `[B, n_classes]` are those of the student in this step.
        """
        head = _SHAPE.pack(step, *scores.shape, student_scores is not None)
        parts = [scores] if student_scores is None else [student_scores, scores]
        body = b"".join(part.detach().cpu().numpy().astype("<f4").tobytes() for part in parts)
        self._append(b"A" + head + body)

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
        from safetensors.torch import save_file

        rows = torch.tensor(
            [[record[name] for name in COLUMNS] for record in history], dtype=torch.float64
        )
        tensors = {
            **state(),
            **{f"best.{number}": tensor for number, tensor in enumerate(best)},
            "history": rows,
        }
        # Clones, since safetensors refuses tensors that share memory.
        tensors = {
            name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()
        }
        with self._naming_folder("cannot write to"):
            save_file(
                tensors, self._path(f"{SNAPSHOT}.partial"), metadata={"crc32": _checksum(tensors)}
            )
            os.replace(self._path(f"{SNAPSHOT}.partial"), self._path(SNAPSHOT))
        self._snapshot_step, self._snapshot_time = step, time.monotonic()

    def remove(self) -> None:
        """Remove the folder, once the set is saved or no longer wanted."""
        self._records.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _append(self, payload: bytes) -> None:
        with self._naming_folder("cannot write to"):
            if not self._records.end:
                self.folder.mkdir(parents=True, exist_ok=True)
                # Without records nobody knows which recovery a snapshot is of.
                self._path(SNAPSHOT).unlink(missing_ok=True)
            self._records.append(payload, first=b"S" + json.dumps(self._settings).encode())

    def _read_records(self, first_step: int) -> None:
        """Read all records; the answers of steps before `first_step` are not kept in memory."""
        self.steps = first_step
        foreign = False  # whole records, but not of this package
        with self._naming_folder("cannot read"):
            try:
                for payload in self._records.read():
                    self._read_record(payload[:1], payload[1:], first_step)
            except (TypeError, ValueError, struct.error):
                foreign = True
        if foreign or not self._records.end:
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

    def _read_record(self, kind: bytes, body: bytes, first_step: int) -> None:
        if kind == b"S":
            self._settings = dict(json.loads(body))
        elif kind == b"M":
            (self.mu,) = struct.unpack("<d", body)
        elif kind == b"A":
            self._read_answers(body, first_step)
        else:
            raise ValueError(kind)

    def _read_answers(self, body: bytes, first_step: int) -> None:
        step, rows, n_images, n_classes, with_student = _SHAPE.unpack_from(body)
        self.steps = max(self.steps, step + 1)
        self.queries += rows * n_images
        if step < first_step:
            return
        values = torch.from_numpy(np.frombuffer(body[_SHAPE.size :], "<f4").astype(np.float32))
        if len(values) != (rows + bool(with_student)) * n_images * n_classes:
            raise ValueError(f"{len(values)} scores")
        student_scores = None
        if with_student:
            student_scores = values[: n_images * n_classes].view(n_images, n_classes)
            values = values[n_images * n_classes :]
        _, calls = self._answers.setdefault(step, (student_scores, []))
        calls.append(values.view(rows, n_images, n_classes))

    def _read_snapshot(self) -> None:
        """Read the snapshot; ignore a missing or damaged one, since the records give the same."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self._path(SNAPSHOT), framework="pt") as opened:
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
                checksum = (opened.metadata() or {}).get("crc32")
        except (OSError, SafetensorError):
            return
        if checksum != _checksum(tensors) or "history" not in tensors:
            return
        self.history = [
            dict(zip(COLUMNS, row, strict=True)) for row in tensors.pop("history").tolist()
        ]
        for record in self.history:
            record |= {"step": int(record["step"]), "queries": int(record["queries"])}
        names = sorted(name for name in tensors if name.startswith("best."))
        self.best, self.state = [tensors.pop(name) for name in names], tensors

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


def _checksum(tensors: dict[str, Tensor]) -> str:
    total = 0
    for name in sorted(tensors):
        total = zlib.crc32(tensors[name].numpy().tobytes(), zlib.crc32(name.encode(), total))
    return f"{total:08x}"
