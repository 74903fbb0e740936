"""Partitions as Dagster puts them into runs: one, or a range without gaps."""

from collections.abc import Sequence

import dagster as dg

from sbp_assets.dagster_support.internals import (
    ASSET_PARTITION_RANGE_END_TAG,
    ASSET_PARTITION_RANGE_START_TAG,
    BaseAssetGraph,
)
from sbp_assets.orchestration.materialisations import Partition


def contiguous(partitions: Sequence[Partition], among: Sequence[Partition], size: int) -> list[list[Partition]]:
    """Return `partitions` in ranges of at most `size` that leave none of `among` out, in its order."""
    place = {partition: number for number, partition in enumerate(among)}
    ranges: list[list[Partition]] = []
    for partition in sorted(partitions, key=place.__getitem__):
        if ranges and len(ranges[-1]) < size and place[ranges[-1][-1]] + 1 == place[partition]:
            ranges[-1].append(partition)
        else:
            ranges.append([partition])
    return ranges


def batches(graph: BaseAssetGraph, key: dg.AssetKey, partitions: Sequence[Partition]) -> list[list[Partition]]:
    """Return `partitions` of an asset as runs can take them: in ranges, as long as its backfill policy allows."""
    node = graph.get(key)
    if node.partitions_def is None or node.backfill_policy is None:
        return [[partition] for partition in sorted(partitions, key=str)]
    size = node.backfill_policy.max_partitions_per_run or len(partitions)
    return contiguous(partitions, list(node.partitions_def.get_partition_keys()), size)


def partitions_of(run: dg.DagsterRun) -> str | None:
    """Return the partition of a run in words, 'FIRST to LAST' of a range; None where it has none."""
    first, last = (run.tags.get(tag) for tag in (ASSET_PARTITION_RANGE_START_TAG, ASSET_PARTITION_RANGE_END_TAG))
    return f"{first} to {last}" if first else run.tags.get("dagster/partition")


def range_tags(partitions: Sequence[Partition]) -> dict[str, str]:
    """Return the tags of a run of the range `partitions`, which are partitioned ones without gaps between them."""
    return {ASSET_PARTITION_RANGE_START_TAG: str(partitions[0]), ASSET_PARTITION_RANGE_END_TAG: str(partitions[-1])}
