"""Keep a set that is recovered outside of a run, and count its queries across killed processes."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from bidfmkd_fast.black_box import BlackBox
from bidfmkd_fast.black_box.ledger_file import LedgerFile
from bidfmkd_fast.errors import InputError
from bidfmkd_fast.recovery.journal import Journal
from bidfmkd_fast.training.run_folder import LEDGER


@contextmanager
def kept_set(
    file: Path, number: int, api: BlackBox, measuring: int = 0
) -> Iterator[tuple[Journal, LedgerFile]]:
    """Give the journal and the ledger of a set that the block recovers from `api` and saves.

    Both are in a folder beside `file`, the file of the set. The folder is removed at the end of the
    block. If the block fails, or the process is killed, the folder stays (unless nothing was
    asked), and the same call continues from it. What was spent before counts against the budget of
    `api`.

    Args:
        file: where the block saves the set.
        number: number of the API in its pool.
        api: the API.
        measuring: queries that measure a step length (mu); 0 if none is measured.

    Raises:
        InputError: the folder cannot be written to, or belongs to another API.

    Warns:
        UserWarning: the ledger holds fewer queries than the answers in the journal have cost; the
            missing queries were added to it.
    """
    folder = file.with_suffix(".journal")
    # The folders that `mkdir` will make, the innermost first.
    above = [path for path in folder.parents if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"recover: cannot write to {folder}: {error.strerror}; give another place"
        ) from None
    journal, ledger, spent = Journal(folder), LedgerFile(folder / LEDGER), True
    try:
        with journal, api.ledger.written_to(ledger, number, api.name):
            counted = sum(row.queries for row in ledger.rows())
            missing = journal.queries + (0 if journal.mu is None else measuring) - counted
            if missing > 0:
                ledger.restore(number, missing, journal.steps, api.price_of(missing))
                warnings.warn(
                    f"recover: {ledger.path} or the end of it was lost, since it holds fewer "
                    f"queries than the kept answers have cost; {missing:,} queries were added; "
                    "what was asked besides them is not known",
                    stacklevel=3,
                )
            if api.budget is not None:
                api.budget.restore_from(ledger, number)
            try:
                yield journal, ledger
            except BaseException:
                spent = any(row.queries for row in ledger.rows())
                raise
            spent = False
    finally:
        ledger.close()
        if not spent:
            journal.remove()
            with suppress(OSError):  # a folder that holds the saved set stays
                for path in above:
                    path.rmdir()
