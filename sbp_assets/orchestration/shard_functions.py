"""The functions of assets and checks of one corpus shard, and what each of their arguments is.

They are taken out of Dagster's definitions, so that a step can call them shard by shard.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_origin

import dagster as dg

from sbp_assets.fan_out import PartitionTasks
from sbp_assets.storage.io_managers import takes_paths


class ShardContext(dg.AssetExecutionContext):
    """The context of a run of many shards, as an asset or a check of one of them sees it; `tasks` are all of theirs."""

    def __init__(self, context: dg.AssetExecutionContext, shard: str, tasks: PartitionTasks) -> None:
        super().__init__(context.op_execution_context)
        self._shard = shard
        self.tasks = tasks

    @property
    def partition_key(self) -> str:
        return self._shard


@dataclass(frozen=True)
class ArtifactInput:
    """An argument that an artifact is loaded for: its asset, and which of its partitions."""

    key: dg.AssetKey
    io_manager: str
    # None: the shard's own. Otherwise all that are read, the same for every shard; (None,) of an unpartitioned asset.
    partitions: tuple[str | None, ...] | None
    as_dict: bool
    as_path: bool


@dataclass(frozen=True)
class ShardFunction:
    """The function of an asset, or of a check, of one shard."""

    call: Callable[..., Any]
    inputs: Mapping[str, ArtifactInput]
    takes_context: bool
    resources: Sequence[str]

    def run(self, context: ShardContext, load: Callable[[ArtifactInput, str], Any]) -> Any:
        arguments = {name: load(read, context.partition_key) for name, read in self.inputs.items()}
        resources = {name: getattr(context.resources, name) for name in self.resources}
        return self.call(*([context] if self.takes_context else []), **arguments, **resources)


@dataclass(frozen=True)
class AssetFunction(ShardFunction):
    """The function of the assets `specs`, which returns a MaterializeResult for each.

    `deps` are the artifacts that it, or a task of it, reads itself: they are not loaded for it.
    """

    specs: Sequence[dg.AssetSpec]
    io_managers: Mapping[dg.AssetKey, str]
    deps: Sequence[ArtifactInput]

    @property
    def reads(self) -> list[ArtifactInput]:
        return [*self.inputs.values(), *self.deps]

    @property
    def keys(self) -> list[dg.AssetKey]:
        return [spec.key for spec in self.specs]


@dataclass(frozen=True)
class CheckFunction(ShardFunction):
    """The function of a check, which returns an AssetCheckResult."""

    spec: dg.AssetCheckSpec


def asset_function(
    asset: dg.AssetsDefinition,
    upstream: Mapping[dg.AssetKey, tuple[dg.AssetsDefinition, dg.AssetSpec]],
    partitions: dg.PartitionsDefinition,
) -> AssetFunction:
    specs = list(asset.specs)
    mappings = {dep.asset_key: dep.partition_mapping for spec in specs for dep in spec.deps}
    io_managers = {spec.key: asset.get_io_manager_key_for_asset_key(spec.key) for spec in specs}
    fields = _function(asset, mappings, upstream, partitions)
    loaded = {read.key for read in fields["inputs"].values()}
    deps = [
        _artifact_input(key, mapping, upstream, partitions) for key, mapping in mappings.items() if key not in loaded
    ]
    return AssetFunction(**fields, specs=specs, io_managers=io_managers, deps=deps)


def check_function(
    check: dg.AssetChecksDefinition,
    upstream: Mapping[dg.AssetKey, tuple[dg.AssetsDefinition, dg.AssetSpec]],
    partitions: dg.PartitionsDefinition,
) -> CheckFunction:
    (spec,) = check.check_specs
    mappings = {dep.asset_key: dep.partition_mapping for dep in spec.additional_deps}
    return CheckFunction(**_function(check, mappings, upstream, partitions), spec=spec)


def _function(
    definition: dg.AssetsDefinition,
    mappings: Mapping[dg.AssetKey, dg.PartitionMapping | None],
    upstream: Mapping[dg.AssetKey, tuple[dg.AssetsDefinition, dg.AssetSpec]],
    partitions: dg.PartitionsDefinition,
) -> dict[str, Any]:
    """Return the fields of ShardFunction: what each argument of the definition's function is."""
    inputs: dict[str, ArtifactInput] = {}
    for argument, key in definition.keys_by_input_name.items():
        kind = definition.op.input_def_named(argument).dagster_type
        if not kind.is_nothing:
            inputs[argument] = _artifact_input(key, mappings.get(key), upstream, partitions, kind.typing_type)
    call = definition.op.compute_fn.decorated_fn  # type: ignore[union-attr]
    # `**` takes inputs that only some settings have.
    named = [name for name, one in inspect.signature(call).parameters.items() if one.kind is not one.VAR_KEYWORD]
    others = [argument for argument in named if argument not in inputs]
    takes_context = others[:1] == ["context"]
    return {
        "call": call,
        "inputs": inputs,
        "takes_context": takes_context,
        "resources": others[1:] if takes_context else others,
    }


def _artifact_input(
    key: dg.AssetKey,
    mapping: dg.PartitionMapping | None,
    upstream: Mapping[dg.AssetKey, tuple[dg.AssetsDefinition, dg.AssetSpec]],
    partitions: dg.PartitionsDefinition,
    annotation: Any = None,
) -> ArtifactInput:
    asset, spec = upstream[key]
    return ArtifactInput(
        key,
        asset.get_io_manager_key_for_asset_key(key),
        _partitions_read(mapping, spec.partitions_def, partitions),
        as_dict=get_origin(annotation) is dict,
        as_path=takes_paths(annotation),
    )


def _partitions_read(
    mapping: dg.PartitionMapping | None,
    of_input: dg.PartitionsDefinition | None,
    of_shards: dg.PartitionsDefinition,
) -> tuple[str | None, ...] | None:
    if of_input is None:
        return (None,)
    if mapping is None or isinstance(mapping, dg.IdentityPartitionMapping):
        return None
    if isinstance(mapping, dg.AllPartitionMapping):
        return tuple(of_input.get_partition_keys())
    assert isinstance(mapping, dg.SpecificPartitionsPartitionMapping), mapping
    return tuple(mapping.partition_keys)
