"""A set under way, kept on disk as it is made, so that answers that were paid for outlive the process.

A journal is a folder of two files. `records` is only appended to: every answer of the API as it comes. `snapshot` is
replaced as a whole every few steps: latents, generator, optimiser, the best images so far. Whoever goes on with a
journal starts from the snapshot and makes the steps after it again from the recorded answers. The snapshot saves
time only: the records alone give the same result.

`records` is `MAGIC`, then records of `<u4 length> <u4 crc32> <payload>`. The first byte of a payload is its kind:

- `S`, the first record: the settings of the recovery as JSON;
- `M`: the measured step length, `<f8`;
- `A`: answers of one call: `<u4` step, rows, images, classes, 1 if student scores follow; then these, `<f4` `[images,
  classes]`, where they are; then the scores, `<f4` `[rows, images, classes]`.

Every record is written by one call before the next request is sent; nothing waits for the disk, so that the records
survive the end of the process at any moment, and the last ones may be lost when the machine itself loses power.
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
from io import FileIO
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bidfmkd_fast.black_box import BlackBox
from bidfmkd_fast.errors import InputError
from bidfmkd_fast.recovery.config import RecoveryConfig

MAGIC = b"bidfmkd journal 1\n"
RECORDS, SNAPSHOT = "records", "snapshot"
COLUMNS = ("step", "loss", "best_loss", "matched", "queries")  # of a recovery's history
# A snapshot is due after so many steps, once making them again would take so long.
SNAPSHOT_STEPS, SNAPSHOT_SECONDS = 10, 1.0

_FRAME, _SHAPE = struct.Struct("<II"), struct.Struct("<IIIII")
_NOT_ASKED = (
    "price_per_1000",
    "max_batch",
)  # fields of a spec that change nothing of what is recovered


class Journal:
    """The journal of one set in `folder`: what an earlier process left there, and where this one
    goes on writing.

    `recover(..., journal=...)` reads and writes it. The folder is made when there is something to
    keep. Once the set is saved elsewhere, `remove` it. To be used in a `with` block, which closes
    the file; one thread at a time.

    Attributes:
        mu: the step length that was measured; None if none was.
        steps: how many steps were begun, so how often a student was asked.
        queries: how many images the recorded answers are of, those of a measured step length left
            out.
        state: of what makes the images after the steps of the snapshot, tensors by name; empty
            without a snapshot.
        best, history: the best images so far and the record of every step, up to the snapshot.

    Raises:
        InputError: the folder holds something else, or cannot be read.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._file: FileIO | None = None
        self._read()

    def _read(self) -> None:
        self.mu: float | None = None
        self.steps = self.queries = 0
        self.state: dict[str, Tensor] = {}
        self.best: list[Tensor] = []
        self.history: list[dict[str, float]] = []
        self._settings: dict[str, Any] = {}
        self._answers: dict[int, tuple[Tensor | None, list[Tensor]]] = {}
        self._end = 0  # of the last whole record
        if self._path(RECORDS).exists():
            self._read_snapshot()
            self._read_records(first_step=len(self.history))
        self._snapshot_step, self._snapshot_time = len(self.history), time.monotonic()

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._close()

    def _close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def begin(self, settings: dict[str, Any]) -> None:
        """Go on with the recovery of these `settings`, plain values by name.

        Raises:
            InputError: the journal is of other settings.
        """
        if self._file is not None:  # an attempt before this one wrote to it
            self._close()
            self._read()
        settings = json.loads(json.dumps(settings))
        if self._end and settings != self._settings:
            held, keys = self._settings, [*settings, *self._settings]
            key = next(key for key in keys if held.get(key) != settings.get(key))
            raise InputError(
                f"recover: {self.folder} keeps the answers of another recovery ({key} is {held.get(key)!r} there; got "
                f"{settings.get(key)!r}); go on with those settings, or remove the folder to ask anew"
            )
        self._settings = settings

    def answers(self, step: int, device: torch.device) -> tuple[Tensor | None, list[Tensor]]:
        """What is recorded of a step: the student's scores `[B, n_classes]`, if it had one, and
        those of each call.

        The scores of a call are `[rows, B, n_classes]`, of the points in the order in which they
        are asked.
        """
        student_scores, calls = self._answers.get(step, (None, []))
        return None if student_scores is None else student_scores.to(device), [
            scores.to(device) for scores in calls
        ]

    def add_mu(self, mu: float) -> None:
        """Record the step length that was measured."""
        self._append(b"M" + struct.pack("<d", mu))
        self.mu = mu

    def add_answers(self, step: int, scores: Tensor, student_scores: Tensor | None) -> None:
        """Record the scores `[rows, B, n_classes]` of one call, and those of the student `[B,
        n_classes]`.
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
        """Replace the snapshot by what there is after `history`, if one is due."""
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
        tensors = {
            name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()
        }  # none shared
        with self._telling("cannot write to"):
            save_file(
                tensors, self._path(f"{SNAPSHOT}.partial"), metadata={"crc32": _checksum(tensors)}
            )
            os.replace(self._path(f"{SNAPSHOT}.partial"), self._path(SNAPSHOT))
        self._snapshot_step, self._snapshot_time = step, time.monotonic()

    def remove(self) -> None:
        """Remove the folder: the set is saved, or not wanted any more."""
        self._close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _append(self, payload: bytes) -> None:
        with self._telling("cannot write to"):
            if self._file is None:
                self._file = self._open()
            record = memoryview(_FRAME.pack(len(payload), zlib.crc32(payload)) + payload)
            while record:
                record = record[self._file.write(record) :]

    def _open(self) -> FileIO:
        if not self._end:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._path(SNAPSHOT).unlink(
                missing_ok=True
            )  # without records it is of an unknown recovery
            payload = b"S" + json.dumps(self._settings).encode()
            partial = self._path(f"{RECORDS}.partial")
            partial.write_bytes(MAGIC + _FRAME.pack(len(payload), zlib.crc32(payload)) + payload)
            self._end = partial.stat().st_size
            os.replace(partial, self._path(RECORDS))
        os.truncate(self._path(RECORDS), self._end)  # what is behind was cut off
        return FileIO(self._path(RECORDS), "ab")

    def _read_records(self, first_step: int) -> None:
        """Read all records; the answers of steps before `first_step` are not kept in memory."""
        with self._telling("cannot read"):
            data = self._path(RECORDS).read_bytes()
        self.steps = first_step
        for payload, self._end in _whole_records(data):
            kind, body = payload[:1], payload[1:]
            if kind == b"S":
                self._settings = json.loads(body)
            elif kind == b"M":
                (self.mu,) = struct.unpack("<d", body)
            else:
                self._read_answers(body, first_step)
        if not self._end:
            raise InputError(
                f"recover: {self._path(RECORDS)} is damaged, or no journal of a recovery; remove {self.folder} to ask "
                "anew"
            )
        if len(data) > self._end:
            warnings.warn(
                f"recover: the last {len(data) - self._end:,} bytes of {self._path(RECORDS)} were cut off or are "
                "damaged; what they held is asked for again",
                stacklevel=3,
            )

    def _read_answers(self, body: bytes, first_step: int) -> None:
        step, rows, n_images, n_classes, with_student = _SHAPE.unpack_from(body)
        self.steps = max(self.steps, step + 1)
        self.queries += rows * n_images
        if step < first_step:
            return
        values = torch.from_numpy(np.frombuffer(body, "<f4", offset=_SHAPE.size).astype(np.float32))
        student_scores = None
        if with_student:
            student_scores = values[: n_images * n_classes].view(n_images, n_classes)
            values = values[n_images * n_classes :]
        _, calls = self._answers.setdefault(step, (student_scores, []))
        calls.append(values.view(rows, n_images, n_classes))

    def _read_snapshot(self) -> None:
        """Read the snapshot; one that is missing or damaged is passed over, since the records give
        the same.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self._path(SNAPSHOT), framework="pt") as opened:
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
                checksum = (opened.metadata() or {}).get("crc32")
        except (OSError, SafetensorError):
            return
        if checksum != _checksum(tensors):
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
    def _telling(self, what: str) -> Iterator[None]:
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
    """List what decides which images a recovery makes, but for the student: its scores are
    recorded step by step.
    """
    settings: dict[str, Any] = {
        "n_per_class": n_per_class,
        "seed": seed,
        "paper_compat": paper_compat,
    }
    settings |= {
        f"spec.{name}": value for name, value in vars(api.spec).items() if name not in _NOT_ASKED
    }
    settings |= {f"config.{name}": value for name, value in vars(config).items()}
    if generator is not None:
        shapes = {name: list(tensor.shape) for name, tensor in generator.state_dict().items()}
        settings["generator"] = [type(generator).__qualname__, shapes]
    return settings


def _whole_records(data: bytes) -> Iterator[tuple[bytes, int]]:
    """Payload and end of every record, up to the first that is not whole."""
    if not data.startswith(MAGIC):
        return
    at = len(MAGIC)
    while at + _FRAME.size <= len(data):
        length, checksum = _FRAME.unpack_from(data, at)
        at += _FRAME.size
        payload = data[at : at + length]
        at += length
        if len(payload) < length or zlib.crc32(payload) != checksum:
            return
        yield payload, at


def _checksum(tensors: dict[str, Tensor]) -> str:
    total = 0
    for name in sorted(tensors):
        total = zlib.crc32(tensors[name].numpy().tobytes(), zlib.crc32(name.encode(), total))
    return f"{total:08x}"
