"""Write and read the files of this package: whole or not at all, with a checksum, and with one clear line on failure.

Every file of a run, a pool or a data set is written here. It goes to `<name>.partial` beside its place first, is
flushed to the disk and then renamed, so that no reader ever sees half a file. All files get the permissions of the
umask.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from bidfmkd_fast.errors import InputError
from bidfmkd_fast.secrets import scrub, scrubbed

PARTIAL = ".partial"
_CHECKSUM = "checksum"
_ADVICE = {
    errno.ENOSPC: "free some space, then give the same command again",
    errno.EDQUOT: "free some space, then give the same command again",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
}


def cannot_write(path: Path, error: OSError) -> InputError:
    """Return the error to raise where `path` could not be written."""
    advice = _ADVICE.get(error.errno or 0, "give another place, or make this one writable")
    return InputError(f"cannot write to {path}: {error.strerror or error}; {advice}")


def make_folder(path: Path) -> None:
    """Make the folder `path` and those above it, unless they are there. Raises InputError where that fails."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(path, error) from None


def check_writable(*paths: Path) -> None:
    """Check that the files `paths` can be written, and make their folders; nothing else is left behind.

    Raises:
        InputError: a folder cannot be made or written to, or a folder stands where a file is to be written.
    """
    for path in paths:
        if path.is_dir():
            raise InputError(f"cannot write to {path}: it is a folder; remove it or give another place")
        with _room_beside(path) as file:
            file.write(bytes(4096))  # a file without content can be made on a full disk, too


def reserve(path: Path, n_bytes: int) -> None:
    """Take the disk space for the file `path` now, so that what is paid for until then can be written for certain.

    Raises:
        InputError: there is not as much space.
    """
    partial = _partial(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, n_bytes)
    except OSError as error:
        _remove(partial)
        raise cannot_write(path, error) from None


@contextmanager
def reserved(path: Path, n_bytes: int) -> Iterator[None]:
    """`reserve`, for a file that is written inside the block; where it is not, the space is given back."""
    reserve(path, n_bytes)
    try:
        yield
    finally:
        _remove(_partial(path))


@contextmanager
def written_whole(path: Path) -> Iterator[IO[bytes]]:
    """Give a binary file to write to, whose content stands at `path` after the block, or nowhere if the block fails.

    The folder is made if it is not there. Space that `reserve` has taken for `path` is used.

    Raises:
        InputError: the file cannot be written: no space, no permission, a folder in its place.
    """
    with _room_beside(path, keep=True) as file:
        yield file
        file.flush()
        file.truncate()  # what `reserve` took beyond the content
        os.fsync(file.fileno())
        os.replace(_partial(path), path)


def write_text(path: Path, text: str) -> None:
    """Write prose without any secret, as UTF-8, to the file `path`."""
    write_exact(path, scrub(text))


def write_json(path: Path, value: Any) -> None:
    """Write plain values as JSON to the file `path`, their strings without any secret."""
    write_exact(path, json.dumps(scrubbed(value), indent=2) + "\n")


def write_exact(path: Path, text: str) -> None:
    """Write `text` as it is, as UTF-8: settings that are compared when read again, or text that is scrubbed already."""
    with written_whole(path) as file:
        file.write(text.encode())


def append_line(path: Path, line: str) -> None:
    """Append `line` and an end of line to the text file `path`. Raises InputError where that fails."""
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    except OSError as error:
        raise cannot_write(path, error) from None


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write tensors by name as a safetensors file with text `metadata` and a checksum of both.

    The tensors may be on any device and share memory. The same content gives the same bytes. Raises InputError where
    the file cannot be written.
    """
    # Copies, since safetensors refuses tensors that share memory (tied weights).
    held = {name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in tensors.items()}
    about = dict(metadata or {})
    content = save(held, {**about, _CHECKSUM: _checksum(held, about)})
    with written_whole(path) as file:
        file.write(_in_order(content))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors, on the CPU, and the metadata of a safetensors file.

    Raises:
        InputError: the file is missing, no safetensors file, or not what was written: its checksum differs. A file
            without a checksum, from another program or an earlier version, is taken as it is.
    """
    try:
        with safe_open(path, framework="pt") as opened:
            about = dict(opened.metadata() or {})
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118  # it is no mapping
    except (OSError, SafetensorError) as error:
        reason = "it is a folder" if path.is_dir() else " ".join(str(error).split())
        raise InputError(f"{path} is not readable: {reason}") from None
    wanted = about.pop(_CHECKSUM, None)
    if wanted is not None and wanted != _checksum(tensors, about):
        raise InputError(f"{path} is damaged: its content does not have the checksum that it was written with")
    return tensors, about


def _in_order(content: bytes) -> bytes:
    """Return a safetensors file whose metadata are sorted by name; safetensors writes them in an order by chance."""
    (length,) = struct.unpack_from("<Q", content)
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8, as the format wants
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


def _checksum(tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> str:
    """Return a digest of names, types, shapes and values, and of the metadata, whatever their order in the file."""
    digest = hashlib.blake2b(json.dumps(sorted(about.items())).encode(), digest_size=16)
    for name, value in sorted(tensors.items()):
        digest.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
        digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _partial(path: Path) -> Path:
    return path.with_name(path.name + PARTIAL)


@contextmanager
def _room_beside(path: Path, keep: bool = False) -> Iterator[IO[bytes]]:
    """Give the file `<path>.partial` to write to, and remove it after the block unless the block has moved it."""
    partial = _partial(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("r+b" if keep and partial.is_file() else "wb") as file:
            yield file
    except OSError as error:
        raise cannot_write(path, error) from None
    finally:
        _remove(partial)


def _remove(path: Path) -> None:
    with suppress(OSError):
        path.unlink()
