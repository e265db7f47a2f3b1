"""One run per folder: a lock of the operating system, which ends with the process that holds it, however it ends."""

from __future__ import annotations

import fcntl
import os
import socket
import warnings
from contextlib import suppress
from io import FileIO
from pathlib import Path
from types import TracebackType

from bidfmkd_fast.errors import InputError
from bidfmkd_fast.files import cannot_write, make_folder

LOCK = "run.lock"


class FolderLock:
    """The right to write in a folder; held from when it is made until `release` or the end of the process.

    It belongs to one run, not to a process: two runs of one process exclude each other (`flock` on two open files), and
    several processes of one run share the lock that one of them holds. Folders that are not there are made, and
    removed by `release` if nothing came into them.

    Raises:
        InputError: another run holds the folder (the message names its process), or it cannot be written to.

    Warns:
        UserWarning: the file system has no locks, so nothing keeps a second run out.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self._made = [one for one in (self.folder, *self.folder.parents) if not one.exists()]
        self._file: FileIO | None = self._locked()

    def release(self) -> None:
        """Give the folder free; a second call does nothing."""
        if self._file is None:
            return
        path = self.folder / LOCK
        with suppress(OSError):  # the folder may be gone, or moved, and another run's in its place
            if _is(path, self._file):
                # While it is locked: whoever has it open and waits for the lock looks for the file again.
                path.unlink()
        self._file.close()
        self._file = None
        with suppress(OSError):  # it is not empty, as a rule
            for folder in self._made:
                folder.rmdir()

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()

    def _locked(self) -> FileIO:
        path = self.folder / LOCK
        while True:
            make_folder(self.folder)
            try:
                file = FileIO(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "r+")
            except FileNotFoundError:
                continue  # its last holder has just removed the folder
            except OSError as error:
                raise cannot_write(self.folder, error) from None
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = file.read().decode().strip() or "another process"
                file.close()
                raise InputError(
                    f"{self.folder} is in use by {holder}; wait until it ends, end it, or give another folder"
                ) from None
            except OSError as error:
                warnings.warn(
                    f"{self.folder}: the file system has no locks ({error.strerror}); make sure that no other run "
                    "writes to this folder",
                    stacklevel=3,
                )
            if _is(path, file):
                break
            file.close()  # its last holder removed it between the two calls above
        try:
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
        except OSError as error:
            with suppress(OSError):
                path.unlink()
            file.close()
            raise cannot_write(self.folder, error) from None
        return file


def check_free(folder: str | Path) -> None:
    """Raise InputError if a run holds `folder`: an early look, before files are read and services are met."""
    if Path(folder).is_dir():
        FolderLock(folder).release()


def _is(path: Path, file: FileIO) -> bool:
    """Return True if the file at `path` is the open one."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False
