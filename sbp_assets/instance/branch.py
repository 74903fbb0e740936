"""Branches: a copy of the finished artifacts with other settings, where only what they change is re-materialised.

A branch is a second artifact store and instance beside the profile's own, in `<data_dir>.branches/<name>`. Artifacts
are hard links to the finished ones, so that a branch takes no space until it materialises something: a write replaces
a file and never changes one in place.
"""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sbp_assets.instance.storage import POSTGRES_URL, exclusive_instance
from sbp_assets.settings import Experiment, Settings, SettingsError, as_text, load_settings, variable
from sbp_assets.settings.deployment import EXPERIMENT_FOLDERS

RECORD = "branch.json"  # the settings that the branch changes


def overrides(changes: Mapping[str, Any]) -> dict[str, str]:
    """Return the environment variables that set the experiment's settings `changes`, {dotted key: value}."""
    return {variable("experiment", *key.split(".")): as_text(value) for key, value in changes.items()}


def parse_changes(changes: Sequence[str]) -> dict[str, str]:
    """Return {dotted key: text} of `key=text` arguments; a text is read as an environment variable's is.

    Raises SettingsError where an argument has no key or no equals sign.
    """
    parsed = {}
    for change in changes:
        key, equals, text = change.partition("=")
        if not equals or not key:
            raise SettingsError(f"{change!r} changes nothing: write key=value, as in synthesizer.epochs=2")
        parsed[key] = text
    return parsed


@dataclass(frozen=True)
class Branch:
    """Name of a branch, and the experiment's settings that it changes, {dotted key: value}."""

    name: str
    changes: Mapping[str, Any]


def branch_of(data_dir: str) -> Branch | None:
    """Return the branch whose artifact store `data_dir` is; None where it is a profile's own."""
    record = Path(data_dir).parent / RECORD
    return Branch(record.parent.name, json.loads(record.read_text(encoding="utf-8"))) if record.is_file() else None


def make_branch(settings: Settings, name: str, changes: Mapping[str, Any]) -> None:
    """Create branch `name` of the profile's store, with dotted `changes` of the experiment, unless it exists.

    Raises SettingsError where the changes are impossible, where an existing branch of that name has other settings, or
    where the profile has no artifacts that can be linked; InstanceInUseError where `sbp run` is writing them.
    """
    home, deployment = _home(settings, name), settings.deployment
    changed = _changed(home, changes)
    if home.exists():
        made = json.loads((home / RECORD).read_text(encoding="utf-8"))
        # Settings are compared, not texts: 2 and 2.0 are the same number of epochs.
        if _changed(home, made) != changed:
            raise SettingsError(f"branch {name} exists and changes {made}: take another name, or delete {home}")
        return
    if not Path(deployment.data_dir).is_dir():
        raise SettingsError(f"nothing to branch from in {deployment.data_dir}: first `sbp run -p {settings.profile}`")
    # It appears as a whole or not at all, and its artifacts and storage belong together.
    with exclusive_instance(settings, "making a branch"):
        temporary = home.parent / f".{name}.partial"
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            shutil.copytree(deployment.data_dir, temporary / "artifacts", copy_function=os.link)
        except (OSError, shutil.Error) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            raise SettingsError(f"{deployment.data_dir} cannot be linked beside itself: {error}") from error
        shutil.copytree(
            deployment.instance_dir,
            temporary / "instance",
            copy_function=_copy_record,
            ignore=shutil.ignore_patterns("lock", "*-wal", "*-shm", "*-journal", "*-new"),
        )
        (temporary / RECORD).write_text(json.dumps(dict(changes)), encoding="utf-8")
        temporary.rename(home)


def branch_environment(settings: Settings, name: str) -> dict[str, str]:
    """Return the environment variables of branch `name`, under which every command acts on it.

    Raises SettingsError where there is no such branch.
    """
    home = _home(settings, name)
    if not home.exists():
        known = sorted(path.name for path in home.parent.glob("[!.]*")) if home.parent.is_dir() else []
        raise SettingsError(f"no branch {name} of {settings.profile}; there are {', '.join(known) or 'none'}")
    changes = json.loads((home / RECORD).read_text(encoding="utf-8"))
    return _environment(home, changes)


def run_branch(settings: Settings, name: str, changes: Mapping[str, Any]) -> Path:
    """Run `sbp run` in branch `name`, which is created where it does not exist; returns the branch's artifact store.

    Raises what make_branch does, and subprocess.CalledProcessError where the run fails; called again, it resumes.
    """
    make_branch(settings, name, changes)
    environment = {**os.environ, **branch_environment(settings, name)}
    # Safe: another checkout in the current directory is not this one.
    subprocess.run([sys.executable, "-P", "-m", "sbp_assets.cli", "run"], env=environment, check=True)
    return _home(settings, name) / "artifacts"


def _environment(home: Path, changes: Mapping[str, Any]) -> dict[str, str]:
    folders = {variable("deployment", key): str(home / folder) for key, folder in EXPERIMENT_FOLDERS.items()}
    return folders | overrides(changes)


def _changed(home: Path, changes: Mapping[str, Any]) -> Experiment:
    """Return the experiment of a branch in `home` with `changes`; raise SettingsError where they are impossible."""
    try:
        return load_settings(environ={**os.environ, **_environment(home, changes)}).experiment
    except SettingsError as error:
        raise SettingsError(f"the changes of {', '.join(changes)} are refused: {error}") from error


def _home(settings: Settings, name: str) -> Path:
    data = settings.deployment.data_dir
    if not name.replace("_", "").isalnum():
        raise SettingsError(f"branch {name!r}: use letters, digits and underscores")
    if "://" in data:
        raise SettingsError(f"branches need artifacts in a local directory, and data_dir is {data}")
    if os.environ.get(POSTGRES_URL):
        raise SettingsError(
            f"branches copy the run and event storage, which works in SQLite alone: unset ${POSTGRES_URL}"
        )
    return Path(f"{data}.branches") / name


def _copy_record(source: str, target: str) -> str:
    """Copy a file of an instance; a database through SQLite, since a webserver may be writing it."""
    if not source.endswith(".db"):
        return str(shutil.copy2(source, target))
    with closing(sqlite3.connect(source)) as live, closing(sqlite3.connect(target)) as copy:
        live.backup(copy)
    return target
