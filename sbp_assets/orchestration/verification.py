"""`sbp verify`, and what `sbp run` does with artifacts that were materialised and not checked: checks alone."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

import dagster as dg

from sbp_assets.dagster_support.check_results import fails
from sbp_assets.orchestration.in_process import execute
from sbp_assets.orchestration.materialisations import Partition
from sbp_assets.orchestration.pipeline import Step
from sbp_assets.orchestration.ranges import batches
from sbp_assets.orchestration.staleness import asset_partitions, fan_in_checks, partition_checks

# In the place of a partition's name: what the checks find that look at all partitions of a step.
OVER_ALL = "over all partitions"


class Outcome(Enum):
    """What the checks of a step find of a partition, all taken together."""

    PASSED = "passed"
    FAILED = "failed"
    CRASHED = "crashed"


@dataclass(frozen=True)
class VerifyResult:
    """Checks of one partition that failed as errors, with their descriptions in Markdown, and those that crashed."""

    failed: Mapping[dg.AssetCheckKey, str]
    crashed: Sequence[dg.AssetCheckKey] = ()

    @property
    def outcome(self) -> Outcome:
        """Return FAILED where any check failed: a check that crashed on a corrupted artifact adds nothing to that."""
        if self.failed:
            return Outcome.FAILED
        return Outcome.CRASHED if self.crashed else Outcome.PASSED

    @property
    def names(self) -> list[str]:
        """Return the names of the checks that failed or crashed, as in 'corpus/documents:has_rows', sorted."""
        return sorted(check.to_user_string() for check in (*self.failed, *self.crashed))


def verify(
    defs: dg.Definitions, instance: dg.DagsterInstance, step: Step, partitions: Sequence[Partition]
) -> Iterator[tuple[Partition, VerifyResult]]:
    """Run the checks of `step` alone on the artifacts as they lie in the store, and yield what they found.

    Materialises nothing. The evaluations are recorded: a failed one stops the nightly automation, and `sbp run`
    re-materialises the partition before anything that reads it.
    """
    graph = defs.resolve_asset_graph()
    checks = {check for key in step.keys for check in partition_checks(graph, key)}
    if not checks:
        yield from ((partition, VerifyResult({})) for partition in partitions)
        return
    job = defs.resolve_job_def(step.name).get_subset(asset_check_selection=checks)
    for batch in batches(graph, step.keys[0], partitions):
        evaluations: dict[Partition, dict[dg.AssetCheckKey, dg.AssetCheckEvaluation]] = defaultdict(dict)
        for evaluation in recorded_evaluations(instance, execute(job, instance, batch)):
            evaluations[evaluation.partition][evaluation.asset_check_key] = evaluation
        for partition in batch:
            found = evaluations[partition]
            failed = {
                key: evaluation.description or "" for key, evaluation in sorted(found.items()) if fails(evaluation)
            }
            yield partition, VerifyResult(failed, sorted(checks - found.keys()))


def recorded_evaluations(
    instance: dg.DagsterInstance, result: dg.ExecuteInProcessResult
) -> Iterator[dg.AssetCheckEvaluation]:
    """Yield the evaluations of a run as the event log has them: the result of one that failed may lack them."""
    for entry in instance.all_logs(result.run_id, of_type=dg.DagsterEventType.ASSET_CHECK_EVALUATION):
        yield entry.get_dagster_event().asset_check_evaluation_data


def verify_steps(
    defs: dg.Definitions, instance: dg.DagsterInstance, partitions: Mapping[Step, Sequence[Partition]]
) -> Iterator[tuple[Step, Partition, VerifyResult]]:
    """Yield what the checks find of the `partitions` of each step, and as OVER_ALL those that look at all partitions.

    The latter are run where all partitions of the step are among them.
    """
    graph = defs.resolve_asset_graph()
    for step, names in partitions.items():
        for partition, result in verify(defs, instance, step, names):
            yield step, partition, result
        checks = [check for key in step.keys for check in fan_in_checks(graph, key)]
        if checks and len(names) == len(step_partitions(defs, step)):
            yield step, OVER_ALL, verify_fan_ins(defs, instance, step, checks)


def verify_fan_ins(
    defs: dg.Definitions, instance: dg.DagsterInstance, step: Step, checks: Sequence[dg.AssetCheckKey]
) -> VerifyResult:
    """Run `checks`, which look at all partitions of the step's assets, and return what they found."""
    job = defs.resolve_job_def(step.name).get_subset(asset_check_selection=set(checks))
    evaluations = list(recorded_evaluations(instance, execute(job, instance, [None])))
    failed = {e.asset_check_key: e.description or "" for e in evaluations if fails(e)}
    return VerifyResult(failed, sorted({*checks} - {evaluation.asset_check_key for evaluation in evaluations}))


def step_partitions(defs: dg.Definitions, step: Step) -> list[Partition]:
    """Return all partition keys of the step's assets; [None] where they are unpartitioned."""
    return asset_partitions(defs.resolve_asset_graph(), step.keys[0])
