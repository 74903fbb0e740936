"""Runs that are killed, cancelled or doubled, by a real daemon: what is left, and what the next one makes of it.

One deployment for all; docs/faults.md is the table of faults and outcomes.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from sbp_assets_tests.operations.deployment import Deployment, wait_for
from sbp_assets_tests.operations.faults import VICTIMS, Victim, forget, in_the_midst, retry_of


@dataclass
class Outcome:
    status: str
    survivors: list[psutil.Process]
    left: list[str]  # of the artifacts, right after the kill
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
    forget(deployment, victim)
    run_id = deployment.launch(victim.job, victim.partition, retried=True)
    process = in_the_midst(deployment, victim, run_id)
    children = process.children(recursive=True)
    process.kill()
    psutil.wait_procs([process], timeout=60)
    left = [name for name in victim.artifacts if (deployment.artifacts / name).exists()]
    _, survivors = psutil.wait_procs(children, timeout=60)
    return Outcome(deployment.wait_run(run_id), survivors, left, retry_of(deployment, run_id))


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
def test_a_killed_worker(stage: str, outcomes: dict[str, Outcome], undisturbed: dict[str, str], deployment: Deployment):
    """kill -9 of the run's process in the midst of its work."""
    outcome, victim = outcomes[stage], VICTIMS[stage]
    assert outcome.status == "FAILURE"
    assert outcome.survivors == []  # training processes, engines, what captures logs
    assert outcome.left == []
    assert outcome.next_status == "SUCCESS"
    assert victim.resumed in log_of(deployment, outcome.next_run)
    assert deployment.versions(*victim.artifacts) == {name: undisturbed[name] for name in victim.artifacts}


def test_killed_workers_hold_no_pool_and_damage_nothing_else(
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
    assert (deployment.home / "work" / victim.evidence).is_file()
    next_run = deployment.launch(victim.job, victim.partition)
    assert deployment.wait_run(next_run) == "SUCCESS"
    assert victim.resumed in log_of(deployment, next_run)
    assert deployment.versions() == undisturbed


def test_two_backfills_of_the_same_shard_at_once(deployment: Deployment, undisturbed: dict[str, str]):
    made = ("corpus/tokens/00000", "corpus/minhash_signatures/00000.parquet", "synthesis/synthetic_tokens/00000")
    forget(deployment, Victim("", "00000", made))
    began = time.time()
    assets = [name.rsplit("/", 1)[0] for name in made]
    backfills = [deployment.backfill(assets, ["00000"]) for _ in range(2)]
    assert [deployment.wait_backfill(backfill) for backfill in backfills] == ["COMPLETED_SUCCESS"] * 2
    with deployment.instance() as instance:
        runs = [run for run in instance.get_run_records(limit=2) if run.create_timestamp.timestamp() > began]
    assert [run.dagster_run.status.value for run in runs] == ["SUCCESS"] * 2
    starts, ends = [run.start_time or 0 for run in runs], [run.end_time or 0 for run in runs]
    assert max(starts) < min(ends)  # or it would have shown nothing
    assert deployment.versions() == undisturbed
