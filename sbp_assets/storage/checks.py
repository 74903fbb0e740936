"""The check that every artifact has: the store holds what the last materialisation wrote, byte for byte.

Also what a check of one shard reads of all shards: Dagster (1.13) gives a partitioned check only its own partition of
an input, whatever the partition mapping.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import dagster as dg

from sbp_assets.dagster_support.check_results import last_version, problems_result
from sbp_assets.storage.io_managers import ArtifactIOManager
from sbp_assets.storage.remote import CorruptedArtifactError

NAME = "artifact_is_intact"


def artifact_is_intact(
    asset: dg.AssetKey, io_manager: str, partitions: dg.PartitionsDefinition | None
) -> dg.AssetChecksDefinition:
    """Return the check of `asset` that reads its artifact back through `io_manager` and compares content versions.

    In the run that materialises the artifact it finds an upload that was cut short; run alone (`sbp verify`), a file
    that is corrupted, was changed or is gone.
    """

    @dg.asset_check(
        asset=asset,
        name=NAME,
        partitions_def=partitions,
        blocking=True,
        required_resource_keys={io_manager},
        description="The artifact in the store has the content that its last materialisation wrote, byte for byte.",
    )
    def check(context: dg.AssetCheckExecutionContext) -> dg.AssetCheckResult:
        partition = context.partition_key if partitions else None
        recorded = last_version(context.instance, asset, partition)
        try:
            stored = getattr(context.op_execution_context.resources, io_manager).stored_version(asset, partition)
        except (FileNotFoundError, CorruptedArtifactError) as error:
            stored = str(error)
        problem = (
            "The store holds other content than the last materialisation wrote: it was corrupted or changed since. "
            "`sbp run` re-materialises it."
        )
        return problems_result([] if stored == recorded else [problem], recorded=str(recorded), stored=stored)

    return check


def stored_checks(assets: Iterable[dg.AssetsDefinition]) -> list[dg.AssetChecksDefinition]:
    """Return the check `artifact_is_intact` of every asset of `assets`."""
    return [
        artifact_is_intact(spec.key, asset.get_io_manager_key_for_asset_key(spec.key), spec.partitions_def)
        for asset in assets
        for spec in asset.specs
    ]


class Partitions(Mapping[str, Any]):
    """Every partition of an asset by its key, opened each time that it is asked for and not before.

    A check of one shard looks at few of thousands, and from a remote store each is a download.
    """

    def __init__(self, load: Callable[[str], Any], keys: Iterable[str]) -> None:
        self._load, self._keys = load, dict.fromkeys(keys)

    def __getitem__(self, key: str) -> Any:
        if key not in self._keys:
            raise KeyError(key)
        return self._load(key)

    def __contains__(self, key: object) -> bool:
        return key in self._keys

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def all_partitions(manager: ArtifactIOManager, asset: str, partitions: dg.PartitionsDefinition) -> Partitions:
    """Return every partition of `asset` ("stage/name"), by its key, as a fan-in input would be.

    The check names the asset among its `additional_deps`, and takes the asset's IO manager as a resource. One that the
    store does not hold raises FileNotFoundError when it is asked for.
    """
    key = dg.AssetKey(asset.split("/"))
    return Partitions(lambda partition: manager.load(key, partition), partitions.get_partition_keys())
