"""`sbp prune` on a finished store: what is superseded goes, and staleness and provenance say the same as before."""

import json
import os
import re
import shutil
import signal
import sys
import time
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from sbp_assets.dagster_support.internals import BaseAssetGraph
from sbp_assets.definitions import build_definitions
from sbp_assets.orchestration.staleness import Staleness
from sbp_assets.provenance.records import Records
from sbp_assets.settings import load_settings
from sbp_assets.storage.artifacts import ABANDONED
from sbp_assets.storage.remote import root
from sbp_assets_tests.operations.deployment import Deployment, wait_for
from sbp_assets_tests.operations.servers import PostgresServer, S3Server


def partitions(graph: BaseAssetGraph, key: dg.AssetKey) -> Sequence[str | None]:
    definition = graph.get(key).partitions_def
    return definition.get_partition_keys() if definition else [None]


def said(deployment: Deployment) -> dict[str, Any]:
    """What the rule of staleness, the records of provenance and `sbp trace --json` say of all artifacts."""
    defs = build_definitions(load_settings("tiny", deployment.environ))
    graph = defs.resolve_asset_graph()
    with deployment.instance() as instance:
        staleness, records = Staleness(graph, instance), Records(defs, instance)
        artifacts = [
            (key.to_user_string(), name) for key in graph.toposorted_asset_keys for name in partitions(graph, key)
        ]
        return {
            "pending": {key: staleness.pending(key) for key in graph.toposorted_asset_keys},
            "records": records(artifacts),
            "trace": json.loads(deployment.sbp("trace", "heldout/perplexity/sbp/0", "--json").stdout),
        }


def supersede(deployment: Deployment) -> None:
    """Materialise pairs with other settings, and with these again; check and fail some shards twice."""
    setting = "SBP_EXPERIMENT__PAIRING__MAX_PAIRS_PER_DOCUMENT"
    deployment.overrides[setting] = "2"
    deployment.sbp("run", "--until", "pair")
    del deployment.overrides[setting]
    deployment.sbp("run", "--until", "pair")
    for _ in range(2):
        deployment.sbp("verify", "split")


def removed(output: str) -> dict[str, int]:
    """Counts by kind, as the command printed them."""
    return {kind: int(count) for kind, count in re.findall(r"^(\w[\w ]+?) {2,}(\d+) +[\d.]+ \w+$", output, re.M)}


def runs(deployment: Deployment) -> set[str]:
    with deployment.instance() as instance:
        return {run.run_id for run in instance.get_runs()}


def files(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_ino for path in folder.rglob("*") if path.is_file()}


def assert_pruned(deployment: Deployment, least: int) -> None:
    """Prune with a dry run before it, and assert that nothing that is said of the artifacts has changed."""
    before, all_runs, artifacts = said(deployment), runs(deployment), files(deployment.artifacts)
    planned = removed(deployment.sbp("prune", "--dry-run", "--days", "0").stdout)
    assert planned.pop("to remove") >= planned["superseded runs"] >= least
    assert runs(deployment) == all_runs
    done = deployment.sbp("prune", "--days", "0").stdout
    assert removed(done)["superseded runs"] == planned["superseded runs"] == len(all_runs - runs(deployment))
    assert said(deployment) == before
    assert files(deployment.artifacts) == artifacts
    again = removed(deployment.sbp("prune", "--days", "0").stdout)
    assert again == {"removed": 0}


def test_a_finished_store_loses_what_is_superseded_and_nothing_else(finished: Path, tmp_path: Path):
    with Deployment(tmp_path / "home", finished=finished) as deployment:
        supersede(deployment)
        assert "superseded runs" not in deployment.sbp("prune").stdout, "all of them are of today"
        work = deployment.home / "work"
        old = deployment.home / "work/staging/report"
        (left := old / uuid.uuid4().hex / "staged").mkdir(parents=True)  # by a process that was killed
        (left / "index.html").write_text("half of a report")
        (left.parent / "lock").touch()
        for path in [*old.rglob("*"), old]:
            os.utime(path, (time.time() - ABANDONED - 60,) * 2)
        shutil.copytree(next(work.glob("synthesis/00000/*")), work / "synthesis/00000/0123456789abcdef")
        (deployment.artifacts / "notes.txt").write_text("mine")
        bytes_before = sum(p.stat().st_size for p in (deployment.home / "instance").rglob("*") if p.is_file())
        planned = deployment.sbp("prune", "--dry-run", "--days", "0").stdout
        assert {"generation ledgers", "unfinished writes", "training checkpoints"} <= removed(planned).keys()
        assert f"left: 1\n  {deployment.artifacts}/notes.txt" in planned
        assert_pruned(deployment, least=5)
        # Logs of runs have files of their own, and the index gives its room back.
        assert sum(p.stat().st_size for p in (deployment.home / "instance").rglob("*") if p.is_file()) < bytes_before
        assert {path.name.partition(".db")[0] for path in (deployment.home / "instance/history/runs").iterdir()} == {
            "index",
            *runs(deployment),
        }
        assert not (work / "synthesis/00000/0123456789abcdef").exists() and not list(old.glob("*/staged"))
        assert (deployment.artifacts / "notes.txt").read_text() == "mine"
        assert "nothing to do" in deployment.sbp("run").stdout
        assert "0 corrupted" in deployment.sbp("verify", "pair", "synthesise").stdout


