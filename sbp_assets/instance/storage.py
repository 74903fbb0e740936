"""Run and event storage: SQLite, or PostgreSQL where $SBP_POSTGRES_URL names a database. Plain code: no dagster.

In PostgreSQL every artifact store has a schema of its own, so that two profiles may share a database and never see
each other's runs. The URL holds a password: it is read from the environment and put nowhere else.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from sbp_assets.settings import Settings, SettingsError
from sbp_assets.storage.artifacts import exclusive

if TYPE_CHECKING:
    from sqlalchemy import Connection

POSTGRES_URL = "SBP_POSTGRES_URL"
DRIVER = "postgresql+psycopg2"
_WRONG = (  # never with its value
    f"${POSTGRES_URL} is no postgresql://user:password@host:port/database, with what is special in a password "
    "percent-encoded (@ as %40, / as %2F)"
)


class InstanceInUseError(RuntimeError):
    """Another process holds the instance; the message says what to do about it."""


def with_driver(url: str) -> str:
    """Return `url` with the driver that dagster-postgres is written for; SQLAlchemy 2.1 takes another by default.

    Raises SettingsError where `url` is no URL of a PostgreSQL database.
    """
    scheme, _, rest = url.partition(":")
    if scheme not in ("postgresql", "postgres", DRIVER) or not rest.startswith("//"):
        raise SettingsError(_WRONG)
    return f"{DRIVER}:{rest}"


def schema_name(settings: Settings) -> str:
    """Return the name of the PostgreSQL schema of this profile's artifact store, the same on every machine."""
    if settings.deployment.postgres_schema:
        return settings.deployment.postgres_schema
    store = hashlib.sha256(settings.deployment.data_dir.encode()).hexdigest()[:8]
    return f"sbp_{re.sub(r'[^a-z0-9_]', '_', settings.profile.lower())[:40]}_{store}"


def prepare_instance(settings: Settings) -> None:
    """Create what the instance needs and does not create itself: its folder, and its schema in PostgreSQL.

    Raises SettingsError where the folder cannot be created or the database cannot be used.
    """
    folder = settings.deployment.instance_dir
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(f"deployment.instance_dir {folder} cannot be created: {error.strerror}") from None
    if os.environ.get(POSTGRES_URL):
        from sqlalchemy.exc import ProgrammingError
        from sqlalchemy.schema import CreateSchema

        with _database() as connection:
            if _has_schema(connection, schema_name(settings)):
                return
            try:
                connection.execute(CreateSchema(schema_name(settings), if_not_exists=True))
            except ProgrammingError as error:
                if not _has_schema(connection, schema_name(settings)):  # otherwise another process was faster
                    raise SettingsError(
                        f"${POSTGRES_URL}: {str(error.orig).strip()}. Let someone who may run, in that database: "
                        f"CREATE SCHEMA {schema_name(settings)} AUTHORIZATION the user of the URL"
                    ) from None


def instance_exists(settings: Settings) -> bool:
    """Return whether the profile has an instance; raise SettingsError where the database cannot be used."""
    if os.environ.get(POSTGRES_URL):
        with _database() as connection:
            return _has_schema(connection, schema_name(settings))
    return Path(settings.deployment.instance_dir).is_dir()


@contextmanager
def exclusive_instance(settings: Settings, what: str) -> Iterator[None]:
    """Hold the instance for the block, which does `what`, a phrase for the others' message.

    Raises InstanceInUseError if another process holds it, on whatever machine; SettingsError where the database cannot
    be used.
    """
    with ExitStack() as stack:
        try:
            stack.enter_context(exclusive(Path(settings.deployment.instance_dir), what))
        except RuntimeError as error:
            raise InstanceInUseError(str(error)) from None
        if os.environ.get(POSTGRES_URL):
            from sqlalchemy import func, select

            connection = stack.enter_context(_database())
            # Held by the connection: it ends with the process.
            if not connection.scalar(
                select(func.pg_try_advisory_lock(func.hashtextextended(schema_name(settings), 0)))
            ):
                raise InstanceInUseError(
                    f"a process on another machine is at work in schema {schema_name(settings)} of the database; "
                    "wait for it or stop it"
                )
        yield


@contextmanager
def _database() -> Iterator[Connection]:
    from sqlalchemy import create_engine, make_url
    from sqlalchemy.exc import ArgumentError, DBAPIError
    from sqlalchemy.pool import NullPool

    try:
        url = make_url(with_driver(os.environ[POSTGRES_URL]))
        engine = create_engine(url, isolation_level="AUTOCOMMIT", poolclass=NullPool)
    except (ArgumentError, ValueError):
        raise SettingsError(_WRONG) from None
    except ImportError:
        raise SettingsError(f"${POSTGRES_URL} needs dagster-postgres, the extra `postgres` of this project") from None
    if "@" in (url.host or "") or "@" in (url.database or ""):
        # What follows an @ of the password that is not written %40 passes for the host, which errors name.
        raise SettingsError(_WRONG)
    if "options" in url.query:
        raise SettingsError(
            f"${POSTGRES_URL} sets `options`, which hides the schema that keeps profiles apart: use $PGOPTIONS instead"
        )
    try:
        connection = engine.connect()
    except DBAPIError as error:
        raise SettingsError(f"${POSTGRES_URL} cannot be used: {str(error.orig).strip()}") from None
    try:
        yield connection
    finally:
        with suppress(DBAPIError):  # lost meanwhile
            connection.close()


def _has_schema(connection: Connection, name: str) -> bool:
    from sqlalchemy import inspect

    return inspect(connection).has_schema(name)
