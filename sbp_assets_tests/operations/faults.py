"""What the fault tests do to a deployment: jobs to be hit in the midst of their work, and the runs that follow."""

from __future__ import annotations

import shutil
from dataclasses import dataclass

import dagster as dg
import psutil

from sbp_assets_tests.operations.deployment import Deployment, wait_for


@dataclass(frozen=True)
class Victim:
    """A job to kill, and what it materialises.

    `evidence` is a file below work/ that shows it in the midst of its work; without one, its first step has begun.
    """

    job: str
    partition: str | None
    artifacts: tuple[str, ...]
    work: tuple[str, ...] = ()
    evidence: str = ""
    resumed: str = ""  # what the next run says of the work that it found done


# But for synthesis none reads what another materialises: the next run of one goes on while another is killed.
VICTIMS = {
    "synthesizer": Victim(
        "tune_synthesizer",
        None,
        ("synthesizer/checkpoint",),
        ("synthesizer/checkpoint", "staging/synthesizer/checkpoint"),
        "synthesizer/checkpoint/checkpoint.pt",
        "resuming after step",
    ),
    "corpus": Victim("ingest", "00001", ("corpus/raw_documents/00001.parquet", "corpus/rejected_rows/00001.parquet")),
    "pairing": Victim("merge", "00001", ("pairing/neighbor_candidates/00001.parquet",)),
    "pretraining": Victim(
        "pretrain_oracle",
        "0",
        ("pretraining/oracle_model/0",),
        ("oracle_model/0", "staging/oracle_model/0"),
        "oracle_model/0/checkpoint.pt",
        "resuming after step",
    ),
    "evaluation": Victim("score_baseline", "0", ("evaluation/baseline_scores/0.parquet",)),
    "synthesis": Victim(
        "synthesise",
        "00001",
        ("synthesis/synthetic_documents/00001.parquet", "synthesis/synthetic_tokens/00001"),
        ("synthesis/00001",),
        "synthesis/00001/*/*.jsonl",
        "are not sampled again",
    ),
}


def forget(deployment: Deployment, victim: Victim) -> None:
    """Remove what the job has materialised and its unfinished work, so that it starts from the beginning."""
    artifacts, work = deployment.artifacts, deployment.home / "work"
    for path in [*(artifacts / name for name in victim.artifacts), *(work / name for name in victim.work)]:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def in_the_midst(deployment: Deployment, victim: Victim, run_id: str) -> psutil.Process:
    """The run's process, when it has done a part of its work."""
    process = deployment.wait_step(run_id)
    if victim.evidence:
        work = deployment.home / "work"
        wait_for(lambda: any(path.stat().st_size for path in work.glob(victim.evidence)), victim.evidence, every=0.02)
    return process


def clear(deployment: Deployment, *names: str) -> None:
    """Have `sbp run` re-materialise assets: wipe their materialisations, as the UI can, and remove their artifacts."""
    with deployment.instance() as instance:
        instance.wipe_assets([dg.AssetKey(name.split("/")) for name in names])
    for name in names:
        shutil.rmtree(deployment.artifacts / name)


def retry_of(deployment: Deployment, run_id: str) -> str:
    """The run that the daemon has put in the place of a dead one."""

    def found(instance: dg.DagsterInstance) -> str:
        runs = instance.get_runs(dg.RunsFilter(tags={"dagster/parent_run_id": run_id}))
        return runs[0].run_id if runs else ""

    return deployment.wait(found, f"the retry of run {run_id}")
