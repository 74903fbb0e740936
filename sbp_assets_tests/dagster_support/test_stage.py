"""What a module declares, and what its stage adds to that."""

from pathlib import Path
from types import ModuleType
from typing import Any

import dagster as dg

from sbp_assets.dagster_support.stage import for_settings, load_assets, load_checks
from sbp_assets.settings import Settings
from sbp_assets_tests.tiny import tiny_settings


def stage_module(name: str, **declared: Any) -> ModuleType:
    """A module of that name, whose attributes are `declared`: a function counts as defined in it by its __module__."""
    module = ModuleType(name)
    vars(module).update(declared)
    return module


def lengths_of(module: str) -> Any:
    def lengths() -> None: ...

    lengths.__module__ = module
    return for_settings(lambda settings: dg.asset())(lengths)


def test_two_stages_may_have_an_asset_of_the_same_name(tmp_path: Path) -> None:
    settings: Settings = tiny_settings(tmp_path)
    modules = [stage_module(name, lengths=lengths_of(name)) for name in ("sbp.first.assets", "sbp.second.assets")]
    assets = [asset for module in modules for asset in load_assets(module, settings)]
    assert [asset.key.path for asset in assets] == [["first", "lengths"], ["second", "lengths"]]
    result = dg.Definitions(assets).resolve_implicit_global_asset_job_def().execute_in_process()
    assert {event.step_key for event in result.get_step_success_events()} == {"first__lengths", "second__lengths"}


def test_what_is_imported_from_another_module_is_not_loaded_again(tmp_path: Path) -> None:
    def lengths_are_positive() -> dg.AssetCheckResult:
        return dg.AssetCheckResult(passed=True)

    lengths_are_positive.__module__ = "sbp.first.checks"
    plain = dg.asset_check(asset=["first", "lengths"], name="plain")(lengths_are_positive)
    of_settings = for_settings(lambda settings: dg.asset_check(asset=["first", "lengths"]))(lengths_are_positive)
    settings = tiny_settings(tmp_path)
    own = stage_module("sbp.first.checks", plain=plain, several=[of_settings])
    assert [check.check_key.name for check in load_checks(own, settings)] == ["plain", "lengths_are_positive"]
    importing = stage_module("sbp.second.checks", plain=plain, several=[of_settings])
    assert load_checks(importing, settings) == []
