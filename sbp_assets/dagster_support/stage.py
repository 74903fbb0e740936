"""Assets and checks that are declared once, at module level, and defined for the settings at hand.

What an asset is called, how it is partitioned and which code version it has depend on the settings, which no module
reads when it is imported. So a stage's modules declare:

    @for_settings(lambda settings: dg.asset(partitions_def=shards(settings), io_manager_key="parquet", ...))
    def documents(settings: dg.ResourceParam[Settings], raw_documents: pl.LazyFrame) -> dg.MaterializeResult: ...

and `load_assets` and `load_checks` define what a module declares. The function stays flat, reads its settings from the
resource of that name, and can be called by a test.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any, Generic, TypeVar

import dagster as dg

from sbp_assets.settings import Settings

Definition = TypeVar("Definition", dg.AssetsDefinition, dg.AssetChecksDefinition)


class ForSettings(Generic[Definition]):
    """A function that becomes an asset, or a check, once the settings are known: call it with them."""

    def __init__(
        self, declare: Callable[[Settings], Callable[[Any], Definition] | None], function: Callable[..., Any]
    ) -> None:
        functools.update_wrapper(self, function)
        self.function = function
        self.declare: Callable[[Settings], Callable[[Any], Definition] | None] = declare

    def __call__(self, settings: Settings) -> Definition | None:
        """Return Dagster's definition under `settings`; None where there is none under them."""
        decorator = self.declare(settings)
        return decorator(self.function) if decorator else None


def for_settings(
    declare: Callable[[Settings], Callable[[Any], Definition] | None],
) -> Callable[[Callable[..., Any]], ForSettings[Definition]]:
    """Decorate a function with what `declare` returns: Dagster's own decorator, with arguments out of the settings.

    `declare` returns None where the asset or check does not exist under the settings.
    """
    return lambda function: ForSettings(declare, function)


def load_assets(module: ModuleType, settings: Settings) -> list[dg.AssetsDefinition]:
    """Return the assets that `module` declares, as they are under `settings`.

    The stage, which is the module's package, prefixes keys that have no prefix, and the names of their ops; prefixes
    give the groups, and the deployment gives the owners.
    """
    return [
        _with_stage_defaults(asset, stage_of(module), settings)
        for asset in _load(module, settings, dg.AssetsDefinition)
    ]


def load_checks(module: ModuleType, settings: Settings) -> list[dg.AssetChecksDefinition]:
    """Return the asset checks that `module` declares, as they are under `settings`."""
    return list(_load(module, settings, dg.AssetChecksDefinition))


def stage_of(module: ModuleType) -> str:
    """Return the name of the stage that a module belongs to, which is its package's."""
    return module.__name__.split(".")[-2]


def _load(module: ModuleType, settings: Settings, kind: type[Any]) -> Iterator[Any]:
    """Yield what `module` declares by name or in a list; what it imports from another module is that one's."""
    for value in vars(module).values():
        for declared in value if isinstance(value, list) else [value]:
            if _module_of(declared) == module.__name__:
                defined = declared(settings) if isinstance(declared, ForSettings) else declared
                # AssetChecksDefinition extends AssetsDefinition.
                if type(defined) is kind:
                    yield defined


def _module_of(declared: object) -> str | None:
    """Return the module of the function of an asset or check, and None for anything else."""
    if isinstance(declared, ForSettings):
        return declared.__module__
    if isinstance(declared, dg.AssetsDefinition):
        return getattr(declared.op.compute_fn, "decorated_fn", declared).__module__
    return None


def _with_stage_defaults(asset: dg.AssetsDefinition, stage: str, settings: Settings) -> dg.AssetsDefinition:
    prefixed = {key: key.with_prefix(stage) for key in asset.keys if len(key.path) == 1}
    asset = asset.with_attributes(asset_key_replacements=prefixed)
    if prefixed and len(asset.keys) == 1:
        # An op, and so a run's step, is named after the key. Dagster has done that before the key had its prefix, and
        # refuses two ops of one name in a job. The op of a multi-asset has a name of its own.
        op = asset.op.with_replaced_properties(asset.key.to_python_identifier())
        asset = dg.AssetsDefinition.dagster_internal_init(**{**asset.get_attributes_dict(), "node_def": op})
    return asset.map_asset_specs(
        lambda spec: spec.replace_attributes(group_name=spec.key.path[0], owners=list(settings.deployment.owners))
    )


def io_manager_keys(defs: dg.Definitions) -> dict[dg.AssetKey, str]:
    """Return the key of the IO manager that keeps each asset, by the asset's key."""
    graph = defs.resolve_asset_graph()
    return {key: graph.get(key).assets_def.get_io_manager_key_for_asset_key(key) for key in graph.toposorted_asset_keys}
