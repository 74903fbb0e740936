"""Which runs and recorded artifacts no current state needs, and their removal from the run and event storage.

Dagster's `delete_run` leaves the SQLite file of the run's log, the evaluations of its checks, its tags and its logs,
and removes the run before its events, so that a kill in between leaves events that belong to no run. It cannot remove
the records of a partition at all. What it lacks is done here through the storages' own connections, in the tables that
SQLite and PostgreSQL have in common.
"""

from __future__ import annotations

import sqlite3
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import dagster as dg
import sqlalchemy as sa

from sbp_assets.dagster_support.internals import (
    ASSET_EVENTS,
    BACKFILL_ID_TAG,
    BULK_ACTION_TERMINAL_STATUSES,
    DATA_VERSION_TAG,
    SKIP_PARTITION_DATA_VERSION_DEPENDENCY_THRESHOLD,
    BaseAssetGraph,
    BulkActionsFilter,
    BulkActionStatus,
    RunStorageSqlMetadata,
    SqlEventLogStorageMetadata,
    SqlEventLogStorageTable,
    extract_data_provenance_from_entry,
)
from sbp_assets.orchestration.fan_in_checks import ENDED
from sbp_assets.orchestration.materialisations import EVENTS_PER_QUERY, MATERIALIZED, Partition
from sbp_assets.orchestration.staleness import Staleness, asset_partitions
from sbp_assets.storage.prune import Recorded, bytes_to_free

RUNS_PER_QUERY = 500

_EVENTS = SqlEventLogStorageTable.c
_TAGS = SqlEventLogStorageMetadata.tables["asset_event_tags"]
_CHECKS = SqlEventLogStorageMetadata.tables["asset_check_executions"]
_RUN_TAGS = RunStorageSqlMetadata.tables["run_tags"]
# It always stays: on SQLite the next event would get its id again, and sensors and provenance go by ids.
NEWEST_EVENT = sa.select(sa.func.max(_EVENTS.id))


class SupersededArtifact(NamedTuple):
    """A recorded artifact that the definitions no longer have, materialised last at `timestamp` (seconds)."""

    key: dg.AssetKey
    partition: Partition
    timestamp: float
    recorded: Recorded

    @property
    def name(self) -> str:
        """Return the artifact's path in the store without an ending: stage/name/partition."""
        return "/".join([*self.key.path, *filter(None, [self.partition])])


class Runs(NamedTuple):
    """Ids of runs: those that go on, and those that are superseded."""

    unfinished: list[str]
    superseded: list[str]


def look_at_runs(instance: dg.DagsterInstance, graph: BaseAssetGraph, before: float) -> Runs:
    """Return the runs of `instance` that have not ended, and those that nothing needs and that ended before `before`.

    `before` is in seconds since the epoch. A run is needed while it holds an event that `needed_runs` names, while its
    backfill goes on, and while a run of which it is the root, the sibling or a retry is needed.
    """
    needed, going_on = needed_runs(instance, graph), _unfinished_backfills(instance)
    unfinished, ended = [], []
    needed_roots = set()
    newest = True  # which stays, like the newest event
    for record in _run_records(instance):
        run = record.dagster_run
        root = run.root_run_id or run.run_id
        if not run.is_finished:
            unfinished.append(run.run_id)
        when = record.end_time or record.update_timestamp.timestamp()
        if (
            newest
            or not run.is_finished
            or when > before
            or run.run_id in needed
            or run.tags.get(BACKFILL_ID_TAG) in going_on
        ):
            needed_roots.add(root)
        else:
            ended.append((run.run_id, root))
        newest = False
    return Runs(unfinished, [run_id for run_id, root in reversed(ended) if root not in needed_roots])


