"""The nightly automation materialises what is missing or stale, from source to synthetic corpus, but never a model.

Every asset of a step that `sbp_assets.orchestration.pipeline` marks as nightly gets one condition; a sensor evaluates
them. At the cron tick each partition is armed, once. An armed partition is requested as soon as it needs
materialisation and everything upstream of it is up to date: so the automation goes through the pipeline in order,
asset by asset, and a fan-in is materialised once. A request disarms: what fails is retried at the next tick and not
before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any

import dagster as dg

from sbp_assets.dagster_support.internals import (
    NOT_FINISHED_STATUSES,
    AssetGraphView,
    BaseAssetGraph,
    EntitySubset,
    executable_in_same_run,
)
from sbp_assets.orchestration.in_process import RUN_TAGS
from sbp_assets.orchestration.materialisations import Partition, StalenessCache
from sbp_assets.orchestration.pipeline import PIPELINE, NightlyPolicy, Step
from sbp_assets.orchestration.staleness import Staleness
from sbp_assets.orchestration.status import Status
from sbp_assets.settings import Deployment

Subset = EntitySubset[dg.AssetKey]
# Of the whole condition, as the UI shows it.
LABELS = {NightlyPolicy.IF_NEEDED: "nightly", NightlyPolicy.IF_MISSING: "nightly_if_missing"}


def policies_of(pipeline: Sequence[Step]) -> dict[dg.AssetKey, NightlyPolicy]:
    """Return what is materialised nightly of the steps' assets, of those that are at all."""
    return {key: step.nightly for step in pipeline if step.nightly is not NightlyPolicy.NEVER for key in step.keys}


NIGHTLY = policies_of(PIPELINE)


class NightlyAutomation:
    """The nightly automation of one set of definitions: its conditions, and the sensor that evaluates them.

    `policies` says what is materialised of which asset. The conditions share what one evaluation has found out, and
    `cache` what carries over to the next.
    """

    def __init__(
        self,
        deployment: Deployment,
        cache: StalenessCache | None = None,
        policies: Mapping[dg.AssetKey, NightlyPolicy] = NIGHTLY,
    ) -> None:
        self.deployment, self.cache, self.policies = deployment, cache or StalenessCache(), policies
        self._latest: NightlyEvaluation | None = None

    def automate(self, assets: Sequence[dg.AssetsDefinition]) -> list[dg.AssetsDefinition]:
        """Return `assets` with their conditions, and fan-ins that are kept up to date with a freshness policy.

        Such a fan-in is called overdue `deployment.overdue_days` after its last materialisation.
        """
        partitioned = {spec.key for asset in assets for spec in asset.specs if spec.partitions_def}

        def automated(spec: dg.AssetSpec) -> dg.AssetSpec:
            fan_in = spec.partitions_def is None and any(dep.asset_key in partitioned for dep in spec.deps)
            if fan_in and self.policies.get(spec.key) is NightlyPolicy.IF_NEEDED and self.deployment.overdue_days:
                window = timedelta(days=self.deployment.overdue_days)
                spec = spec.replace_attributes(freshness_policy=dg.FreshnessPolicy.time_window(fail_window=window))
            return self.with_condition(spec)

        return [asset.map_asset_specs(automated) for asset in assets]

    def with_condition(self, spec: dg.AssetSpec) -> dg.AssetSpec:
        """Return `spec` with the condition of its policy; without a policy, as it is."""
        policy = self.policies.get(spec.key, NightlyPolicy.NEVER)
        if policy is NightlyPolicy.NEVER:
            return spec
        return spec.replace_attributes(automation_condition=self.condition(policy))

    def condition(self, policy: NightlyPolicy) -> dg.AutomationCondition:
        """Return the condition under which a partition of an asset is requested."""
        when, deployment = dg.AutomationCondition, self.deployment
        tick: Any = when.cron_tick_passed(deployment.nightly, deployment.timezone)
        armed: dg.AutomationCondition = tick.since_last_handled().with_label("armed_by_nightly_tick")
        if deployment.nightly_until:
            end = when.cron_tick_passed(deployment.nightly_until, deployment.timezone)
            armed = armed & tick.since(end).with_label("in_nightly_window")
        # Dagster's condition of this name does not rely on a check that runs with what is requested in this
        # evaluation; in one run, a blocking check that fails stops what follows.
        passing = when.all_checks_match(when.check_passed(), blocking_only=True)
        upstream_passing = when.all_deps_match(when.will_be_requested() | passing)
        return (
            armed
            & ~when.in_progress()
            & NeedsMaterialisation(self, policy)
            & ~when.any_deps_missing()
            & ~UpstreamPending(self)
            & upstream_passing.with_label("all_deps_blocking_checks_passed")
        ).with_label(LABELS[policy])

    def sensor(self) -> dg.AutomationConditionSensorDefinition:
        """Return the sensor that evaluates the conditions where the project's code runs, which custom ones need."""
        at = f"{self.deployment.nightly} ({self.deployment.timezone})"
        return dg.AutomationConditionSensorDefinition(
            "nightly",
            target=dg.AssetSelection.assets(*self.policies),
            description=f"At {at}: materialises what is missing or stale, but no model.",
            run_tags={"sbp/command": "nightly"},
            use_user_code_server=True,
            default_status=default_status(self.deployment.automation),
        )

    def evaluation(self, view: AssetGraphView) -> NightlyEvaluation:
        """Return the evaluation that `view` belongs to: Dagster creates one view of the instance for each."""
        if self._latest is None or self._latest.view is not view:
            self._latest = NightlyEvaluation(view, self.cache, self.policies)
        return self._latest


