"""The loader: a profile is a YAML file that holds `experiment` and `deployment`; the environment overrides it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_core import ErrorDetails

from sbp_assets.settings.deployment import FOLDERS, Deployment
from sbp_assets.settings.environment import apply_environment, nearest, setting_types, variable
from sbp_assets.settings.experiment import Experiment
from sbp_assets.settings.formats import is_one_line, is_url, local_folder
from sbp_assets.settings.section import Section, SettingsError
from sbp_assets.settings.yaml_file import read_mapping

PROFILES_DIR = Path(__file__).parent.parent / "profiles"
DEFAULT_PROFILE = "demo"


class Settings(Section):
    """A loaded profile; the relative paths in its deployment have been made absolute."""

    profile: str = Field(
        max_length=200, description="Name of the profile: the stem of its file, unless the file gives another."
    )
    experiment: Experiment = Field(description="What is computed.")
    deployment: Deployment = Field(Deployment(), description="Where and how it runs.")
    note: str | None = Field(None, description="What to know of the results; `sbp run` prints it below them.")

    @field_validator("profile")
    @classmethod
    def _names_a_folder(cls, value: str) -> str:
        if value in ("", ".", "..") or "/" in value or not is_one_line(value):
            raise ValueError("has to be a name that a folder may have, as it stands for {profile} in directories")
        return value

    @model_validator(mode="after")
    def _judge_answers_somewhere(self) -> Settings:
        if self.experiment.synthesis.judge and not self.deployment.judge_url:
            raise ValueError(
                "experiment.synthesis.judge is set and deployment.judge_url is not: name the OpenAI-compatible "
                "endpoint that serves the judge, or set experiment.synthesis.judge to null"
            )
        return self


def profile_path(profile: str) -> Path:
    """Return the file of a profile, given by name or path; raise SettingsError, with the known names, for others."""
    path = Path(profile) if profile.endswith((".yaml", ".yml")) else PROFILES_DIR / f"{profile}.yaml"
    try:
        there = path.is_file()
    except (OSError, ValueError):  # a name that is too long, a null character
        there = False
    if not there:
        known = ", ".join(sorted(p.stem for p in PROFILES_DIR.glob("*.yaml")))
        raise SettingsError(
            f"profile {profile!r}: no file {path}. Known profiles: {known}; or give a path ending in .yaml"
        )
    return path


def load_settings(profile: str | None = None, environ: Mapping[str, str] | None = None) -> Settings:
    """Return the settings of `profile` (default: $SBP_PROFILE, then 'demo') with the overrides of `environ` applied.

    `environ` is the process's environment unless another is given; `sbp_assets.settings.environment` says how its
    values are read: `SBP_EXPERIMENT__PRETRAINING__REPETITIONS=4`. Raises SettingsError, whose message names every key
    that is wrong, the variable that set it or could, and the reason, but never the value.
    """
    environ = os.environ if environ is None else environ
    profile = profile or environ.get("SBP_PROFILE") or DEFAULT_PROFILE
    path = profile_path(profile)
    values = read_mapping(path)
    values.setdefault("profile", path.stem)
    wrong = apply_environment(values, environ, Settings)
    try:
        settings = Settings.model_validate(values)
    except ValidationError as error:
        wrong += [f"{_where(_keys(e), environ)}: {_reason(e)}" for e in error.errors()]
    folders = {}
    for key in FOLDERS if not wrong else ():
        if value := getattr(settings.deployment, key):
            try:
                folders[key] = _absolute(value, settings.profile)
                if key == "instance_dir" and not environ.get("SBP_POSTGRES_URL"):
                    _can_be_sqlite_url(folders[key])
            except ValueError as error:
                wrong.append(f"{_where(['deployment', key], environ)}: {error}")
    experiment = {}
    if not wrong and (earlier := settings.experiment.synthesizer.earlier_round):
        try:
            # One spelling, as it is part of code versions.
            earlier = local_folder(earlier, settings.profile)
            if earlier == folders["data_dir"]:
                raise ValueError(
                    "is this run's own data_dir, which it would write over: tune a second round in a branch"
                )
            synthesizer = settings.experiment.synthesizer.model_copy(update={"earlier_round": earlier})
            experiment["experiment"] = settings.experiment.model_copy(update={"synthesizer": synthesizer})
        except ValueError as error:
            wrong.append(f"{_where(['experiment', 'synthesizer', 'earlier_round'], environ)}: {error}")
    if wrong:
        raise SettingsError("\n  ".join([f"profile {profile} ({path}) cannot be used:", *wrong]))
    deployment = settings.deployment.model_copy(update=folders)
    return settings.model_copy(update={"deployment": deployment, **experiment})


def _absolute(value: str, profile: str) -> str:
    return value.replace("{profile}", profile) if is_url(value) else local_folder(value, profile)


def _can_be_sqlite_url(path: str) -> None:
    # Dagster puts the path into a URL as it is.
    if re.search(r"\?|%[0-9a-f]{2}", path, re.IGNORECASE):
        raise ValueError(
            "is, from / on, a path with '?' or '%' and two hexadecimal digits, which mean something else in the "
            "URL of an SQLite database: name another folder"
        )


def _where(keys: list[int | str], environ: Mapping[str, str]) -> str:
    """Return the dotted key of a validation error, and the environment variable that set it or could."""
    dotted = ".".join(map(str, keys))
    # A place in a list has no variable of its own.
    path = [key for key in keys if isinstance(key, str)]
    for length in range(len(path), 1, -1):
        if (name := variable(*path[:length])) in environ:
            return f"{dotted} (from {name})"
    return f"{dotted} (environment variable {variable(*path)})" if len(path) > 1 else dotted or "(profile)"


def _keys(error: ErrorDetails) -> list[int | str]:
    """Return the keys of the profile that a validation error is about."""
    location = error["loc"]
    # The source's kind stands in the location as pydantic's tag of the union, where it is no key of the profile; and
    # not at all where the kind itself is wrong.
    keys = [part for index, part in enumerate(location) if not (index and location[index - 1] == "source")]
    return [*keys, "kind"] if error["type"].startswith("union_tag_") else keys


def _reason(error: ErrorDetails) -> str:
    """Return why a value is wrong, without the value."""
    if error["type"] == "extra_forbidden":
        *section, key = _keys(error)
        siblings = [path[-1] for path in setting_types(Settings) if list(path[:-1]) == section]
        return f"is unknown; the nearest name is {nearest(str(key), siblings)}" if siblings else error["msg"]
    if error["type"] == "string_unicode":
        return "is not UTF-8"
    if error["type"] == "union_tag_invalid":  # the one message of pydantic's that quotes it
        return f"is none of {error['ctx']['expected_tags']}"
    if error["type"] == "union_tag_not_found":
        return "Field required"
    return error["msg"].removeprefix("Value error, ")
