"""The ledger on disk: an SQLite file that holds every count before the request it belongs to is sent."""

from __future__ import annotations

import sqlite3
import threading
from dataclasses import dataclass
from pathlib import Path

from bidfmkd_fast.errors import InputError


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


class LedgerFile:
    """One row of counts per API in an SQLite file, which outlives a killed process. Safe under threads.

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
                "CREATE TABLE IF NOT EXISTS apis (number INTEGER PRIMARY KEY, name TEXT NOT NULL, "
                "queries INTEGER NOT NULL DEFAULT 0, requests INTEGER NOT NULL DEFAULT 0, "
                "answered_queries INTEGER NOT NULL DEFAULT 0, answered_requests INTEGER NOT NULL DEFAULT 0, "
                "cost REAL NOT NULL DEFAULT 0)"
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
            self._connection.execute("INSERT OR IGNORE INTO apis (number, name) VALUES (?, ?)", (number, name))
            (held,) = self._connection.execute("SELECT name FROM apis WHERE number = ?", (number,)).fetchone()
        if held != name:
            raise InputError(f"ledger: API {number} of {self.path} is {held!r}; got {name!r}; is this another pool?")

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
                "?, answered_requests = answered_requests + ?, cost = cost + ? WHERE number = ?",
                (queries, requests, answered_queries, answered_requests, cost, number),
            )

    def rows(self) -> list[LedgerRow]:
        """All rows, by number."""
        with self._lock:
            found = self._connection.execute(
                "SELECT number, name, queries, requests, answered_queries, answered_requests, cost FROM apis "
                "ORDER BY number"
            ).fetchall()
        return [LedgerRow(*row) for row in found]

    def close(self) -> None:
        """Write everything into the one file."""
        with self._lock:
            self._connection.close()
