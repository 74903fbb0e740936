"""Runs that are killed, cancelled or launched twice, by a real daemon: what is left, and how the next run ends.

One deployment for all; docs/faults.md is the table of faults and outcomes.
"""

import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import dagster as dg
import psutil
import pytest

from sbp_assets.definitions import build_definitions
from sbp_assets.settings import load_settings
from sbp_assets_tests.operations.deployment import Deployment, wait_for
from sbp_assets_tests.operations.faults import VICTIMS, Victim, forget, in_the_midst, retry_of


@dataclass
class Outcome:
    status: str
    survivors: list[psutil.Process]
    left: dict[str, str]  # versions of the artifacts that were there right after the kill
    next_run: str
    next_status: str = ""


@pytest.fixture(scope="module")
def deployment(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    often = {"SBP_DEPLOYMENT__CHECKPOINT_MINUTES": "0.005"}  # every 0.3 s
    with Deployment(tmp_path_factory.mktemp("faults"), often, finished) as deployment:
        deployment.start_daemon()
        deployment.start_webserver()
        yield deployment


@pytest.fixture(scope="module")
def undisturbed(deployment: Deployment) -> dict[str, str]:
    return deployment.versions()


def kill(deployment: Deployment, victim: Victim) -> Outcome:
    for _ in range(5):
        forget(deployment, victim)
        run_id = deployment.launch(victim.job, victim.partition, retried=True)
        process = in_the_midst(deployment, victim, run_id)
        children = process.children(recursive=True)
        process.kill()
        psutil.wait_procs([process], timeout=60)
        left = deployment.versions(*victim.artifacts)
        _, survivors = psutil.wait_procs(children, timeout=60)
        status = deployment.wait_run(run_id)
        if status != "SUCCESS":  # on a busy machine a short one has ended before it is killed
            break
    return Outcome(status, survivors, left, retry_of(deployment, run_id))


def log_of(deployment: Deployment, run_id: str) -> str:
    with deployment.instance() as instance:
        return "\n".join(entry.user_message for entry in instance.all_logs(run_id))


@pytest.fixture(scope="module")
def outcomes(deployment: Deployment, undisturbed: dict[str, str]) -> dict[str, Outcome]:
    """Of each stage's job, killed once; nothing but the daemon starts it again."""
    outcomes: dict[str, Outcome] = {}
    for stage, victim in VICTIMS.items():
        if stage == "synthesis":
            deployment.wait_run(outcomes["synthesizer"].next_run)
        outcomes[stage] = kill(deployment, victim)
    for outcome in outcomes.values():
        outcome.next_status = deployment.wait_run(outcome.next_run)
    return outcomes


@pytest.mark.parametrize("stage", VICTIMS)
def test_a_killed_run_is_retried(
    stage: str, outcomes: dict[str, Outcome], undisturbed: dict[str, str], deployment: Deployment
):
    """kill -9 of the run's process in the midst of its work."""
    outcome, victim = outcomes[stage], VICTIMS[stage]
    assert outcome.status == "FAILURE"
    assert outcome.survivors == []  # training processes, engines, what captures logs
    # What was published before the kill is whole.
    assert outcome.left.items() <= undisturbed.items() and not (victim.evidence and outcome.left)
    assert outcome.next_status == "SUCCESS"
    assert victim.resumed in log_of(deployment, outcome.next_run)
    assert deployment.versions(*victim.artifacts) == {name: undisturbed[name] for name in victim.artifacts}


def test_a_killed_run_of_many_shards_keeps_those_that_it_has_finished(
    deployment: Deployment, undisturbed: dict[str, str]
):
    """The retry materialises the others, and no shard twice."""
    assets, shards = ["pairing/embeddings"], ["00000", "00001"]
    graph = build_definitions(load_settings("tiny", {})).resolve_asset_graph()
    checks = len(graph.get(dg.AssetKey(["pairing", "embeddings"])).check_keys)
    for _ in range(5):
        forget(deployment, Victim("", "", tuple(assets)))
        backfill = deployment.backfill(assets, shards)
        of_it = dg.RunsFilter(tags={"dagster/backfill": backfill})
        (run_id,) = wait_for(partial(run_ids, deployment, of_it), "the backfill's run")
        process = deployment.wait_step(run_id)
        wait_for(partial(has_checked, deployment, run_id, "00000", checks), "the first shard", every=0.01)
        process.kill()
        if deployment.wait_run(run_id) != "SUCCESS":  # on a busy machine it may have ended before
            break
    finished = materialised(deployment, run_id)
    retry = retry_of(deployment, run_id)
    assert deployment.wait_run(retry) == "SUCCESS"
    assert sorted([*finished, *materialised(deployment, retry)]) == ["00000"] * len(assets) + ["00001"] * len(assets)
    assert deployment.wait_backfill(backfill) == "COMPLETED_SUCCESS"
    assert deployment.versions() == undisturbed
    assert "nothing to do" in deployment.sbp("run", "--until", "embed").stdout, "checks and all"


def run_ids(deployment: Deployment, which: dg.RunsFilter) -> list[str]:
    with deployment.instance() as instance:
        return list(instance.get_run_ids(which))


def has_checked(deployment: Deployment, run_id: str, shard: str, checks: int) -> bool:
    with deployment.instance() as instance:
        entries = instance.all_logs(run_id, of_type=dg.DagsterEventType.ASSET_CHECK_EVALUATION)
    found = [entry.get_dagster_event().asset_check_evaluation_data.partition for entry in entries]
    return found.count(shard) == checks


def materialised(deployment: Deployment, run_id: str) -> list[str]:
    """Return the shard of each materialisation of a run."""
    with deployment.instance() as instance:
        entries = instance.all_logs(run_id, of_type=dg.DagsterEventType.ASSET_MATERIALIZATION)
    return [entry.get_dagster_event().partition or "" for entry in entries]


def test_killed_runs_hold_no_pool_and_damage_nothing_else(
    outcomes: dict[str, Outcome], undisturbed: dict[str, str], deployment: Deployment
):
    wait_for(lambda: not deployment.slot_holders(), "the slots to be free")
    assert deployment.versions() == undisturbed


def test_a_run_cancelled_in_training_is_resumed(deployment: Deployment, undisturbed: dict[str, str]):
    """Through the mutation that the UI's button sends."""
    victim = VICTIMS["pretraining"]
    forget(deployment, victim)
    run_id = deployment.launch(victim.job, victim.partition)
    process = in_the_midst(deployment, victim, run_id)
    tree = [process, *process.children(recursive=True)]
    deployment.terminate(run_id)
    assert deployment.wait_run(run_id) == "CANCELED"
    _, survivors = psutil.wait_procs(tree, timeout=60)
    assert survivors == []
    assert "ended as asked after step" in log_of(deployment, run_id)
    next_run = deployment.launch(victim.job, victim.partition)
    assert deployment.wait_run(next_run) == "SUCCESS"
    assert victim.resumed in log_of(deployment, next_run)
    assert deployment.versions() == undisturbed


def test_two_backfills_of_the_same_shard_at_once(deployment: Deployment, undisturbed: dict[str, str]):
    artifacts = ("pairing/embeddings/00000.parquet",)
    forget(deployment, Victim("", "00000", artifacts))
    began = time.time()
    assets = [name.rsplit("/", 1)[0] for name in artifacts]
    backfills = [deployment.backfill(assets, ["00000"]) for _ in range(2)]
    assert [deployment.wait_backfill(backfill) for backfill in backfills] == ["COMPLETED_SUCCESS"] * 2
    with deployment.instance() as instance:
        runs = [run for run in instance.get_run_records(limit=2) if run.create_timestamp.timestamp() > began]
    assert [run.dagster_run.status.value for run in runs] == ["SUCCESS"] * 2
    # Both were asked for before either began.
    assert max(run.create_timestamp.timestamp() for run in runs) < min(run.start_time or 0 for run in runs)
    assert deployment.versions() == undisturbed


MATERIALISE_REPEATEDLY = """
import sys
import dagster as dg
from sbp_assets.definitions import build_definitions
from sbp_assets.settings import load_settings
defs = build_definitions(load_settings())
with dg.DagsterInstance.get() as instance:
    print("ready", flush=True)
    sys.stdin.readline()
    for _ in range(5):
        assert defs.resolve_job_def("tokenise").execute_in_process(instance=instance, partition_key="00000").success
"""


def test_two_processes_that_materialise_the_same_artifact_at_once(
    deployment: Deployment, undisturbed: dict[str, str], tmp_path: Path
):
    """Without a queue between them: each writes, publishes and checks while the other does."""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", MATERIALISE_REPEATEDLY],
            env=deployment.environ,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(tmp_path / "said").open("a"),
            text=True,
        )
        for _ in range(2)
    ]
    assert [process.stdout and process.stdout.readline() for process in processes] == ["ready\n"] * 2
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    assert [process.wait(600) for process in processes] == [0, 0], (tmp_path / "said").read_text()[-3000:]
    assert deployment.versions() == undisturbed