def needed_runs(instance: dg.DagsterInstance, graph: BaseAssetGraph) -> set[str]:
    """Return the ids of the runs that hold an event which says something of an artifact as it is now.

    For each asset of `graph` and each of its partitions these are the latest materialisation, attempt, failure and
    observation, the latest evaluation of each check, and the events of inputs that staleness compares the present ones
    with: for an input without partitions the one that was read, for an input whose partitions Dagster does not compare
    by a digest the materialisation of each partition that was the latest then.
    """
    events = _latest_events(instance, graph) | _compared_events(instance, graph)
    with _events(instance) as connection:
        ids = [*events, *filter(None, [connection.scalar(NEWEST_EVENT)])]
        runs = _selected(connection, sa.select(_EVENTS.run_id), _EVENTS.id, ids)
        latest = sa.select(_CHECKS.c.asset_key, _CHECKS.c.check_name, _CHECKS.c.partition, sa.func.max(_CHECKS.c.id))
        latest = latest.group_by(_CHECKS.c.asset_key, _CHECKS.c.check_name, _CHECKS.c.partition)
        # Also the last that ended: a check of all shards is planned by each run of some of them.
        ended = latest.where(_CHECKS.c.execution_status.in_([status.value for status in ENDED]))
        groups = {*connection.execute(latest).all(), *connection.execute(ended).all()}
        checks = {(check.asset_key.to_string(), check.name) for check in graph.asset_check_keys}
        defined = _defined(graph)
        evaluations = [
            row for key, name, partition, row in groups if (key, name) in checks and partition in defined[key]
        ]
        return runs | _selected(connection, sa.select(_CHECKS.c.run_id), _CHECKS.c.id, evaluations)


def bytes_of_runs(instance: dg.DagsterInstance, run_ids: Sequence[str], logs: Path) -> dict[str, int]:
    """Return the bytes of each run's events, of the file of its log and of what its steps printed, below `logs`.

    Events count with their text: what a row takes beside it is not known.
    """
    found = dict.fromkeys(run_ids, 0)
    with _events(instance) as connection:
        for text, run in ((_EVENTS.event, _EVENTS.run_id), (_CHECKS.c.evaluation_event, _CHECKS.c.run_id)):
            for some in _chunks(run_ids, RUNS_PER_QUERY):
                query = sa.select(run, sa.func.sum(sa.func.length(text))).where(run.in_(some)).group_by(run)
                for run_id, size in connection.execute(query):
                    found[run_id] += size or 0
    for run_id in run_ids:
        places = [*_files_of(instance, run_id), logs / run_id]
        found[run_id] += sum(bytes_to_free(path) for path in places if path.exists())
    return found


def delete_run(instance: dg.DagsterInstance, run_id: str) -> None:
    """Remove a run: what its steps printed, its events, the evaluations of its checks, and last the run itself.

    Killed meanwhile, it leaves a run that is found again.
    """
    instance.compute_log_manager.delete_logs(prefix=[run_id])
    storage: Any = instance.event_log_storage
    with _events(instance) as connection:
        storage.delete_events_for_run(connection, run_id)
        connection.execute(_CHECKS.delete().where(_CHECKS.c.run_id == run_id))
    for path in _files_of(instance, run_id):
        path.unlink(missing_ok=True)
    storage.free_concurrency_slots_for_run(run_id)
    runs: Any = instance.run_storage
    with runs.connect() as connection:
        connection.execute(_RUN_TAGS.delete().where(_RUN_TAGS.c.run_id == run_id))  # SQLite does not cascade
    runs.delete_run(run_id)


def superseded_artifacts(instance: dg.DagsterInstance, graph: BaseAssetGraph) -> list[SupersededArtifact]:
    """Return the recorded artifacts that `graph` does not have.

    Those are partitions that the settings do not define any more, and assets that there are no more. What was recorded
    by something else than this project's IO managers is left out.
    """
    found = []
    for key in instance.all_asset_keys():
        events: dict[int, dg.EventLogRecord] = {}
        if not graph.has(key) or graph.get(key).is_partitioned:
            defined = _partitions(graph, key) if graph.has(key) else set()
            latest = instance.event_log_storage.get_latest_storage_id_by_partition(key, MATERIALIZED)
            ids = [event for name, event in latest.items() if name not in defined]
            for some in _chunks(sorted(ids), EVENTS_PER_QUERY):
                filtered = dg.AssetRecordsFilter(key, storage_ids=some)
                events |= {e.storage_id: e for e in instance.fetch_materializations(filtered, limit=len(some)).records}
        if not graph.has(key):
            events |= {e.storage_id: e for e in instance.fetch_materializations(key, limit=1).records}
        for event in events.values():
            if recorded := _recorded(event):
                found.append(SupersededArtifact(key, event.partition_key, event.timestamp, recorded))
    return found


