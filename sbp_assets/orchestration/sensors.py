"""The sensors report new and changed source files, have unchecked artifacts checked and post failed runs."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

import dagster as dg

from sbp_assets.corpus.ingest import source_changes
from sbp_assets.dagster_support.internals import NOT_FINISHED_STATUSES, BulkActionsFilter, BulkActionStatus
from sbp_assets.orchestration import webhook
from sbp_assets.orchestration.fan_in_checks import due_checks
from sbp_assets.orchestration.in_process import RUN_TAGS
from sbp_assets.orchestration.materialisations import StalenessCache
from sbp_assets.orchestration.nightly import default_status
from sbp_assets.orchestration.pipeline import PIPELINE, Step
from sbp_assets.orchestration.ranges import batches, partitions_of, range_tags
from sbp_assets.orchestration.runner import original_error
from sbp_assets.orchestration.staleness import Staleness, partition_checks
from sbp_assets.settings import Deployment, FilesSource

MANIFEST = dg.AssetKey(["corpus", "source_manifest"])
SHOWN = 20
UNCHECKED_TAGS = {"sbp/command": "unchecked"}
UNCHECKED_AT_ONCE = 100
# A tick asks as much as a nightly evaluation does: seconds for thousands of shards (docs/ui.md).
UNCHECKED_SECONDS = 300


def source_sensor(source: FilesSource, deployment: Deployment) -> dg.SensorDefinition:
    """Return the sensor that compares the source with the manifest and reports each difference once, on the manifest.

    With deployment.ingest_new_files it then requests the job `manifest`, as soon as two ticks find the same: a file
    that is still being written is not ingested.
    """

    @dg.sensor(
        name="source_files",
        job_name="manifest",
        minimum_interval_seconds=deployment.source_poll_seconds,
        default_status=default_status(deployment.automation),
        description="Reports files that are new, changed or gone at the corpus location"
        + (", and ingests them." if deployment.ingest_new_files else "."),
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
            # A request that failed is repeated, after one more tick, then two, four, …
            requests, looks = before.get("requests", 0), before.get("looks", 0) + 1  # ticks since the last request
            if not requests or (looks >= 2 ** (requests - 1) and _ingestion_failed(context.instance)):
                requests, looks, run_requests = requests + 1, 0, [dg.RunRequest()]
            else:
                run_requests = []
            cursor = json.dumps({"changes": digest, "requests": requests, "looks": looks})
            reason = None if run_requests else "Requested already."
            return dg.SensorResult(cursor=cursor, run_requests=run_requests, skip_reason=reason)
        return dg.SkipReason("Reported already; the job `manifest`, or `sbp run --refresh`, ingests them.")

    return source_files


def _ingestion_failed(instance: dg.DagsterInstance) -> bool:
    """Whether the last run that the sensor requested ended without success."""
    runs = instance.get_runs(dg.RunsFilter(tags={"dagster/sensor_name": "source_files"}), limit=1)
    return bool(runs) and runs[0].status in (dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.CANCELED)


def _observation(changes: dict[str, dict[str, str]], ingested: bool) -> dg.AssetObservation:
    names = {kind: list(files) for kind, files in changes.items()}
    counts = ", ".join(f"{len(files)} {kind}" for kind, files in names.items() if files)
    then = "they are ingested next" if ingested else "the job `manifest`, or `sbp run --refresh`, ingests them"
    return dg.AssetObservation(
        MANIFEST,
        description=f"At the source there are files other than in the manifest: {counts}; {then}.",
        metadata={
            **{f"{kind}_files": len(files) for kind, files in names.items()},
            **{f"first_{kind}": files[:SHOWN] for kind, files in names.items() if files},
        },
    )


def unchecked_sensor(
    deployment: Deployment, cache: StalenessCache | None = None, pipeline: Sequence[Step] = PIPELINE
) -> dg.SensorDefinition:
    """Return the sensor that requests runs of the checks alone on unchecked artifacts.

    Those are older than a blocking check, or their run died before the check; the nightly automation materialises
    nothing from them until then. The sensor requests a few runs at a time, and more when those are done, so that a
    project with a new check does not fill the queue: `sbp verify` is the fast way. A check that crashes is requested
    again the next day. `cache` is kept from tick to tick.
    """
    cache = cache or StalenessCache()

    @dg.sensor(
        name="unchecked",
        jobs=[step.job for step in pipeline],
        minimum_interval_seconds=UNCHECKED_SECONDS,
        default_status=default_status(deployment.automation),
        description="Runs the checks of artifacts that a blocking check has not been run on; materialises nothing.",
    )
    def unchecked(context: dg.SensorEvaluationContext) -> Iterator[dg.RunRequest | dg.SkipReason]:
        instance = context.instance
        for tags, reason in (
            (UNCHECKED_TAGS, "What was requested is not done yet."),
            (RUN_TAGS, "`sbp run` is running."),
        ):
            if instance.get_runs_count(dg.RunsFilter(tags=tags, statuses=NOT_FINISHED_STATUSES)):
                yield dg.SkipReason(reason)
                return
        today = datetime.now(UTC).replace(hour=0, minute=0, second=0, microsecond=0)
        requested = instance.get_runs(dg.RunsFilter(tags=UNCHECKED_TAGS, created_after=today))
        requested_today = {run.tags.get("dagster/run_key") for run in requested}
        assert context.repository_def is not None  # it is given to every sensor of a code location
        graph = context.repository_def.asset_graph
        staleness, requests = Staleness(graph, instance, cache), 0
        for step in pipeline:
            by_key = {key: staleness.unchecked(key) for key in step.keys}
            found = {name for events in by_key.values() for name in events}
            for partitions in batches(graph, step.keys[0], list(found)):
                events = {key: [by_key[key].get(name) for name in partitions] for key in step.keys}
                run_key = f"{step.name} {partitions[0]} {sorted(events.items())} {today:%F}"
                run_key = f"{step.name} {partitions[0]} {hashlib.sha256(run_key.encode()).hexdigest()}"
                if run_key in requested_today:
                    continue
                if requests == UNCHECKED_AT_ONCE:
                    return
                requests += 1
                yield dg.RunRequest(
                    run_key=run_key,
                    job_name=step.name,
                    partition_key=partitions[0] if len(partitions) == 1 else None,
                    asset_check_keys=sorted(
                        check for key in step.keys if any(events[key]) for check in partition_checks(graph, key)
                    ),
                    tags={
                        **UNCHECKED_TAGS,
                        "dagster/priority": "-1",
                        **(range_tags(partitions) if len(partitions) > 1 else {}),
                    },
                )
            yield from _over_all(staleness, step, requested_today, today)

    return unchecked


def _over_all(staleness: Staleness, step: Step, requested: set[str | None], today: datetime) -> Iterator[dg.RunRequest]:
    """Request the checks of all shards of a step that are due."""
    going_on = BulkActionsFilter(statuses=[BulkActionStatus.REQUESTED])
    if staleness.instance.get_backfills(filters=going_on, limit=1):
        return  # which may be about to materialise more of it
    due = due_checks(staleness, step.keys)
    run_key = f"{step.name} over all {[staleness.last_event(key) for key in step.keys]} {today:%F}"
    if due and run_key not in requested:
        tags = {**UNCHECKED_TAGS, "dagster/priority": "-1"}
        yield dg.RunRequest(run_key=run_key, job_name=step.name, asset_check_keys=due, tags=tags)


def failure_sensor(deployment: Deployment) -> dg.SensorDefinition:
    """Return the sensor that posts every failed run to $SBP_WEBHOOK_URL; it runs from the start where that is set."""

    @dg.run_failure_sensor(
        name="failed_runs",
        default_status=default_status(bool(os.environ.get(webhook.URL_VARIABLE))),
        description=f"Posts a JSON message about each failed run to ${webhook.URL_VARIABLE}.",
    )
    def failed_runs(context: dg.RunFailureSensorContext) -> dg.SkipReason | None:
        url = os.environ.get(webhook.URL_VARIABLE)
        if not url:
            return dg.SkipReason(f"${webhook.URL_VARIABLE} is not set where the code runs.")
        if context.dagster_run.tags.get("dagster/will_retry") == "true":
            return dg.SkipReason("The daemon retries this run; only the last attempt is reported.")
        run, step, error = context.dagster_run, None, context.failure_event.message or ""
        for event in context.get_step_failure_events():
            cause = event.step_failure_data.error and original_error(event.step_failure_data.error)
            if cause and cause.cls_name == dg.DagsterExecutionInterruptedError.__name__:
                return dg.SkipReason("The run was terminated on request.")
            step, error = event.step_key, cause.message if cause else error
            break
        message = webhook.failure_message(
            run.run_id,
            run.job_name,
            partitions_of(run),
            step,
            error.replace(url, f"${webhook.URL_VARIABLE}"),
            f"{deployment.webserver_url.rstrip('/')}/runs/{run.run_id}",
        )
        if reason := webhook.post(url, message):
            context.log.warning("run %s was not posted to ${%s}: %s", run.run_id, webhook.URL_VARIABLE, reason)
        return None

    return failed_runs
