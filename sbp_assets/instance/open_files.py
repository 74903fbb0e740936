"""SQLite files that stay open between uses, all of them behind one SQLAlchemy engine. Plain code: no dagster."""

from __future__ import annotations

import os
import sqlite3
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError, OperationalError


class _Connection(sqlite3.Connection):
    """A connection that stays open when the engine closes it."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._cursors: list[sqlite3.Cursor] = []

    def cursor(self, factory: Any = sqlite3.Cursor) -> Any:
        """Return a cursor, which lives until the connection goes back to the engine."""
        cursor = super().cursor(factory)
        self._cursors.append(cursor)
        return cursor

    def close(self) -> None:
        """End every cursor. With rows that nobody fetched, later reads would still see the file as it is now."""
        for cursor in self._cursors:
            cursor.close()
        self._cursors.clear()

    def really_close(self) -> None:
        """Close the file."""
        self.close()
        super().close()


@dataclass
class _File:
    connection: _Connection
    identity: tuple[int, int] | None
    prepared: bool = False


def _leave_to_sqlite(path: str) -> None:
    """Create no file: SQLite makes an empty one."""


def _as_it_is(path: str, connection: sa.Connection) -> None:
    """Prepare nothing."""


@dataclass(eq=False)
class OpenFiles:
    """Connections to SQLite files that stay open: to those of `always`, and to the `keep` others that were used last.

    A file has one connection, and one of them is used at a time, by whichever thread holds `lock`. They share an
    engine, so that a statement is compiled once for all files. `create` is called with the path of a file that is not
    there, `prepare` with that of each newly opened file and a connection to it. A file that another process has locked
    is waited for `timeout` seconds.
    """

    keep: int
    timeout: float
    always: frozenset[str] = frozenset()
    create: Callable[[str], None] = _leave_to_sqlite
    prepare: Callable[[str, sa.Connection], None] = _as_it_is
    lock: threading.Lock = field(init=False, default_factory=threading.Lock)
    _process: int = field(init=False, default_factory=os.getpid)
    _files: dict[str, _File] = field(init=False, default_factory=dict)  # the one used last comes last
    _wanted: str = field(init=False, default="")
    _of_the_parent: OpenFiles | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        # The pool hands on what `_connection` returns, and closes it after each use, which leaves it open.
        self._engine = sa.create_engine("sqlite://", creator=self._connection, poolclass=sa.NullPool)
        # Locks belong to a process. A fork would copy SQLite's record of them, which would be wrong in the child.
        method = weakref.WeakMethod(self._close_unless_used)
        os.register_at_fork(before=lambda: (close := method()) and close())

    def of_this_process(self) -> OpenFiles:
        """Return this object, or after a fork another one in its place.

        Before a fork all files are closed, unless one is used just then, by another thread of the parent. That one must
        not be closed here, as the loss of the last reference to it would do.
        """
        if self._process == os.getpid():
            return self
        own = replace(self)
        own._of_the_parent = self
        return own

    @contextmanager
    def transaction(self, path: str) -> Iterator[sa.Connection]:
        """Yield a connection to the file at `path` in a transaction, which is committed unless the block raises.

        The caller holds `lock`. Raises sqlalchemy.exc.DBAPIError where the file cannot be used. It is closed then, and
        opened again the next time.
        """
        self._wanted = path
        try:
            with self._engine.connect() as connection:
                file = self._files[path]
                if not file.prepared:
                    self.prepare(path, connection)
                    connection.rollback()
                    file.prepared = True
                before = file.connection.total_changes
                with connection.begin():
                    yield connection
            if file.connection.total_changes != before:
                # Until a connection is closed, what is written is in PATH-wal alone. Who watches the file itself, as
                # the webserver does for the live log of a run, is told by its time.
                with suppress(OSError):  # it is written all the same
                    os.utime(path)
        except BaseException as error:
            self._close(path)
            if isinstance(error, DBAPIError) and getattr(error.orig, "sqlite_errorname", "") == "SQLITE_IOERR_SHMSIZE":
                # There is no space for PATH-shm, which SQLite calls an I/O error.
                full = sqlite3.OperationalError("database or disk is full")
                raise OperationalError(error.statement, error.params, full) from error
            raise
        others = [path for path in self._files if path not in self.always]
        for path in others[: max(len(others) - self.keep, 0)]:
            self._close(path)

    def close(self) -> None:
        """Close all files; one that is used again is opened again."""
        with self.lock:
            self._close_all()

    def remove(self, path: str) -> None:
        """Close the file at `path` and remove it, if it is there."""
        with self.lock:
            self._close(path)
            for name in (path, f"{path}-wal", f"{path}-shm"):
                Path(name).unlink(missing_ok=True)

    def _connection(self) -> _Connection:
        path = self._wanted
        if path in self._files and self._files[path].identity != _identity(path):
            self._close(path)  # another file, or none, has taken its place
        file = self._files.pop(path, None)
        if file is None:
            if not os.path.exists(path):
                self.create(path)
            # From any thread, one at a time.
            connection = sqlite3.connect(path, timeout=self.timeout, check_same_thread=False, factory=_Connection)
            file = _File(connection, _identity(path))
        self._files[path] = file
        return file.connection

    def _close_unless_used(self) -> None:
        if self.lock.acquire(blocking=False):
            try:
                self._close_all()
            finally:
                self.lock.release()

    def _close_all(self) -> None:
        for path in list(self._files):
            self._close(path)

    def _close(self, path: str) -> None:
        if (file := self._files.pop(path, None)) is not None:
            file.connection.really_close()


def _identity(path: str) -> tuple[int, int] | None:
    try:
        state = os.stat(path)
    except FileNotFoundError:
        return None
    return state.st_dev, state.st_ino
