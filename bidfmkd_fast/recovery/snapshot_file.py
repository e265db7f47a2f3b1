"""Write and read the snapshot of a recovery: a safetensors file with a checksum.

The tensors are those of the `ImageMaker` by name, the best images so far as `best.0`, `best.1` and
so on, and `history` with a row per step, `[steps, columns]`. The metadata hold the checksum under
`crc32`.
"""

from __future__ import annotations

import os
import zlib
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

COLUMNS = ("step", "loss", "best_loss", "matched", "queries")  # of a recovery's history


class Snapshot(NamedTuple):
    """A recovery after one of its steps.

    Attributes:
        state: state of the `ImageMaker`, tensors by name; empty without a snapshot.
        best: the best images so far, with their scores and losses.
        history: the record of every step.
    """

    state: dict[str, Tensor]
    best: list[Tensor]
    history: list[dict[str, float]]


def write_snapshot(path: Path, snapshot: Snapshot) -> None:
    """Replace the file as a whole, so that a process that dies here leaves the old one."""
    from safetensors.torch import save_file

    rows = torch.tensor(
        [[record[name] for name in COLUMNS] for record in snapshot.history], dtype=torch.float64
    )
    tensors = {
        **snapshot.state,
        **{f"best.{number}": tensor for number, tensor in enumerate(snapshot.best)},
        "history": rows,
    }
    # Clones, since safetensors refuses tensors that share memory.
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    partial = path.with_name(f"{path.name}.partial")
    save_file(tensors, partial, metadata={"crc32": checksum(tensors)})
    os.replace(partial, path)


def read_snapshot(path: Path) -> Snapshot:
    """Read the file; return an empty snapshot if the file is missing or damaged.

    The records of the journal give the same result without it.
    """
    from safetensors import SafetensorError, safe_open

    nothing = Snapshot({}, [], [])
    try:
        with safe_open(path, framework="pt") as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            expected = (opened.metadata() or {}).get("crc32")
    except (OSError, SafetensorError):
        return nothing
    if expected != checksum(tensors) or "history" not in tensors:
        return nothing
    history = [dict(zip(COLUMNS, row, strict=True)) for row in tensors.pop("history").tolist()]
    for record in history:
        record |= {"step": int(record["step"]), "queries": int(record["queries"])}
    names = sorted(name for name in tensors if name.startswith("best."))
    return Snapshot(state=tensors, best=[tensors.pop(name) for name in names], history=history)


def checksum(tensors: dict[str, Tensor]) -> str:
    """Return the CRC-32 of names and bytes, in order of names, as eight hexadecimal digits."""
    total = 0
    for name in sorted(tensors):
        total = zlib.crc32(tensors[name].numpy().tobytes(), zlib.crc32(name.encode(), total))
    return f"{total:08x}"
