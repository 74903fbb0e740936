"""Checks of a partitioned asset that look at all of its partitions: each runs once per step, in a run of its own.

What only all shards together show (an id that two shards keep, a cap that no shard exceeds alone) takes a look at all
of them. In runs of some shards such a check does nothing and stays planned, which the UI shows as not executed, and
`due_checks` finds it.
"""

import inspect
from collections.abc import Iterable, Iterator

import dagster as dg

from sbp_assets.dagster_support.check_results import evaluation_of, fails, looked_at
from sbp_assets.dagster_support.internals import AssetCheckExecutionRecordStatus
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
        target = looked_at(records[0]) if records else None
        dg.AssetExecutionContext(context.op_execution_context).log_event(evaluation_of(spec, result, target))
        if fails(result):
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
        if _current_evaluation(staleness, check) is None
    ]


def failed_checks_of_all(staleness: Staleness, keys: Iterable[dg.AssetKey]) -> dict[dg.AssetCheckKey, str]:
    """Return why, of the fan-in checks of the assets `keys` that looked at what is materialised now, which failed."""
    return {
        check: found.description or ""
        for key in keys
        for check in fan_in_checks(staleness.graph, key)
        if (found := _current_evaluation(staleness, check)) and fails(found)
    }


def _current_evaluation(staleness: Staleness, check: dg.AssetCheckKey) -> dg.AssetCheckEvaluation | None:
    """Return the last evaluation of a fan-in check, unless something has been materialised that it did not look at."""
    records = staleness.instance.event_log_storage.get_asset_check_execution_history(check, limit=1, status=ENDED)
    evaluation = records[0].evaluation if records else None
    target = evaluation.target_materialization_data if evaluation else None
    current = target is not None and target.storage_id >= staleness.last_event(check.asset_key)
    return evaluation if current else None
