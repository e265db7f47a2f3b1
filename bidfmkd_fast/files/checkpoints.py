"""Keep checkpoints of long work in a folder: each whole or not at all, and the two newest of them.

A checkpoint is a folder with a number for its name. `tensors.safetensors` holds tensors and
`state.json` plain values; the former names the checksum of the latter. The folder is written under
another name, flushed to the disk and then renamed, so that a process or machine that dies meanwhile
leaves the checkpoints before it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from bidfmkd_fast.errors import InputError
from bidfmkd_fast.files.atomic import PARTIAL, cannot_write, make_folder, write_exact
from bidfmkd_fast.files.tensors import read_tensors, write_tensors

SECONDS = 30.0  # between two checkpoints, hence the most work that a kill can cost
_FORMAT = 1
_KEPT = 2
_TENSORS, _STATE = "tensors.safetensors", "state.json"


class Checkpoint(NamedTuple):
    """What work needs to go on: tensors by name, and plain values."""

    tensors: dict[str, Tensor]
    state: dict[str, Any]


class Checkpoints:
    """The checkpoints of one piece of work.

    Args:
        folder: where they are; it is made with the first. None to keep none.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self._last = time.monotonic()

    @property
    def due(self) -> bool:
        """Return True if `SECONDS` have passed since the last checkpoint, or since the start."""
        return self.folder is not None and time.monotonic() - self._last >= SECONDS

    def write(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Write a checkpoint, then remove all but the two newest. Nothing happens without a folder.

        Raises:
            InputError: it cannot be written, as on a full disk; the earlier ones stay.
        """
        if self.folder is None:
            return
        held = self._numbered()
        path = self.folder / f"{held[-1][0] + 1 if held else 1:06d}"
        partial = path.with_name(path.name + PARTIAL)
        shutil.rmtree(partial, ignore_errors=True)
        text = json.dumps({"format": _FORMAT, **state}, indent=1) + "\n"
        try:
            make_folder(partial)
            write_exact(partial / _STATE, text)
            write_tensors(partial / _TENSORS, tensors, {_STATE: _digest(text)})
            _flush(partial)
            os.rename(partial, path)
            _flush(self.folder)
        except OSError as error:
            raise cannot_write(path, error) from None
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        for _, older in held[: len(held) + 1 - _KEPT]:
            shutil.rmtree(older, ignore_errors=True)
        self._last = time.monotonic()

    def newest(self) -> Checkpoint | None:
        """Read the newest checkpoint that is whole; None if there is none.

        Raises:
            InputError: a newer version of this package wrote it.

        Warns:
            UserWarning: a checkpoint is damaged; it is removed, and the one before it taken.
        """
        for _, path in reversed(self._numbered()):
            try:
                checkpoint = _read(path)
            except InputError as error:
                warnings.warn(
                    f"checkpoint {path} is damaged ({error}) and removed; going on from the one "
                    "before it, or from the start if there is none",
                    stacklevel=2,
                )
                shutil.rmtree(path, ignore_errors=True)  # else it would count as the newest
                continue
            written = checkpoint.state.pop("format")
            if written != _FORMAT:
                raise InputError(
                    f"checkpoint {path} has format {written}, and this version reads format "
                    f"{_FORMAT}; continue with the version that wrote it, or remove {self.folder} "
                    "to train from the start"
                )
            return checkpoint
        return None

    def remove(self) -> None:
        """Remove all checkpoints, once the work is finished."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _numbered(self) -> list[tuple[int, Path]]:
        """Return the checkpoints with their numbers, the newest last."""
        if self.folder is None or not self.folder.is_dir():
            return []
        held = [(int(path.name), path) for path in self.folder.iterdir() if path.name.isdecimal()]
        return sorted(held)


def _read(path: Path) -> Checkpoint:
    """Read a checkpoint. Raises InputError if it is damaged."""
    tensors, about = read_tensors(path / _TENSORS)
    try:
        text = (path / _STATE).read_bytes().decode()
    except (OSError, ValueError) as error:
        raise InputError(f"{path / _STATE} is not readable: {error}") from None
    if about.get(_STATE) != _digest(text):
        raise InputError(f"{path / _STATE} does not match its checksum")
    return Checkpoint(tensors, json.loads(text))


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _flush(folder: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
