"""Which partitions of an asset have to be made, and why: the one rule of `sbp run` and of the nightly automation.

Dagster's own resolver asks the instance for one partition after another and looks at no input of 100 partitions or
more; here every question is asked for all partitions at once, and inputs of any size count. It also knows tables of
which a partition reads only its own rows (`sbp_assets.storage.row_versions`).
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Mapping
from functools import cached_property
from typing import Any

import dagster as dg
from dagster._core.definitions.assets.graph.base_asset_graph import BaseAssetGraph
from dagster._core.definitions.data_version import (
    DATA_VERSION_TAG,
    SKIP_PARTITION_DATA_VERSION_DEPENDENCY_THRESHOLD,
    DataProvenance,
    extract_data_provenance_from_entry,
    extract_data_version_from_entry,
)
from dagster._core.storage.asset_check_execution_record import (
    AssetCheckExecutionRecord,
    AssetCheckExecutionRecordStatus,
    AssetCheckPartitionInfo,
)
from dagster._core.storage.dagster_run import NOT_FINISHED_STATUSES
from dagster._core.storage.event_log.base import EventLogRecord, PartitionKeyFilter

from sbp_assets.storage.row_versions import ROW_VERSIONS

MATERIALIZED = dg.DagsterEventType.ASSET_MATERIALIZATION
# Event ids go into one SQL statement; SQLite takes a bounded number of parameters.
EVENTS_PER_QUERY = 500

UNCHECKED = "unchecked "

Partition = str | None  # None: the whole of an unpartitioned asset

# Provenance by instance and asset, then partition, with the event that told it. Events never change and reading them is
# most of the work, so a process that asks again and again, as a sensor's does, reads each once.
_PROVENANCE: defaultdict[tuple[str, dg.AssetKey], dict[Partition, tuple[int, DataProvenance | None]]] = defaultdict(
    dict
)
# Likewise whether a failed evaluation of a check is only a warning.
_WARNS: defaultdict[tuple[str, dg.AssetCheckKey], dict[Partition, tuple[int, bool]]] = defaultdict(dict)


def is_unchecked(reason: str) -> bool:
    """Whether a partition is pending for want of a check alone: then it need not be made again, only looked at."""
    return reason.startswith(UNCHECKED)


class Staleness:
    """What `instance` says of the assets of `graph` once; answers are kept, so make a new one to look again."""

    def __init__(self, graph: BaseAssetGraph, instance: dg.DagsterInstance) -> None:
        self.graph, self.instance = graph, instance
        self._pending: dict[dg.AssetKey, dict[Partition, str]] = {}
        self._made: dict[dg.AssetKey, _Made] = {}
        self._digests: dict[tuple[dg.AssetKey, tuple[str, ...]], str] = {}
        self._changed_after: dict[tuple[dg.AssetKey, int], set[str]] = {}

    def pending(self, key: dg.AssetKey) -> dict[Partition, str]:
        """Reason per partition of `key` that is to be made, in order of the partitions; up-to-date ones are left out.

        'missing'; 'code': another code version, so another setting; 'input NAME': a direct input has other content;
        'check NAME': a check has failed as an error; 'unchecked NAME': a check has not said what it thinks of what is
        there, because it is new and blocking or its run has died. `is_unchecked` tells the last from the others.
        """
        if key not in self._pending:
            self._pending[key] = {
                partition: reason
                for partition in self._partitions(key)
                if (reason := self._reason(key, partition) or self._failed_checks(key).get(partition))
            }
        return self._pending[key]

    def blocked(self, key: dg.AssetKey) -> list[Partition]:
        """Partitions that nothing should be made from: all pending ones but those with a failed non-blocking check."""
        others = {
            f"check {check.name}" for check in self.graph.get(key).check_keys if not self.graph.get(check).blocking
        }
        return [partition for partition, reason in self.pending(key).items() if reason not in others]

    def versions(self, key: dg.AssetKey) -> dict[Partition, str]:
        """Content version per partition of `key` that was made, and that the settings still have."""
        versions = self._latest(key).versions
        return {partition: versions[partition] for partition in self._partitions(key) if partition in versions}

    def unchecked(self, key: dg.AssetKey) -> dict[Partition, int]:
        """Event that made it, per partition of `key` of which all that is missing is a check that nobody is at.

        While the run that made it goes on, or one that is to check it, queued or not, that run will say.
        """
        made = self._latest(key)
        partitions = {made.storage_ids[name]: name for name, why in self.pending(key).items() if is_unchecked(why)}
        runs = {record.storage_id: record.run_id for record in made.events(partitions)}
        concerned = {name: {runs[event], *made.planned[name]} for event, name in partitions.items()}
        going_on = self._going_on(set().union(*concerned.values()))
        return {name: event for event, name in partitions.items() if going_on.isdisjoint(concerned[name])}

    def _going_on(self, run_ids: set[str]) -> set[str]:
        wanted, found = sorted(run_ids), set()
        for start in range(0, len(wanted), EVENTS_PER_QUERY):
            some = dg.RunsFilter(run_ids=wanted[start : start + EVENTS_PER_QUERY], statuses=NOT_FINISHED_STATUSES)
            found |= {run.run_id for run in self.instance.get_runs(some)}
        return found

    def _partitions(self, key: dg.AssetKey) -> list[Partition]:
        definition = self.graph.get(key).partitions_def
        return [*definition.get_partition_keys()] if definition else [None]

    def _latest(self, key: dg.AssetKey) -> _Made:
        if key not in self._made:
            self._made[key] = _Made(self.instance, key, self.graph.get(key).is_partitioned)
        return self._made[key]

    def _reason(self, key: dg.AssetKey, partition: Partition) -> str:
        made = self._latest(key)
        if partition not in made.versions:
            return "missing"
        provenance = made.provenance.get(partition)
        if provenance is None:
            return ""  # reported by hand: whoever did so vouches for it
        node = self.graph.get(key)
        if node.code_version and node.code_version != provenance.code_version:
            return "code"
        inputs = provenance.input_data_versions
        for name in sorted({*node.parent_keys, *inputs}):
            known = name in node.parent_keys and name in inputs
            if not known or self._input_changed(key, partition, provenance, name):
                return f"input {name.to_user_string()}"
        return ""

    def _input_changed(
        self, key: dg.AssetKey, partition: Partition, provenance: DataProvenance, parent: dg.AssetKey
    ) -> bool:
        read, pointer = provenance.input_data_versions[parent].value, provenance.input_storage_ids.get(parent)
        latest = self._latest(parent)
        if not self.graph.get(parent).is_partitioned:
            if read == latest.versions.get(None):
                return False
            old, new = latest.row_versions(pointer), latest.row_versions(latest.storage_ids.get(None))
            if partition is None or old is None or new is None or partition not in new:
                return True
            return old.get(partition) != new[partition]
        parents = self._parent_partitions(key, partition, parent)
        if len(parents) < SKIP_PARTITION_DATA_VERSION_DEPENDENCY_THRESHOLD:
            # What Dagster notes of such an input: a digest of its partitions' versions.
            return read != self._digest(parent, parents)
        # Of a larger one it notes the last event of any partition.
        if pointer is None:
            return True
        if (parent, pointer) not in self._changed_after:
            self._changed_after[parent, pointer] = latest.changed_after(pointer)
        return not self._changed_after[parent, pointer].isdisjoint(parents)

    def _parent_partitions(self, key: dg.AssetKey, partition: Partition, parent: dg.AssetKey) -> tuple[str, ...]:
        mapping = self.graph.get_partition_mapping(key, parent)
        if partition is not None and isinstance(mapping, dg.IdentityPartitionMapping):
            return (partition,)
        definition = self.graph.get(parent).partitions_def
        if definition is not None and isinstance(mapping, dg.AllPartitionMapping):
            return self._latest(parent).all_partitions(definition)
        subset = self.graph.get_parent_partition_keys_for_child(partition, parent, key).partitions_subset
        return tuple(sorted(subset.get_partition_keys()))

    def _digest(self, parent: dg.AssetKey, partitions: tuple[str, ...]) -> str:
        if (parent, partitions) not in self._digests:
            versions = self._latest(parent).versions
            text = "".join(versions[name] for name in partitions if name in versions)
            self._digests[parent, partitions] = hashlib.sha256(text.encode()).hexdigest()
        return self._digests[parent, partitions]

    def _failed_checks(self, key: dg.AssetKey) -> dict[Partition, str]:
        made = self._latest(key)
        if made.failed_checks is None:
            made.failed_checks = {}
            checks = sorted(self.graph.get(key).check_keys)
            infos = {
                (info.check_key, info.partition_key): info
                for info in self.instance.event_log_storage.get_asset_check_partition_info(checks)
            }
            for partition in self._partitions(key):
                found = [infos[check, partition] for check in checks if (check, partition) in infos]
                made.planned[partition] = {info.latest_planned_run_id for info in found}
                reasons = [
                    (not self.graph.get(check).blocking, is_unchecked(reason), reason)
                    for check in checks
                    if (reason := self._failure(check, partition, infos.get((check, partition))))
                ]
                # Blocking ones first; and what has failed before what crashed: of a lost artifact most checks do.
                if reasons:
                    made.failed_checks[partition] = min(reasons)[-1]
        return made.failed_checks

    def _failure(self, check: dg.AssetCheckKey, partition: Partition, info: AssetCheckPartitionInfo | None) -> str:
        if info and info.latest_execution_status == AssetCheckExecutionRecordStatus.PLANNED:
            return f"{UNCHECKED}{check.name}"
        if not info or not info.is_current:
            return f"{UNCHECKED}{check.name}" if self.graph.get(check).blocking else ""
        if info.latest_execution_status == AssetCheckExecutionRecordStatus.SUCCEEDED:
            return ""
        failed = info.latest_execution_status == AssetCheckExecutionRecordStatus.FAILED
        if failed and self._only_warns(check, partition, info.latest_check_event_storage_id):
            return ""
        return f"check {check.name}"

    def _only_warns(self, check: dg.AssetCheckKey, partition: Partition, event: int) -> bool:
        """Whether the failure that `event` records is a warning: that is in the evaluation alone, read once."""
        known = _WARNS[_identity(self.instance), check]
        if known.get(partition, (0, False))[0] != event:
            record: AssetCheckExecutionRecord | None = (
                self.instance.event_log_storage.get_latest_asset_check_execution_by_key(
                    [check], PartitionKeyFilter(key=partition) if partition is not None else None
                ).get(check)
            )
            evaluation = record.evaluation if record else None
            known[partition] = event, bool(evaluation and evaluation.severity == dg.AssetCheckSeverity.WARN)
        return known[partition][1]


class _Made:
    """The latest materialisations of one asset, by partition."""

    def __init__(self, instance: dg.DagsterInstance, key: dg.AssetKey, partitioned: bool) -> None:
        self._instance, self._key = instance, key
        self.storage_ids: Mapping[Partition, int]
        self.versions: dict[Partition, str]
        self.failed_checks: dict[Partition, str] | None = None
        self.planned: dict[Partition, set[str]] = {}  # with them: runs that last set out to check it
        self._row_versions: dict[int, Mapping[str, str] | None] = {}
        self._all: tuple[str, ...] = ()
        if partitioned:
            storage = instance.event_log_storage
            self.storage_ids = dict(storage.get_latest_storage_id_by_partition(key, MATERIALIZED).items())
            tags = storage.get_latest_tags_by_partition(key, MATERIALIZED, [DATA_VERSION_TAG])
            self.versions = {name: tags.get(name, {}).get(DATA_VERSION_TAG, "") for name in self.storage_ids if name}
        else:
            self.storage_ids, self.versions = {}, {}
            for record in instance.fetch_materializations(key, limit=1).records:
                version = extract_data_version_from_entry(record.event_log_entry)
                self.storage_ids, self.versions = {None: record.storage_id}, {None: version.value if version else ""}

    @cached_property
    def provenance(self) -> dict[Partition, DataProvenance | None]:
        """How each partition was made: code version and inputs."""
        known = _PROVENANCE[_identity(self._instance), self._key]
        unread = [event for partition, event in self.storage_ids.items() if known.get(partition, (0, None))[0] != event]
        for record in self.events(unread):
            known[record.partition_key] = record.storage_id, extract_data_provenance_from_entry(record.event_log_entry)
        return {partition: known[partition][1] for partition in self.storage_ids if partition in known}

    def all_partitions(self, definition: dg.PartitionsDefinition) -> tuple[str, ...]:
        self._all = self._all or tuple(sorted(definition.get_partition_keys()))
        return self._all

    def changed_after(self, storage_id: int) -> set[str]:
        """Partitions whose version is another than it was at the event `storage_id`."""
        later = [name for name, latest in self.storage_ids.items() if name is not None and latest > storage_id]
        if not later:
            return set()
        before = self._instance.event_log_storage.get_latest_tags_by_partition(
            self._key, MATERIALIZED, [DATA_VERSION_TAG], before_cursor=storage_id + 1
        )
        return {name for name in later if before.get(name, {}).get(DATA_VERSION_TAG) != self.versions[name]}

    def row_versions(self, storage_id: int | None) -> Mapping[str, str] | None:
        """What the event `storage_id` says of the rows of each partition; None where it says nothing."""
        if storage_id is None:
            return None
        if storage_id not in self._row_versions:
            found: Mapping[str, str] | None = None
            for record in self.events([storage_id]):
                value = record.asset_materialization and record.asset_materialization.metadata.get(ROW_VERSIONS)
                found = value.value if isinstance(value, dg.JsonMetadataValue) else None  # type: ignore[assignment]
            self._row_versions[storage_id] = found
        return self._row_versions[storage_id]

    def events(self, storage_ids: Iterable[int]) -> Iterable[EventLogRecord]:
        wanted = sorted(storage_ids)
        for start in range(0, len(wanted), EVENTS_PER_QUERY):
            some = wanted[start : start + EVENTS_PER_QUERY]
            yield from self._instance.fetch_materializations(
                dg.AssetRecordsFilter(self._key, storage_ids=some), limit=len(some)
            ).records


def _identity(instance: dg.DagsterInstance) -> str:
    """Of the instance, for what is kept between evaluations: its storage, SQL as all of Dagster's are, has one."""
    storage: Any = instance.run_storage
    return storage.get_run_storage_id()
