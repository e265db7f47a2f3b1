"""Let one run at a time write in a folder, by a lock of the operating system.

The lock ends with the process that holds it, however that process ends.
"""

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
from bidfmkd_fast.files.atomic import cannot_write, make_folder

LOCK = "run.lock"


class FolderLock:
    """The right to write in a folder, held until `release` or the end of the process.

    The lock belongs to a run and not to a process: two runs of one process exclude each other
    (`flock` on two open files), and several processes of a run share the lock that one of them
    holds. Missing folders are made; `release` removes them again if they are still empty.

    Raises:
        InputError: another run holds the folder (the message names its process), or the folder
            cannot be written to.

    Warns:
        UserWarning: the file system has no locks, so that a second run would not be noticed.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        folders = (self.folder, *self.folder.parents)
        self._made = [folder for folder in folders if not folder.exists()]
        self._file: FileIO | None = self._locked()

    def release(self) -> None:
        """Give the lock back; a second call does nothing."""
        if self._file is None:
            return
        path = self.folder / LOCK
        with suppress(OSError):  # the folder may be gone, or replaced by that of another run
            if _is(path, self._file):
                # Remove the file while it is locked: another process that has just opened it finds
                # after locking that the path has changed, and starts again.
                path.unlink()
        self._file.close()
        self._file = None
        with suppress(OSError):  # rmdir refuses a folder that is not empty
            for folder in self._made:
                folder.rmdir()

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.release()

    def _locked(self) -> FileIO:
        """Return the lock file, open and locked, with the name of this process in it."""
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
                    f"{self.folder} is in use by {holder}; wait until it ends, end it, "
                    "or give another folder"
                ) from None
            except OSError as error:
                warnings.warn(
                    f"{self.folder}: the file system has no locks ({error.strerror}); "
                    "make sure that no other run writes to this folder",
                    stacklevel=3,
                )
            if _is(path, file):
                break
            file.close()  # its last holder removed it between open and flock
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
    """Raise InputError if a run holds `folder`.

    This is an early check, before files are read and services are asked.
    """
    if Path(folder).is_dir():
        FolderLock(folder).release()


def _is(path: Path, file: FileIO) -> bool:
    """Return True if the file at `path` is the open one."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False
