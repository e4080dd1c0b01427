"""Events in an SQLite file: one writes, many read beside it (S1, S3).

Write-ahead logging with `synchronous=NORMAL`: what has been written outlives the process, however it dies. When the
machine loses power the last transactions may be lost, and the file is whole still.
"""

from __future__ import annotations

import os
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from itertools import chain
from pathlib import Path
from typing import Any, Optional

from .base import Query, Record, Store, StoreError

SCHEMA = 1
BUSY = 5.0
"""Seconds to wait for others who write to the same file."""

_APPLICATION = 0x61676466  # what kind of file it is, for those who look at its header
_ROWS = 128  # in one statement: Python lets other threads run at each, and gets its turn back only after them
_PAGE = 500  # read in one transaction: a long one would keep the log from being emptied
_LOG_PAGES = 4000  # SQLite would copy the log into the file four times as often, the same pages again and again
_LOG_LIMIT = 16 * 1024 * 1024
_TABLES = """
BEGIN IMMEDIATE;
CREATE TABLE IF NOT EXISTS events (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    id TEXT NOT NULL UNIQUE,
    name TEXT NOT NULL,
    time REAL NOT NULL,
    sender TEXT,
    run_id TEXT,
    parent_id TEXT,
    data TEXT NOT NULL
);
PRAGMA application_id = {application};
PRAGMA user_version = {schema};
COMMIT;
"""
_COLUMNS = "id, name, time, sender, run_id, parent_id, data"
_INSERT = f"INSERT OR IGNORE INTO events ({_COLUMNS}) VALUES "
_ROW = "(?, ?, ?, ?, ?, ?, ?)"
_left_alone: list[Any] = []  # connections of a parent process: closing them would harm it


