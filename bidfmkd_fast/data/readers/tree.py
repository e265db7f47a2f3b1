"""Read the files of a folder, or of a zip or tar archive without unpacking it to disk."""

from __future__ import annotations

import lzma
import os
import tarfile
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from bidfmkd_fast.errors import InputError

# Three times the largest file that is needed, the training images of CIFAR-100.
MAX_FILE_BYTES = 1 << 29
_SYSTEM = {
    "__macosx",
    "@eadir",
    "@recycle",
    "#recycle",
    "$recycle.bin",
    "thumbs.db",
    "ehthumbs.db",
    "desktop.ini",
}
_DAMAGE = (
    OSError,
    EOFError,
    tarfile.TarError,
    zipfile.BadZipFile,
    zlib.error,
    lzma.LZMAError,
    RuntimeError,
)


class Tree(ABC):
    """The files of a source, named by their path below the root with parts joined by "/".

    `names` are the files to read. `hidden` are the others: a part of their path begins with "." or
    was made by an operating system, such as the thumbnails in `@eaDir`.
    """

    def __init__(self, path: Path, names: Iterable[str]) -> None:
        every = sorted(set(names))
        self.path = path
        self.names = [name for name in every if is_visible(name)]
        self.hidden = [name for name in every if not is_visible(name)]

    @property
    def name(self) -> str:
        """Return the name of the folder, or of the archive without its ending."""
        name = self.path.resolve().name
        return (
            name if self.path.is_dir() else name.removesuffix(self.path.suffix).removesuffix(".tar")
        )

    @abstractmethod
    def stream(self, names: Iterable[str]) -> Iterator[tuple[str, bytes]]:
        """Yield (name, content) of these files, in the order that is quickest to read.

        Raises:
            InputError: a file is damaged, too large or gone.
        """

    def read(self, *names: str) -> list[bytes]:
        """Return the contents of a few files, in the order of `names`."""
        contents = dict(self.stream(names))
        return [contents[name] for name in names]

    def folder_of(self, *names: str) -> str | None:
        """Return the folder nearest to the root that holds all these files; None if none does.

        The folder ends in "/", or is empty for the root.
        """
        there, first = set(self.names), names[0]
        folders = [name[: -len(first)] for name in self.names if f"/{name}".endswith(f"/{first}")]
        found = [folder for folder in folders if all(folder + name in there for name in names)]
        return min(found, key=lambda folder: (folder.count("/"), folder), default=None)


def open_tree(path: Path) -> Tree:
    """Return the tree of a folder, a zip or a tar archive.

    Raises:
        InputError: `path` is none of these or damaged, or a path leads out of the archive.
    """
    if path.is_dir():
        return _Folder(path)
    if not path.is_file():
        raise InputError(f"convert_dataset: there is no file or folder {path}")
    with _damage_named(path):
        if tarfile.is_tarfile(path):
            return _Tar(path)
        if zipfile.is_zipfile(path):
            return _Zip(path)
    raise InputError(
        f"convert_dataset: {path} is neither a folder nor a whole zip or tar archive; "
        "if it was an archive, it is damaged or cut off"
    )


class _Folder(Tree):
    def __init__(self, path: Path) -> None:
        super().__init__(path, _walk(path))

    def stream(self, names: Iterable[str]) -> Iterator[tuple[str, bytes]]:
        for name in names:
            file = self.path / name
            with _damage_named(file):
                if not file.is_file():  # a pipe would never end
                    raise InputError(f"convert_dataset: {file} is not a regular file")
                _refuse_huge(self.path, name, file.stat().st_size)
                content = file.read_bytes()
            yield name, content


class _Zip(Tree):
    def __init__(self, path: Path) -> None:
        with zipfile.ZipFile(path) as archive:
            super().__init__(
                path,
                [_inside(path, info.filename) for info in archive.infolist() if not info.is_dir()],
            )

    def stream(self, names: Iterable[str]) -> Iterator[tuple[str, bytes]]:
        with _damage_named(self.path), zipfile.ZipFile(self.path) as archive:
            infos = {_inside(self.path, info.filename): info for info in archive.infolist()}
            for name in names:
                _refuse_huge(self.path, name, infos[name].file_size)
                yield name, archive.read(infos[name])


class _Member(tarfile.TarInfo):
    """A member of a tar archive whose header must be whole.

    tarfile by itself takes a damaged header for the end of the archive, and would lose the rest.
    """

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> _Member:
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise  # the block of zeros with which every archive ends
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(
                f"{error} at byte {archive.offset:,}, without the mark of its end"
            ) from error


class _Tar(Tree):
    """A tar archive, read front to back: going back in a compressed one would read it all again."""

    def __init__(self, path: Path) -> None:
        names = []
        with tarfile.open(path, tarinfo=_Member) as archive:
            for member in archive:
                name = _inside(path, member.name)
                _refuse_huge(path, name, member.size)
                if member.isfile():
                    names.append(name)
                elif not member.isdir():
                    raise InputError(
                        f"convert_dataset: {path}: {name!r} is a link or device, "
                        "which no data set needs"
                    )
        super().__init__(path, names)

    def stream(self, names: Iterable[str]) -> Iterator[tuple[str, bytes]]:
        wanted = set(names)
        with _damage_named(self.path), tarfile.open(self.path, tarinfo=_Member) as archive:
            for member in archive:
                name = _inside(self.path, member.name)
                content = (
                    archive.extractfile(member) if name in wanted and member.isfile() else None
                )
                if content is not None:
                    wanted.remove(name)
                    yield name, content.read()
        if wanted:
            raise InputError(
                f"convert_dataset: {self.path} has changed: {min(wanted)!r} is no longer in it"
            )


@contextmanager
def _damage_named(path: Path) -> Iterator[None]:
    """Turn an error about a damaged file into an InputError that names the file."""
    try:
        yield
    except _DAMAGE as error:
        raise InputError(
            f"convert_dataset: {path} cannot be read: {error}; it may be damaged or cut off"
        ) from error


def _walk(root: Path) -> Iterator[str]:
    """Yield the files below a folder; links to folders are followed, but each folder only once."""

    def refuse(error: OSError) -> None:
        raise InputError(f"convert_dataset: cannot look into {error.filename}: {error.strerror}")

    seen: set[str] = set()
    for folder, folders, files in os.walk(root, onerror=refuse, followlinks=True):
        resolved = os.path.realpath(folder)
        if resolved in seen:
            folders.clear()
            continue
        seen.add(resolved)
        folders.sort()
        yield from ((Path(folder) / file).relative_to(root).as_posix() for file in files)


def is_visible(name: str) -> bool:
    """Return False for a path that is hidden or that an operating system made."""
    return not any(part.startswith(".") or part.lower() in _SYSTEM for part in name.split("/"))


def _inside(archive: Path, name: str) -> str:
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts:
        raise InputError(
            f"convert_dataset: {archive}: the path {name!r} leads out of the archive; "
            "nothing of it was read"
        )
    return path.as_posix()


def _refuse_huge(root: Path, name: str, size: int) -> None:
    if size > MAX_FILE_BYTES:
        raise InputError(
            f"convert_dataset: {root}: {name!r} holds {size:,} bytes; "
            f"no file of a data set exceeds {MAX_FILE_BYTES:,}"
        )
