"""Keep the answers of one API to the survey on disk as they come, so that nothing is asked twice.

The file is a `RecordFile`. The first byte of a record is its kind:

- `S`, the first record: the settings of the survey as JSON;
- `A`: the answer of one call: `<u4` number of the first picture, number of pictures, number of
  classes; then the scores, `<f4` `[pictures, classes]`.

Pictures are not kept, since the seed and their numbers give them again.
"""

from __future__ import annotations

import json
import os
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bidfmkd_fast.black_box import APISpec
from bidfmkd_fast.errors import InputError
from bidfmkd_fast.ops.scores import probabilities_of
from bidfmkd_fast.recovery.record_file import RecordFile

_HEAD = struct.Struct("<III")


def count_answers(path: Path) -> int:
    """Count the pictures that are answered in a file, whatever survey it is of; nothing is kept.

    Raises InputError if the file cannot be read.
    """
    pictures: set[int] = set()
    with _naming("cannot read", path):
        for payload in RecordFile(path).read():
            if payload[:1] == b"A" and len(payload) > _HEAD.size:
                first, n, _ = _HEAD.unpack_from(payload, 1)
                pictures.update(range(first, first + n))
    return len(pictures)


class KeptAnswers(NamedTuple):
    """The answers in a file: `numbers` int64 `[n]` of the pictures, and `scores` `[n, n_classes]`.

    `pictures` is the seed of the pictures; the rest is from the spec of the API.
    """

    name: str
    scores_kind: str
    image_shape: tuple[int, int, int]
    pictures: int
    numbers: Tensor
    scores: Tensor


def read_answers(path: Path, most: int) -> KeptAnswers | None:
    """Read the first `most` pictures and answers of a file, for a reader who lacks the API's spec.

    Return None if the file has no answer yet. Nothing is written, since the survey may be under
    way. Raises InputError if the file is damaged or cannot be read.
    """
    settings: dict[str, Any] = {}
    scores: dict[int, Tensor] = {}
    try:
        with _naming("cannot read", path):
            for payload in RecordFile(path).read():
                if payload[:1] == b"S":
                    settings = dict(json.loads(payload[1:]))
                    continue
                first, _, n_classes = _HEAD.unpack_from(payload, 1)
                values = np.frombuffer(payload[1 + _HEAD.size :], "<f4").astype(np.float32)
                rows = torch.from_numpy(values).view(-1, n_classes)
                scores.update(enumerate(rows[:most], first))
        if not scores:
            return None
        numbers = sorted(scores)[:most]
        channels, height, width = map(int, settings["image_shape"])
        return KeptAnswers(
            str(settings["name"]),
            str(settings["scores_kind"]),
            (channels, height, width),
            int(settings["pictures"]),
            torch.tensor(numbers),
            torch.stack([scores[number] for number in numbers]),
        )
    except (RuntimeError, TypeError, ValueError, KeyError, struct.error) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"survey: {path} is damaged, or holds no answers of a survey") from None


def told(asked: KeptAnswers, number: int) -> str:
    """Say which class an API has given to a picture, and with which probability if it told one.

    The text is empty without an answer.
    """
    places = (asked.numbers == number).nonzero()[:, 0].tolist()
    if not places:
        return ""
    scores = asked.scores[places[0]]
    winner = int(scores.argmax())
    if asked.scores_kind == "labels":
        return f"class {winner}"
    kind = "probabilities" if asked.scores_kind == "top_k" else asked.scores_kind
    return f"class {winner}, {100 * float(probabilities_of(scores, kind)[winner]):.0f} %"


