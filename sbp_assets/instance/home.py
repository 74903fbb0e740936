"""Where Dagster keeps its records: SQLite, or PostgreSQL where $SBP_POSTGRES_URL names one. Plain code: no dagster.

In PostgreSQL every artifact store has a schema of its own, so that two profiles may share a database and never look at
each other's records. The URL holds a password: it is read from the environment and put nowhere else.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
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


def project_file(name: str) -> Path:
    """One of the files at the top of the project: in a wheel the copy that the build has put into the package."""
    package = Path(__file__).resolve().parents[1]
    places = [package / "_project" / name, package.parent / name]
    for path in places:
        if path.is_file():
            return path
    raise SettingsError(f"no {name} in {' or '.join(str(path.parent) for path in places)}: install the project again")


def dagster_environment(settings: Settings, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """Environment variables under which Dagster's own commands use this profile's instance. None is a secret."""
    name = environ.get("SBP_PROFILE") or settings.profile
    instance = project_file("deploy/postgres/dagster.yaml" if environ.get(POSTGRES_URL) else "dagster.yaml")
    variables = {
        "DAGSTER_HOME": str(instance.parent),
        # That is the checkout or a folder of site-packages. Telemetry is off in dagster.yaml, but Dagster would still
        # make empty folders for it there.
        "DAGSTER_DISABLE_TELEMETRY": "1",
        # A profile of one's own is named by its path, which has to hold in any directory.
        "SBP_PROFILE": str(Path(name).resolve()) if name.endswith((".yaml", ".yml")) else name,
        "SBP_INSTANCE_DIR": settings.deployment.instance_dir,
        # For the `-w` of Dagster's commands: in a checkout, the file workspace.yaml.
        "SBP_WORKSPACE": str(project_file("workspace.yaml")),
    }
    if environ.get(POSTGRES_URL):
        # Read by libpq itself; Dagster's tables have no schema in their names, so they are looked for here.
        others = re.sub(r"\s*-c search_path=\S+", "", environ.get("PGOPTIONS", ""))
        variables["PGOPTIONS"] = f"{others} -c search_path={schema(settings)}".strip()
    return variables


def activate(settings: Settings) -> None:
    """Put what Dagster reads into this process's environment.

    Set, not defaulted: left over from another profile's `sbp env`, it would mix two experiments' records.
    """
    os.environ.update(dagster_environment(settings))
    if os.environ.get(POSTGRES_URL):
        os.environ[POSTGRES_URL] = with_driver(os.environ[POSTGRES_URL])


def with_driver(url: str) -> str:
    """`url` naming the driver that dagster-postgres is written for; SQLAlchemy 2.1 takes another by default."""
    scheme, _, rest = url.partition(":")
    if scheme not in ("postgresql", "postgres", DRIVER) or not rest.startswith("//"):
        raise SettingsError(_WRONG)
    return f"{DRIVER}:{rest}"


def schema(settings: Settings) -> str:
    """PostgreSQL schema of the records that belong to this profile's artifact store, wherever it is worked on."""
    if settings.deployment.postgres_schema:
        return settings.deployment.postgres_schema
    store = hashlib.sha256(settings.deployment.data_dir.encode()).hexdigest()[:8]
    return f"sbp_{re.sub(r'[^a-z0-9_]', '_', settings.profile.lower())[:40]}_{store}"


def prepare(settings: Settings) -> None:
    """Make what the instance needs and does not make itself; SettingsError where the database cannot be used."""
    Path(settings.deployment.instance_dir).mkdir(parents=True, exist_ok=True)
    if os.environ.get(POSTGRES_URL):
        from sqlalchemy.exc import ProgrammingError
        from sqlalchemy.schema import CreateSchema

        with _database() as connection:
            if _has_schema(connection, schema(settings)):
                return
            try:
                connection.execute(CreateSchema(schema(settings), if_not_exists=True))
            except ProgrammingError as error:
                if not _has_schema(connection, schema(settings)):  # else another process was faster
                    raise SettingsError(
                        f"${POSTGRES_URL}: {str(error.orig).strip()}. Let someone who may run, in that database: "
                        f"CREATE SCHEMA {schema(settings)} AUTHORIZATION the user of the URL"
                    ) from None


def exists(settings: Settings) -> bool:
    """Whether the profile has an instance."""
    if os.environ.get(POSTGRES_URL):
        with _database() as connection:
            return _has_schema(connection, schema(settings))
    return Path(settings.deployment.instance_dir).is_dir()


@contextmanager
def exclusive_instance(settings: Settings, what: str) -> Iterator[None]:
    """Hold the instance for the block, doing `what`; RuntimeError if another process has it, on whatever machine."""
    with exclusive(Path(settings.deployment.instance_dir), what):
        if not os.environ.get(POSTGRES_URL):
            yield
            return
        from sqlalchemy import func, select

        with _database() as connection:
            # Held by the connection: it ends with the process.
            if not connection.scalar(select(func.pg_try_advisory_lock(func.hashtextextended(schema(settings), 0)))):
                raise RuntimeError(
                    f"a process on another machine is at work in schema {schema(settings)} of the database; "
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
