"""The checks that have failed, warnings too, as lines for the end of a command: nobody looks for them in the UI."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import dagster as dg

from sbp_assets.dagster_support.internals import (
    AssetCheckExecutionRecord,
    AssetCheckExecutionRecordStatus,
    AssetCheckPartitionInfo,
    BaseAssetGraph,
    PartitionKeyFilter,
)
from sbp_assets.dagster_support.preview import printable, unescape
from sbp_assets.orchestration.materialisations import Partition

FAILED = AssetCheckExecutionRecordStatus.FAILED
PARTITIONS, CHARS = 3, 300  # Shown of one check.


@dataclass(frozen=True)
class FailedCheck:
    """A check that failed, alike for all `partitions`; `reason` is what it says of the first."""

    check: dg.AssetCheckKey
    kind: str
    partitions: Sequence[Partition]
    reason: str

    @property
    def line(self) -> str:
        """Return one line for a terminal."""
        names = [name for name in self.partitions if name is not None]
        shown = ", ".join(names[:PARTITIONS]) + (f" and {len(names) - PARTITIONS} more" * (len(names) > PARTITIONS))
        place = f" [{shown}]" if names else ""
        reason = printable(self.reason)
        cut = reason if len(reason) <= CHARS else reason[: CHARS - 1] + "…"
        return f"{self.kind}: {self.check.to_user_string()}{place}" + (f": {cut}" if cut else "")


def failed_checks(
    graph: BaseAssetGraph, instance: dg.DagsterInstance, keys: Iterable[dg.AssetKey]
) -> list[FailedCheck]:
    """Return the checks of the assets `keys` whose last evaluation, of what is materialised now, failed.

    Errors come first, then warnings, each in the order of `keys`. Partitions that the settings do not
    define are left out.
    """
    order = {key: place for place, key in enumerate(keys)}
    checks = sorted(key for key in graph.asset_check_keys if key.asset_key in order)
    found: defaultdict[tuple[dg.AssetCheckKey, str], list[tuple[Partition, str]]] = defaultdict(list)
    known: dict[dg.AssetKey, set[Partition]] = {}
    for evaluation in failed_evaluations(instance, instance.event_log_storage.get_asset_check_partition_info(checks)):
        check, partition = evaluation.asset_check_key, evaluation.partition
        if check.asset_key not in known:
            # A check of all partitions is of none.
            definition = graph.get(check.asset_key).partitions_def
            known[check.asset_key] = {None, *(definition.get_partition_keys() if definition else ())}
        if partition in known[check.asset_key]:
            kind = "warning" if evaluation.severity == dg.AssetCheckSeverity.WARN else "failed"
            found[check, kind].append((partition, _reason(evaluation)))
    failed = [
        FailedCheck(check, kind, [partition for partition, _ in places], places[0][1])
        for (check, kind), places in (
            (group, sorted(places, key=lambda p: p[0] or "")) for group, places in found.items()
        )
    ]
    return sorted(failed, key=lambda one: (one.kind, order[one.check.asset_key], one.check.name))


def failed_evaluations(
    instance: dg.DagsterInstance, infos: Iterable[AssetCheckPartitionInfo]
) -> Iterator[dg.AssetCheckEvaluation]:
    """Yield, of the checks and partitions of `infos`, the last evaluations of what is materialised now that failed.

    Passed ones, which are nearly all, need no query.
    """
    storage = instance.event_log_storage
    for info in infos:
        if info.latest_execution_status == FAILED and info.is_current:
            only = PartitionKeyFilter(key=info.partition_key) if info.partition_key is not None else None
            record: AssetCheckExecutionRecord | None = storage.get_latest_asset_check_execution_by_key(
                [info.check_key], only
            ).get(info.check_key)
            if record and record.evaluation and not record.evaluation.passed:
                yield record.evaluation


def failed_check_lines(failed: Sequence[FailedCheck]) -> str:
    """Return the lines of `failed` below a heading; '' where there is none."""
    if not failed:
        return ""
    warnings = sum(one.kind == "warning" for one in failed)
    counts = {"failed": len(failed) - warnings, "with a warning": warnings}
    told = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)
    return "\n".join([f"checks: {told}", *(f"  {one.line}" for one in failed)])


def _reason(evaluation: dg.AssetCheckEvaluation) -> str:
    """Return why a check failed in plain words, and its numbers where it gives no words."""
    if evaluation.description:
        return "; ".join(unescape(line.removeprefix("- ")) for line in evaluation.description.splitlines())
    return ", ".join(
        f"{name} {value.value:.4g}" if isinstance(value, dg.FloatMetadataValue) else f"{name} {value.value}"
        for name, value in evaluation.metadata.items()
        if isinstance(value, dg.IntMetadataValue | dg.FloatMetadataValue)
    )
