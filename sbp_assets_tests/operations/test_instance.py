"""What dagster.yaml promises, by a real daemon on PostgreSQL: pools across processes, retries after a crash alone."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest

from sbp_assets_tests.operations.deployment import Deployment, wait_for
from sbp_assets_tests.operations.servers import PostgresServer

SHARDS = ("00000", "00001")


@pytest.fixture(scope="module")
def deployment(
    finished: Path, postgres: PostgresServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Deployment]:
    overrides = {"SBP_POSTGRES_URL": postgres.url}
    with Deployment(tmp_path_factory.mktemp("instance"), overrides, finished) as deployment:
        deployment.sbp("env")  # makes the schema
        deployment.start_daemon()
        deployment.start_webserver()
        yield deployment


def step_times(deployment: Deployment, run_id: str, step: str) -> tuple[float, float]:
    with deployment.instance() as instance:
        entries = [entry for entry in instance.all_logs(run_id) if entry.step_key == step]
    times = {entry.dagster_event_type: entry.timestamp for entry in entries}
    return times[dg.DagsterEventType.STEP_START], times[dg.DagsterEventType.STEP_SUCCESS]


def test_a_pool_lets_one_step_in_at_a_time_though_its_runs_are_processes_of_their_own(deployment: Deployment):
    runs = [deployment.launch("embed", shard) for shard in SHARDS]
    assert [deployment.wait_run(run) for run in runs] == ["SUCCESS", "SUCCESS"]
    first, second = sorted(step_times(deployment, run, "embed_shards") for run in runs)
    assert first[1] <= second[0]
    assert not deployment.slot_holders()


def test_a_run_that_crashes_is_started_again(deployment: Deployment):
    before = deployment.versions("pairing/embeddings")
    run_id = deployment.launch("embed", SHARDS[0], retried=True)
    deployment.wait_step(run_id).kill()
    assert deployment.wait_run(run_id) == "FAILURE"

    def retry() -> str:
        with deployment.instance() as instance:
            runs = instance.get_runs(dg.RunsFilter(tags={"dagster/parent_run_id": run_id}))
        return runs[0].run_id if runs else ""

    assert deployment.wait_run(wait_for(retry, "the retry")) == "SUCCESS"
    assert deployment.versions("pairing/embeddings") == before


def test_a_run_whose_asset_fails_is_not_started_again(deployment: Deployment):
    shutil.rmtree(deployment.artifacts / "corpus/tokenizer")
    run_id = deployment.launch("tokenise", SHARDS[0], retried=True)
    assert deployment.wait_run(run_id) == "FAILURE"

    def decided() -> str | None:
        with deployment.instance() as instance:
            run = instance.get_run_by_id(run_id)
            return run.tags.get("dagster/will_retry") if run else None

    assert wait_for(decided, "whether it is started again") == "false"
    with deployment.instance() as instance:
        assert any("materialise corpus/tokenizer first" in str(entry) for entry in instance.all_logs(run_id))


def test_the_databases_password_is_shown_nowhere(deployment: Deployment, postgres: PostgresServer):
    shown = json.dumps(deployment.graphql("{ instance { info } version }"))
    assert "PostgresRunStorage" in shown
    assert postgres.PASSWORD not in shown + deployment.log("daemon.log") + deployment.log("webserver.log")
