"""Read and write named tensors as safetensors files with a checksum.

Tensors that were read are memory-mapped: the system reads the parts that are used, and may drop
them from memory again.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from bidfmkd_fast.errors import InputError
from bidfmkd_fast.files.atomic import written_whole

_CHECKSUM = "checksum"


class Pieces:
    """A tensor in pieces along its first dimension, which are never in memory together.

    Args:
        pieces: at least one tensor; they agree in dtype and in all dimensions but the first.
    """

    def __init__(self, pieces: Sequence[Tensor]) -> None:
        self._pieces, self.dtype = pieces, pieces[0].dtype
        self.shape = (sum(map(len, pieces)), *pieces[0].shape[1:])

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._pieces)

    @property
    def nbytes(self) -> int:
        """Return the size of the whole tensor."""
        return sum(piece.nbytes for piece in self._pieces)

    def none(self) -> Tensor:
        """Return a tensor like this one without any rows."""
        return torch.empty(0, *self.shape[1:], dtype=self.dtype)


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor | Pieces], metadata: Mapping[str, str] | None = None
) -> None:
    """Write named tensors as a safetensors file, with text `metadata` and a checksum of both.

    The tensors may be on any device and share memory. Equal content gives equal bytes.

    Raises:
        InputError: the file cannot be written.
    """
    pieces = {name: value for name, value in tensors.items() if isinstance(value, Pieces)}
    # Copy, since safetensors refuses tensors that share memory (tied weights).
    held = {
        name: value.none()
        if isinstance(value, Pieces)
        else value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, value in tensors.items()
    }
    about = dict(metadata or {})
    content = save(held, {**about, _CHECKSUM: _checksum({**held, **pieces}, about)})
    with written_whole(path) as file:
        for part in _parts(content, pieces):
            file.write(part)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read a safetensors file; return its tensors, on the CPU, and its metadata.

    A file without a checksum, written by another program or an earlier version, is accepted.

    Raises:
        InputError: the file is missing, is not a safetensors file, or its content does not match
            its checksum.
    """
    try:
        with safe_open(path, framework="pt") as opened:
            about = dict(opened.metadata() or {})
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (no mapping)
    except (OSError, SafetensorError) as error:
        reason = "it is a folder" if path.is_dir() else " ".join(str(error).split())
        raise InputError(f"{path} is not readable: {reason}") from None
    wanted = about.pop(_CHECKSUM, None)
    if wanted is not None and wanted != _checksum(tensors, about):
        raise InputError(
            f"{path} is damaged: its content does not match its checksum; "
            "restore a copy or remove it"
        )
    return tensors, about


def _parts(content: bytes, pieces: Mapping[str, Pieces]) -> Iterator[Any]:
    """Yield the bytes of a safetensors file part by part, with its metadata sorted by name.

    safetensors itself writes them in a random order. In `content` the tensors of `pieces` have no
    rows, but the place that their type demands; here they get their rows.
    """
    (length,) = struct.unpack_from("<Q", content)
    header, data = json.loads(content[8 : 8 + length]), memoryview(content)[8 + length :]
    about = dict(sorted(header.pop("__metadata__").items()))
    ends: dict[str, tuple[int, int]] = {
        name: tuple(entry["data_offsets"]) for name, entry in header.items()
    }
    at = 0
    for name in (in_place := sorted(header, key=lambda name: (ends[name], name))):
        first, last = ends[name]
        n_bytes = pieces[name].nbytes if name in pieces else last - first
        if name in pieces:
            header[name]["shape"] = list(pieces[name].shape)
        header[name]["data_offsets"] = [at, at + n_bytes]
        at += n_bytes
    ordered = {"__metadata__": about, **header}
    text = json.dumps(ordered, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the format aligns tensors to 8
    yield struct.pack("<Q", len(text)) + text
    for name in in_place:
        if name not in pieces:
            yield data[slice(*ends[name])]
            continue
        for piece in pieces[name]:
            yield _bytes_of(piece)


def _checksum(tensors: Mapping[str, Tensor | Pieces], about: Mapping[str, str]) -> str:
    """Return a digest of the metadata and of names, types, shapes and values of the tensors.

    The digest does not depend on the order of the tensors in the file.
    """
    digest = hashlib.blake2b(json.dumps(sorted(about.items())).encode(), digest_size=16)
    for name, value in sorted(tensors.items()):
        digest.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
        for piece in value if isinstance(value, Pieces) else (value,):
            digest.update(_bytes_of(piece))
    return digest.hexdigest()


def _bytes_of(value: Tensor) -> Any:
    """Return the bytes of a tensor on the CPU, without a copy if it is contiguous."""
    return value.contiguous().reshape(-1).view(torch.uint8).numpy().data
