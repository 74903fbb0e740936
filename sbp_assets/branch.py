"""Other settings on a copy of finished artifacts: only what they change is made anew.

A branch is a second artifact store and instance beside the profile's own. Artifacts are hard links to the finished
ones, so that a branch costs no space until it makes something: a write replaces a file and never changes one in place.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from sbp_assets.experiment import ENV_PREFIX, ENV_SEPARATOR, Settings, SettingsError
from sbp_assets.storage.artifacts import exclusive

DIRECTORIES = ("data_dir", "work_dir", "instance_dir")


def override(key: str, value: Any) -> tuple[str, str]:
    """Environment variable, and its text, that sets the experiment's dotted `key`."""
    return f"{ENV_PREFIX}EXPERIMENT{ENV_SEPARATOR}{key.upper().replace('.', ENV_SEPARATOR)}", yaml.safe_dump(
        value, default_flow_style=True
    ).removesuffix("\n").removesuffix("\n...")


def parse_changes(changes: Sequence[str]) -> dict[str, Any]:
    """{dotted key: value} of `key=value` arguments, values read as YAML; SettingsError where one is none."""
    parsed = {}
    for change in changes:
        key, equals, value = change.partition("=")
        if not equals or not key:
            raise SettingsError(f"{change!r} changes nothing: write key=value, as in synthesizer.epochs=2")
        try:
            parsed[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise SettingsError(f"{change!r}: the value is not YAML: {error}") from None
    return parsed


def make_branch(settings: Settings, name: str) -> dict[str, str]:
    """Environment variables of branch `name` of the profile, whose store is made where it does not exist yet.

    Raises SettingsError where the profile has no finished artifacts or keeps them in an object store, which has no
    links; RuntimeError where `sbp run` is writing them.
    """
    deployment = settings.deployment
    if not name.replace("_", "").isalnum():
        raise SettingsError(f"branch {name!r}: use letters, digits and underscores")
    if "://" in deployment.data_dir:
        raise SettingsError(f"branches need artifacts in a local directory, and data_dir is {deployment.data_dir}")
    if not Path(deployment.data_dir).is_dir():
        raise SettingsError(
            f"nothing to branch from in {deployment.data_dir}: run `sbp run -p {settings.profile}` first"
        )
    home = Path(deployment.data_dir).parent / "branches" / name
    directories = {key: home / Path(getattr(deployment, key)).name for key in DIRECTORIES}
    # Made whole or not at all, and from artifacts and records that belong together.
    if not home.exists():
        with exclusive(Path(deployment.instance_dir), "branching"):
            temporary = home.parent / f".{name}.partial"
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.copytree(
                deployment.data_dir, temporary / directories["data_dir"].name, copy_function=os.link, symlinks=True
            )
            shutil.copytree(
                deployment.instance_dir,
                temporary / directories["instance_dir"].name,
                ignore=shutil.ignore_patterns("lock"),
            )
            temporary.rename(home)
    return {f"{ENV_PREFIX}DEPLOYMENT{ENV_SEPARATOR}{key.upper()}": str(path) for key, path in directories.items()}


def run_branch(settings: Settings, name: str, overrides: Mapping[str, Any], *arguments: str) -> Path:
    """`sbp run` in branch `name` with dotted `overrides` of the experiment; returns the branch's artifact store.

    `arguments` are further ones of `sbp run`. Raises subprocess.CalledProcessError where the run fails; run again, it
    goes on where it stopped.
    """
    directories = make_branch(settings, name)
    environment = {**os.environ, **directories, **dict(override(key, value) for key, value in overrides.items())}
    subprocess.run([sys.executable, "-m", "sbp_assets.cli", "run", *arguments], env=environment, check=True)
    return Path(directories[f"{ENV_PREFIX}DEPLOYMENT{ENV_SEPARATOR}DATA_DIR"])
