"""Checks of a partitioned asset that look at all of its partitions: each runs once per step, in a run of its own.

What only all shards together show (an id that two shards keep, a cap that no shard exceeds alone) takes a look at all
of them. In runs of some shards such a check does nothing and stays planned, which the UI shows as not executed, and
`due_checks` finds it.
"""

import inspect
from collections.abc import Iterable, Iterator

import dagster as dg

from sbp_assets.dagster_support.internals import (
    AssetCheckEvaluationTargetMaterializationData,
    AssetCheckExecutionRecordStatus,
)
from sbp_assets.orchestration.staleness import Staleness, fan_in_checks

ENDED = {AssetCheckExecutionRecordStatus.SUCCEEDED, AssetCheckExecutionRecordStatus.FAILED}


def alone(check: dg.AssetChecksDefinition) -> dg.AssetChecksDefinition:
    """Return `check`, which takes resources and no inputs, as one that does nothing in a run of partitions."""
    (spec,) = check.check_specs
    call = check.op.compute_fn.decorated_fn  # type: ignore[union-attr]
    arguments = list(inspect.signature(call).parameters)

    @dg.multi_asset_check(
        name=check.op.name, specs=[spec], can_subset=True, required_resource_keys=set(check.required_resource_keys)
    )
    def look_at_all(context: dg.AssetCheckExecutionContext) -> Iterator[dg.AssetCheckResult]:
        if context.has_partition_key or context.has_partition_key_range:
            return
        # Before it reads: Dagster would take what was materialised meanwhile, which the check may not have seen.
        records = context.instance.fetch_materializations(spec.asset_key, limit=1).records
        resources = context.op_execution_context.resources
        result: dg.AssetCheckResult = call(**{name: getattr(resources, name) for name in arguments})
        dg.AssetExecutionContext(context.op_execution_context).log_event(
            dg.AssetCheckEvaluation(
                spec.asset_key,
                spec.name,
                passed=result.passed,
                metadata=result.metadata,
                severity=result.severity,
                description=result.description,
                blocking=spec.blocking,
                target_materialization_data=AssetCheckEvaluationTargetMaterializationData(
                    storage_id=records[0].storage_id, run_id=records[0].run_id, timestamp=records[0].timestamp
                )
                if records
                else None,
            )
        )
        if not result.passed and result.severity is dg.AssetCheckSeverity.ERROR:
            raise dg.Failure(f"{spec.key.to_user_string()} failed: {result.description or ''}", allow_retries=False)
        yield from ()

    return look_at_all


def due_checks(staleness: Staleness, keys: Iterable[dg.AssetKey]) -> list[dg.AssetCheckKey]:
    """Return the fan-in checks of the assets `keys` that have not looked at what is materialised now.

    Those of an asset of which a partition is pending are left out: it is about to change.
    """
    return [
        check
        for key in keys
        if not staleness.blocked(key)
        for check in fan_in_checks(staleness.graph, key)
        if not _is_current(staleness, check)
    ]


def failed_checks_of_all(staleness: Staleness, keys: Iterable[dg.AssetKey]) -> dict[dg.AssetCheckKey, str]:
    """Return why, of the fan-in checks of the assets `keys` that looked at what is materialised now, which failed."""
    checks = [check for key in keys for check in fan_in_checks(staleness.graph, key) if _is_current(staleness, check)]
    evaluations = {check: _evaluation(staleness, check) for check in checks}
    return {
        check: found.description or ""
        for check, found in evaluations.items()
        if found and not found.passed and found.severity is dg.AssetCheckSeverity.ERROR
    }


def _evaluation(staleness: Staleness, check: dg.AssetCheckKey) -> dg.AssetCheckEvaluation | None:
    records = staleness.instance.event_log_storage.get_asset_check_execution_history(check, limit=1, status=ENDED)
    return records[0].evaluation if records else None


def _is_current(staleness: Staleness, check: dg.AssetCheckKey) -> bool:
    evaluation = _evaluation(staleness, check)
    target = evaluation.target_materialization_data if evaluation else None
    return target is not None and target.storage_id >= staleness.last_event(check.asset_key)
