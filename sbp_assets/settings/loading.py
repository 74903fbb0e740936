"""The loader: a profile is a YAML file that holds `experiment` and `deployment`; the environment overrides it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import yaml
from pydantic import Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from sbp_assets.settings.deployment import Deployment
from sbp_assets.settings.environment import apply_environment, variable
from sbp_assets.settings.experiment import Experiment
from sbp_assets.settings.section import Section, SettingsError

PROFILES_DIR = Path(__file__).parent.parent / "profiles"
DEFAULT_PROFILE = "demo"


class Settings(Section):
    """A loaded profile; the relative paths in its deployment have been made absolute."""

    profile: str = Field(description="Name of the profile: the stem of its file, unless the file gives another.")
    experiment: Experiment = Field(description="What is computed.")
    deployment: Deployment = Field(Deployment(), description="Where and how it runs.")
    note: str | None = Field(None, description="What to know of the results; `sbp run` prints it below them.")

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
    if not path.is_file():
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
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise SettingsError(f"{path}: not YAML: {_fault(error)}") from None
    if not isinstance(values, dict):
        raise SettingsError(
            f"{path}: expected a mapping with `experiment` and `deployment`, got {type(values).__name__}"
        )
    values.setdefault("profile", path.stem)
    wrong = apply_environment(values, environ, Settings)
    try:
        settings = Settings.model_validate(values)
    except ValidationError as error:
        wrong += [f"{_where(e['loc'], environ)}: {_reason(e)}" for e in error.errors()]
    if wrong:
        raise SettingsError("\n  ".join([f"profile {profile} ({path}) cannot be used:", *wrong]))
    directories = {}
    for key in ("data_dir", "work_dir", "instance_dir", "tensorboard_dir"):
        if (value := getattr(settings.deployment, key)) is None:
            continue
        filled = value.replace("{profile}", settings.profile)
        directories[key] = filled if "://" in filled else str(Path(filled).resolve())
    return settings.model_copy(update={"deployment": settings.deployment.model_copy(update=directories)})


def _where(location: tuple[int | str, ...], environ: Mapping[str, str]) -> str:
    """Return the dotted key of a validation error, and the environment variable that set it or could."""
    # The source's kind stands in the location as pydantic's tag of the union; it is no key of the profile.
    keys = [part for index, part in enumerate(location) if not (index and location[index - 1] == "source")]
    dotted = ".".join(map(str, keys))
    # A place in a list has no variable of its own.
    path = [key for key in keys if isinstance(key, str)]
    for length in range(len(path), 1, -1):
        if (name := variable(*path[:length])) in environ:
            return f"{dotted} (from {name})"
    return f"{dotted} (environment variable {variable(*path)})" if len(path) > 1 else dotted or "(profile)"


def _reason(error: ErrorDetails) -> str:
    """Return why a value is wrong, without the value."""
    if error["type"] == "union_tag_invalid":  # the one message of pydantic's that quotes it
        return f"{error['ctx']['discriminator']} is none of {error['ctx']['expected_tags']}"
    return error["msg"]


def _fault(error: yaml.YAMLError) -> str:
    """Return what is wrong and where, without the text that is: PyYAML's own message quotes it."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return type(error).__name__
    return f"{error.problem} (line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1})"
