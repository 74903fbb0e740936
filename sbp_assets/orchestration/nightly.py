"""The nightly automation: what is missing or stale is made, from the source to the synthetic corpus, never a model.

Every asset of a step that `sbp_assets.orchestration.pipeline` marks as nightly gets one condition; a sensor evaluates
them. At the cron tick each partition is armed, once. An armed partition is requested as soon as it is to be made and
everything that it is made from is settled: so the night goes through the pipeline in order, asset by asset, and what
joins all shards is made once. A request disarms: what fails is tried again at the next tick and not before.
"""

from __future__ import annotations

from typing import Any, Literal

import dagster as dg
from dagster._core.asset_graph_view.asset_graph_view import AssetGraphView
from dagster._core.asset_graph_view.entity_subset import EntitySubset
from dagster._core.definitions.assets.graph.asset_graph import executable_in_same_run
from dagster._core.storage.dagster_run import NOT_FINISHED_STATUSES

from sbp_assets.orchestration.pipeline import PIPELINE
from sbp_assets.orchestration.runner import RUN_TAGS
from sbp_assets.orchestration.staleness import Partition, Staleness, is_unchecked
from sbp_assets.settings import Deployment

Subset = EntitySubset[dg.AssetKey]
NIGHTLY = {key: step.nightly for step in PIPELINE if step.nightly != "no" for key in step.keys}
# The condition's label, by which an evaluation tells what else it makes.
LABELS = {"stale": "nightly", "missing": "nightly_if_missing"}


class Night:
    """What one evaluation knows, asked once for all assets."""

    def __init__(self, view: AssetGraphView) -> None:
        self.view = view
        self.staleness = Staleness(view.asset_graph, view.instance)
        # `sbp run` goes through everything itself; what it has yet to come to is in no run that could be seen.
        running = dg.RunsFilter(statuses=NOT_FINISHED_STATUSES, tags=RUN_TAGS)
        self.is_taken = view.instance.get_runs_count(running) > 0
        self._unsettled: dict[dg.AssetKey, Subset] = {}

    def subset(self, key: dg.AssetKey, partitions: list[Partition]) -> Subset:
        definition = self.view.asset_graph.get(key).partitions_def
        if definition is None:
            return self.view.get_full_subset(key=key) if partitions else self.view.get_empty_subset(key=key)
        names = {name for name in partitions if name is not None}
        return self.view.get_subset_from_partition_keys(key, definition, names)

    async def unsettled(self, key: dg.AssetKey) -> Subset:
        """Partitions of `key` that are, or are made from what is, still to be made by the automation or being made."""
        if key not in self._unsettled:
            full = self.view.get_full_subset(key=key)
            running = await self.view.compute_run_in_progress_subset(key=key, from_subset=full)
            queued = await self.view.compute_backfill_in_progress_subset(key=key, from_subset=full)
            found = running.compute_union(queued)
            own = self.view.asset_graph.get(key).automation_condition
            label = own.get_label() if own else None
            if label == LABELS["missing"]:
                missing = [p for p, reason in self.staleness.pending(key).items() if reason == "missing"]
                found = found.compute_union(self.subset(key, missing))
            elif label == LABELS["stale"]:
                found = found.compute_union(self.subset(key, self.staleness.blocked(key)))
                for parent in sorted(self.view.asset_graph.get(key).parent_keys):
                    found = found.compute_union(self.view.compute_child_subset(key, await self.unsettled(parent)))
            self._unsettled[key] = found
        return self._unsettled[key]


# One evaluation asks all its questions of one view of the instance; the last one's is kept.
_LAST: list[Night] = []


def _night(context: dg.AutomationContext) -> Night:
    view = context.asset_graph_view
    if not _LAST or _LAST[0].view is not view:
        _LAST[:] = [Night(view)]
    return _LAST[0]


