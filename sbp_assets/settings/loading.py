"""Profiles and environment overrides: a profile is a YAML file that holds `experiment` and `deployment`."""

from __future__ import annotations

import os
from pathlib import Path

import yaml
from pydantic import ValidationError, model_validator

from sbp_assets.settings.deployment import Deployment
from sbp_assets.settings.experiment import Experiment
from sbp_assets.settings.section import Section, SettingsError

PROFILES_DIR = Path(__file__).parent.parent / "profiles"
ENV_PREFIX = "SBP_"
ENV_SEPARATOR = "__"
DEFAULT_PROFILE = "demo"


class Settings(Section):
    """A loaded profile. `profile` is its file stem; relative deployment paths are resolved at the load."""

    profile: str
    experiment: Experiment
    deployment: Deployment = Deployment()

    @model_validator(mode="after")
    def _judge_answers_somewhere(self) -> Settings:
        if self.experiment.synthesis.judge and not self.deployment.judge_url:
            raise ValueError(
                "experiment.synthesis.judge is set and deployment.judge_url is not: name the OpenAI-compatible "
                "endpoint that serves the judge, or set experiment.synthesis.judge to null"
            )
        return self


def profile_path(profile: str) -> Path:
    """File of a profile given by name or path; SettingsError names the known ones."""
    path = Path(profile) if profile.endswith((".yaml", ".yml")) else PROFILES_DIR / f"{profile}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in PROFILES_DIR.glob("*.yaml")))
        raise SettingsError(
            f"profile {profile!r}: no file {path}. Known profiles: {known}; or give a path ending in .yaml"
        )
    return path


def _where(location: tuple[int | str, ...], environ: dict[str, str]) -> str:
    """Dotted key of a validation error, and the environment variable that set it or could."""
    # The source's kind stands in the location as pydantic's tag of the union; it is no key of the profile.
    keys = [str(part) for index, part in enumerate(location) if not (index and location[index - 1] == "source")]
    if len(location) == 3 and location[-1] == "source":
        keys = [str(part) for part in location]
    name = ENV_PREFIX + ENV_SEPARATOR.join(keys).upper()
    return f"{'.'.join(keys) or '(profile)'} ({'from' if name in environ else 'environment variable'} {name})"


def fault(error: yaml.YAMLError) -> str:
    """What is wrong and where, without the text that is: PyYAML's own message quotes it."""
    if not isinstance(error, yaml.MarkedYAMLError) or error.problem_mark is None:
        return type(error).__name__
    return f"{error.problem} (line {error.problem_mark.line + 1}, column {error.problem_mark.column + 1})"


def load_settings(profile: str | None = None, environ: dict[str, str] | None = None) -> Settings:
    """Settings of `profile` (default: $SBP_PROFILE, then 'demo') with environment overrides applied.

    An override is `SBP_` + the path with `__` between levels, its value read as YAML:
    `SBP_EXPERIMENT__PRETRAINING__REPETITIONS=4`. Raises SettingsError naming every key that is wrong and why.
    """
    environ = dict(os.environ) if environ is None else environ
    profile = profile or environ.get("SBP_PROFILE") or DEFAULT_PROFILE
    path = profile_path(profile)
    try:
        values = yaml.safe_load(path.read_text()) or {}
    except yaml.YAMLError as error:
        raise SettingsError(f"{path}: not YAML: {fault(error)}") from None
    if not isinstance(values, dict):
        raise SettingsError(
            f"{path}: expected a mapping with `experiment` and `deployment`, got {type(values).__name__}"
        )
    for name, value in environ.items():
        if not name.startswith(ENV_PREFIX) or ENV_SEPARATOR not in name:
            continue
        *parents, key = name.removeprefix(ENV_PREFIX).lower().split(ENV_SEPARATOR)
        section = values
        for parent in parents:
            section = section.setdefault(parent, {}) if isinstance(section, dict) else {}
        if not isinstance(section, dict):
            raise SettingsError(f"environment variable {name}: {'.'.join(parents)} is a value, not a section")
        try:
            section[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise SettingsError(f"environment variable {name}: not YAML: {fault(error)}") from None
    values.setdefault("profile", path.stem)
    try:
        settings = Settings.model_validate(values)
    except ValidationError as error:
        lines = [f"  {_where(e['loc'], environ)}: {e['msg']}" for e in error.errors()]
        raise SettingsError(f"profile {profile} ({path}) cannot be used:\n" + "\n".join(lines)) from error
    directories = {}
    for key in ("data_dir", "work_dir", "instance_dir"):
        filled = getattr(settings.deployment, key).format(profile=settings.profile)
        directories[key] = filled if "://" in filled else str(Path(filled).resolve())
    return settings.model_copy(update={"deployment": settings.deployment.model_copy(update=directories)})
