"""What Dagster records of the artifacts that a trace passes through: the graph, and each artifact's latest version."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import dagster as dg

from sbp_assets.dagster_support.internals import DATA_VERSION_TAG
from sbp_assets.dagster_support.stage import io_manager_keys
from sbp_assets.orchestration.pipeline import pipeline_among
from sbp_assets.orchestration.staleness import Staleness
from sbp_assets.provenance.store import Asset


def graph_of(defs: dg.Definitions) -> dict[str, Asset]:
    """Return the assets of `defs` by name, in topological order, as `Store` needs them."""
    graph = defs.resolve_asset_graph()
    managers = io_manager_keys(defs)
    jobs = {key: step.name for step in pipeline_among(graph.get_all_asset_keys()) for key in step.assets}
    assets = {}
    for key in graph.toposorted_asset_keys:
        node, name = graph.get(key), key.to_user_string()
        partitions = node.partitions_def
        assets[name] = Asset(
            key=name,
            partitions=tuple(partitions.get_partition_keys()) if partitions else None,
            parents=tuple(sorted(parent.to_user_string() for parent in node.parent_keys)),
            job=jobs[name],
            directory=managers[key] == "directory",
        )
    return assets


class Records:
    """What `instance` records of artifacts; without an instance, every artifact is unrecorded."""

    def __init__(self, defs: dg.Definitions, instance: dg.DagsterInstance | None) -> None:
        self._staleness = Staleness(defs.resolve_asset_graph(), instance) if instance else None

    def __call__(self, artifacts: Sequence[tuple[str, str | None]]) -> list[dict[str, Any]]:
        """Return the latest materialisation of each artifact, which is given as asset and partition.

        A row has asset, partition, data_version, run_id, materialised, state and reasons. materialised is a time in ISO
        format. state is fresh, stale (an input or a setting has changed since), check failed, unchecked or unrecorded;
        reasons says for people why it is not fresh, in at most one entry.
        """
        partitions: defaultdict[str, list[str | None]] = defaultdict(list)
        for asset, partition in artifacts:
            partitions[asset].append(partition)
        rows = {asset: self._rows(asset, names) for asset, names in partitions.items()}
        return [rows[asset][partition] for asset, partition in artifacts]

    def _rows(self, asset: str, partitions: list[str | None]) -> dict[str | None, dict[str, Any]]:
        rows: dict[str | None, dict[str, Any]] = {
            partition: {"asset": asset, "partition": partition, "data_version": None, "run_id": None}
            | {"materialised": None, "state": "unrecorded", "reasons": []}
            for partition in partitions
        }
        if self._staleness is None:
            return rows
        key = dg.AssetKey(asset.split("/"))
        for partition, event in self._staleness.materialisations(key, partitions).items():
            status, materialisation = self._staleness.status(key, partition), event.asset_materialization
            rows[partition] |= {
                "data_version": (materialisation.tags or {}).get(DATA_VERSION_TAG) if materialisation else None,
                "run_id": event.run_id,
                "materialised": datetime.fromtimestamp(event.timestamp, UTC).isoformat(timespec="seconds"),
                "state": "stale" if status.is_stale else status.status.value,
                "reasons": [status.describe()] if status.is_pending else [],
            }
        return rows