def forget(instance: dg.DagsterInstance, graph: BaseAssetGraph, artifacts: Iterable[SupersededArtifact]) -> None:
    """Remove what is recorded of superseded artifacts: were they defined again, they would pass for materialised."""
    by_key: defaultdict[dg.AssetKey, list[Partition]] = defaultdict(list)
    for artifact in artifacts:
        by_key[artifact.key].append(artifact.partition)
    storage = instance.event_log_storage
    for key, partitions in by_key.items():
        recorded = storage.get_latest_storage_id_by_partition(key, MATERIALIZED).keys()
        if not graph.has(key) and recorded <= set(partitions):
            instance.wipe_assets([key])
            continue
        with _events(instance) as connection:
            newest = connection.scalar(NEWEST_EVENT)
            for partition in filter(None, partitions):
                of_it = sa.and_(
                    _EVENTS.asset_key == key.to_string(), _EVENTS.partition == partition, _EVENTS.id != newest
                )
                ids = sa.select(_EVENTS.id).where(of_it)
                connection.execute(_TAGS.delete().where(_TAGS.c.event_id.in_(ids)))
                connection.execute(SqlEventLogStorageTable.delete().where(of_it))
                checked = sa.and_(_CHECKS.c.asset_key == key.to_string(), _CHECKS.c.partition == partition)
                connection.execute(_CHECKS.delete().where(checked))
        storage.wipe_asset_cached_status(key)


def compact(instance: dg.DagsterInstance) -> None:
    """Give the room of removed rows back to the disk where the storage is SQLite; PostgreSQL does it by itself.

    Where another process is reading, or the disk has no room for a second copy, nothing happens: SQLite uses the room
    for what comes.
    """
    runs: Any = instance.run_storage
    for connect in (lambda: _events(instance), runs.connect):
        with connect() as connection:
            if connection.dialect.name != "sqlite":
                return
            path = connection.exec_driver_sql("PRAGMA database_list").first()[2]
        if path:
            with suppress(sqlite3.OperationalError), closing(sqlite3.connect(path, timeout=10)) as database:
                database.execute("VACUUM")
                database.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def _latest_events(instance: dg.DagsterInstance, graph: BaseAssetGraph) -> set[int]:
    """Return the latest event of each kind of each partition that is defined, and of each asset without partitions."""
    kinds = [kind.value for kind in ASSET_EVENTS]
    columns = _EVENTS.asset_key, _EVENTS.partition, _EVENTS.dagster_event_type
    query = sa.select(_EVENTS.asset_key, _EVENTS.partition, sa.func.max(_EVENTS.id))
    query = query.where(_EVENTS.asset_key.is_not(None), _EVENTS.dagster_event_type.in_(kinds)).group_by(*columns)
    defined = _defined(graph)
    unpartitioned = {key.to_string() for key in graph.get_all_asset_keys() if not graph.get(key).is_partitioned}
    with _events(instance) as connection:
        return {
            event
            for key, partition, event in connection.execute(query)
            # An asset that had partitions once has no other materialisation until it is materialised without.
            if partition in defined[key] or key in unpartitioned
        }


def _compared_events(instance: dg.DagsterInstance, graph: BaseAssetGraph) -> set[int]:
    """Return the materialisations of inputs that staleness compares with the present ones."""
    staleness = Staleness(graph, instance)
    pointers: defaultdict[dg.AssetKey, set[int]] = defaultdict(set)
    for key in graph.materializable_asset_keys:
        for partition, event in staleness.materialisations(key, asset_partitions(graph, key)).items():
            provenance = extract_data_provenance_from_entry(event.event_log_entry)
            for parent, pointer in (provenance.input_storage_ids if provenance else {}).items():
                if pointer and graph.has(parent) and not _reads_one_partition(graph, key, partition, parent):
                    pointers[parent].add(pointer)
    found: set[int] = set()
    for parent, ids in pointers.items():
        if not graph.get(parent).is_partitioned:
            found |= ids
        elif len(_partitions(graph, parent)) >= SKIP_PARTITION_DATA_VERSION_DEPENDENCY_THRESHOLD:
            found |= _latest_at(instance, parent, sorted(ids))
    return found


