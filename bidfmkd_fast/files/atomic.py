"""Write and read the files of this package: whole or not at all, with a checksum.

Every file of a run, a pool or a data set is written here. The content goes to `<name>.partial`
beside the final place first, is flushed to the disk, and then gets its name, so that no reader ever
sees half a file. All files get the permissions of the umask. A failure is one clear line.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from bidfmkd_fast.errors import InputError
from bidfmkd_fast.secrets import scrub, scrubbed

PARTIAL = ".partial"
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
    """Make the folder `path` and those above it, if they are missing.

    Raises:
        InputError: a folder cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(path, error) from None


def check_writable(*paths: Path) -> None:
    """Check that the files `paths` can be written; leave nothing behind but their folders.

    Raises:
        InputError: a folder cannot be made or written to, or a path is a folder itself.
    """
    for path in paths:
        if path.is_dir():
            raise InputError(
                f"cannot write to {path}: it is a folder; remove it or give another place"
            )
        with _room_beside(path) as file:
            file.write(bytes(4096))  # an empty file can be made even on a full disk


def reserve(path: Path, n_bytes: int) -> None:
    """Allocate the disk space of the file `path` now.

    Results that cost queries can then be written for certain, even if the disk fills up meanwhile.

    Raises:
        InputError: the disk has less space.
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
    """Reserve space for a file that the block writes; free it if the block does not."""
    reserve(path, n_bytes)
    try:
        yield
    finally:
        _remove(_partial(path))


@contextmanager
def written_whole(path: Path) -> Iterator[IO[bytes]]:
    """Yield a binary file to write to; give it the name `path` after the block.

    If the block fails, its content is dropped and an older file at `path` stays. The folder is
    made if it is missing. Space that `reserve` has allocated for `path` is used.

    Raises:
        InputError: the file cannot be written, since there is no space, no permission, or a folder
            at `path`.
    """
    with _room_beside(path, keep=True) as file:
        yield file
        file.flush()
        file.truncate()  # frees the space that `reserve` allocated beyond the content
        os.fsync(file.fileno())
        os.replace(_partial(path), path)


def write_text(path: Path, text: str) -> None:
    """Write text as UTF-8 to the file `path`, with its secrets replaced."""
    write_exact(path, scrub(text))


def write_json(path: Path, value: Any) -> None:
    """Write plain values as JSON to the file `path`, with the secrets in their strings replaced."""
    write_exact(path, json.dumps(scrubbed(value), indent=2) + "\n")


def write_exact(path: Path, text: str) -> None:
    """Write `text` as UTF-8 without replacing secrets.

    Use it for settings, which are compared when they are read again, and for text whose secrets
    have been replaced already.
    """
    with written_whole(path) as file:
        # JSON and names may hold halves of UTF-16 pairs, which UTF-8 has no bytes for.
        file.write(text.encode(errors="backslashreplace"))


def append_line(path: Path, line: str) -> None:
    """Append `line` and an end of line to the text file `path`.

    Raises:
        InputError: the file cannot be written.
    """
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    except OSError as error:
        raise cannot_write(path, error) from None


def _partial(path: Path) -> Path:
    return path.with_name(path.name + PARTIAL)


@contextmanager
def _room_beside(path: Path, keep: bool = False) -> Iterator[IO[bytes]]:
    """Yield the file `<path>.partial` to write to; remove it if it is there after the block.

    With `keep` the space of an existing partial file is used.
    """
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
