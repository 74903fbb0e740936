import json
import logging
import subprocess
import sys
import time
from pathlib import Path

import dagster as dg
import polars as pl
import psutil
import pytest
import torch

from sbp_assets.training.launch import training_command, training_environment
from sbp_assets.training.model import load_model
from sbp_assets.training.packed_loss import PackedLoss
from sbp_assets.training.rows import heldout_rows
from sbp_assets.training.spec import TrainingSpec
from sbp_assets.training.worker import main, run
from sbp_assets_tests.training.conftest import Launch

pytestmark = pytest.mark.processes


def test_output_is_a_model_directory_with_its_record(spec: TrainingSpec):
    run(spec)
    names = {path.name for path in spec.output_dir.iterdir()}
    assert names >= {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "metrics.parquet", "run.json",
    }  # fmt: skip
    record = json.loads((spec.output_dir / "run.json").read_text())
    assert record["tokens"] == 12 * 256 and record["processes"] == 1 and record["flops"] > 0
    assert TrainingSpec.model_validate(record["spec"]) == spec
    curve = pl.read_parquet(spec.output_dir / "metrics.parquet")
    assert record["final_heldout_loss"] == curve["heldout_loss"][-1]


def test_the_best_model_is_kept_beside_the_last(spec: TrainingSpec):
    # A rate so high that the loss rises again before the end.
    optimizer = spec.optimizer.model_copy(update={"learning_rate": 0.3, "final_learning_rate": 1.0})
    spec = spec.model_copy(update={"keep_best": True, "evaluations": 12, "optimizer": optimizer})
    run(spec)
    curve = pl.read_parquet(spec.output_dir / "metrics.parquet")[1:]
    best = curve.sort("heldout_loss")["step"][0]
    assert json.loads((spec.output_dir / "run.json").read_text())["best_step"] == best < 12
    rows = heldout_rows(spec.heldout, spec.model.context_length, spec.heldout_tokens)
    batch = [torch.from_numpy(array) for array in (rows.input_ids, rows.position_ids, rows.labels)]
    with torch.no_grad():
        kept = PackedLoss(load_model(spec.output_dir / "best"))(*batch) / rows.supervised
    assert float(kept) == pytest.approx(curve["heldout_loss"].min(), abs=1e-5)
    assert not list(spec.work_dir.glob("*.pt"))


@pytest.mark.parametrize("emulated", [True, False])
def test_a_device_without_bfloat16_is_named_in_one_line(
    spec: TrainingSpec, emulated: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr("sbp_assets.training.worker.emulates_bfloat16", lambda device: emulated)
    run(spec.model_copy(update={"optimizer": spec.optimizer.model_copy(update={"dtype": "bfloat16"})}))
    lines = [message for message in caplog.messages if "dtype is bfloat16" in message]
    assert len(lines) == emulated and all("this cpu device has no arithmetic for" in line for line in lines)


def test_failure_is_one_readable_message_and_a_status(
    spec: TrainingSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    for name, value in (("handlers", []), ("level", logging.NOTSET)):
        monkeypatch.setattr(logging.getLogger("sbp_assets"), name, value)
    path = spec.model_copy(update={"initial_model": tmp_path / "absent"}).write(tmp_path / "spec.json")
    assert main([str(path)]) == 1
    said = capsys.readouterr().err
    assert "absent" in said and "Traceback" not in said


def test_progress_reaches_dagster_through_pipes(spec: TrainingSpec, tmp_path: Path):
    path = spec.write(tmp_path / "spec.json")

    @dg.asset
    def model(context: dg.AssetExecutionContext, pipes: dg.PipesSubprocessClient):
        invocation = pipes.run(context=context, command=training_command(path), env=training_environment())
        return invocation.get_materialize_result()

    with dg.DagsterInstance.ephemeral() as instance:
        result = dg.materialize([model], instance=instance, resources={"pipes": dg.PipesSubprocessClient()})
        logs = [record.user_message for record in instance.all_logs(result.run_id)]
    assert any("test: step 12/12 · held-out loss" in line for line in logs)
    assert any("3,072/3,072 tokens" in line for line in logs)


def test_workers_leave_when_their_launcher_is_killed(spec: TrainingSpec, tmp_path: Path):
    path = spec.model_copy(update={"steps": 100_000}).write(tmp_path / "spec.json")
    launcher_code = (
        "import os, subprocess, sys; from sbp_assets.training.launch import *; from pathlib import Path;"
        f"command = training_command(Path({str(path)!r}));"
        "child = subprocess.Popen(command, env={**os.environ, **training_environment()});"
        "print(child.pid, flush=True); child.wait()"
    )
    launcher = subprocess.Popen([sys.executable, "-c", launcher_code], stdout=subprocess.PIPE, text=True)
    assert launcher.stdout is not None
    worker = psutil.Process(int(launcher.stdout.readline()))
    deadline = time.monotonic() + 120
    while not (spec.work_dir / "lock").exists() and time.monotonic() < deadline:
        time.sleep(0.2)
    launcher.kill()
    # Not waited for yet, the launcher is a zombie: its number is still taken.
    gone, _ = psutil.wait_procs([worker], timeout=60)
    launcher.wait()
    assert gone


def test_another_checkout_in_the_current_directory_is_not_imported(
    spec: TrainingSpec, launch: Launch, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "other/sbp_assets").mkdir(parents=True)
    (tmp_path / "other/sbp_assets/__init__.py").write_text("raise RuntimeError('the other checkout')")
    monkeypatch.chdir(tmp_path / "other")
    process = launch(spec)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output


@pytest.mark.faults
def test_workers_leave_when_torchrun_is_killed(spec: TrainingSpec, launch: Launch):
    torchrun = launch(spec.model_copy(update={"steps": 100_000}), processes=2)
    deadline = time.monotonic() + 240
    workers: list[psutil.Process] = []
    while not ((spec.work_dir / "lock").exists() and len(workers) == 2) and time.monotonic() < deadline:
        time.sleep(0.2)
        workers = psutil.Process(torchrun.pid).children()
    torchrun.kill()
    gone, left = psutil.wait_procs(workers, timeout=60)
    assert len(gone) == 2 and not left
