"""The check that every artifact has: what lies in the store is what its asset made, byte for byte.

And what checks of one shard read of all shards: Dagster (1.13) gives a partitioned check only its own partition of an
input, whatever the partition mapping.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import dagster as dg

from sbp_assets.storage.io_managers import ArtifactIOManager
from sbp_assets.storage.preview import escape
from sbp_assets.storage.remote import DamagedError

NAME = "stored_as_made"
DATA_VERSION = "dagster/data_version"
SHOWN = 5


def check_result(
    passed: bool, metadata: Mapping[str, Any], severity: dg.AssetCheckSeverity = dg.AssetCheckSeverity.ERROR
) -> dg.AssetCheckResult:
    """A check's result that says in words why it failed: the UI hides lists among the metadata behind a button.

    The words are the entries of `problems`, and the first few of the other lists and texts that are not empty.
    """
    reasons: list[str] = []
    for name, value in ({} if passed else metadata).items():
        found = [value] if isinstance(value, str) and value else value if isinstance(value, list) else []
        words = [escape(str(entry)) for entry in found[:SHOWN]]
        if len(found) > SHOWN:
            words.append(f"and {len(found) - SHOWN} more")
        if words:
            reasons += words if name == "problems" else [f"{escape(name)}: {', '.join(words)}"]
    description = "\n".join(f"- {reason}" for reason in reasons) or None
    return dg.AssetCheckResult(passed=passed, severity=severity, metadata=metadata, description=description)


def stored_as_made(asset: dg.AssetKey, io_manager: str, partitions: dg.PartitionsDefinition | None):
    """Check of `asset` that reads its artifact back through `io_manager` and compares content versions.

    In the run that makes the artifact this finds an upload that was cut short; run alone (`sbp verify`), a file that
    rotted, was changed or is gone.
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
        made = last_version(context.instance, asset, partition)
        try:
            stored = _manager(context, io_manager).stored_version(asset, partition)
        except (FileNotFoundError, DamagedError) as error:
            stored = str(error)
        problem = (
            "The store holds other content than was made: it rotted or was changed since. `sbp run` makes it again."
        )
        problems = [] if stored == made else [problem]
        return check_result(stored == made, {"problems": problems, "made": str(made), "stored": stored})

    return check


def stored_checks(assets: Iterable[dg.AssetsDefinition]) -> list[dg.AssetChecksDefinition]:
    """`stored_as_made` of every asset of `assets`."""
    return [
        stored_as_made(spec.key, asset.get_io_manager_key_for_asset_key(spec.key), spec.partitions_def)
        for asset in assets
        for spec in asset.specs
    ]


def all_partitions(
    context: dg.AssetCheckExecutionContext, io_manager: str, asset: str, partitions: dg.PartitionsDefinition
) -> dict[str, Any]:
    """Every partition of `asset` ("stage/name"), by its key, as a fan-in input would be.

    The check names the asset among its `additional_deps` and `io_manager` among its `required_resource_keys`.
    """
    manager, key = _manager(context, io_manager), dg.AssetKey(asset.split("/"))
    return {partition: manager.load(key, partition) for partition in partitions.get_partition_keys()}


def _manager(context: dg.AssetCheckExecutionContext, name: str) -> ArtifactIOManager:
    return getattr(context.op_execution_context.resources, name)


def last_version(instance: dg.DagsterInstance, asset: dg.AssetKey, partition: str | None) -> str | None:
    """Content version that the last materialisation of an asset (or partition) recorded; None without one."""
    wanted = dg.AssetRecordsFilter(asset, asset_partitions=[partition] if partition else None)
    records = instance.fetch_materializations(wanted, limit=1).records
    materialization = records[0].asset_materialization if records else None
    return (materialization.tags or {}).get(DATA_VERSION) if materialization else None
