"""Keep the ledger on disk: an SQLite file that gets every count before its request is sent."""

from __future__ import annotations

import os
import sqlite3
import threading
import uuid
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from bidfmkd_fast.errors import InputError
from bidfmkd_fast.secrets import scrub

if TYPE_CHECKING:
    from bidfmkd_fast.black_box.base import BlackBox

_COUNTS = "queries, requests, answered_queries, answered_requests, cost"


@dataclass(frozen=True)
class LedgerRow:
    """The counts of one API, as in `Ledger`."""

    number: int
    name: str
    queries: int
    requests: int
    answered_queries: int
    answered_requests: int
    cost: float


def row_of(number: int, api: BlackBox, before: LedgerRow | None = None) -> LedgerRow:
    """Return the counts of an API's ledger in memory, minus those of `before`."""
    now, then = api.ledger, before or LedgerRow(number, api.name, 0, 0, 0, 0, 0.0)
    return LedgerRow(
        number,
        api.name,
        now.queries - then.queries,
        now.requests - then.requests,
        now.answered_queries - then.answered_queries,
        now.answered_requests - then.answered_requests,
        now.cost - then.cost,
    )


class LedgerFile:
    """Counts per API in an SQLite file, which outlives a killed process. Safe under threads.

    Every count is written before its request is sent, to SQLite's write-ahead log and without a
    wait for the disk. The counts survive the end of the process at any moment; only a loss of power
    may lose the last few.

    Raises:
        InputError: the file cannot be created, or is no ledger.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._opened = uuid.uuid4().hex
        self._names: dict[int, str] = {}
        self._lock = threading.Lock()
        try:
            self._connection = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
            self._connection.execute("PRAGMA journal_mode=WAL")
            self._connection.execute("PRAGMA synchronous=NORMAL")
            self._connection.execute(
                "CREATE TABLE IF NOT EXISTS apis (number INTEGER NOT NULL, session TEXT NOT NULL, "
                "name TEXT NOT NULL, queries INTEGER NOT NULL DEFAULT 0, requests INTEGER NOT NULL "
                "DEFAULT 0, answered_queries INTEGER NOT NULL DEFAULT 0, answered_requests INTEGER "
                "NOT NULL DEFAULT 0, cost REAL NOT NULL DEFAULT 0, PRIMARY KEY (number, session))"
            )
            (found,) = self._connection.execute("PRAGMA quick_check(1)").fetchone()
            if found != "ok":
                raise sqlite3.DatabaseError(found)
            self._connection.execute(f"SELECT number, session, name, {_COUNTS} FROM apis LIMIT 1")
            self._file = os.stat(path)
        except (sqlite3.Error, OSError) as error:
            advice = (
                "is it a ledger of this package, in a folder that is writable and has space left?"
            )
            if not isinstance(error, (sqlite3.OperationalError, OSError)):  # its content is wrong
                advice = "remove it, and the run counts anew what its recovered sets have cost"
            raise InputError(f"ledger: {path} cannot be used: {error}; {advice}") from None

    @property
    def session(self) -> str:
        """Return the name under which this object counts; a forked process has another name."""
        return f"{self._opened}-{os.getpid()}"

    def begin(self, number: int, name: str) -> None:
        """Add a row for API `number`, unless there is one.

        Raises:
            InputError: the row belongs to an API of another name.
        """
        name = scrub(name)
        with self._used() as connection:
            names = connection.execute(
                "SELECT name FROM apis WHERE number = ?", (number,)
            ).fetchall()
            if not {held for (held,) in names} <= {name}:
                raise InputError(
                    f"ledger: API {number} of {self.path} is {names[0][0]!r}; got {name!r}; "
                    "is this another pool?"
                )
            # Add a row only to an API that has none: opening a finished ledger must not change it.
            connection.execute(
                "INSERT INTO apis (number, session, name) SELECT ?, ?, ? "
                "WHERE NOT EXISTS (SELECT 1 FROM apis WHERE number = ?)",
                (number, self.session, name, number),
            )
            self._names[number] = name

    def add(
        self,
        number: int,
        queries: int = 0,
        requests: int = 0,
        answered_queries: int = 0,
        answered_requests: int = 0,
        cost: float = 0.0,
    ) -> None:
        """Add to the counts of API `number`.

        Raises:
            InputError: the counts cannot be written; the request must not be sent then.
        """
        with self._used() as connection:
            connection.execute(
                f"INSERT INTO apis (number, session, name, {_COUNTS}) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (number, session) DO UPDATE SET "
                + ", ".join(f"{name} = {name} + excluded.{name}" for name in _COUNTS.split(", ")),
                (
                    *(number, self.session, self._names[number]),
                    *(queries, requests, answered_queries, answered_requests, cost),
                ),
            )

    def restore(self, number: int, queries: int, requests: int, cost: float) -> None:
        """Add what earlier processes have spent on API `number`, as other files show.

        All of it counts as answered. Call `begin` with the same number before.
        """
        with self._used() as connection:
            connection.execute(
                f"INSERT INTO apis (number, session, name, {_COUNTS}) "
                "SELECT number, ?, name, ?, ?, ?, ?, ? FROM apis WHERE number = ? LIMIT 1",
                (
                    f"restored {uuid.uuid4().hex}",
                    queries,
                    requests,
                    queries,
                    requests,
                    cost,
                    number,
                ),
            )

    def rows(self) -> list[LedgerRow]:
        """Return the sums over all sessions, in the order of the numbers."""
        sums = ", ".join(f"sum({count})" for count in _COUNTS.split(", "))
        with self._used() as connection:
            found = connection.execute(
                f"SELECT number, name, {sums} FROM apis GROUP BY number ORDER BY number"
            ).fetchall()
        return [LedgerRow(*row) for row in found]

    def sessions(self, number: int) -> dict[str, LedgerRow]:
        """Return the counts of API `number` by session, this one included."""
        with self._used() as connection:
            found = connection.execute(
                f"SELECT session, number, name, {_COUNTS} FROM apis WHERE number = ?", (number,)
            ).fetchall()
        return {session: LedgerRow(*row) for session, *row in found}

    def merge(self, path: Path) -> None:
        """Move all counts of another ledger, which no process uses any more, into this one.

        If the process dies meanwhile, a second call counts nothing twice. The file is removed.
        """
        other = LedgerFile(path)
        try:
            with other._used() as connection:
                found = connection.execute(
                    f"SELECT number, session, name, {_COUNTS} FROM apis"
                ).fetchall()
        finally:
            other.close()
        with self._used() as connection:
            connection.executemany(
                f"INSERT OR REPLACE INTO apis (number, session, name, {_COUNTS}) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                [row for row in found if any(row[3:])],
            )
            connection.execute("PRAGMA wal_checkpoint(FULL)")  # on the disk before the other goes
        path.unlink()

    @contextmanager
    def _used(self) -> Iterator[sqlite3.Connection]:
        """Give the connection to one thread; turn whatever goes wrong into InputError.

        A file that was removed or replaced is noticed here. SQLite itself would go on and write to
        the removed file.
        """
        with self._lock:
            try:
                if not os.path.samestat(os.stat(self.path), self._file):
                    raise FileNotFoundError
                yield self._connection
            except FileNotFoundError:
                raise InputError(
                    f"ledger: {self.path} was removed or replaced during the run; nothing more is "
                    "asked without it"
                ) from None
            except (sqlite3.Error, OSError) as error:
                raise InputError(
                    f"ledger: cannot count in {self.path}: {error}; nothing was sent uncounted"
                ) from None

    def close(self) -> None:
        """Write everything into the file and close it."""
        with self._lock:
            self._connection.close()


def read_ledger(path: Path) -> list[LedgerRow]:
    """Read the sums by API of a ledger that a run may be writing at this moment.

    The ledgers beside it that other processes of the same run write are part of it. Nothing is
    written, no file beside the ledger either.

    Raises:
        InputError: a file is no ledger, or damaged.
    """
    totals: dict[int, LedgerRow] = {}
    for file in (path, *path.parent.glob(f"{path.stem}_rank_*{path.suffix}")):
        for row in _read_rows(file):
            held = totals.get(row.number)
            totals[row.number] = row if held is None else sum_of(held, row)
    return [totals[number] for number in sorted(totals)]


def sum_of(first: LedgerRow, second: LedgerRow) -> LedgerRow:
    """Add up the counts of one API in two processes."""
    names = _COUNTS.split(", ")
    sums = {name: getattr(first, name) + getattr(second, name) for name in names}
    return replace(first, **sums)


def _read_rows(path: Path) -> list[LedgerRow]:
    """Read the sums by API of one file."""
    # Without a write-ahead log all counts are in the file, and SQLite would create a log unless it
    # is told that the file is immutable. With a log, the last counts are in the log, and SQLite
    # must read the log's index without changing it.
    log = Path(f"{path}-wal")
    mode = "readonly_shm=1" if log.exists() and log.stat().st_size else "immutable=1"
    sums = ", ".join(f"sum({count})" for count in _COUNTS.split(", "))
    query = f"SELECT number, name, {sums} FROM apis GROUP BY number ORDER BY number"
    try:
        with closing(
            sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro&{mode}", uri=True)
        ) as connection:
            found = connection.execute(query).fetchall()
    except sqlite3.Error as error:
        raise InputError(
            f"ledger: {path} cannot be read: {error}; is it a ledger of this package?"
        ) from None
    return [LedgerRow(*row) for row in found]
