"""`sbp prune`: what no current state needs, in the run and event storage, the artifact store and work_dir."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dagster as dg

from sbp_assets.dagster_support.stage import io_manager_keys
from sbp_assets.orchestration import prune_records
from sbp_assets.orchestration.prune_work import Resumable, find_in_work
from sbp_assets.orchestration.staleness import Staleness, asset_partitions
from sbp_assets.settings import Deployment, Settings
from sbp_assets.settings.deployment import WRITTEN_FOLDERS
from sbp_assets.settings.formats import is_url
from sbp_assets.storage.prune import Found, Leftover, find_in_store
from sbp_assets.storage.remote import RemoteStore, is_local, root
from sbp_assets.synthesis.engine import ENGINES
from sbp_assets.synthesis.ledger import fingerprint

RUNS = "superseded runs"
DAY = 24 * 3600

CHECKPOINT = dg.AssetKey(["synthesizer", "checkpoint"])
BASELINE = dg.AssetKey(["pretraining", "baseline_model"])


@dataclass(frozen=True)
class Plan:
    """What can be removed: runs with their bytes, files, and the records of artifacts whose files are among those.

    `unknown` are paths of what is beside the project's own files and stays. `unfinished` runs go on: while there are
    any, nothing is to be removed.
    """

    unfinished: Sequence[str]
    runs: dict[str, int]
    files: Sequence[Leftover]
    forgotten: Sequence[prune_records.SupersededArtifact]
    unknown: Sequence[str]

    def kinds(self) -> dict[str, tuple[int, int]]:
        """Return how many there are of each kind, and their bytes."""
        found = {RUNS: (len(self.runs), sum(self.runs.values()))} if self.runs else {}
        for leftover in self.files:
            count, size = found.get(leftover.kind, (0, 0))
            found[leftover.kind] = count + 1, size + leftover.bytes
        return found


def look(settings: Settings, defs: dg.Definitions, instance: dg.DagsterInstance, days: float) -> Plan:
    """Return what no current state needs and is older than `days`; removes nothing.

    Raises StorageError where the artifact store cannot be used.
    """
    graph, deployment, before = defs.resolve_asset_graph(), settings.deployment, time.time() - days * DAY
    runs = prune_records.look_at_runs(instance, graph, before)
    superseded = prune_records.superseded_artifacts(instance, graph)
    in_store = _look_in_store(defs, deployment, superseded)
    young = {artifact.name for artifact in superseded if artifact.timestamp > before}
    in_work = find_in_work(
        Path(deployment.work_dir),
        deployment.cache_gb * 1e9,
        _resumable(settings, Staleness(graph, instance)),
        days * DAY,
        _folders_but(deployment, "work_dir"),
    )
    return Plan(
        runs.unfinished,
        prune_records.bytes_of_runs(instance, runs.superseded, Path(deployment.instance_dir)),
        [leftover for leftover in in_store.leftovers if leftover.artifact not in young] + in_work.leftovers,
        [artifact for artifact in superseded if artifact.name not in young | in_store.changed],
        in_store.unknown + in_work.unknown,
    )


def carry_out(
    plan: Plan,
    defs: dg.Definitions,
    instance: dg.DagsterInstance,
    track: Callable[[Sequence[Any], str], Iterable[Any]] = lambda things, what: things,
) -> None:
    """Remove what `plan` names. Killed at any moment, it leaves what another look finds.

    `track` yields things one by one, and may show a progress bar with the text that it is given.
    """
    for leftover in track(plan.files, "removing files"):
        leftover.remove()
    # After its files, which are known by what is recorded; before its run, which may hold records of others.
    prune_records.forget(instance, defs.resolve_asset_graph(), plan.forgotten)
    for run_id in track(list(plan.runs), "removing runs"):
        prune_records.delete_run(instance, run_id)
    if plan.runs:
        prune_records.compact(instance)


def _look_in_store(
    defs: dg.Definitions, deployment: Deployment, superseded: Sequence[prune_records.SupersededArtifact]
) -> Found:
    base = root(deployment.data_dir)
    store = None
    if not is_local(base):
        cache = Path(deployment.work_dir) / "cache"
        store = RemoteStore(base, cache, deployment.cache_gb * 1e9, deployment.storage_patience)
    graph, managers = defs.resolve_asset_graph(), io_manager_keys(defs)
    current = {
        "/".join([*key.path, *filter(None, [partition])]): managers[key] == "directory"
        for key in graph.materializable_asset_keys
        for partition in asset_partitions(graph, key)
    }
    recorded = {artifact.name: artifact.recorded for artifact in superseded}
    return find_in_store(base, store, current, recorded, _folders_but(deployment, "data_dir"))


def _resumable(settings: Settings, staleness: Staleness) -> Resumable:
    graph, experiment = staleness.graph, settings.experiment
    models = {key for key in graph.materializable_asset_keys if key.path[0] == "pretraining" and _is_model(key)}
    pending = {f"{key.path[1]}/{partition}" for key in models for partition in staleness.pending(key)}
    if staleness.pending(CHECKPOINT):
        pending.add("/".join(CHECKPOINT.path))
    versions = [*staleness.versions(CHECKPOINT).values(), *staleness.versions(BASELINE).values()]
    fingerprints = {
        fingerprint(
            version, experiment.synthesis, experiment.max_document_tokens, experiment.model.context_length, engine
        )
        for version in versions
        for engine in ENGINES
    }
    return Resumable(
        shards=set(experiment.shard_keys),
        fingerprints=fingerprints or None,
        trained={CHECKPOINT.path[0], *(key.path[1] for key in models)},
        training=pending,
    )


def _is_model(key: dg.AssetKey) -> bool:
    return key.path[1].endswith("_model")


def _folders_but(deployment: Deployment, name: str) -> list[Path]:
    folders = [getattr(deployment, key) for key in WRITTEN_FOLDERS if key != name]
    return [Path(folder) for folder in folders if folder and not is_url(folder)]
