"""Pack what a recovery keeps into the records of its journal, and read them back.

The first byte of a record is its kind:

- `S`, the first record: the settings of the recovery as JSON;
- `M`: the measured step length (mu), `<f8`;
- `A`: the answers of one call: `<u4` step, rows, images, classes, and 1 if student scores follow;
  then the student scores, `<f4` `[images, classes]`, if there are any; then the API's scores,
  `<f4` `[rows, images, classes]`.

`record_file` puts length and checksum before each record.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

_SETTINGS, _MU, _ANSWERS = b"S", b"M", b"A"
_MU_FORMAT = struct.Struct("<d")
_ANSWERS_HEAD = struct.Struct("<IIIII")


@dataclass
class Recorded:
    """What the records of a journal hold.

    Attributes:
        settings: the settings of the recovery.
        mu: the measured step length; None if none was measured.
        steps: how many steps were begun.
        queries: how many images the recorded answers are for, without those that measured mu.
        answers: by step, the student's scores `[B, n_classes]` or None, and the API's scores of
            each call, `[rows, B, n_classes]`.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    mu: float | None = None
    steps: int = 0
    queries: int = 0
    answers: dict[int, tuple[Tensor | None, list[Tensor]]] = field(default_factory=dict)


def pack_settings(settings: dict[str, Any]) -> bytes:
    """Return the record of the settings."""
    return _SETTINGS + json.dumps(settings).encode()


def pack_mu(mu: float) -> bytes:
    """Return the record of the measured step length."""
    return _MU + _MU_FORMAT.pack(mu)


def pack_answers(step: int, scores: Tensor, student_scores: Tensor | None) -> bytes:
    """Return the record of the scores `[rows, B, n_classes]` of one call.

    `student_scores` `[B, n_classes]` are those of the student in this step.
    """
    head = _ANSWERS_HEAD.pack(step, *scores.shape, student_scores is not None)
    parts = [scores] if student_scores is None else [student_scores, scores]
    body = b"".join(part.detach().cpu().numpy().astype("<f4").tobytes() for part in parts)
    return _ANSWERS + head + body


def read_records(records: Iterable[bytes], first_step: int) -> Recorded:
    """Read all records.

    The answers of steps before `first_step` are counted, but not kept in memory, since a snapshot
    holds what they led to.

    Raises:
        TypeError, ValueError, struct.error: a record is not of a journal.
    """
    recorded = Recorded(steps=first_step)
    for record in records:
        kind, body = record[:1], record[1:]
        if kind == _SETTINGS:
            recorded.settings = dict(json.loads(body))
        elif kind == _MU:
            (recorded.mu,) = _MU_FORMAT.unpack(body)
        elif kind == _ANSWERS:
            _read_answers(recorded, body, first_step)
        else:
            raise ValueError(f"a record of the unknown kind {kind!r}")
    return recorded


def _read_answers(recorded: Recorded, body: bytes, first_step: int) -> None:
    """Add the answers of one call to `recorded`."""
    step, rows, n_images, n_classes, with_student = _ANSWERS_HEAD.unpack_from(body)
    recorded.steps = max(recorded.steps, step + 1)
    recorded.queries += rows * n_images
    if step < first_step:
        return
    values = torch.from_numpy(np.frombuffer(body[_ANSWERS_HEAD.size :], "<f4").astype(np.float32))
    if len(values) != (rows + bool(with_student)) * n_images * n_classes:
        raise ValueError(f"{len(values)} scores do not fill the shape in their record")
    student_scores = None
    if with_student:
        student_scores = values[: n_images * n_classes].view(n_images, n_classes)
        values = values[n_images * n_classes :]
    _, calls = recorded.answers.setdefault(step, (student_scores, []))
    calls.append(values.view(rows, n_images, n_classes))
