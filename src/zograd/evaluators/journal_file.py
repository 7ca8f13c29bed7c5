"""The file of a journal: values by estimate and point, in sqlite, plain numbers only."""

from __future__ import annotations

import contextlib
import os
import threading
import time
import zlib
from typing import TYPE_CHECKING, Any

from zograd.errors import JournalError

if TYPE_CHECKING:
    import sqlite3
    from collections.abc import Iterator

_APPLICATION = 0x7A6F6772  # "zogr", in sqlite's own header: what kind of file this is
_PATIENCE = 60.0  # seconds to wait for another process that writes
_SCHEMA = (
    "CREATE TABLE IF NOT EXISTS header (name TEXT PRIMARY KEY, text TEXT NOT NULL) WITHOUT ROWID",
    """CREATE TABLE IF NOT EXISTS value (
        estimate BLOB, point INTEGER, data BLOB NOT NULL, crc INTEGER NOT NULL, PRIMARY KEY (estimate, point)
    ) WITHOUT ROWID""",
)


class JournalFile:
    """Rows of bytes by (estimate, point), written at once and safe against the death of the process.

    In sqlite's write-ahead mode a committed row survives whatever kills the process; several processes and threads may
    read and write. Each row carries a checksum of itself and its key.

    Args:
        path: of the file; it is made if there is none.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._lock = threading.RLock()
        self._connection: sqlite3.Connection | None = None
        self._pid = 0
        self._header: dict[str, str] = {}

    def open(self, header: dict[str, str]) -> None:
        """Make the file, or check that it is a journal with this header.

        Args:
            header: what all its rows have in common.

        Raises:
            JournalError: if it is another file, of another header, or damaged.
        """
        with self._lock, self._named_errors():
            if self._connection is None or self._pid != os.getpid():  # a connection must not cross a fork
                self._connection, self._header = self._connect(), {}
                self._pid = os.getpid()
            if self._header != header:
                self._check(self._begin(self._connection, header), header)
                self._header = header

    def read(self, estimate: bytes) -> dict[int, bytes]:
        """All rows of an estimate by point.

        Args:
            estimate: its key.

        Returns:
            The rows.

        Raises:
            JournalError: if a row is damaged.
        """
        with self._lock, self._named_errors():
            query = "SELECT point, data, crc FROM value WHERE estimate = ?"
            rows = self._open().execute(query, (estimate,)).fetchall()
        for point, data, crc in rows:
            whole = isinstance(point, int) and isinstance(data, bytes)
            if not whole or crc != _crc(estimate, point, data):
                raise self._damaged(f"the row of point {point!r:.20} does not fit its checksum")
        return {point: data for point, data, _ in rows}

    def write(self, estimate: bytes, rows: dict[int, bytes]) -> None:
        """Add rows in one transaction; those that are there already stay as they are.

        Args:
            estimate: its key.
            rows: by point.

        Raises:
            JournalError: if the file cannot be written.
        """
        with self._lock, self._named_errors(), self._transaction(self._open()) as connection:
            connection.executemany(
                "INSERT OR IGNORE INTO value VALUES (?, ?, ?, ?)",
                [(estimate, point, data, _crc(estimate, point, data)) for point, data in rows.items()],
            )

    def close(self) -> None:
        """Close the file; it is opened again when needed."""
        with self._lock:
            if self._connection is not None and self._pid == os.getpid():
                self._connection.close()
            self._connection = None

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # at the end of the program its modules may be gone
            self.close()

    def _open(self) -> sqlite3.Connection:
        if self._connection is None or self._pid != os.getpid():
            self.open(self._header)
        assert self._connection is not None
        return self._connection

    def _connect(self) -> sqlite3.Connection:
        import sqlite3

        connection = sqlite3.connect(self.path, timeout=_PATIENCE, isolation_level=None, check_same_thread=False)
        give_up = time.monotonic() + _PATIENCE
        while True:
            try:
                # Rows survive the death of the process as soon as they are written; NORMAL orders what goes to disk.
                connection.execute("PRAGMA synchronous = NORMAL")
                if connection.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
                    connection.execute("PRAGMA journal_mode = WAL")
                return connection
            except sqlite3.OperationalError as error:
                # sqlite does not wait by itself for another process that switches the mode.
                if "locked" not in str(error) or time.monotonic() > give_up:
                    connection.close()
                    raise
                time.sleep(0.01)
            except BaseException:
                connection.close()
                raise

    def _begin(self, connection: sqlite3.Connection, header: dict[str, str]) -> dict[str, str]:
        """The file's header, made of this one if it is new."""
        with self._transaction(connection):
            kind = connection.execute("PRAGMA application_id").fetchone()[0]
            if kind != _APPLICATION:
                tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
                if kind or tables:
                    raise JournalError(f"`Journal(path={self.path!r})` is a database of another program.")
                connection.execute(f"PRAGMA application_id = {_APPLICATION}")
                for statement in _SCHEMA:
                    connection.execute(statement)
                connection.executemany("INSERT INTO header VALUES (?, ?)", header.items())
        return dict(connection.execute("SELECT name, text FROM header").fetchall())

    def _check(self, found: dict[str, str], wanted: dict[str, str]) -> None:
        if found.keys() != wanted.keys() and "format" not in found:
            raise self._damaged("it has no header")
        for name, now in wanted.items():
            then = found.get(name, "none")
            if then != now:
                raise JournalError(
                    f"`Journal(path={self.path!r})` is the journal of another run: its {name} is {then}, now it is "
                    f"{now}. Its values may not be those that `fn` would return: give another path, or delete the file."
                )

    @contextlib.contextmanager
    def _transaction(self, connection: sqlite3.Connection) -> Iterator[sqlite3.Connection]:
        connection.execute("BEGIN IMMEDIATE")
        try:
            yield connection
        except BaseException:
            with contextlib.suppress(Exception):
                connection.execute("ROLLBACK")
            raise
        connection.execute("COMMIT")

    @contextlib.contextmanager
    def _named_errors(self) -> Iterator[None]:
        import sqlite3

        try:
            yield
        except sqlite3.OperationalError as error:
            raise JournalError(f"`Journal(path={self.path!r})` cannot be read or written: {error}.") from error
        except (sqlite3.Error, OverflowError, UnicodeDecodeError) as error:
            raise self._damaged(str(error)) from error

    def _damaged(self, how: str) -> JournalError:
        return JournalError(
            f"`Journal(path={self.path!r})` is damaged: {how}. Nothing of it was used; give another path, or delete "
            "the file and evaluate again."
        )

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["path"])  # type: ignore[misc]


def _crc(estimate: bytes, point: int, data: bytes) -> int:
    return zlib.crc32(data, zlib.crc32(point.to_bytes(8, "little", signed=True), zlib.crc32(estimate)))
