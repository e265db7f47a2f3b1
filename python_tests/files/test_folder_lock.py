"""Test that a folder has one run at a time.

The message names the process that holds the folder. The lock ends with that process, however it
ends.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from bidfmkd_fast.errors import InputError
from bidfmkd_fast.files.folder_lock import LOCK, FolderLock, check_free

HOLD = (
    "import sys; from bidfmkd_fast.files.folder_lock import FolderLock\n"
    "lock = FolderLock(sys.argv[1]); print('held', flush=True); sys.stdin.read()\n"
)


def test_two_in_one_process_exclude_each_other(tmp_path: Path) -> None:
    with FolderLock(tmp_path):
        for attempt in (lambda: FolderLock(tmp_path), lambda: check_free(tmp_path)):
            with pytest.raises(
                InputError, match=f"{tmp_path} is in use by process {os.getpid()} on "
            ):
                attempt()
    check_free(tmp_path)
    with FolderLock(tmp_path):
        assert (tmp_path / LOCK).is_file()
    assert not any(tmp_path.iterdir())


def test_it_dies_with_its_process(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    with pytest.raises(InputError, match=f"in use by process {holder.pid} on "):
        FolderLock(tmp_path)
    holder.send_signal(signal.SIGKILL)
    holder.communicate()
    with FolderLock(tmp_path):
        assert (tmp_path / LOCK).read_text().startswith(f"process {os.getpid()} on ")


def test_folders_made_for_it_go_with_it_unless_they_are_used(tmp_path: Path) -> None:
    FolderLock(tmp_path / "a" / "b").release()
    assert not (tmp_path / "a").exists()
    lock = FolderLock(tmp_path / "a" / "b")
    (tmp_path / "a" / "mine").touch()
    lock.release()
    lock.release()
    assert [file.name for file in (tmp_path / "a").iterdir()] == ["mine"]
    check_free(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


def test_a_removed_folder_does_not_keep_the_lock_from_ending(tmp_path: Path) -> None:
    lock = FolderLock(tmp_path / "run")
    (tmp_path / "run" / LOCK).unlink()
    (tmp_path / "run").rmdir()
    lock.release()
    FolderLock(tmp_path / "run").release()


def test_a_moved_folder_leaves_the_lock_of_the_one_in_its_place(tmp_path: Path) -> None:
    moved = FolderLock(tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "moved")
    with FolderLock(tmp_path / "run"):
        moved.release()
        with pytest.raises(InputError, match="in use"):
            FolderLock(tmp_path / "run")
    FolderLock(tmp_path / "moved").release()


def test_one_at_a_time_under_threads(tmp_path: Path) -> None:
    inside, most, taken = [0], [0], [0]
    guard = threading.Lock()

    def work() -> None:
        while taken[0] < 60:
            try:
                lock = FolderLock(tmp_path / "run")
            except InputError:
                continue
            with guard:
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                taken[0] += 1
            with guard:
                inside[0] -= 1
            lock.release()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most[0] == 1 and not (tmp_path / "run" / LOCK).exists()


def test_a_place_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(InputError, match=f"cannot write to {folder}: "):
            FolderLock(folder)
