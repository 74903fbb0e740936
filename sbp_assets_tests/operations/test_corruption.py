"""Artifacts that are corrupted or lost after they were materialised: they are found, and nothing is built on them."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from sbp_assets.definitions import build_definitions
from sbp_assets.orchestration.nightly import NIGHTLY
from sbp_assets.orchestration.pipeline import PIPELINE
from sbp_assets.orchestration.runner import PipelineError, pending_partitions, run_pipeline
from sbp_assets.orchestration.verification import Outcome, VerifyResult, verify
from sbp_assets.settings import Settings, load_settings
from sbp_assets.storage.io_managers import ParquetIOManager
from sbp_assets_tests.operations.damage import SHARD, shuffled_pairs
from sbp_assets_tests.operations.deployment import Deployment

STEPS = {step.name: step for step in PIPELINE}
NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)


@pytest.fixture
def deployment(finished: Path, tmp_path: Path) -> Iterator[Deployment]:
    with Deployment(tmp_path, finished=finished) as copy:
        yield copy


@pytest.fixture
def settings(deployment: Deployment) -> Settings:
    return load_settings(environ=deployment.environ)


@pytest.fixture
def defs(settings: Settings) -> dg.Definitions:
    return build_definitions(settings)


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def nightly_requests(defs: dg.Definitions, instance: dg.DagsterInstance) -> set[str]:
    """The assets that the nightly automation requests just after its tick."""
    evaluated = None
    for now in (NOON, NOON + timedelta(hours=14, minutes=1)):
        evaluated = dg.evaluate_automation_conditions(
            defs,
            instance,
            asset_selection=dg.AssetSelection.assets(*NIGHTLY),
            evaluation_time=now,
            cursor=evaluated.cursor if evaluated else None,
        )
    assert evaluated
    return {r.key.to_user_string() for r in evaluated.results if evaluated.get_requested_partitions(r.key)}


def verified(defs: dg.Definitions, instance: dg.DagsterInstance, step: str) -> VerifyResult:
    ((_, result),) = verify(defs, instance, STEPS[step], [SHARD])
    return result


def test_verify_finds_corrupted_artifacts_and_run_rematerialises_them(
    deployment: Deployment, defs: dg.Definitions, settings: Settings
):
    before = deployment.versions()
    pairs = deployment.artifacts / f"pairing/neighbor_pairs/{SHARD}.parquet"
    flip_a_bit(pairs)
    # Still finite weights of the right shapes: only their bytes tell.
    flip_a_bit(deployment.artifacts / "pretraining/baseline_model/0/model.safetensors")
    found = deployment.sbp("verify", "pair", "pretrain_baseline", "train_tokenizer", check=False)
    assert found.returncode == 1
    lines = found.stdout.splitlines()
    assert any(line.startswith(f"pair {SHARD}: ") and "neighbor_pairs:artifact_is_intact" in line for line in lines)
    assert "pretrain_baseline 0: pretraining/baseline_model:artifact_is_intact" in lines
    assert lines[-1].startswith("4 partitions checked, 2 corrupted")
    assert any("corrupted or changed" in line for line in lines) and "Traceback" not in found.stderr
    with deployment.instance() as instance:
        assert nightly_requests(defs, instance) == {"pairing/neighbor_pairs"}
        runs_before = len(instance.get_run_ids())
        states = run_pipeline(defs, instance, {}, until="format_examples")
        done = {state.step.name: state.finished for state in states if state.status == "done"}
        assert done == {"pair": len(settings.experiment.shard_keys)}
        assert len(instance.get_run_ids()) == runs_before + 2, "a shard, a check of all, nothing else"
        assert verified(defs, instance, "pair").outcome is Outcome.PASSED
        assert pending_partitions(defs, instance, STEPS["pretrain_baseline"]) == ["0"], "trained again when asked for"
    after = deployment.versions()
    del before["pretraining/baseline_model/0"], after["pretraining/baseline_model/0"]
    assert after == before


def test_a_missing_store_fails_no_check(deployment: Deployment):
    (deployment.artifacts).rename(deployment.home / "elsewhere")
    deployment.artifacts.mkdir()
    for command in (["verify", "pair"], ["run"], ["copy-artifacts", "copy"]):
        said = deployment.sbp(*command, check=False)
        assert said.returncode == 2 and "is it the right data_dir?" in said.stderr, command
    deployment.artifacts.rmdir()
    (deployment.home / "elsewhere").rename(deployment.artifacts)
    assert "nothing to do" in deployment.sbp("run").stdout


def test_a_lost_comparison_is_said_instead_of_printed(deployment: Deployment):
    table = deployment.artifacts / "evaluation/comparison.parquet"
    table.rename(deployment.home / "comparison")
    said = deployment.sbp("run", check=False)
    assert said.returncode == 2 and f"{table} is gone from the store" in said.stderr and "sbp verify" in said.stderr
    (deployment.home / "comparison").rename(table)


def test_a_lost_artifact_fails_its_check_and_is_requested(deployment: Deployment, defs: dg.Definitions):
    (deployment.artifacts / f"corpus/documents/{SHARD}.parquet").unlink()
    with deployment.instance() as instance:
        assert "corpus/documents:artifact_is_intact" in verified(defs, instance, "split").names
        assert pending_partitions(defs, instance, STEPS["split"]) == [SHARD]
        assert "corpus/documents" in nightly_requests(defs, instance)
        assert "corpus/tokens" not in nightly_requests(defs, instance)


class ShufflesPairs(ParquetIOManager):
    """An IO manager that writes neighbour pairs with their second documents shuffled."""

    def write(self, obj: Any, path: Path) -> None:
        super().write(shuffled_pairs(obj) if "neighbor_pairs" in str(path) else obj, path)


def test_a_step_that_writes_a_wrong_artifact_stops_the_run(
    deployment: Deployment, defs: dg.Definitions, settings: Settings
):
    manager = ShufflesPairs(settings.deployment.data_dir, f"{settings.deployment.work_dir}/cache")
    (deployment.artifacts / f"pairing/neighbor_pairs/{SHARD}.parquet").unlink()
    with deployment.instance() as instance:
        assert verified(defs, instance, "pair").failed
        runs = instance.get_run_ids()
        with pytest.raises(PipelineError, match="pairs_match_candidates"):
            run_pipeline(build_definitions(settings, {"parquet": manager}), instance, {})
        assert len(instance.get_run_ids()) == len(runs) + 1, "no later step has begun"
        assert "synthesizer/tuning_examples" not in nightly_requests(defs, instance)
