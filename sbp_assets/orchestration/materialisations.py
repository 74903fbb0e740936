"""The latest materialisations of an asset, read for all its partitions at once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import dagster as dg

from sbp_assets.dagster_support.internals import (
    DATA_VERSION_TAG,
    extract_data_provenance_from_entry,
    extract_data_version_from_entry,
)
from sbp_assets.storage.row_versions import ROW_VERSIONS

MATERIALIZED = dg.DagsterEventType.ASSET_MATERIALIZATION
# Event ids go into one SQL statement; SQLite takes a bounded number of parameters.
EVENTS_PER_QUERY = 500

Partition = str | None  # None: the whole of an unpartitioned asset


@dataclass(frozen=True, slots=True)
class Provenance:
    """What a partition was materialised with: the code version, and of each input its version and last event then.

    There is one for each shard of each asset. Dagster's own takes 1.8 kB; of this one the inputs are shared.
    """

    code_version: str
    inputs: tuple[tuple[dg.AssetKey, str, int | None], ...]


class KnownEvents:
    """What the events read so far of one instance say, by asset or check, then partition, with the event's id."""

    def __init__(self) -> None:
        self.provenance: defaultdict[dg.AssetKey, dict[Partition, tuple[int, Provenance | None]]] = defaultdict(dict)
        # Of partitioned assets: the ids of the latest materialisations, and their data versions.
        self.latest: dict[dg.AssetKey, tuple[Mapping[str, int], Mapping[str, str]]] = {}
        # Whether a failed evaluation of a check is only a warning.
        self.warns: defaultdict[dg.AssetCheckKey, dict[Partition, tuple[int, bool]]] = defaultdict(dict)


class StalenessCache:
    """What a process that looks at staleness again and again keeps in between.

    Events never change and reading them is most of the work, so each is read once: `python -m benchmarks.ui_scale` has
    the seconds of the first look and of later ones. What looks repeatedly owns one cache and hands it to each
    Staleness.
    """

    def __init__(self) -> None:
        self._by_storage: defaultdict[str, KnownEvents] = defaultdict(KnownEvents)

    def known_events(self, instance: dg.DagsterInstance) -> KnownEvents:
        """Return what is known of `instance`, which the id of its SQL storage identifies."""
        storage: Any = instance.run_storage
        return self._by_storage[storage.get_run_storage_id()]


