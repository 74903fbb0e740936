"""The option --profile: loading its settings, and which profile's environment the shell has."""

from __future__ import annotations

import os
import shlex
from typing import Annotated

import typer

from sbp_assets.cli.errors import CommandError
from sbp_assets.instance.home import activate_instance, portable_profile
from sbp_assets.instance.storage import prepare_instance
from sbp_assets.settings import DEFAULT_PROFILE, Settings, load_settings, variable
from sbp_assets.settings.deployment import EXPERIMENT_FOLDERS

Profile = Annotated[
    str | None, typer.Option("--profile", "-p", help="Profile name or YAML path; default $SBP_PROFILE, then demo.")
]

ENV_PROFILE = "SBP_ENV_PROFILE"
# Settings that `sbp env` exports for a profile, whether they were set before or not.
OF_THE_PROFILE = tuple(variable("deployment", key) for key in (*EXPERIMENT_FOLDERS, "postgres_schema"))


def activate(profile: str | None, instance: bool = True) -> Settings:
    """Load the profile, put what Dagster reads into the environment, and return the settings.

    With `instance`, create what Dagster's instance needs. Raises SettingsError where the settings cannot be used, and
    CommandError where the shell has the environment of another profile.
    """
    if profile:
        os.environ["SBP_PROFILE"] = profile
    if shell := other_profile_of_shell():
        raise CommandError(
            f"this shell has the environment of profile {shell} (from `sbp env`), so that the command would replace "
            f"the artifacts of {shell} by those of profile {profile_name()}. Open another shell, or first run: "
            f'eval "$({command_line("env")})"'
        )
    settings = load_settings()
    activate_instance(settings)
    if instance:
        prepare_instance(settings)
    return settings


def profile_name() -> str:
    """Return the name or path of the profile that this process acts on, as --profile takes it."""
    return os.environ.get("SBP_PROFILE") or DEFAULT_PROFILE


def other_profile_of_shell() -> str | None:
    """Return the profile whose environment `sbp env` has put into this shell, where another is asked for."""
    shell = os.environ.get(ENV_PROFILE)
    return shell if shell and shell != portable_profile(profile_name()) else None


def command_line(*words: str) -> str:
    """Return the shell command `sbp WORDS` for the profile of this process, for messages."""
    return shlex.join(["sbp", *words, "-p", profile_name()])
