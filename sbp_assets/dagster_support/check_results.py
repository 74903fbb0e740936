"""Results of asset checks: whether a check passed and, in words, why not."""

from collections.abc import Mapping, Sequence
from typing import Any

import dagster as dg

from sbp_assets.dagster_support.internals import (
    DATA_VERSION_TAG,
    AssetCheckEvaluationTargetMaterializationData,
    AssetCheckExecutionRecordStatus,
    PartitionKeyFilter,
)
from sbp_assets.dagster_support.preview import escape, printable

SHOWN = 5  # Entries of a list in a result's description.
LISTED, PROBLEM_CHARS = 20, 300  # Problems in a result's metadata, and characters of each.


def check_result(
    passed: bool, metadata: Mapping[str, Any], severity: dg.AssetCheckSeverity = dg.AssetCheckSeverity.ERROR
) -> dg.AssetCheckResult:
    """Return a check's result whose description says why the check failed: the UI hides lists of the metadata.

    The description consists of the first entries of `problems`, and of the other lists and texts that are not empty.
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


def problems_result(
    problems: Sequence[str], severity: dg.AssetCheckSeverity = dg.AssetCheckSeverity.ERROR, /, **numbers: float | str
) -> dg.AssetCheckResult:
    """Return the result of a check that passes when there are no `problems`: sentences, or the ids of wrong rows.

    The metadata are `numbers`, the number of problems and the first LISTED of them.
    """
    result = check_result(not problems, {"problems": list(problems)}, severity)
    listed = [printable(problem)[:PROBLEM_CHARS] for problem in problems[:LISTED]]
    return result.with_metadata({**numbers, "problem_count": len(problems), "problems": listed})


def fails(result: dg.AssetCheckResult | dg.AssetCheckEvaluation) -> bool:
    """Return whether a check has failed, and not only warns."""
    return not result.passed and result.severity is dg.AssetCheckSeverity.ERROR


def evaluation_of(
    check: dg.AssetCheckSpec,
    result: dg.AssetCheckResult,
    looked_at: AssetCheckEvaluationTargetMaterializationData | None,
    partition: str | None = None,
) -> dg.AssetCheckEvaluation:
    """Return the event of a check's result, for a check that records it itself."""
    return dg.AssetCheckEvaluation(
        check.asset_key,
        check.name,
        passed=result.passed,
        partition=partition,
        metadata=result.metadata,
        severity=result.severity,
        description=result.description,
        blocking=check.blocking,
        target_materialization_data=looked_at,
    )


def looked_at(materialisation: dg.EventLogRecord) -> AssetCheckEvaluationTargetMaterializationData:
    """Return what an evaluation says of the materialisation that the check looked at."""
    return AssetCheckEvaluationTargetMaterializationData(
        storage_id=materialisation.storage_id, run_id=materialisation.run_id, timestamp=materialisation.timestamp
    )


def last_materialization(
    instance: dg.DagsterInstance, asset: dg.AssetKey, partition: str | None
) -> dg.AssetMaterialization | None:
    """Return the last materialisation of an asset (or of its partition); None without one."""
    wanted = dg.AssetRecordsFilter(asset, asset_partitions=[partition] if partition else None)
    records = instance.fetch_materializations(wanted, limit=1).records
    return records[0].asset_materialization if records else None


def last_check_failed(instance: dg.DagsterInstance, check: dg.AssetCheckKey, partition: str | None) -> bool:
    """Return whether the last execution of `check`, of a partition or of an unpartitioned asset, did not pass."""
    latest = instance.event_log_storage.get_latest_asset_check_execution_by_key(
        [check], PartitionKeyFilter(key=partition) if partition else None
    ).get(check)
    return latest is not None and latest.status == AssetCheckExecutionRecordStatus.FAILED


def last_version(instance: dg.DagsterInstance, asset: dg.AssetKey, partition: str | None) -> str | None:
    """Return the content version that the last materialisation of an asset (or its partition) recorded, if any."""
    materialization = last_materialization(instance, asset, partition)
    return (materialization.tags or {}).get(DATA_VERSION_TAG) if materialization else None
