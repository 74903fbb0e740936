"""The daemon and the webserver restarted in mid-backfill, and a machine that goes down with everything on it."""

import shutil
import signal
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import psutil
import pytest

from sbp_assets_tests.operations.deployment import Deployment, wait_for
from sbp_assets_tests.operations.faults import VICTIMS, forget, in_the_midst, retry_of

SHARDS = ["00000", "00001"]


@pytest.fixture
def deployment(finished: Path, tmp_path: Path) -> Iterator[Deployment]:
    often = {"SBP_DEPLOYMENT__CHECKPOINT_MINUTES": "0.005"}  # every 0.3 s
    with Deployment(tmp_path, often, finished) as deployment:
        yield deployment


def backfill_runs(deployment: Deployment, backfill: str) -> list[dg.DagsterRun]:
    with deployment.instance() as instance:
        return list(instance.get_runs(dg.RunsFilter(tags={"dagster/backfill": backfill})))


def test_a_backfill_survives_restarts_of_daemon_and_webserver(deployment: Deployment):
    """Two layers of two shards: the second waits for all of the first.

    While the first is materialised, the webserver is killed and the daemon ended (SIGTERM); while the second is, the
    daemon is killed. The runs that they have started go on without them.
    """
    undisturbed = deployment.versions()
    assets = ["pairing/embeddings", "pairing/ann_index"]
    for asset in assets:
        shutil.rmtree(deployment.artifacts / asset)
    daemon, webserver = deployment.start_daemon(), deployment.start_webserver()
    backfill = deployment.backfill(assets, SHARDS)

    first = wait_for(lambda: backfill_runs(deployment, backfill), "the first layer's runs")
    process = deployment.wait_step(first[0].run_id)
    deployment.stop(webserver, signal.SIGKILL, alone=True)
    deployment.stop(daemon, signal.SIGTERM, alone=True)
    psutil.wait_procs([process], timeout=300)
    daemon = deployment.start_daemon()

    def second() -> str:
        layer = [run for run in backfill_runs(deployment, backfill) if "ann_index" in str(run.asset_selection)]
        return layer[0].run_id if layer else ""

    deployment.wait_step(wait_for(second, "the second layer's runs"))
    deployment.stop(daemon, signal.SIGKILL, alone=True)
    deployment.start_daemon()
    deployment.start_webserver()
    assert deployment.wait_backfill(backfill) == "COMPLETED_SUCCESS"
    shown = deployment.graphql(
        "query ($id: String!) { partitionBackfillOrError(backfillId: $id) { ... on PartitionBackfill { status } } }",
        id=backfill,
    )
    assert shown["partitionBackfillOrError"]["status"] == "COMPLETED_SUCCESS"
    assert deployment.versions() == undisturbed
    assert not deployment.slot_holders()


def test_a_run_is_retried_after_its_machine_went_down(deployment: Deployment):
    """kill -9 of run, code servers, daemon and webserver at once; nobody is left to report the run as failed."""
    undisturbed = deployment.versions()
    victim = VICTIMS["pretraining"]
    forget(deployment, victim)
    services = [deployment.start_daemon(), deployment.start_webserver()]
    run_id = deployment.launch(victim.job, victim.partition, retried=True)
    processes = [in_the_midst(deployment, victim, run_id)]
    assert deployment.slot_holders() == {run_id}
    processes += processes[0].children(recursive=True)
    for service in services:
        processes += [psutil.Process(service.pid), *psutil.Process(service.pid).children(recursive=True)]
    for process in reversed(processes):
        process.kill()
    _, survivors = psutil.wait_procs(processes, timeout=60)
    assert survivors == [] and not (deployment.artifacts / victim.artifacts[0]).exists()

    deployment.start_daemon()
    assert deployment.wait_run(run_id) == "FAILURE"
    assert deployment.wait_run(retry_of(deployment, run_id)) == "SUCCESS"
    assert deployment.versions() == undisturbed
