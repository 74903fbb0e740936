"""Dagster's run launcher, which also finds out when a run's process is gone with nobody left to say so."""

import platform

import dagster as dg
import psutil

from sbp_assets.dagster_support.internals import CheckRunHealthResult, LaunchRunContext, WorkerStatus

HOST_TAG = "sbp/host"
# By how much the clock of processes and that of events may disagree.
CLOCK_SECONDS = 60.0


class LocalRunLauncher(dg.DefaultRunLauncher):
    """As Dagster's own: each run is a process that the code server starts, and reports as failed when it dies.

    Where both die (the machine restarts, all is killed), Dagster's own leaves the run started for ever, with its place
    in the pools. This one answers run monitoring, which then marks the run as failed. It does so for runs of `sbp run`
    too, and only for those of this host: of others it cannot know.
    """

    @property
    def supports_check_run_worker_health(self) -> bool:
        """Return True: run monitoring is to call check_run_worker_health."""
        return True

    def launch_run(self, context: LaunchRunContext) -> None:
        """Launch the run of `context`, and tag it with the name of this host."""
        self._instance.add_run_tags(context.dagster_run.run_id, {HOST_TAG: platform.node()})
        super().launch_run(context)

    def check_run_worker_health(self, run: dg.DagsterRun) -> CheckRunHealthResult:
        """Return FAILED where the run is of this host and its process is gone, and RUNNING otherwise."""
        if run.tags.get(HOST_TAG) != platform.node():
            return CheckRunHealthResult(WorkerStatus.RUNNING, "not a run of this host: nothing is known about it")
        events = self._instance.event_log_storage.get_logs_for_run(run.run_id, of_type=dg.DagsterEventType.ENGINE_EVENT)
        for entry in events:
            # The first says which process runs it; with an executor of many processes, later ones are its children.
            pid = entry.get_dagster_event().engine_event_data.metadata.get("pid")
            if pid is not None:
                return _health(int(str(pid.value)), entry.timestamp)
        return CheckRunHealthResult(WorkerStatus.RUNNING, "its process has not said which it is")


def _health(pid: int, seen: float) -> CheckRunHealthResult:
    try:
        process = psutil.Process(pid)
        # One that began later has got the number of one that is gone.
        alive = process.create_time() <= seen + CLOCK_SECONDS and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        alive = False
    if alive:
        return CheckRunHealthResult(WorkerStatus.RUNNING, run_worker_id=str(pid))
    return CheckRunHealthResult(WorkerStatus.FAILED, f"its process (pid {pid}) is gone", run_worker_id=str(pid))
