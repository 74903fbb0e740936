"""The environment of Dagster's own commands: DAGSTER_HOME and what dagster.yaml reads. Plain code: no dagster."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

from sbp_assets.instance.storage import POSTGRES_URL, schema_name, with_driver
from sbp_assets.settings import Settings, SettingsError, variable
from sbp_assets.settings.deployment import WRITTEN_FOLDERS
from sbp_assets.settings.formats import is_url


def project_file(name: str) -> Path:
    """Return the path of the file `name` at the top of the project, in a wheel that of its copy in the package.

    Raises SettingsError where the installation has no such file.
    """
    package = Path(__file__).resolve().parents[1]
    places = [package / "_project" / name, package.parent / name]
    for path in places:
        if path.is_file():
            return path
    raise SettingsError(f"no {name} in {' or '.join(str(path.parent) for path in places)}: install the project again")


def portable_profile(name: str) -> str:
    """Return `name`, the name or path of a profile, as it holds in any directory."""
    return str(Path(name).resolve()) if name.endswith((".yaml", ".yml")) else name


def dagster_environment(settings: Settings, environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment variables under which Dagster's own commands use this profile's instance; none is secret.

    `environ` is the process's environment unless another is given. Raises SettingsError where the installation lacks
    one of the files that the variables name.
    """
    environ = os.environ if environ is None else environ
    name = environ.get("SBP_PROFILE") or settings.profile
    instance = project_file("deploy/postgres/dagster.yaml" if environ.get(POSTGRES_URL) else "dagster.yaml")
    variables = {
        "DAGSTER_HOME": str(instance.parent),
        # DAGSTER_HOME is the checkout or a folder of site-packages. Telemetry is off in dagster.yaml, but Dagster would
        # still create empty folders for it there.
        "DAGSTER_DISABLE_TELEMETRY": "1",
        "SBP_PROFILE": portable_profile(name),
        "SBP_INSTANCE_DIR": settings.deployment.instance_dir,
        # For the `-w` of Dagster's commands: in a checkout, the file workspace.yaml.
        "SBP_WORKSPACE": str(project_file("workspace.yaml")),
    }
    if environ.get(POSTGRES_URL):
        # Read by libpq itself; Dagster's tables have no schema in their names, so they are looked for here.
        others = re.sub(r"\s*-c search_path=\S+", "", environ.get("PGOPTIONS", ""))
        variables["PGOPTIONS"] = f"{others} -c search_path={schema_name(settings)}".strip()
    return variables


def require_writable(settings: Settings, keys: Iterable[str] = WRITTEN_FOLDERS) -> None:
    """Raise SettingsError, which names it, where one of the folders of `settings` on this machine cannot be written.

    It would be found out hours later, by a step that fails. Of a folder that is not there yet, the nearest one above it
    is tried, and nothing is created: its name may be mistyped.
    """
    for key in keys:
        folder = getattr(settings.deployment, key)
        if folder is None or is_url(folder):
            continue
        there = next(path for path in (Path(folder), *Path(folder).parents) if os.path.lexists(path))
        try:
            with tempfile.TemporaryFile(dir=there):
                pass
        except OSError as error:
            raise SettingsError(
                f"deployment.{key} {folder} cannot be written: {error.strerror}. Allow it, or name another folder: "
                f"{variable('deployment', key)}"
            ) from None


def activate_instance(settings: Settings) -> None:
    """Put the variables that Dagster reads into this process's environment.

    They replace what is there: left over from another profile's `sbp env`, it would mix the runs of two experiments.
    Raises SettingsError where $SBP_POSTGRES_URL is set to no URL of a PostgreSQL database.
    """
    os.environ.update(dagster_environment(settings))
    if os.environ.get(POSTGRES_URL):
        os.environ[POSTGRES_URL] = with_driver(os.environ[POSTGRES_URL])