def of_second_shard(name: str) -> bool:
    """Whether a file is of an artifact of shard 00001; a block of keys has a table of each shard."""
    return "00001" in name and "partial_candidates" not in name


def files_of_second_shard(deployment: Deployment) -> list[str]:
    return [str(path) for path in deployment.artifacts.rglob("00001*") if of_second_shard(str(path))]


@pytest.mark.faults
def test_shards_that_are_no_more_go_and_are_missing_when_they_come_back(finished: Path, tmp_path: Path):
    with Deployment(tmp_path / "home", finished=finished) as deployment:
        before = files(deployment.artifacts)
        deployment.overrides["SBP_EXPERIMENT__CORPUS__SHARDS"] = "1"
        assert "superseded artifacts" not in deployment.sbp("prune").stdout, "materialised today"
        assert removed(deployment.sbp("prune", "--days", "0").stdout)["superseded artifacts"] > 10
        kept = files(deployment.artifacts)
        assert {name for name in before if not of_second_shard(name)} == kept.keys()
        del deployment.overrides["SBP_EXPERIMENT__CORPUS__SHARDS"]
        said_now = said(deployment)["records"]
        gone = {(row["asset"], row["state"]) for row in said_now if row["partition"] == "00001"}
        assert {state for _, state in gone} == {"unrecorded"} and ("corpus/documents", "unrecorded") in gone
        again = deployment.sbp("run", "--until", "split")
        assert "done] Read and sign documents" in again.stderr


def test_while_a_run_goes_on_nothing_is_removed(finished: Path, tmp_path: Path):
    with Deployment(tmp_path / "home", finished=finished) as deployment:
        for _ in range(2):
            deployment.sbp("verify", "split")
        defs = build_definitions(load_settings("tiny", deployment.environ))
        with deployment.instance() as instance:
            run = instance.create_run_for_job(defs.resolve_job_def("compare"))
        before = runs(deployment)
        refused = deployment.sbp("prune", "--days", "0", check=False)
        assert refused.returncode == 2 and run.run_id in refused.stderr and "Let them end or cancel" in refused.stderr
        assert runs(deployment) == before
        assert removed(deployment.sbp("prune", "--days", "0", "--dry-run").stdout)["superseded runs"] >= 1


@pytest.mark.faults
def test_an_instance_in_postgresql_is_pruned(finished: Path, tmp_path: Path, postgres: PostgresServer):
    with Deployment(tmp_path / "home", finished=finished) as deployment:
        deployment.overrides["SBP_POSTGRES_URL"] = postgres.url
        deployment.sbp("to-postgres")
        for _ in range(2):
            deployment.sbp("verify", "deduplicate", "split")
        assert_pruned(deployment, least=2)
        assert "nothing to do" in deployment.sbp("run").stdout


@pytest.mark.faults
def test_a_store_on_s3_is_pruned(finished: Path, tmp_path: Path, s3: S3Server, monkeypatch: pytest.MonkeyPatch):
    for name, value in s3.environ.items():
        monkeypatch.setenv(name, value)
    bucket = s3.bucket("pruned")
    with Deployment(tmp_path / "home", s3.environ, finished) as deployment:
        deployment.sbp("copy-artifacts", "s3://pruned/tiny")
        deployment.overrides["SBP_DEPLOYMENT__DATA_DIR"] = "s3://pruned/tiny"
        before = files(bucket)
        deployment.sbp("prune", "--days", "0")
        assert files(bucket) == before
        (root("s3://pruned/tiny") / "corpus/notes.txt").write_text("mine")
        deployment.overrides["SBP_EXPERIMENT__CORPUS__SHARDS"] = "1"
        done = deployment.sbp("prune", "--days", "0").stdout
        assert removed(done)["superseded artifacts"] > 10 and "s3://pruned/tiny/corpus/notes.txt" in done
        kept = {name for name in before if not of_second_shard(name)}
        assert kept | {"tiny/corpus/notes.txt"} == files(bucket).keys()


@pytest.mark.faults
def test_killed_meanwhile_it_is_finished_by_the_next(finished: Path, tmp_path: Path):
    with Deployment(tmp_path / "home", finished=finished) as deployment:
        for _ in range(3):
            deployment.sbp("verify", "split")
        deployment.overrides["SBP_EXPERIMENT__CORPUS__SHARDS"] = "1"
        before = said(deployment)
        logs = deployment.home / "instance/history/runs"
        moments = {
            "removing artifacts": lambda: len(files_of_second_shard(deployment)),
            "removing runs": lambda: len(list(logs.glob("*.db"))),
        }
        for moment, left in moments.items():
            there = left()
            command = (sys.executable, "-m", "sbp_assets.cli", "prune", "--days", "0")
            process = deployment.start(*command, log="prune.log")
            wait_for(lambda left=left, there=there: left() < there, moment, every=0.001)
            deployment.stop(process, signal.SIGKILL)
        deployment.sbp("prune", "--days", "0")
        assert said(deployment) == before
        assert not [name for name in files_of_second_shard(deployment) if not name.endswith(".partial")]
        assert {path.name.partition(".db")[0] for path in logs.iterdir()} == {"index", *runs(deployment)}
        assert removed(deployment.sbp("prune", "--days", "0").stdout) == {"removed": 0}
