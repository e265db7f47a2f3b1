"""Use the folder of a run in a rank that has not made it, on a disk that all ranks share."""

from __future__ import annotations

import socket
import time
from pathlib import Path

from bidfmkd_fast.black_box import BlackBox
from bidfmkd_fast.errors import InputError
from bidfmkd_fast.runtime.interrupt import pause
from bidfmkd_fast.training.config import TrainConfig
from bidfmkd_fast.training.run import RecoveredSet
from bidfmkd_fast.training.run_folder import CONFIG, RunFolder

RANK_LEDGERS = "ledger_rank_*.sqlite"  # what ranks above 0 count, until the ledger has taken it
_SEEN = 60.0  # seconds until a file that another machine has written must be there


def follow(path: str | Path, config: TrainConfig) -> RunFolder:
    """Open the folder of a run that rank 0 has created, in another rank. Nothing is written.

    Raises InputError if it does not appear within `_SEEN` seconds.
    """
    wait_until_seen(Path(path) / CONFIG)
    return RunFolder(Path(path), config)


def rank_ledger(folder: Path, rank: int) -> Path:
    """Return the path of the ledger of a rank above 0."""
    return folder / RANK_LEDGERS.replace("*", f"{rank:03d}")


def seen_recovered(folder: RunFolder, index: int, part: str, api: BlackBox) -> RecoveredSet:
    """Read a recovered set that another rank has written."""
    wait_until_seen(folder.recovered_file(index, part))
    held = folder.load_recovered(index, part, api)
    assert held is not None
    return held


def wait_until_seen(file: Path) -> None:
    """Wait for a file that another rank has written, which a shared disk may show a little later.

    Raises InputError if it is not there within `_SEEN` seconds.
    """
    end = time.monotonic() + _SEEN
    while not file.is_file():
        if time.monotonic() > end:
            raise InputError(
                f"run folder: {file} was written by another rank and is not there on "
                f"{socket.gethostname()}; give a folder on a disk that all machines share"
            )
        pause(0.1)