class LatestMaterialisations:
    """The latest materialisation of each partition of the asset `key`, as `instance` had it at first sight."""

    def __init__(
        self,
        instance: dg.DagsterInstance,
        key: dg.AssetKey,
        partitions: dg.PartitionsDefinition | None,
        known: KnownEvents,
    ) -> None:
        self._instance, self._key, self._definition = instance, key, partitions
        self._provenance = known.provenance[key]
        self._row_versions: dict[int, Mapping[str, str] | None] = {}
        self._all: tuple[str, ...] | None = None
        self._last: tuple[Partition, int] | None = None
        self.storage_ids: dict[Partition, int] = {}
        self.versions: dict[Partition, str] = {}
        if partitions is not None:
            known.latest[key] = ids, versions = self._look(*known.latest.get(key, ({}, {})))
            self.storage_ids, self.versions = dict(ids.items()), dict(versions.items())
        else:
            for record in instance.fetch_materializations(key, limit=1).records:
                version = extract_data_version_from_entry(record.event_log_entry)
                self.storage_ids, self.versions = {None: record.storage_id}, {None: version.value if version else ""}

    def _look(
        self, known_ids: Mapping[str, int], known_versions: Mapping[str, str]
    ) -> tuple[Mapping[str, int], Mapping[str, str]]:
        """Return the latest materialisation and the data version of each partition, where these were known before."""
        storage = self._instance.event_log_storage
        # All of them: an event that was deleted is no later than another.
        ids = storage.get_latest_storage_id_by_partition(self._key, MATERIALIZED)
        if not (new := ids.items() - known_ids.items()):
            return ids, {name: known_versions[name] for name in ids} if len(ids) < len(known_ids) else known_versions
        before_new = min(event for _, event in new) - 1
        tags = storage.get_latest_tags_by_partition(
            self._key, MATERIALIZED, [DATA_VERSION_TAG], after_cursor=before_new
        )
        read = {name: tags.get(name, {}).get(DATA_VERSION_TAG, "") for name, _ in new}
        return ids, {name: read[name] if name in read else known_versions[name] for name in ids}

    def load_provenance(self, partitions: Iterable[Partition]) -> None:
        """Read the provenance of all `partitions` of which it is not known yet, in as few queries as there can be."""
        events = {name: self.storage_ids[name] for name in partitions if name in self.storage_ids}
        known = self._provenance
        unread = [event for name, event in events.items() if known.get(name, (0, None))[0] != event]
        same: dict[Any, Any] = {}  # what is equal is kept once
        for record in self.events(unread):
            found = extract_data_provenance_from_entry(record.event_log_entry)
            known[record.partition_key] = record.storage_id, found and _provenance(found, same)

    def provenance(self, partition: Partition) -> Provenance | None:
        """Return the code version and inputs that `partition` was materialised with; None where there is no record."""
        event, provenance = self._provenance.get(partition, (0, None))
        if event != self.storage_ids.get(partition):
            self.load_provenance([partition])
            _, provenance = self._provenance.get(partition, (0, None))
        return provenance

    def add(self, partition: str, version: str, storage_id: int) -> None:
        """Take note of a materialisation later than first sight."""
        self.storage_ids[partition], self.versions[partition] = storage_id, version
        if self._last and storage_id > self._last[1]:
            self._last = partition, storage_id

    def last(self) -> tuple[Partition, int] | None:
        """Return the partition that was materialised last, and its event's id; None where none was."""
        if self._last is None and self.storage_ids:
            self._last = max(self.storage_ids.items(), key=lambda item: item[1])
        return self._last

    def all_partitions(self) -> tuple[str, ...]:
        """Return the keys of the asset's partitions, sorted; none for an unpartitioned asset."""
        if self._all is None:
            self._all = tuple(sorted(self._definition.get_partition_keys())) if self._definition else ()
        return self._all

    def changed_after(self, storage_id: int) -> set[str]:
        """Return the partitions whose version is another than it was at the event `storage_id`."""
        later = [name for name, latest in self.storage_ids.items() if name is not None and latest > storage_id]
        if not later:
            return set()
        before = self._instance.event_log_storage.get_latest_tags_by_partition(
            self._key, MATERIALIZED, [DATA_VERSION_TAG], before_cursor=storage_id + 1
        )
        return {name for name in later if before.get(name, {}).get(DATA_VERSION_TAG) != self.versions[name]}

    def rows_changed(self, storage_id: int | None, partition: Partition) -> bool:
        """Return whether a table without partitions has, since the event `storage_id`, other rows for `partition`.

        Where it does not record the versions of each partition's rows, they count as changed.
        """
        old, new = self.row_versions(storage_id), self.row_versions(self.storage_ids.get(None))
        if partition is None or old is None or new is None or partition not in new:
            return True
        return old.get(partition) != new[partition]

    def row_versions(self, storage_id: int | None) -> Mapping[str, str] | None:
        """Return the version of each partition's rows that the event `storage_id` records; None where it has none."""
        if storage_id is None:
            return None
        if storage_id not in self._row_versions:
            found: Mapping[str, str] | None = None
            for record in self.events([storage_id]):
                value = record.asset_materialization and record.asset_materialization.metadata.get(ROW_VERSIONS)
                found = value.value if isinstance(value, dg.JsonMetadataValue) else None  # type: ignore[assignment]
            self._row_versions[storage_id] = found
        return self._row_versions[storage_id]

    def events(self, storage_ids: Iterable[int]) -> Iterable[dg.EventLogRecord]:
        """Yield the materialisation events of these ids."""
        wanted = sorted(storage_ids)
        for start in range(0, len(wanted), EVENTS_PER_QUERY):
            some = wanted[start : start + EVENTS_PER_QUERY]
            yield from self._instance.fetch_materializations(
                dg.AssetRecordsFilter(self._key, storage_ids=some), limit=len(some)
            ).records


def _provenance(found: dg.DataProvenance, same: dict[Any, Any]) -> Provenance:
    inputs = []
    for key, version in found.input_data_versions.items():
        one = same.setdefault(key, key), version.value, found.input_storage_ids.get(key)
        inputs.append(same.setdefault(one, one))
    all_inputs = tuple(inputs)
    return Provenance(same.setdefault(found.code_version, found.code_version), same.setdefault(all_inputs, all_inputs))
