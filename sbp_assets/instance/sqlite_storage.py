"""Dagster's storage in SQLite with files that stay open, which dagster.yaml names.

Dagster opens a file for each statement, with an engine of its own that compiles the statement again, and sets up the
tables of each new run's event log with Alembic. `python -m benchmarks.event_log` prints what that costs. The files are
the same here, in the same places: an instance may be opened by either.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

import sqlalchemy as sa

from sbp_assets.dagster_support.internals import (
    INDEX_SHARD_NAME,
    SQLITE_BUSY_TIMEOUT_SECONDS,
    ConfigurableClassData,
    DagsterSqliteStorage,
    SqliteEventLogStorage,
    SqliteRunStorage,
)
from sbp_assets.instance.open_files import OpenFiles

OPEN_LOGS = 8  # Four runs at a time write theirs (dagster.yaml); three descriptors and some 0.4 MB of PATH-wal each.
_RUNS_TIMEOUT_SECONDS = 5  # what Dagster's run storage waits for a lock, too: the default of sqlite3


class EventLogStorage(SqliteEventLogStorage):
    """Dagster's event log in SQLite, of which the index and the logs of the `OPEN_LOGS` runs used last stay open.

    The file of a new run is a copy of the first one that this object has set up.
    """

    def __init__(self, base_dir: str, inst_data: ConfigurableClassData | None = None) -> None:
        self._base_dir = os.path.abspath(base_dir)
        self._template: bytes | None = None
        self._tables: set[str] = set()
        always = frozenset({self.path_for_shard(INDEX_SHARD_NAME)})
        self._files = OpenFiles(OPEN_LOGS, SQLITE_BUSY_TIMEOUT_SECONDS, always, self._create, self._prepare)
        super().__init__(base_dir, inst_data)

    def has_table(self, table_name: str) -> bool:
        """Return whether the index has a table of this name."""
        # Asked for within transactions: not by the connection that they use. A table that is there stays.
        if table_name not in self._tables and super().has_table(table_name):
            self._tables.add(table_name)
        return table_name in self._tables

    def delete_events(self, run_id: str) -> None:
        """Remove the events of a run from the index, and the file of its log."""
        super().delete_events(run_id)
        self._own_files().remove(self.path_for_shard(run_id))

    def wipe(self) -> None:
        """Remove all events and the logs of all runs."""
        self._own_files().close()
        super().wipe()

    def dispose(self) -> None:
        """Stop watching files, and close all."""
        super().dispose()
        self._own_files().close()

    @contextmanager
    def _connect(self, shard: str) -> Iterator[sa.Connection]:
        files = self._own_files()
        with files.lock, files.transaction(self.path_for_shard(shard)) as connection:
            yield connection

    def _own_files(self) -> OpenFiles:
        self._files = self._files.of_this_process()
        return self._files

    def _create(self, path: str) -> None:
        """Create the log of a run with its tables.

        It appears as a whole, and never in place of one that another process has created meanwhile. Where this cannot
        be done, for example for a full disk, there is no file: `_prepare` then does as Dagster does, and fails as it
        would.
        """
        partial = f"{path}.{os.getpid()}-new"
        with suppress(OSError, sa.exc.DBAPIError):
            try:
                if self._template is None:
                    self._initdb(_engine(partial))
                    self._template = Path(partial).read_bytes()
                else:
                    # With the mode of a file that SQLite creates.
                    with open(os.open(partial, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o644), "wb") as file:
                        file.write(self._template)
                        file.flush()
                        os.fsync(file.fileno())
                os.link(partial, path)
            finally:
                Path(partial).unlink(missing_ok=True)

    def _prepare(self, path: str, connection: sa.Connection) -> None:
        """Set up the tables of a file that has none."""
        stamped = connection.dialect.has_table(connection, "alembic_version")
        if not stamped or not connection.scalar(sa.text("SELECT version_num FROM alembic_version")):
            connection.rollback()
            self._initdb(_engine(path))


class RunStorage(SqliteRunStorage):
    """Dagster's run storage in SQLite, whose file stays open."""

    def __init__(self, conn_string: str, inst_data: ConfigurableClassData | None = None) -> None:
        super().__init__(conn_string, inst_data)
        self._path = str(sa.make_url(conn_string).database)
        self._files = OpenFiles(1, _RUNS_TIMEOUT_SECONDS)

    @contextmanager
    def connect(self) -> Iterator[sa.Connection]:
        """Yield a connection in a transaction; several threads may have one, and a thread several, as in Dagster's."""
        self._files = files = self._files.of_this_process()
        if files.lock.acquire(blocking=False):
            try:
                with files.transaction(self._path) as connection:
                    yield connection
            finally:
                files.lock.release()
        else:
            with super().connect() as connection:
                yield connection

    def dispose(self) -> None:
        """Close the file."""
        super().dispose()
        self._files.of_this_process().close()


class SqliteStorage(DagsterSqliteStorage):
    """Dagster's storage in SQLite with the event log and the run storage above; of schedules it is Dagster's own."""

    def __init__(self, base_dir: str, inst_data: ConfigurableClassData | None = None) -> None:
        super().__init__(base_dir, inst_data)
        # Both exist: Dagster's have created them, or found them.
        self._run_storage = RunStorage(self._run_storage._conn_string)
        self._event_log_storage = EventLogStorage(self._event_log_storage._base_dir)

    @classmethod
    def from_config_value(cls, inst_data: ConfigurableClassData, config_value: Any) -> Self:
        """Return the storage that a dagster.yaml describes."""
        return cls.from_local(inst_data=inst_data, **config_value)


def _engine(path: str) -> sa.Engine:
    """Return an engine that closes the file after each use, as Dagster's do."""
    url = sa.URL.create("sqlite", database=path)
    return sa.create_engine(url, poolclass=sa.NullPool, connect_args={"timeout": SQLITE_BUSY_TIMEOUT_SECONDS})