class NightlyEvaluation:
    """What one evaluation of the conditions knows, asked once for all assets."""

    def __init__(
        self, view: AssetGraphView, cache: StalenessCache, policies: Mapping[dg.AssetKey, NightlyPolicy]
    ) -> None:
        self.view, self._policies = view, policies
        self.staleness = Staleness(view.asset_graph, view.instance, cache)
        # `sbp run` goes through everything itself; what it has yet to come to is in no run that could be seen.
        running = dg.RunsFilter(statuses=NOT_FINISHED_STATUSES, tags=RUN_TAGS)
        self.left_to_sbp_run = view.instance.get_runs_count(running) > 0
        self._pending: dict[dg.AssetKey, Subset] = {}

    def subset(self, key: dg.AssetKey, partitions: list[Partition]) -> Subset:
        """Return `partitions` of `key` in the form that conditions return."""
        definition = self.view.asset_graph.get(key).partitions_def
        if definition is None:
            return self.view.get_full_subset(key=key) if partitions else self.view.get_empty_subset(key=key)
        names = {name for name in partitions if name is not None}
        return self.view.get_subset_from_partition_keys(key, definition, names)

    async def pending(self, key: dg.AssetKey) -> Subset:
        """Return the partitions of `key` that this automation has yet to materialise or that are in progress.

        Included are those that have such partitions anywhere upstream.
        """
        if key not in self._pending:
            full = self.view.get_full_subset(key=key)
            running = await self.view.compute_run_in_progress_subset(key=key, from_subset=full)
            queued = await self.view.compute_backfill_in_progress_subset(key=key, from_subset=full)
            found = running.compute_union(queued)
            policy = self._policies.get(key, NightlyPolicy.NEVER)
            if policy is NightlyPolicy.IF_MISSING:
                statuses = self.staleness.pending(key).items()
                missing = [partition for partition, status in statuses if status.status is Status.MISSING]
                found = found.compute_union(self.subset(key, missing))
            elif policy is NightlyPolicy.IF_NEEDED:
                found = found.compute_union(self.subset(key, self.staleness.blocked(key)))
                for parent in sorted(self.view.asset_graph.get(key).parent_keys):
                    found = found.compute_union(self.view.compute_child_subset(key, await self.pending(parent)))
            self._pending[key] = found
        return self._pending[key]


class NeedsMaterialisation(dg.AutomationCondition[dg.AssetKey]):
    """Missing, stale or with a failed check, by the rule of `sbp run`; with policy IF_MISSING, the first alone.

    What is only unchecked is left to the sensor `unchecked`. Nothing is true while `sbp run` runs.
    """

    def __init__(self, automation: NightlyAutomation, policy: NightlyPolicy) -> None:
        self._automation, self._only_missing = automation, policy is NightlyPolicy.IF_MISSING

    @property
    def name(self) -> str:
        return "missing" if self._only_missing else "missing_stale_or_check_failed"

    @property
    def description(self) -> str:
        return "Missing" if self._only_missing else "Missing, stale or with a failed check, by the rule of `sbp run`"

    @property
    def requires_cursor(self) -> bool:
        return False

    def evaluate(self, context: dg.AutomationContext) -> dg.AutomationResult:
        if context.candidate_subset.is_empty:
            return dg.AutomationResult(context, context.get_empty_subset())
        evaluation = self._automation.evaluation(context.asset_graph_view)
        if evaluation.left_to_sbp_run:
            return dg.AutomationResult(context, context.get_empty_subset())
        needed = [
            partition
            for partition, status in evaluation.staleness.pending(context.key).items()
            if status.status is Status.MISSING or (status.needs_materialisation and not self._only_missing)
        ]
        found = evaluation.subset(context.key, needed)
        return dg.AutomationResult(context, context.candidate_subset.compute_intersection(found))


class UpstreamPending(dg.AutomationCondition[dg.AssetKey]):
    """Something upstream, near or far, is still to be materialised in this nightly window or in progress.

    What is requested in this very evaluation does not count where it is materialised first in the same run.
    """

    def __init__(self, automation: NightlyAutomation) -> None:
        self._automation = automation

    @property
    def name(self) -> str:
        return "upstream_pending"

    @property
    def description(self) -> str:
        return "Something upstream is still to be materialised or in progress"

    @property
    def requires_cursor(self) -> bool:
        return False

    async def evaluate(self, context: dg.AutomationContext) -> dg.AutomationResult:  # type: ignore[override]
        found = context.get_empty_subset()
        if not context.candidate_subset.is_empty:
            graph, view = context.asset_graph, context.asset_graph_view
            for parent in sorted(graph.get(context.key).parent_keys):
                pending = await self._automation.evaluation(view).pending(parent)
                requested = context.request_subsets_by_key.get(parent)
                if requested and _in_one_run(graph, context.key, parent):
                    pending = pending.compute_difference(requested)
                found = found.compute_union(view.compute_child_subset(context.key, pending))
        return dg.AutomationResult(context, context.candidate_subset.compute_intersection(found))


def _in_one_run(graph: BaseAssetGraph, child: dg.AssetKey, parent: dg.AssetKey) -> bool:
    """Whether a request of both puts them into one run; Dagster's rule leaves out that two policies make two runs."""
    same_policy = graph.get(child).backfill_policy == graph.get(parent).backfill_policy
    return same_policy and executable_in_same_run(graph, child_key=child, parent_key=parent)


def default_status(running: bool) -> dg.DefaultSensorStatus:
    """Return whether a sensor runs from the start, as Dagster's value."""
    return dg.DefaultSensorStatus.RUNNING if running else dg.DefaultSensorStatus.STOPPED
