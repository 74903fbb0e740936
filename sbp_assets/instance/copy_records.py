"""Dagster's run and event storage of a profile, copied from SQLite into the PostgreSQL schema of the same profile.

Both hold the same tables, but SQLite spreads them over files: the log of each run has one of its own, and events that
concern assets, checks or a run's status are in the index as well.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError

from sbp_assets.dagster_support.internals import (
    ASSET_CHECK_EVENTS,
    ASSET_EVENTS,
    EVENT_TYPE_TO_PIPELINE_RUN_STATUS,
    FINISHED_STATUSES,
    RunsTable,
    RunStorageSqlMetadata,
    ScheduleStorageSqlMetadata,
    SqlEventLogStorageMetadata,
    SqlEventLogStorageTable,
)
from sbp_assets.settings import SettingsError

# The other instance has its own rows of these, or writes them itself.
NOT_COPIED = {
    "secondary_indexes",
    "instance_info",
    "daemon_heartbeats",
    "concurrency_limits",
    "concurrency_slots",
    "pending_steps",
}
ROWS_AT_ONCE = 1000
# Kept in the index too, under the ids by which other tables and the provenance of artifacts name them.
INDEXED = sorted(kind.value for kind in {*ASSET_EVENTS, *ASSET_CHECK_EVENTS, *EVENT_TYPE_TO_PIPELINE_RUN_STATUS})


def copy_records(
    instance_dir: str, postgres_url: str, track: Callable[[Sequence[str]], Iterable[str]] = lambda runs: runs
) -> int:
    """Copy the storage below `instance_dir` into the tables of `postgres_url`, all or nothing; returns how many runs.

    `track` hands on the runs one by one, and may show the progress. The tables exist (`DagsterInstance.get()` creates
    them) and are empty. Raises SettingsError where they are not empty, where there is nothing to copy, where a run has
    not ended, or for the storage of an older Dagster. Nothing is removed.
    """
    history = Path(instance_dir) / "history"
    if not (history / "runs.db").is_file():
        raise SettingsError(f"no run storage in SQLite below {instance_dir}: there is nothing to copy")
    engine = sa.create_engine(postgres_url, poolclass=sa.NullPool)
    try:
        with engine.begin() as target, _opened(history / "runs.db") as runs:
            states = dict(runs.execute(sa.select(RunsTable.c.run_id, RunsTable.c.status)).tuples().all())
            finished = {status.value for status in FINISHED_STATUSES}
            if unfinished := sorted(run for run, status in states.items() if status not in finished):
                raise SettingsError(
                    f"runs that have not ended, as {unfinished[0]}: {len(unfinished)}. Stop the daemon, let them end "
                    "or cancel them, without $SBP_POSTGRES_URL; `sbp run` there marks killed ones as failed"
                )
            files = {
                history / "runs.db": RunStorageSqlMetadata,
                history / "runs" / "index.db": SqlEventLogStorageMetadata,
                Path(instance_dir) / "schedules" / "schedules.db": ScheduleStorageSqlMetadata,
            }
            tables = {
                path: [table for table in metadata.sorted_tables if table.name not in NOT_COPIED]
                for path, metadata in files.items()
            }
            for table in (table for some in tables.values() for table in some):
                if target.execute(sa.select(table).limit(1)).first():
                    schema = target.scalar(sa.select(sa.func.current_schema()))
                    raise SettingsError(
                        f"schema {schema} of the database already has rows in {table.name}: it must be empty to be "
                        f"copied to. Where none of it is needed: DROP SCHEMA {schema} CASCADE"
                    )
            for path, some in tables.items():
                with _opened(path) as source:
                    for table in some:
                        _copy(source.execution_options(yield_per=ROWS_AT_ONCE).execute(sa.select(table)), table, target)
                        if "id" in table.c:
                            _count_on(table, target)
            events = SqlEventLogStorageTable
            kind = events.c.dagster_event_type
            rest = sa.select(*(column for column in events.c if column.name != "id")).order_by(events.c.id)
            rest = rest.where(kind.is_(None) | kind.not_in(INDEXED))
            for run in track(list(states)):
                # A run that never began has no log.
                if (log := history / "runs" / f"{run}.db").is_file():
                    with _opened(log) as source:
                        _copy(source.execute(rest), events, target)
    except DBAPIError as error:
        advice = "nothing was copied"
        if isinstance(error.orig, sqlite3.Error):
            advice = "the storage of an older Dagster is brought up to date by `dagster instance migrate`"
            advice += ", without $SBP_POSTGRES_URL"
        raise SettingsError(f"{str(error.orig).strip()}: {advice}") from None
    finally:
        engine.dispose()
    return len(states)


@contextmanager
def _opened(path: Path) -> Iterator[sa.Connection]:
    """Yield a read-only connection to the SQLite file at `path`."""
    # By a function: in a URL of SQLAlchemy's, a path with '?' would end there.
    opened = lambda: sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)  # noqa: E731
    engine = sa.create_engine("sqlite://", creator=opened, poolclass=sa.NullPool)
    try:
        with engine.connect() as connection:
            yield connection
    finally:
        engine.dispose()


def _copy(rows: sa.CursorResult, table: sa.Table, target: sa.Connection) -> None:
    for batch in rows.mappings().partitions(ROWS_AT_ONCE):
        target.execute(sa.insert(table), [dict(row) for row in batch])


def _count_on(table: sa.Table, target: sa.Connection) -> None:
    """Make the next row's id follow the highest copied one."""
    highest = target.scalar(sa.select(sa.func.max(table.c.id)))
    if highest is not None:
        target.execute(sa.select(sa.func.setval(sa.func.pg_get_serial_sequence(table.name, "id"), highest)))