class ToBeMade(dg.AutomationCondition[dg.AssetKey]):
    """Missing, stale or failed by a check, as `sbp run` sees it; for `nightly` 'missing', the first alone.

    What only has not been checked is left to the sensor `unchecked`. Nothing while `sbp run` is at it.
    """

    def __init__(self, nightly: Literal["missing", "stale"]) -> None:
        self._only_missing = nightly == "missing"

    @property
    def name(self) -> str:
        return "missing" if self._only_missing else "missing_stale_or_unsound"

    @property
    def description(self) -> str:
        return "Missing" if self._only_missing else "Missing, stale or failed by a check, as `sbp run` sees it"

    @property
    def requires_cursor(self) -> bool:
        return False

    def evaluate(self, context: dg.AutomationContext) -> dg.AutomationResult:
        if context.candidate_subset.is_empty:
            return dg.AutomationResult(context, context.get_empty_subset())
        night = _night(context)
        if night.is_taken:
            return dg.AutomationResult(context, context.get_empty_subset())
        pending = [
            partition
            for partition, reason in night.staleness.pending(context.key).items()
            if reason == "missing" or not (self._only_missing or is_unchecked(reason))
        ]
        found = night.subset(context.key, pending)
        return dg.AutomationResult(context, context.candidate_subset.compute_intersection(found))


class Unsettled(dg.AutomationCondition[dg.AssetKey]):
    """Something that it is made from, near or far, is still to be made this night or being made.

    What is requested in this very evaluation counts as settled where it is made first in the same run.
    """

    @property
    def name(self) -> str:
        return "upstream_unsettled"

    @property
    def description(self) -> str:
        return "Something that it is made from is still to be made or being made"

    @property
    def requires_cursor(self) -> bool:
        return False

    async def evaluate(self, context: dg.AutomationContext) -> dg.AutomationResult:  # type: ignore[override]
        found = context.get_empty_subset()
        if not context.candidate_subset.is_empty:
            graph, view = context.asset_graph, context.asset_graph_view
            for parent in sorted(graph.get(context.key).parent_keys):
                unsettled = await _night(context).unsettled(parent)
                requested = context.request_subsets_by_key.get(parent)
                if requested and executable_in_same_run(graph, child_key=context.key, parent_key=parent):
                    unsettled = unsettled.compute_difference(requested)
                found = found.compute_union(view.compute_child_subset(context.key, unsettled))
        return dg.AutomationResult(context, context.candidate_subset.compute_intersection(found))


def condition(nightly: Literal["missing", "stale"], deployment: Deployment) -> dg.AutomationCondition:
    """When a partition of an asset is requested by the nightly automation."""
    when = dg.AutomationCondition
    night: Any = when.cron_tick_passed(deployment.nightly, deployment.timezone)
    armed: dg.AutomationCondition = night.since_last_handled().with_label("armed_this_night")
    if deployment.nightly_until:
        end = when.cron_tick_passed(deployment.nightly_until, deployment.timezone)
        armed = armed & night.since(end).with_label("at_night")
    # Dagster's condition of this name takes no check for granted that runs with what is requested in this evaluation;
    # in one run, a blocking check that fails stops what follows.
    sound = when.all_checks_match(when.check_passed(), blocking_only=True)
    upstream_sound = when.all_deps_match(when.will_be_requested() | sound).with_label("all_deps_blocking_checks_passed")
    return (
        armed & ~when.in_progress() & ToBeMade(nightly) & ~when.any_deps_missing() & ~Unsettled() & upstream_sound
    ).with_label(LABELS[nightly])


def with_nightly_condition(spec: dg.AssetSpec, deployment: Deployment) -> dg.AssetSpec:
    """`spec` with the condition of its step, where that is nightly."""
    nightly = NIGHTLY.get(spec.key)
    if nightly is None or nightly == "no":
        return spec
    return spec.replace_attributes(automation_condition=condition(nightly, deployment))


def nightly_sensor(deployment: Deployment) -> dg.AutomationConditionSensorDefinition:
    """Evaluates the conditions where the project's code runs, which conditions of one's own need."""
    return dg.AutomationConditionSensorDefinition(
        "nightly",
        target=dg.AssetSelection.assets(*NIGHTLY),
        description=f"At {deployment.nightly} ({deployment.timezone}): makes what is missing or stale, but no model.",
        run_tags={"sbp/command": "nightly"},
        use_user_code_server=True,
        default_status=status(deployment.automation),
    )


def status(running: bool) -> dg.DefaultSensorStatus:
    return dg.DefaultSensorStatus.RUNNING if running else dg.DefaultSensorStatus.STOPPED
