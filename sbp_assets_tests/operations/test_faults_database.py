"""The database that crashes under a daemon, a webserver and a run, and is started again."""

import contextlib
import shutil
import time
import urllib.error
from pathlib import Path

import psutil

from sbp_assets_tests.operations.deployment import FOLDERS, Deployment, wait_for
from sbp_assets_tests.operations.faults import VICTIMS, forget, in_the_midst
from sbp_assets_tests.operations.servers import PostgresServer

# Long enough that nothing only waits until it is over: Dagster tries to connect for a second.
OUTAGE_SECONDS = 15


def test_a_database_that_crashes_and_is_started_again(postgres: PostgresServer, finished: Path, tmp_path: Path):
    for folder in (FOLDERS["data_dir"], FOLDERS["work_dir"]):
        shutil.copytree(finished / folder, tmp_path / folder)
    overrides = {"SBP_POSTGRES_URL": postgres.url, "SBP_DEPLOYMENT__CHECKPOINT_MINUTES": "0.005"}
    with Deployment(tmp_path, overrides) as deployment:
        undisturbed = deployment.versions()
        deployment.sbp("env")  # makes the schema of runs and events
        daemon, webserver = deployment.start_daemon(reload_seconds=20), deployment.start_webserver()
        victim = VICTIMS["pretraining"]
        forget(deployment, victim)
        run_id = deployment.launch(victim.job, victim.partition)
        process = in_the_midst(deployment, victim, run_id)
        tree = [process, *process.children(recursive=True)]
        postgres.stop("immediate")
        gone_at = time.monotonic()
        # The run cannot record what it has done, and ends.
        _, survivors = psutil.wait_procs(tree, timeout=300)
        assert survivors == []
        time.sleep(max(0.0, OUTAGE_SECONDS - (time.monotonic() - gone_at)))
        postgres.start()

        assert deployment.wait_run(run_id) == "FAILURE"
        wait_for(lambda: not deployment.slot_holders(), "the slots to be free")

        def launched() -> str:
            # The webserver finds its pooled connections cut one by one, and answers with status 500 when it does.
            with contextlib.suppress(urllib.error.HTTPError):
                return deployment.launch(victim.job, victim.partition)
            return ""

        # The daemon may have tried to load the code meanwhile, and tries again within a minute: so long, runs wait.
        next_run = wait_for(launched, "the webserver to launch again")
        assert deployment.wait_run(next_run) == "SUCCESS"
        assert deployment.versions() == undisturbed
        assert daemon.poll() is None and webserver.poll() is None
