"""The nightly automation, the failure sensor and backfills from the command line: a real daemon on a real instance.

The nightly automation ticks every minute here.
"""

import contextlib
import json
import shutil
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import dagster as dg
import pytest
from dagster._core.execution.backfill import PartitionBackfill

from sbp_assets.orchestration.nightly import NIGHTLY
from sbp_assets_tests.operations.deployment import BACKFILL_FINISHED, CHECKOUT, Deployment, wait_for

SIGNATURES = dg.AssetKey(["corpus", "minhash_signatures"])
BOTH = ["00000", "00001"]
EVERY_MINUTE = {
    "SBP_DEPLOYMENT__AUTOMATION": "true",
    "SBP_DEPLOYMENT__NIGHTLY": "* * * * *",
    "SBP_DEPLOYMENT__NIGHTLY_UNTIL": "null",
}


@pytest.fixture
def webhook() -> Iterator[tuple[str, list[dict[str, str]]]]:
    """URL of a server on loopback, and the messages it has received."""
    received: list[dict[str, str]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}/hooks/of-ours", received
    server.shutdown()
    server.server_close()


def backfills(deployment: Deployment) -> list[PartitionBackfill]:
    with deployment.instance() as instance:
        return list(instance.get_backfills())


def materialised(deployment: Deployment) -> set[str]:
    with deployment.instance() as instance:
        return instance.get_materialized_partitions(SIGNATURES)


def test_the_nightly_automation_materialises_what_is_missing_and_retries_what_failed(
    finished: Path, tmp_path: Path, webhook: tuple[str, list[dict[str, str]]]
):
    url, received = webhook
    with Deployment(tmp_path, {**EVERY_MINUTE, "SBP_WEBHOOK_URL": url}, finished) as deployment:
        before = deployment.versions()
        with deployment.instance() as instance:
            earlier = {run.run_id for run in instance.get_runs()}
            instance.wipe_assets([SIGNATURES])
        # One of the two shards cannot be materialised: its input is gone.
        source, aside = deployment.artifacts / "corpus/raw_documents/00001.parquet", tmp_path / "aside.parquet"
        shutil.move(source, aside)

        deployment.start_daemon()
        wait_for(lambda: materialised(deployment) == {"00000"} and received, "the first nightly tick", every=1)
        message = received[0]
        assert (message["partition"], message["step"]) == ("00000 to 00001", "ingest_shards")
        assert "1 of 2 shards failed" in message["error"] and "00001.parquet does not exist" in message["error"]
        assert message["url"].endswith(f"/runs/{message['run_id']}")

        shutil.move(aside, source)
        wait_for(lambda: materialised(deployment) == set(BOTH), "a later nightly tick", every=1)
        first, *_ = wait_for(
            lambda: [one for one in backfills(deployment) if one.status.value in BACKFILL_FINISHED], "the backfill"
        )
        assert (first.status.value, first.tags["sbp/command"]) == ("COMPLETED_FAILED", "nightly")

        with deployment.instance() as instance:
            runs = [run for run in instance.get_runs() if run.run_id not in earlier]
        # The signatures have the content of before, so nothing downstream is stale; and no model is ever trained.
        assert {key for run in runs for key in run.asset_selection or ()} == {SIGNATURES} <= set(NIGHTLY)
        assert deployment.versions() == before
        assert url not in deployment.log("daemon.log")


def test_a_backfill_from_the_command_line(finished: Path, tmp_path: Path):
    with Deployment(tmp_path, finished=finished) as deployment:
        before = deployment.versions()
        deployment.start_daemon()
        command = [sys.executable, "-m", "dagster", "job", "backfill", "-w", str(CHECKOUT / "workspace.yaml")]
        asked = subprocess.run(
            [*command, "-j", "pair", "--all", "all", "--noprompt"],
            env=deployment.environ, cwd=tmp_path, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert asked.returncode == 0, asked.stderr
        (backfill,) = backfills(deployment)
        # A job's backfill is completed when all its runs are queued.
        assert deployment.wait_backfill(backfill.backfill_id).startswith("COMPLETED")
        with deployment.instance() as instance:
            runs = instance.get_runs(dg.RunsFilter(tags={"dagster/backfill": backfill.backfill_id}))
        # This command of Dagster's makes a run for each shard, whatever the backfill policy.
        ended = {run.tags["dagster/partition"]: deployment.wait_run(run.run_id) for run in runs}
        assert ended == dict.fromkeys(BOTH, "SUCCESS")
        assert deployment.versions() == before


def test_an_unchecked_artifact_is_checked_and_not_materialised(finished: Path, tmp_path: Path):
    """As after an upgrade that adds a check."""
    with Deployment(tmp_path, {"SBP_DEPLOYMENT__AUTOMATION": "true"}, finished) as deployment:
        before = deployment.versions()
        check = dg.AssetCheckKey(dg.AssetKey(["pairing", "neighbor_pairs"]), "artifact_is_intact")
        with contextlib.closing(sqlite3.connect(tmp_path / "instance/history/runs/index.db")) as records, records:
            forget = "delete from asset_check_executions where check_name = ? and asset_key = ? and partition = ?"
            records.execute(forget, (check.name, check.asset_key.to_string(), "00001"))
        with deployment.instance() as instance:
            earlier = {run.run_id for run in instance.get_runs()}

        def checked() -> list[str]:
            with deployment.instance() as instance:
                infos = instance.event_log_storage.get_asset_check_partition_info([check])
            return [info.latest_execution_status.value for info in infos if info.partition_key == "00001"]

        assert checked() == []
        deployment.start_daemon()
        wait_for(lambda: checked() == ["SUCCEEDED"], "the check")
        with deployment.instance() as instance:
            (run,) = [run for run in instance.get_runs() if run.run_id not in earlier]
        assert (run.tags["sbp/command"], run.tags["dagster/partition"]) == ("unchecked", "00001")
        assert not run.asset_selection and check in (run.asset_check_selection or ())
        assert deployment.versions() == before
