"""Which partitions of an asset are pending, and why: one rule for all commands, the sensors and the nightly automation.

Dagster's own resolver asks the instance for one partition after another and looks at no input of 100 partitions or
more; here every question is asked for all partitions at once, and inputs of any size count. The rule also knows tables
of which a partition reads only its own rows (`sbp_assets.storage.row_versions`).
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import dagster as dg

from sbp_assets.dagster_support.internals import (
    DATA_VERSION_TAG,
    NOT_FINISHED_STATUSES,
    SKIP_PARTITION_DATA_VERSION_DEPENDENCY_THRESHOLD,
    AssetCheckExecutionRecord,
    AssetCheckExecutionRecordStatus,
    AssetCheckPartitionInfo,
    BaseAssetGraph,
    PartitionKeyFilter,
)
from sbp_assets.orchestration.materialisations import (
    EVENTS_PER_QUERY,
    MATERIALIZED,
    LatestMaterialisations,
    Partition,
    StalenessCache,
)
from sbp_assets.orchestration.passed_checks import passed_checks
from sbp_assets.orchestration.status import FRESH, PartitionStatus, Status

# Of one input of an asset: whether it has changed for a partition that has read this version, at this event.
Changed = Callable[[Partition, str, int | None], bool]
# What Dagster records of an input that has none.
NO_VERSION = "INITIAL"


def asset_partitions(graph: BaseAssetGraph, key: dg.AssetKey) -> list[Partition]:
    """Return the partitions of an asset in their order; [None] of an unpartitioned one."""
    definition = graph.get(key).partitions_def
    return [*definition.get_partition_keys()] if definition else [None]


def unfinished_runs(instance: dg.DagsterInstance, run_ids: Collection[str]) -> set[str]:
    """Return those of `run_ids` whose runs have not ended."""
    wanted, found = sorted(run_ids), set[str]()
    for start in range(0, len(wanted), EVENTS_PER_QUERY):
        some = dg.RunsFilter(run_ids=wanted[start : start + EVENTS_PER_QUERY], statuses=NOT_FINISHED_STATUSES)
        found |= {run.run_id for run in instance.get_runs(some)}
    return found


def partition_checks(graph: BaseAssetGraph, key: dg.AssetKey) -> list[dg.AssetCheckKey]:
    """Return the checks of an asset that look at one of its partitions, or at an unpartitioned asset."""
    partitioned = graph.get(key).is_partitioned
    return [
        check for check in graph.get(key).check_keys if (graph.get(check).partitions_def is not None) == partitioned
    ]


def fan_in_checks(graph: BaseAssetGraph, key: dg.AssetKey) -> list[dg.AssetCheckKey]:
    """Return the checks of a partitioned asset that look at all of its partitions."""
    return sorted(set(graph.get(key).check_keys) - set(partition_checks(graph, key)))


@dataclass
class _Checks:
    """The checks of the partitions of an asset: the materialisation that has passed them all, by partition.

    What Dagster knows of each check on a partition that has not is asked for when it is wanted.
    """

    keys: list[dg.AssetCheckKey]
    passed: dict[Partition, int]
    infos: defaultdict[Partition, dict[dg.AssetCheckKey, AssetCheckPartitionInfo]] | None = None


class Staleness:
    """The status of the assets of `graph` in `instance`, looked at once; create another one to look again.

    `cache` carries over from one look to the next what never changes.
    """

    def __init__(
        self, graph: BaseAssetGraph, instance: dg.DagsterInstance, cache: StalenessCache | None = None
    ) -> None:
        self.graph, self.instance = graph, instance
        self._known = (cache or StalenessCache()).known_events(instance)
        self._pending: dict[dg.AssetKey, dict[Partition, PartitionStatus]] = {}
        self._materialisations: dict[dg.AssetKey, LatestMaterialisations] = {}
        self._checks: dict[dg.AssetKey, _Checks] = {}
        self._digests: dict[tuple[dg.AssetKey, tuple[str, ...]], str] = {}
        self._changed_after: dict[tuple[dg.AssetKey, int], set[str]] = {}
        self._inputs: dict[dg.AssetKey, dict[dg.AssetKey, Changed]] = {}

    def pending(self, key: dg.AssetKey) -> dict[Partition, PartitionStatus]:
        """Return the status of each partition of `key` that is not fresh, in the order of the partitions."""
        if key not in self._pending:
            partitions = asset_partitions(self.graph, key)
            self._latest(key).load_provenance(partitions)
            statuses = {partition: self.status(key, partition) for partition in partitions}
            self._pending[key] = {name: status for name, status in statuses.items() if status.is_pending}
        return self._pending[key]

    def status(self, key: dg.AssetKey, partition: Partition) -> PartitionStatus:
        """Return the status of one partition; what is missing or stale is not asked for its checks."""
        status = self._materialisation_status(key, partition)
        return self._check_status(key, partition) if status.status is Status.FRESH else status

    def blocked(self, key: dg.AssetKey) -> list[Partition]:
        """Return the partitions that nothing should be materialised from.

        Those are all pending ones but those with a failed check that is not blocking.
        """
        return [
            partition
            for partition, status in self.pending(key).items()
            if status.status is not Status.CHECK_FAILED or (status.check and self.graph.get(status.check).blocking)
        ]

    def last_event(self, key: dg.AssetKey) -> int:
        """Return the id of the last materialisation of any partition of `key`; 0 without one."""
        _, event = self._latest(key).last() or (None, 0)
        return event

    def versions(self, key: dg.AssetKey) -> dict[Partition, str]:
        """Return the data version of each materialised partition of `key`, of those that the settings define."""
        versions = self._latest(key).versions
        return {name: versions[name] for name in asset_partitions(self.graph, key) if name in versions}

    def materialisations(self, key: dg.AssetKey, partitions: Sequence[Partition]) -> dict[Partition, dg.EventLogRecord]:
        """Return the latest materialisation's event of each of `partitions` that has one, asked for all at once.

        Their status is then known without a query for each.
        """
        latest = self._latest(key)
        latest.load_provenance(partitions)
        events = latest.events(latest.storage_ids[name] for name in partitions if name in latest.storage_ids)
        return {event.partition_key: event for event in events}

    def inputs(self, key: dg.AssetKey, partition: Partition) -> dict[dg.AssetKey, tuple[str, int | None]]:
        """Return what a materialisation of `partition` now has to record of each input, which `status` compares later.

        That is the version read, and the id of the input's last event: what Dagster records of a run of one partition.
        """
        found: dict[dg.AssetKey, tuple[str, int | None]] = {}
        for parent in sorted(self.graph.get(key).parent_keys):
            latest = self._latest(parent)
            name, event = latest.last() or (None, None)
            version = latest.versions[name] if event else NO_VERSION
            if self.graph.get(parent).is_partitioned:
                parents = self._parent_partitions(key, partition, parent)
                if len(parents) < SKIP_PARTITION_DATA_VERSION_DEPENDENCY_THRESHOLD:
                    version = self._digest_of(parent, parents)
            found[parent] = version, event
        return found

    def look_again(self, key: dg.AssetKey, partition: str) -> None:
        """Look up the last materialisation of one partition, which another run may have added since first sight."""
        storage = self.instance.event_log_storage
        events = storage.get_latest_storage_id_by_partition(key, MATERIALIZED, {partition})
        if partition in events and events[partition] != self._latest(key).storage_ids.get(partition):
            tags = storage.get_latest_tags_by_partition(key, MATERIALIZED, [DATA_VERSION_TAG], [partition])
            self.materialised(key, partition, tags.get(partition, {}).get(DATA_VERSION_TAG, ""), events[partition])

    def materialised(self, key: dg.AssetKey, partition: str, version: str, storage_id: int) -> None:
        """Take note of a materialisation that the caller has just recorded."""
        self._latest(key).add(partition, version, storage_id)
        self._pending.pop(key, None)
        self._digests.pop((key, (partition,)), None)
        self._checks.pop(key, None)

    def unchecked(self, key: dg.AssetKey) -> dict[Partition, int]:
        """Return the materialisation's event id of each unchecked partition of `key` that no run is about to check.

        While the run that materialised it goes on, or one that is to check it, queued or not, that run will say.
        """
        latest = self._latest(key)
        unchecked = [name for name, status in self.pending(key).items() if status.status is Status.UNCHECKED]
        partitions = {latest.storage_ids[name]: name for name in unchecked}
        runs = {record.storage_id: record.run_id for record in latest.events(partitions)}
        concerned = {
            name: {runs[event], *(info.latest_planned_run_id for info in self._check_infos(key, name).values())}
            for event, name in partitions.items()
        }
        going_on = unfinished_runs(self.instance, set().union(*concerned.values()))
        return {name: event for event, name in partitions.items() if going_on.isdisjoint(concerned[name])}

    def _latest(self, key: dg.AssetKey) -> LatestMaterialisations:
        if key not in self._materialisations:
            partitions = self.graph.get(key).partitions_def
            self._materialisations[key] = LatestMaterialisations(self.instance, key, partitions, self._known)
        return self._materialisations[key]

    def _materialisation_status(self, key: dg.AssetKey, partition: Partition) -> PartitionStatus:
        latest = self._latest(key)
        if partition not in latest.versions:
            return PartitionStatus(Status.MISSING)
        provenance = latest.provenance(partition)
        if provenance is None:
            return FRESH  # reported by hand: the person who did so vouches for it
        code_version = self.graph.get(key).code_version
        if code_version and code_version != provenance.code_version:
            return PartitionStatus(Status.CODE_CHANGED)
        if key not in self._inputs:
            self._inputs[key] = {parent: self._comparison(key, parent) for parent in self.graph.get(key).parent_keys}
        inputs, read = self._inputs[key], provenance.inputs
        changed = {
            parent
            for parent, version, event in read
            if parent not in inputs or inputs[parent](partition, version, event)
        }
        if changed or len(read) != len(inputs):
            changed |= inputs.keys() - {parent for parent, *_ in read}
        return PartitionStatus(Status.INPUT_CHANGED, inputs=tuple(sorted(changed))) if changed else FRESH

    def _comparison(self, key: dg.AssetKey, parent: dg.AssetKey) -> Changed:
        """Return what tells whether an input of `key` has changed: it is called for every partition."""
        latest = self._latest(parent)
        if not self.graph.get(parent).is_partitioned:
            return lambda partition, read, pointer: (
                read != latest.versions.get(None) and latest.rows_changed(pointer, partition)
            )
        mapping = self.graph.get_partition_mapping(key, parent)
        if self.graph.get(key).is_partitioned and isinstance(mapping, dg.IdentityPartitionMapping):
            return lambda partition, read, _: read != _digest(latest.versions.get(str(partition), ""))
        if isinstance(mapping, dg.AllPartitionMapping):
            everything = latest.all_partitions()
            return lambda _, read, pointer: self._any_changed(parent, everything, read, pointer)
        return lambda partition, read, pointer: self._any_changed(
            parent, self._parent_partitions(key, partition, parent), read, pointer
        )

    def _any_changed(self, parent: dg.AssetKey, partitions: tuple[str, ...], read: str, pointer: int | None) -> bool:
        if len(partitions) < SKIP_PARTITION_DATA_VERSION_DEPENDENCY_THRESHOLD:
            # What Dagster records of such an input: a digest of its partitions' versions.
            return read != self._digest_of(parent, partitions)
        # Of a larger one it records the last event of any partition.
        if pointer is None:
            return True
        if (parent, pointer) not in self._changed_after:
            self._changed_after[parent, pointer] = self._latest(parent).changed_after(pointer)
        # Mostly none has, and to look for none of them among all would take S² steps for S shards.
        changed = self._changed_after[parent, pointer]
        return bool(changed) and not changed.isdisjoint(partitions)

    def _parent_partitions(self, key: dg.AssetKey, partition: Partition, parent: dg.AssetKey) -> tuple[str, ...]:
        mapping = self.graph.get_partition_mapping(key, parent)
        if partition is not None and isinstance(mapping, dg.IdentityPartitionMapping):
            return (partition,)
        if isinstance(mapping, dg.AllPartitionMapping):
            return self._latest(parent).all_partitions()
        subset = self.graph.get_parent_partition_keys_for_child(partition, parent, key).partitions_subset
        return tuple(sorted(subset.get_partition_keys()))

    def _digest_of(self, parent: dg.AssetKey, partitions: tuple[str, ...]) -> str:
        if (parent, partitions) not in self._digests:
            versions = self._latest(parent).versions
            self._digests[parent, partitions] = _digest(*(versions[name] for name in partitions if name in versions))
        return self._digests[parent, partitions]

    def _check_status(self, key: dg.AssetKey, partition: Partition) -> PartitionStatus:
        """Return the status of the check that matters most: blocking ones first, what has failed before what crashed.

        Of a lost artifact most checks crash.
        """
        checks = self._checks_of(key)
        if not checks.keys or checks.passed.get(partition) == self._latest(key).storage_ids.get(partition):
            return FRESH
        infos = self._check_infos(key, partition)
        found = [
            (not self.graph.get(check).blocking, status is Status.UNCHECKED, check.name, status, check)
            for check in checks.keys
            if (status := self._status_of_check(check, partition, infos.get(check))) is not Status.FRESH
        ]
        if not found:
            return FRESH
        *_, status, check = min(found, key=lambda one: one[:3])
        return PartitionStatus(status, check=check)

    def _checks_of(self, key: dg.AssetKey) -> _Checks:
        if key not in self._checks:
            checks = sorted(partition_checks(self.graph, key))
            self._checks[key] = _Checks(checks, passed_checks(self.instance, checks) if checks else {})
        return self._checks[key]

    def _check_infos(self, key: dg.AssetKey, partition: Partition) -> dict[dg.AssetCheckKey, AssetCheckPartitionInfo]:
        checks = self._checks_of(key)
        if checks.infos is None:
            events = self._latest(key).storage_ids
            asked = [name for name, event in events.items() if name and checks.passed.get(name) != event]
            few = self.graph.get(key).is_partitioned and len(asked) <= EVENTS_PER_QUERY
            checks.infos = defaultdict(dict)
            for info in self.instance.event_log_storage.get_asset_check_partition_info(
                checks.keys, partition_keys=asked if few else None
            ):
                checks.infos[info.partition_key][info.check_key] = info
        return checks.infos.get(partition, {})

    def _status_of_check(
        self, check: dg.AssetCheckKey, partition: Partition, info: AssetCheckPartitionInfo | None
    ) -> Status:
        """UNCHECKED where it is new and blocking, or where its run has died or not ended; else what it said."""
        if info and info.latest_execution_status == AssetCheckExecutionRecordStatus.PLANNED:
            return Status.UNCHECKED
        if not info or not info.is_current:
            return Status.UNCHECKED if self.graph.get(check).blocking else Status.FRESH
        if info.latest_execution_status == AssetCheckExecutionRecordStatus.SUCCEEDED:
            return Status.FRESH
        failed = info.latest_execution_status == AssetCheckExecutionRecordStatus.FAILED
        if failed and self._only_warns(check, partition, info.latest_check_event_storage_id):
            return Status.FRESH
        return Status.CHECK_FAILED

    def _only_warns(self, check: dg.AssetCheckKey, partition: Partition, event: int) -> bool:
        """Whether the failure that `event` records is a warning: that is in the evaluation alone, read once."""
        known = self._known.warns[check]
        if known.get(partition, (0, False))[0] != event:
            record: AssetCheckExecutionRecord | None = (
                self.instance.event_log_storage.get_latest_asset_check_execution_by_key(
                    [check], PartitionKeyFilter(key=partition) if partition is not None else None
                ).get(check)
            )
            evaluation = record.evaluation if record else None
            known[partition] = event, bool(evaluation and evaluation.severity == dg.AssetCheckSeverity.WARN)
        return known[partition][1]


def _digest(*versions: str) -> str:
    """Return what Dagster records of an input of so many partitions that have these versions."""
    return hashlib.sha256("".join(versions).encode()).hexdigest()
