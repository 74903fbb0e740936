"""`sbp run` and `sbp verify`: the pipeline in one process, step by step, leaving out what is up to date.

One process means each engine is loaded once for all shards. Every materialisation is a run of the Dagster instance,
so the UI shows it like any other.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import dagster as dg

from sbp_assets.dagster_support.internals import (
    FINISHED_STATUSES,
    NOT_FINISHED_STATUSES,
    SerializableErrorInfo,
    WorkerStatus,
)
from sbp_assets.dagster_support.preview import printable
from sbp_assets.orchestration.display import StepState, StepStatus, display
from sbp_assets.orchestration.fan_in_checks import due_checks, failed_checks_of_all
from sbp_assets.orchestration.in_process import HOST_TAGS, RUN_TAGS, execute
from sbp_assets.orchestration.materialisations import Partition, StalenessCache
from sbp_assets.orchestration.pipeline import PIPELINE, Step
from sbp_assets.orchestration.ranges import batches
from sbp_assets.orchestration.shard_step import FAILED_SHARDS
from sbp_assets.orchestration.staleness import Staleness
from sbp_assets.orchestration.verification import OVER_ALL, Outcome, step_partitions, verify, verify_fan_ins


class PipelineError(RuntimeError):
    """A step failed; the message names the partitions, the reason and how to resume."""


def pending_partitions(defs: dg.Definitions, instance: dg.DagsterInstance, step: Step) -> list[Partition]:
    """Return the partitions of `step` (None: unpartitioned) of which an asset is not fresh."""
    return list(_pending(defs, Staleness(defs.resolve_asset_graph(), instance), step))


def _pending(defs: dg.Definitions, staleness: Staleness, step: Step) -> dict[Partition, bool]:
    """Whether it needs materialisation, per pending partition; otherwise it only needs its checks run."""
    statuses = [staleness.pending(key) for key in step.keys]
    return {
        partition: any(found[partition].needs_materialisation for found in statuses if partition in found)
        for partition in step_partitions(defs, step)
        if any(partition in found for found in statuses)
    }


def end_killed_runs(instance: dg.DagsterInstance) -> None:
    """Mark killed runs of `sbp run` and of this host's daemon as failed, and free the pool slots of all ended runs.

    Dagster frees the pool slots of a run when it ends; a killed one never ends, and the next would wait for ever. Only
    the one process that may run the pipeline calls this (see `exclusive_instance`), so that every unfinished run of
    `sbp run` is dead.
    """
    for run in instance.get_runs(dg.RunsFilter(statuses=NOT_FINISHED_STATUSES, tags=RUN_TAGS)):
        instance.report_run_failed(run, message="The process of `sbp run` was killed.")
    if instance.run_launcher.supports_check_run_worker_health:
        for run in instance.get_runs(dg.RunsFilter(statuses=[dg.DagsterRunStatus.STARTED], tags=HOST_TAGS)):
            health = instance.run_launcher.check_run_worker_health(run)
            ended = instance.get_run_by_id(run.run_id)  # perhaps with success, since it was listed
            if health.status == WorkerStatus.FAILED and ended and not ended.is_finished:
                instance.report_run_failed(run, message=f"Found by `sbp run`: {health.msg}.")
    # The daemon frees slots too, but may not be running.
    if holders := instance.event_log_storage.get_concurrency_run_ids():
        for run in instance.get_runs(dg.RunsFilter(run_ids=list(holders), statuses=FINISHED_STATUSES)):
            instance.event_log_storage.free_concurrency_slots_for_run(run.run_id)


def run_pipeline(
    defs: dg.Definitions,
    instance: dg.DagsterInstance,
    after_step: dict[str, Callable[[], None]],
    until: str | None = None,
    forced: Mapping[str, Mapping[str, Any]] | None = None,
    pipeline: Sequence[Step] = PIPELINE,
) -> list[StepState]:
    """Run every step in order for its pending partitions, and return the state of each step with what it took.

    A failing partition does not stop the others of its step, but no later step begins: PipelineError is raised.
    `after_step` maps step names to functions called when a step ends, to release its engine. `forced` maps the names of
    steps that run even if they are fresh to the configuration of their runs: nothing that Dagster knows shows that
    files at the source have changed, or that somebody wants another fit.
    """
    states = [StepState(step, step_partitions(defs, step)) for step in pipeline]
    cache = StalenessCache()
    with display(states) as listen:
        for state in states:
            _run_step(defs, instance, cache, state, listen, (forced or {}).get(state.step.name))
            if release := after_step.get(state.step.name):
                release()
            if state.failures or until == state.step.name:
                break
    for state in states:
        if state.failures:
            reasons = "\n".join(f"  {p or state.step.name}: {reason}" for p, reason in state.failures.items())
            raise PipelineError(
                f"{state.step.title} failed for {len(state.failures)} of {len(state.partitions)}:\n{reasons}\n"
                "What was materialised is kept. Fix the cause and run the same command again; `sbp ui` shows the runs."
            )
    return states


def _run_step(
    defs: dg.Definitions,
    instance: dg.DagsterInstance,
    cache: StalenessCache,
    state: StepState,
    listen: Callable[[StepState], None],
    forced: Mapping[str, Any] | None,
) -> None:
    listen(state)
    if forced is not None:
        pending = dict.fromkeys(state.partitions, True)
    else:
        pending = _pending(defs, Staleness(defs.resolve_asset_graph(), instance, cache), state.step)
    state.finished = len(state.partitions) - len(pending)
    if pending:
        _run_pending(defs, instance, state, listen, pending, forced or {})
    if not state.failures:
        staleness = Staleness(defs.resolve_asset_graph(), instance, cache)
        # One that failed looks again: what it is about may have been put right without a materialisation.
        due = [*due_checks(staleness, state.step.keys), *failed_checks_of_all(staleness, state.step.keys)]
        crashed = verify_fan_ins(defs, instance, state.step, due).crashed if due else []
        reasons = [f"check crashed: {check.to_user_string()}; its run's log says why" for check in crashed]
        for check, reason in failed_checks_of_all(staleness, state.step.keys).items():
            advice = "materialise in the UI the shards of what it names, and run this again"
            reasons.append(f"check failed: {check.to_user_string()}: {_on_lines(reason)}; {advice}")
        if reasons:
            state.failures[OVER_ALL] = "\n".join(reasons)
    if state.failures:
        state.status = StepStatus.FAILED
    else:
        state.status = StepStatus.DONE if pending else StepStatus.FRESH
    listen(state)


def _run_pending(
    defs: dg.Definitions,
    instance: dg.DagsterInstance,
    state: StepState,
    listen: Callable[[StepState], None],
    pending: Mapping[Partition, bool],
    config: Mapping[str, Any],
) -> None:
    """Materialise under `config`, or only check, the `pending` partitions of a step."""
    state.status, started = StepStatus.RUNNING, time.monotonic()
    listen(state)

    def note(partition: Partition, failure: str | None) -> None:
        if failure is None:
            state.finished += 1
        else:
            state.failures[partition] = failure
        state.seconds = time.monotonic() - started
        listen(state)

    stale = {partition for partition, needs_materialisation in pending.items() if needs_materialisation}
    # A check that is newer than the artifact: a model need not be trained again to be checked.
    for partition, checked in verify(defs, instance, state.step, [name for name in pending if name not in stale]):
        if checked.outcome is Outcome.CRASHED:
            # That says nothing of the artifact: the store may be unreachable, or the check wrong.
            note(partition, f"check crashed: {', '.join(checked.names)}; its run's log says why")
        elif checked.outcome is Outcome.PASSED:
            note(partition, None)
        else:
            stale.add(partition)
    job = defs.resolve_job_def(state.step.name)
    graph = defs.resolve_asset_graph()
    for batch in batches(graph, state.step.keys[0], [name for name in state.partitions if name in stale]):
        result = execute(job, instance, batch, config)
        state.materialised = 0
        state.own_seconds += sum(_wall_seconds(instance, result))
        failures = _failures(result, batch)
        for partition in batch:
            note(partition, failures.get(partition))


def _wall_seconds(instance: dg.DagsterInstance, result: dg.ExecuteInProcessResult) -> Iterator[float]:
    # As recorded: the result of a run that failed lacks the events of a range.
    for entry in instance.all_logs(result.run_id, of_type=dg.DagsterEventType.ASSET_MATERIALIZATION):
        materialization = entry.asset_materialization
        value = materialization.metadata.get("wall_seconds") if materialization else None
        if value is not None:
            yield float(str(value.value))


def _failures(result: dg.ExecuteInProcessResult, partitions: Sequence[Partition]) -> dict[Partition, str]:
    """Return why a run failed, by partition; nothing where it did not."""
    if result.success:
        return {}
    for event in result.all_events:
        if event.is_step_failure:
            named = event.step_failure_data.user_failure_data
            if named and FAILED_SHARDS in named.metadata:
                by_shard: Any = named.metadata[FAILED_SHARDS].value
                return {name: _on_lines(reason) for name, reason in by_shard.items()}
            if error := event.step_failure_data.error:
                reason = named.description if named and named.description else original_error(error).message
                return dict.fromkeys(partitions, f"{event.step_key}: {_on_lines(reason)}")
    checks = [e.check_name for e in result.get_asset_check_evaluations() if not e.passed]
    reason = f"check failed: {', '.join(checks)}" if checks else "the run failed; see its log in the UI"
    return dict.fromkeys(partitions, reason)


def _on_lines(reason: str) -> str:
    # A file's name in it is as untrusted as its text.
    return "\n".join(map(printable, reason.strip().splitlines()))


def original_error(error: SerializableErrorInfo) -> SerializableErrorInfo:
    """Return what the asset raised, without Dagster's wrapping; its own cause is some library's, and left out."""
    while error.cause is not None and (error.cls_name or "").startswith("Dagster"):
        error = error.cause
    return error
