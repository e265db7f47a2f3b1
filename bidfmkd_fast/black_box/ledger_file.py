"""The ledger on disk: an SQLite file that holds every count before the request it belongs to is sent."""

from __future__ import annotations

import os
import sqlite3
import threading
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bidfmkd_fast.errors import InputError

if TYPE_CHECKING:
    from bidfmkd_fast.black_box.base import BlackBox

_SESSION = uuid.uuid4().hex  # this process and those that are forked from it
_COUNTS = "queries, requests, answered_queries, answered_requests, cost"


def _session() -> str:
    """Name this process: a forked one is another, which may go on where the first was killed."""
    return f"{_SESSION}-{os.getpid()}"


@dataclass(frozen=True)
class LedgerRow:
    """What one API was asked and what it answered; see `Ledger`."""

    number: int
    name: str
    queries: int
    requests: int
    answered_queries: int
    answered_requests: int
    cost: float


def row_of(number: int, api: BlackBox, before: LedgerRow | None = None) -> LedgerRow:
    """What the ledger in memory of an API says, less what it said `before`."""
    told, sold = api.ledger, before or LedgerRow(number, api.name, 0, 0, 0, 0, 0.0)
    return LedgerRow(
        number,
        api.name,
        told.queries - sold.queries,
        told.requests - sold.requests,
        told.answered_queries - sold.answered_queries,
        told.answered_requests - sold.answered_requests,
        told.cost - sold.cost,
    )


class LedgerFile:
    """Counts per API in an SQLite file, which outlives a killed process. Safe under threads.

    It is written ahead of each request (write-ahead log, no wait for the disk): the counts survive the end of the
    process at any moment; the last few may be lost when the machine itself loses power.

    Raises:
        InputError: the file cannot be made, or is no ledger.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        try:
            self._connection = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
            self._connection.execute("PRAGMA journal_mode=WAL")
            self._connection.execute("PRAGMA synchronous=NORMAL")
            self._connection.execute(
                "CREATE TABLE IF NOT EXISTS apis (number INTEGER NOT NULL, session TEXT NOT NULL, name TEXT NOT NULL, "
                "queries INTEGER NOT NULL DEFAULT 0, requests INTEGER NOT NULL DEFAULT 0, "
                "answered_queries INTEGER NOT NULL DEFAULT 0, answered_requests INTEGER NOT NULL DEFAULT 0, "
                "cost REAL NOT NULL DEFAULT 0, PRIMARY KEY (number, session))"
            )
            self.rows()
        except sqlite3.Error as error:
            raise InputError(f"ledger: {path} cannot be used: {error}; is it a ledger of this package?") from None

    def begin(self, number: int, name: str) -> None:
        """A row for API `number`, unless there is one.

        Raises:
            InputError: the row is of an API of another name.
        """
        with self._lock:
            names = self._connection.execute("SELECT name FROM apis WHERE number = ?", (number,)).fetchall()
            if not {held for (held,) in names} <= {name}:
                told = f"API {number} of {self.path} is {names[0][0]!r}"
                raise InputError(f"ledger: {told}; got {name!r}; is this another pool?")
            self._connection.execute(
                "INSERT OR IGNORE INTO apis (number, session, name) VALUES (?, ?, ?)", (number, _session(), name)
            )

    def add(
        self,
        number: int,
        queries: int = 0,
        requests: int = 0,
        answered_queries: int = 0,
        answered_requests: int = 0,
        cost: float = 0.0,
    ) -> None:
        """Add to the counts of API `number`."""
        with self._lock:
            self._connection.execute(
                "UPDATE apis SET queries = queries + ?, requests = requests + ?, answered_queries = answered_queries + "
                "?, answered_requests = answered_requests + ?, cost = cost + ? WHERE number = ? AND "
                "session = ?",
                (queries, requests, answered_queries, answered_requests, cost, number, _session()),
            )

    def rows(self) -> list[LedgerRow]:
        """The sums over all processes, by number."""
        return self._rows("")

    def earlier(self) -> dict[int, LedgerRow]:
        """What other processes, all gone by now, have counted, by number."""
        return {row.number: row for row in self._rows(f"WHERE session != '{_session()}'")}

    def _rows(self, where: str) -> list[LedgerRow]:
        sums = ", ".join(f"sum({count})" for count in _COUNTS.split(", "))
        with self._lock:
            found = self._connection.execute(
                f"SELECT number, name, {sums} FROM apis {where} GROUP BY number ORDER BY number"
            ).fetchall()
        return [LedgerRow(*row) for row in found]

    def close(self) -> None:
        """Write everything into the one file."""
        with self._lock:
            self._connection.close()