def _reads_one_partition(graph: BaseAssetGraph, key: dg.AssetKey, partition: Partition, parent: dg.AssetKey) -> bool:
    if partition is None or not graph.get(parent).is_partitioned:
        return False
    return isinstance(graph.get_partition_mapping(key, parent), dg.IdentityPartitionMapping)


def _latest_at(instance: dg.DagsterInstance, key: dg.AssetKey, moments: Sequence[int]) -> set[int]:
    """Return the materialisations of `key` that were their partitions' latest at one of the event ids `moments`."""
    query = sa.select(_EVENTS.partition, _EVENTS.id).where(
        _EVENTS.asset_key == key.to_string(),
        _EVENTS.dagster_event_type == MATERIALIZED.value,
        _EVENTS.partition.is_not(None),
    )
    history: defaultdict[str, list[int]] = defaultdict(list)
    with _events(instance) as connection:
        for partition, event in connection.execute(query.order_by(_EVENTS.id)):
            history[partition].append(event)
    found = set()
    for events in history.values():
        for event, following in pairwise(events):
            at = bisect_left(moments, event)
            if at < len(moments) and moments[at] < following:
                found.add(event)
    return found


def _recorded(event: dg.EventLogRecord) -> Recorded | None:
    materialisation = event.asset_materialization
    size = materialisation.metadata.get("bytes") if materialisation else None
    version = (materialisation.tags or {}).get(DATA_VERSION_TAG) if materialisation else None
    return Recorded(version, size.value or 0) if version and isinstance(size, dg.IntMetadataValue) else None


def _partitions(graph: BaseAssetGraph, key: dg.AssetKey) -> set[str]:
    definition = graph.get(key).partitions_def
    return set(definition.get_partition_keys()) if definition else set()


def _defined(graph: BaseAssetGraph) -> defaultdict[str, set[Partition]]:
    """Return the partitions of each asset, by its key as the storage writes it, and None for records without any."""
    found: defaultdict[str, set[Partition]] = defaultdict(set)
    for key in graph.get_all_asset_keys():
        found[key.to_string()] = {None, *_partitions(graph, key)}
    return found


def _run_records(instance: dg.DagsterInstance) -> Iterator[dg.RunRecord]:
    """Yield the records of all runs, the newest first."""
    cursor = None
    while records := instance.get_run_records(limit=RUNS_PER_QUERY, cursor=cursor):
        yield from records
        cursor = records[-1].dagster_run.run_id


def _unfinished_backfills(instance: dg.DagsterInstance) -> set[str]:
    statuses = [status for status in BulkActionStatus if status not in BULK_ACTION_TERMINAL_STATUSES]
    return {backfill.backfill_id for backfill in instance.get_backfills(filters=BulkActionsFilter(statuses=statuses))}


def _events(instance: dg.DagsterInstance) -> Any:
    """Return a connection to the events of all runs: in SQLite the index beside the runs' logs."""
    storage: Any = instance.event_log_storage
    return storage.index_connection()


def _files_of(instance: dg.DagsterInstance, run_id: str) -> list[Path]:
    storage: Any = instance.event_log_storage
    if not storage.is_run_sharded:
        return []
    path = storage.path_for_shard(run_id)
    return [Path(f"{path}{suffix}") for suffix in ("", "-wal", "-shm", "-journal")]


def _selected(connection: sa.Connection, query: sa.Select, column: sa.Column, ids: Sequence[int]) -> set[str]:
    """Return what `query` finds for rows whose `column` is one of `ids`."""
    return {
        row[0]
        for some in _chunks(sorted(ids), EVENTS_PER_QUERY)
        for row in connection.execute(query.where(column.in_(some)))
    }


def _chunks(values: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(values), size):
        yield values[start : start + size]