class SQLiteStore(Store):
    """Keeps events in a file of SQLite, readable by its owner only.

    Args:
        path: the file; it is made if it isn't there, and so are its folders.

    Raises:
        StoreError: it can't be opened, or is something else.
    """

    def __init__(self, path: str) -> None:
        if not isinstance(path, str):
            raise TypeError(f"path must be a string, not {path!r}")
        if not path or "\0" in path:
            raise ValueError(f"path must name a file, not {path!r}")
        self.path: str = os.path.abspath(path)
        self._connection: Optional[sqlite3.Connection] = None
        self._file: Optional[tuple[int, int]] = None
        self._mutex = threading.Lock()
        with self._mutex:
            self._connect()

    @classmethod
    def from_url(cls, url: str) -> SQLiteStore:
        """Open `sqlite:///relative.db` or `sqlite:////absolute.db`."""
        path = url[len("sqlite://") :]
        if not path.startswith("/") or len(path) == 1 or path.endswith("/") or "?" in path:
            raise ValueError(
                f"{url!r} names no SQLite file: write sqlite:///relative.db, or sqlite:////absolute/path.db"
            )
        return cls(path[1:])

    def __repr__(self) -> str:
        return f"<SQLiteStore {self.path!r}>"

    # -- writing ------------------------------------------------------------------------------------------

    def write(self, records: Sequence[Record]) -> None:
        with self._mutex:
            connection = self._connect()
            try:
                connection.execute("BEGIN IMMEDIATE")
                for begin in range(0, len(records), _ROWS):
                    rows = records[begin : begin + _ROWS]
                    connection.execute(_INSERT + ", ".join([_ROW] * len(rows)), list(chain.from_iterable(rows)))
                connection.execute("COMMIT")
            except BaseException as error:
                self._disconnect()
                if isinstance(error, sqlite3.Error):
                    raise self._error("can't be written", error) from error
                raise
            self._shorten_log(connection)

    def _shorten_log(self, connection: sqlite3.Connection) -> None:
        """SQLite empties its log by itself, but where there is always somebody who reads, it goes on growing."""
        with suppress(OSError, sqlite3.Error):
            if os.stat(self.path + "-wal").st_size > _LOG_LIMIT:
                connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()

    def _connect(self) -> sqlite3.Connection:
        """The connection for writing; a new one where the file isn't the one that was opened."""
        if self._connection is not None and self._file == _identity(self.path):
            return self._connection
        self._disconnect()
        connection = None
        try:
            _make_folder(os.path.dirname(self.path))
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o600))
            connection = sqlite3.connect(self.path, timeout=BUSY, isolation_level=None, check_same_thread=False)
            self._prepare(connection)
            self._file = _identity(self.path)
            self._connection = connection
            return connection
        except (sqlite3.Error, OSError) as error:
            if connection is not None:
                connection.close()
            if isinstance(error, StoreError):
                raise
            raise self._error("can't be opened", error) from error

    def _prepare(self, connection: sqlite3.Connection) -> None:
        connection.execute("BEGIN")  # so that what is read belongs together: others may be making the file just now
        application = connection.execute("PRAGMA application_id").fetchone()[0]
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        connection.execute("COMMIT")
        if application != _APPLICATION and tables:
            raise StoreError(f"{self.path} is a database of something else", store=repr(self))
        if version > SCHEMA:
            raise StoreError(
                f"{self.path} was written by a newer agentdiff: its schema is {version}, and {SCHEMA} is known here",
                store=repr(self),
            )
        _write_ahead(connection)
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute(f"PRAGMA wal_autocheckpoint = {_LOG_PAGES}")
        if application != _APPLICATION:
            connection.executescript(_TABLES.format(application=_APPLICATION, schema=SCHEMA))

    def _disconnect(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            with suppress(sqlite3.Error):
                connection.close()

    def _error(self, what: str, error: BaseException) -> StoreError:
        return StoreError(f"{self.path} {what}: {error}", store=repr(self))

    def close(self) -> None:
        with self._mutex:
            self._disconnect()

    def forget(self) -> None:
        self._mutex = threading.Lock()
        if self._connection is not None:
            _left_alone.append(self._connection)
            self._connection = None

    # -- reading ------------------------------------------------------------------------------------------

    def select(self, query: Query) -> Iterator[Record]:
        conditions = ["seq > ?"]
        values: list[Any] = []
        for condition, value in (
            ("name GLOB ?", None if query.pattern is None else query.pattern.replace("[", "[[]")),
            ("name = ?", query.name if query.pattern is None else None),
            ("run_id = ?", query.run),
            ("time >= ?", query.since),
            ("time <= ?", query.until),
        ):
            if value is not None:
                conditions.append(condition)
                values.append(value)
        statement = f"SELECT seq, {_COLUMNS} FROM events WHERE {' AND '.join(conditions)} ORDER BY seq LIMIT ?"
        left = query.limit
        try:
            with closing(self._open_to_read()) as connection:
                found = connection.execute("SELECT seq FROM events WHERE id = ?", (query.after,)).fetchone()
                seen = found[0] if found else 0
                while left is None or left > 0:
                    size = _PAGE if left is None else min(left, _PAGE)
                    rows = connection.execute(statement, (seen, *values, size)).fetchall()
                    for row in rows:
                        yield Record(*row[1:])
                    if len(rows) < size:
                        return
                    seen = rows[-1][0]
                    left = None if left is None else left - size
        except sqlite3.Error as error:
            raise self._error("can't be read", error) from error

    def _open_to_read(self) -> sqlite3.Connection:
        address = f"{Path(self.path).as_uri()}?mode=ro"
        return sqlite3.connect(address, uri=True, timeout=BUSY, isolation_level=None, check_same_thread=False)


def _write_ahead(connection: sqlite3.Connection) -> None:
    """Nobody may be at a new file while it changes to this mode, and SQLite does not wait for them."""
    until = time.monotonic() + BUSY
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL").fetchall()
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() >= until:
                raise
            time.sleep(0.01)


def _identity(path: str) -> Optional[tuple[int, int]]:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _make_folder(path: str) -> None:
    """Make a folder, and those above it, for their owner only."""
    if not os.path.isdir(path):
        _make_folder(os.path.dirname(path))
        with suppress(FileExistsError):
            os.mkdir(path, 0o700)
