"""What the event log says that a run of many shards has to know: what it resumes, and which of its inputs to refuse."""

from collections.abc import Collection, Sequence

import dagster as dg

from sbp_assets.dagster_support.check_results import fails
from sbp_assets.dagster_support.internals import (
    RESUME_RETRY_TAG,
    ROOT_RUN_ID_TAG,
    AssetCheckExecutionRecordStatus,
    PartitionKeyFilter,
)
from sbp_assets.orchestration.failed_checks import failed_evaluations
from sbp_assets.orchestration.fan_in_checks import ENDED
from sbp_assets.orchestration.materialisations import Partition
from sbp_assets.orchestration.staleness import Staleness, unfinished_runs


def finished_shards(
    run: dg.DagsterRun,
    staleness: Staleness,
    assets: Collection[dg.AssetKey],
    checks: Sequence[dg.AssetCheckSpec],
    shards: Sequence[str],
) -> dict[str, list[dg.AssetCheckEvaluation]]:
    """Return the shards of which the runs that `run` resumes have materialised all `assets`, with their evaluations.

    Those are the last of each of `checks`. A shard of which one is missing or blocks is not among them; nor is any
    where the run materialises nothing: it is to look at artifacts again.
    """
    if run.tags.get(RESUME_RETRY_TAG) != "true" or not assets:
        return {}
    resumed = staleness.instance.get_runs(dg.RunsFilter(tags={ROOT_RUN_ID_TAG: run.tags[ROOT_RUN_ID_TAG]}))
    group = {run.tags[ROOT_RUN_ID_TAG], *(other.run_id for other in resumed)}
    events = {key: staleness.materialisations(key, shards) for key in assets}
    finished: dict[str, list[dg.AssetCheckEvaluation]] = {}
    for shard in shards:
        made = {key: event.storage_id for key in assets if (event := events[key].get(shard)) and event.run_id in group}
        evaluations = [_last_evaluation(staleness.instance, check.key, shard) for check in checks]
        if len(made) == len(assets) and all(
            found and _is_of(found, made.get(check.asset_key)) and not blocks(check, found)
            for check, found in zip(checks, evaluations, strict=True)
        ):
            finished[shard] = [found for found in evaluations if found]
    return finished


def _last_evaluation(
    instance: dg.DagsterInstance, check: dg.AssetCheckKey, shard: str
) -> dg.AssetCheckEvaluation | None:
    # The last that ended: the resuming run's own are planned already.
    records = instance.event_log_storage.get_asset_check_execution_history(
        check, limit=1, status=ENDED, partition_filter=PartitionKeyFilter(key=shard)
    )
    return records[0].evaluation if records else None


def _is_of(evaluation: dg.AssetCheckEvaluation, materialisation: int | None) -> bool:
    target = evaluation.target_materialization_data
    return materialisation is None or (target is not None and target.storage_id == materialisation)


def blocks(check: dg.AssetCheckSpec, result: dg.AssetCheckResult | dg.AssetCheckEvaluation) -> bool:
    """Return whether nothing shall be materialised from an artifact of which `check` has found `result`."""
    return check.blocking and fails(result)


def partitions_with_failed_checks(
    instance: dg.DagsterInstance, checks: Sequence[dg.AssetCheckKey]
) -> dict[tuple[dg.AssetKey, Partition], str]:
    """Return the name of a check that failed, or whose run ended before it did, for each partition that has one."""
    infos = instance.event_log_storage.get_asset_check_partition_info(checks)
    found = {
        (evaluation.asset_key, evaluation.partition): evaluation.check_name
        for evaluation in failed_evaluations(instance, infos)
        if fails(evaluation)
    }
    planned = [info for info in infos if info.latest_execution_status == AssetCheckExecutionRecordStatus.PLANNED]
    going_on = unfinished_runs(instance, {info.latest_planned_run_id for info in planned})
    for info in planned:
        if info.latest_planned_run_id not in going_on:
            found.setdefault((info.check_key.asset_key, info.partition_key), info.check_key.name)
    return found