class Answers:
    """The scores of one API for the pictures of a survey, as far as they have come.

    Args:
        path: the file that holds them; None to keep them in memory only.
        spec: what is known of the API.
        seed: of the shared pictures.
        n_images: number of pictures of the survey.
        n_first: number of those before any is chosen; all of them without a choice.

    Attributes:
        scores: float32 `[n_images, n_classes]`; rows that are not answered are 0.
        answered: bool `[n_images]`.

    Raises:
        InputError: the file belongs to another survey or another API, is damaged, or cannot be
            read or written.
    """

    def __init__(
        self, path: Path | None, spec: APISpec, seed: int, n_images: int, n_first: int | None = None
    ) -> None:
        self.path, self.spec = path, spec
        self.scores = torch.zeros(n_images, spec.n_classes)
        self.answered = torch.zeros(n_images, dtype=torch.bool)
        self._lock = threading.Lock()
        self._settings = json.loads(
            json.dumps(
                {
                    "pictures": seed,
                    "n_images": n_images,
                    "n_first": n_images if n_first is None else n_first,
                    "image_shape": spec.image_shape,
                    "input_range": spec.input_range,
                    "n_classes": spec.n_classes,
                    "scores_kind": spec.scores_kind,
                    "name": spec.name,
                }
            )
        )
        self._file = None if path is None else RecordFile(path)
        self.read()

    def read(self) -> None:
        """Take the answers that the file holds, of which another process may have written some."""
        if self.path is not None and self.path.exists():
            self._read()

    def close(self) -> None:
        """Close the file; `add` opens it again."""
        if self._file is not None:
            self._file.close()

    def __enter__(self) -> Answers:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def queries(self) -> int:
        """Return the number of pictures that are answered."""
        return int(self.answered.sum())

    def missing(self, most: int, numbers: range) -> list[tuple[int, int]]:
        """Return the pictures of `numbers` without an answer as (first, number), `most` at most.

        Pieces begin at multiples of `most` from the first number on, so that a survey that was cut
        off asks the same pieces as one that was not.
        """
        pieces = []
        for start in range(numbers.start, numbers.stop, most):
            end = min(start + most, numbers.stop)
            open_rows = (~self.answered[start:end]).nonzero()[:, 0].tolist()
            while open_rows:
                n = next(
                    (i for i, row in enumerate(open_rows) if row != open_rows[0] + i),
                    len(open_rows),
                )
                pieces.append((start + open_rows[0], n))
                open_rows = open_rows[n:]
        return pieces

    def add(self, first: int, scores: Tensor) -> None:
        """Keep the scores `[n, n_classes]` of pictures `first`, ..., on disk before in memory.

        Safe under threads.
        """
        scores = scores.detach().cpu().float()
        with self._lock:
            if self._file is not None:
                head = _HEAD.pack(first, *scores.shape)
                body = scores.numpy().astype("<f4").tobytes()
                with _naming("cannot write to", self.path):
                    assert self.path is not None
                    self.path.parent.mkdir(parents=True, exist_ok=True)
                    self._file.append(
                        b"A" + head + body, first=b"S" + json.dumps(self._settings).encode()
                    )
            self._put(first, scores)

    def _put(self, first: int, scores: Tensor) -> None:
        self.scores[first : first + len(scores)] = scores
        self.answered[first : first + len(scores)] = True

    def _read(self) -> None:
        assert self._file is not None
        settings = None
        try:
            with _naming("cannot read", self.path):
                for payload in self._file.read():
                    if payload[:1] == b"S":
                        settings = dict(json.loads(payload[1:]))
                        self._check_settings(settings)
                    else:
                        self._read_answer(payload)
                if not os.access(str(self.path), os.W_OK):
                    raise PermissionError(None, "Permission denied")
        except (RuntimeError, TypeError, ValueError, struct.error) as error:
            if isinstance(error, InputError):
                raise
            settings = None
        if settings is None:
            raise InputError(
                f"survey: {self.path} is damaged, or holds no answers of a survey; remove it to "
                "ask anew"
            )

    def _read_answer(self, payload: bytes) -> None:
        first, n, n_classes = _HEAD.unpack_from(payload, 1)
        values = np.frombuffer(payload[1 + _HEAD.size :], "<f4").astype(np.float32)
        if payload[:1] != b"A" or first + n > len(self.answered):
            raise ValueError(payload[:1])
        self._put(first, torch.from_numpy(values).view(n, n_classes))

    def _check_settings(self, held: dict[str, Any]) -> None:
        held = {"n_first": held.get("n_images"), **held}  # before pictures were chosen
        for key, value in self._settings.items():
            if held.get(key) != value:
                raise InputError(
                    f"survey: {self.path} keeps the answers of another survey ({key} is "
                    f"{held.get(key)!r} there; got {value!r}); use those settings, or give another "
                    "folder"
                )


@contextmanager
def _naming(what: str, path: Path | None) -> Iterator[None]:
    """Turn an OSError inside the block into an InputError that names the file."""
    try:
        yield
    except OSError as error:
        raise InputError(f"survey: {what} {path}: {error.strerror or error}") from error
