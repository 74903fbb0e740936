"""Sensors: files that are new or changed at the source are noticed, what no check has seen is checked, and a failed run
is told to a webhook."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

import dagster as dg
from dagster._core.storage.dagster_run import NOT_FINISHED_STATUSES

from sbp_assets.corpus.ingest import source_changes
from sbp_assets.orchestration import webhook as notify
from sbp_assets.orchestration.nightly import status
from sbp_assets.orchestration.pipeline import PIPELINE, Step
from sbp_assets.orchestration.runner import RUN_TAGS, raised
from sbp_assets.orchestration.staleness import Staleness
from sbp_assets.settings import Deployment, FilesSource

MANIFEST = dg.AssetKey(["corpus", "source_manifest"])
SHOWN = 20
UNCHECKED_TAGS = {"sbp/command": "unchecked"}
UNCHECKED_AT_ONCE = 100
UNCHECKED_SECONDS = 300  # the night, which asks as much, takes 3 to 9 s for 2,000 shards (docs/ui.md)


def source_sensor(source: FilesSource, deployment: Deployment) -> dg.SensorDefinition:
    """Compares what lies at the source with the manifest, and reports each difference once, on the manifest.

    With deployment.ingest_new_files it then requests the job `manifest`, as soon as two looks find the same: a file
    that is still being written is not taken in.
    """

    @dg.sensor(
        name="source_files",
        job_name="manifest",
        minimum_interval_seconds=deployment.source_poll_seconds,
        default_status=status(deployment.automation),
        description="Reports files that are new, changed or gone at the corpus location"
        + (", and takes them in." if deployment.ingest_new_files else "."),
    )
    def source_files(context: dg.SensorEvaluationContext) -> dg.SensorResult | dg.SkipReason:
        if context.instance.get_latest_materialization_event(MANIFEST) is None:
            return dg.SkipReason("There is no manifest to compare with: materialise corpus/source_manifest first.")
        assert context.repository_def is not None  # it is given to every sensor of a code location
        manifest: Any = context.repository_def.load_asset_value(MANIFEST, instance=context.instance)
        changes = source_changes(source, manifest.collect())
        if not any(changes.values()):
            context.update_cursor("")
            return dg.SkipReason("The source holds the files of the manifest, unchanged.")
        digest = hashlib.sha256(json.dumps(changes).encode()).hexdigest()
        before = json.loads(context.cursor) if context.cursor else {}
        if before.get("changes") != digest:
            return dg.SensorResult(
                cursor=json.dumps({"changes": digest}),
                asset_events=[_observation(changes, deployment.ingest_new_files)],
                skip_reason="Reported on corpus/source_manifest.",
            )
        if deployment.ingest_new_files:
            # A request that failed is made again, after one more look, then two, four, …
            requests, looks = before.get("requests", 0), before.get("looks", 0) + 1
            if not requests or (looks >= 2 ** (requests - 1) and _taking_in_failed(context.instance)):
                requests, looks, run_requests = requests + 1, 0, [dg.RunRequest()]
            else:
                run_requests = []
            cursor = json.dumps({"changes": digest, "requests": requests, "looks": looks})
            reason = None if run_requests else "Requested already."
            return dg.SensorResult(cursor=cursor, run_requests=run_requests, skip_reason=reason)
        return dg.SkipReason("Reported already; the job `manifest`, or `sbp run --refresh`, takes them in.")

    return source_files


def _taking_in_failed(instance: dg.DagsterInstance) -> bool:
    """Whether the last run that the sensor has requested ended without success."""
    runs = instance.get_runs(dg.RunsFilter(tags={"dagster/sensor_name": "source_files"}), limit=1)
    return bool(runs) and runs[0].status in (dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.CANCELED)


def _observation(changes: dict[str, dict[str, str]], taken_in: bool) -> dg.AssetObservation:
    names = {kind: list(files) for kind, files in changes.items()}
    counts = ", ".join(f"{len(files)} {kind}" for kind, files in names.items() if files)
    then = "they are taken in next" if taken_in else "the job `manifest`, or `sbp run --refresh`, takes them in"
    return dg.AssetObservation(
        MANIFEST,
        description=f"At the source there are files other than in the manifest: {counts}; {then}.",
        metadata={
            **{f"{kind}_files": len(files) for kind, files in names.items()},
            **{f"first_{kind}": files[:SHOWN] for kind, files in names.items() if files},
        },
    )


def unchecked_sensor(deployment: Deployment, pipeline: Sequence[Step] = PIPELINE) -> dg.SensorDefinition:
    """Has the checks run, alone, on what has not been checked: made before a blocking check was, or by a run that died.

    The night makes nothing of such artifacts until then. It asks for a few at a time, and for more when those are done,
    so that a project with a new check does not fill the queue: `sbp verify` is the fast way. A check that crashes is
    asked for again the next day.
    """

    @dg.sensor(
        name="unchecked",
        jobs=[step.job for step in pipeline],
        minimum_interval_seconds=UNCHECKED_SECONDS,
        default_status=status(deployment.automation),
        description="Runs the checks of artifacts that no blocking check has looked at yet; makes nothing.",
    )
    def unchecked(context: dg.SensorEvaluationContext) -> Iterator[dg.RunRequest | dg.SkipReason]:
        instance = context.instance
        for tags, reason in (
            (UNCHECKED_TAGS, "What was asked for is not done yet."),
            (RUN_TAGS, "`sbp run` is at it."),
        ):
            if instance.get_runs_count(dg.RunsFilter(tags=tags, statuses=NOT_FINISHED_STATUSES)):
                yield dg.SkipReason(reason)
                return
        today = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
        asked = instance.get_runs(dg.RunsFilter(tags=UNCHECKED_TAGS, created_after=today))
        asked_today = {run.tags.get("dagster/run_key") for run in asked}
        assert context.repository_def is not None  # it is given to every sensor of a code location
        graph = context.repository_def.asset_graph
        staleness, requests = Staleness(graph, instance), 0
        for step in pipeline:
            by_key = {key: staleness.unchecked(key) for key in step.keys}
            for partition in sorted({name for events in by_key.values() for name in events}, key=str):
                events = {key: events[partition] for key, events in by_key.items() if partition in events}
                run_key = f"{step.name} {partition} {sorted(events.values())} {today:%F}"
                if run_key in asked_today:
                    continue
                if requests == UNCHECKED_AT_ONCE:
                    return
                requests += 1
                yield dg.RunRequest(
                    run_key=run_key,
                    job_name=step.name,
                    partition_key=partition,
                    asset_check_keys=sorted(check for key in events for check in graph.get(key).check_keys),
                    tags={**UNCHECKED_TAGS, "dagster/priority": "-1"},
                )

    return unchecked


def failure_sensor(deployment: Deployment) -> dg.SensorDefinition:
    """Tells $SBP_WEBHOOK_URL of every failed run; on from the start where that is set."""

    @dg.run_failure_sensor(
        name="failed_runs",
        default_status=status(bool(os.environ.get(notify.URL_VARIABLE))),
        description=f"Posts a JSON message about each failed run to ${notify.URL_VARIABLE}.",
    )
    def failed_runs(context: dg.RunFailureSensorContext) -> dg.SkipReason | None:
        webhook = os.environ.get(notify.URL_VARIABLE)
        if not webhook:
            return dg.SkipReason(f"${notify.URL_VARIABLE} is not set where the code runs.")
        if context.dagster_run.tags.get("dagster/will_retry") == "true":
            return dg.SkipReason("The daemon starts this run again; only the last attempt is told.")
        run, step, error = context.dagster_run, None, context.failure_event.message or ""
        for event in context.get_step_failure_events():
            cause = event.step_failure_data.error and raised(event.step_failure_data.error)
            if cause and cause.cls_name == dg.DagsterExecutionInterruptedError.__name__:
                return dg.SkipReason("The run was asked to end.")
            step, error = event.step_key, cause.message if cause else error
            break
        message = notify.failure_message(
            run.run_id,
            run.job_name,
            run.tags.get("dagster/partition"),
            step,
            error.replace(webhook, f"${notify.URL_VARIABLE}"),
            f"{deployment.webserver_url.rstrip('/')}/runs/{run.run_id}",
        )
        if reason := notify.post(webhook, message):
            context.log.warning("run %s failed and ${%s} was not told: %s", run.run_id, notify.URL_VARIABLE, reason)
        return None

    return failed_runs
