"""Settings for tests: profile tiny, with directories of the test's own and the changes that the test is about."""

from pathlib import Path
from types import ModuleType
from typing import Any

import dagster as dg
from pydantic import BaseModel

from sbp_assets.dagster_support.stage import load_assets, load_checks
from sbp_assets.settings import Settings, load_settings


def tiny_settings(root: Path, changes: dict[str, Any] | None = None) -> Settings:
    """Return profile tiny with all its directories under `root`.

    `changes` maps dotted keys, as in "experiment.synthesis.dtype", to values; these are taken as they are, so that a
    test may set what a profile could not.
    """
    folders = {f"SBP_DEPLOYMENT__{name.upper()}": str(root / name) for name in ("data_dir", "work_dir", "instance_dir")}
    settings: Any = load_settings("tiny", folders)
    for key, value in (changes or {}).items():
        settings = _changed(settings, key.split("."), value)
    return settings


def _changed(section: BaseModel, path: list[str], value: Any) -> BaseModel:
    name, *rest = path
    return section.model_copy(update={name: _changed(getattr(section, name), rest, value) if rest else value})


def only(assets: ModuleType, checks: ModuleType, settings: Settings, *names: str) -> list[dg.AssetsDefinition]:
    """Return those of a stage's assets that are named, with all the checks on them."""
    own = [asset for asset in load_assets(assets, settings) if {key.path[-1] for key in asset.keys} <= set(names)]
    keys = {key for asset in own for key in asset.keys}
    return [*own, *(check for check in load_checks(checks, settings) if check.check_key.asset_key in keys)]
