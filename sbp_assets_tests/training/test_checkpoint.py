import json
import os
import signal
import time
from pathlib import Path
from typing import Literal

import polars as pl
import pytest
import torch
from safetensors.torch import load_file

from sbp_assets.training import loop
from sbp_assets.training.checkpoint import CheckpointMismatch, load_checkpoint, save_checkpoint
from sbp_assets.training.loop import train
from sbp_assets.training.parallel import World
from sbp_assets.training.spec import Source, StreamData, TrainingSpec
from sbp_assets.training.worker import run
from sbp_assets_tests.training.conftest import Launch, with_optimizer

CPU = World(torch.device("cpu"))


class Killed(BaseException):
    """Stands for a kill: nothing in the run may catch it."""


def interrupted(spec: TrainingSpec, after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train `spec` and stop it dead right after the step `after`."""
    original = loop._Run._optimize

    def optimize(self, rate):
        if self.step == after:
            raise Killed
        return original(self, rate)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(loop._Run, "_optimize", optimize)
        train(spec, CPU)


def same(first: Path, second: Path, curve: bool = True) -> bool:
    a, b = load_file(first / "model.safetensors"), load_file(second / "model.safetensors")
    weights = a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    if not curve:
        return weights
    curves = [pl.read_parquet(directory / "metrics.parquet") for directory in (first, second)]
    return weights and curves[0].equals(curves[1])


@pytest.mark.parametrize("kind", ["stream", "examples", "muon"])
@pytest.mark.parametrize("after", [1, 5, 9])
def test_resumed_run_ends_with_the_same_bits(
    spec: TrainingSpec,
    tuning_spec: TrainingSpec,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    after: int,
):
    chosen = {
        "stream": spec,
        "examples": tuning_spec.model_copy(update={"data": tuning_spec.data.model_copy(update={"epochs": 5.5})}),
        "muon": with_optimizer(spec, method="muon"),
    }[kind]
    whole = chosen.model_copy(update={"output_dir": tmp_path / "whole", "work_dir": tmp_path / "whole-work"})
    run(whole)
    part = chosen.model_copy(update={"checkpoint_every_steps": 2})
    interrupted(part, after, monkeypatch)
    checkpoint = load_checkpoint(part.work_dir, _fingerprint(whole))
    assert (checkpoint["step"] if checkpoint else 0) == after - after % 2
    run(part)
    assert same(whole.output_dir, part.output_dir)
    assert not list(part.work_dir.iterdir())


def rising(spec: TrainingSpec) -> TrainingSpec:
    """`spec` with so high a rate that its held-out loss is not lowest at the end, measured after every step."""
    optimizer = spec.optimizer.model_copy(update={"learning_rate": 0.3, "final_learning_rate": 1.0})
    return spec.model_copy(update={"keep_best": True, "evaluations": 12, "optimizer": optimizer})


@pytest.mark.parametrize("after", [5, 9])
def test_best_weights_survive_a_kill(spec: TrainingSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int):
    spec = rising(spec)
    whole = spec.model_copy(update={"output_dir": tmp_path / "whole", "work_dir": tmp_path / "whole-work"})
    run(whole)
    part = spec.model_copy(update={"checkpoint_every_steps": 4})
    interrupted(part, after, monkeypatch)
    run(part)
    assert same(whole.output_dir / "best", part.output_dir / "best", curve=False)
    assert not list(part.work_dir.iterdir())


def test_best_weights_of_the_checkpoint_are_kept_until_the_next(spec: TrainingSpec, monkeypatch: pytest.MonkeyPatch):
    # Work that does not repeat exactly: after the resume the later, killed best is not reached again.
    losses = {0: 9.0, 2: 5.0, 4: 6.0, 6: 4.0}

    def heldout(self):
        return losses.get(self.step, 7.0)

    monkeypatch.setattr(loop._Run, "_heldout_loss", heldout)
    spec = spec.model_copy(update={"keep_best": True, "evaluations": 6, "checkpoint_every_steps": 4})
    interrupted(spec, 7, monkeypatch)
    assert {path.name for path in spec.work_dir.glob("best-*")} == {"best-2.pt", "best-6.pt"}
    losses[6] = 8.0
    run(spec)
    assert json.loads((spec.output_dir / "run.json").read_text())["best_step"] == 2
    assert (spec.output_dir / "best/model.safetensors").exists()


def test_lost_best_weights_are_told_at_the_resume(spec: TrainingSpec, monkeypatch: pytest.MonkeyPatch):
    spec = rising(spec).model_copy(update={"checkpoint_every_steps": 4})
    interrupted(spec, 9, monkeypatch)
    for path in spec.work_dir.glob("best-*"):
        path.unlink()
    with pytest.raises(CheckpointMismatch, match="is missing"):
        run(spec)


def _fingerprint(finished: TrainingSpec) -> dict:
    return json.loads((finished.output_dir / "run.json").read_text())["fingerprint"]


@pytest.mark.faults
@pytest.mark.processes
def test_killed_process_resumes_to_the_same_bits_across_a_pass(spec: TrainingSpec, launch: Launch, tmp_path: Path):
    """A real process, kill -9, over data that is read several times."""
    long = spec.model_copy(update={"steps": 100, "evaluations": 5})
    whole = long.model_copy(update={"output_dir": tmp_path / "whole", "work_dir": tmp_path / "whole-work"})
    run(whole)
    part = long.model_copy(update={"checkpoint_every_steps": 3})
    checkpoint = part.work_dir / "checkpoint.pt"
    process = launch(part)
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        if checkpoint.exists() and torch.load(checkpoint, weights_only=True)["step"] >= 10:
            break
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not part.output_dir.exists()
    assert 10 <= torch.load(checkpoint, weights_only=True)["step"] < 100
    process = launch(part)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    assert "resuming after step" in output
    assert same(whole.output_dir, part.output_dir)


@pytest.mark.processes
@pytest.mark.parametrize(
    ("processes", "sharding", "number"),
    [
        (1, "none", signal.SIGTERM),
        pytest.param(2, "none", signal.SIGINT, marks=pytest.mark.faults),
        (2, "full", signal.SIGTERM),
    ],
)
def test_a_run_that_is_asked_to_end_saves_what_it_has(
    spec: TrainingSpec, launch: Launch, processes: int, sharding: Literal["none", "full"], number: signal.Signals
):
    """What Dagster sends to cancel a run, and a batch system that takes back the machine."""
    steps = 2000
    part = spec.model_copy(update={"steps": steps, "sharding": sharding, "checkpoint_minutes": 60})
    process = launch(part, processes)
    assert process.stdout is not None
    begun = any(f"step 0/{steps} · held-out loss" in line for line in process.stdout)
    process.send_signal(number)
    output, _ = process.communicate(timeout=240)
    assert begun and process.returncode not in (0, -number), output
    assert f"of {steps}, saved" in output
    checkpoint = torch.load(part.work_dir / "checkpoint.pt", weights_only=True)
    assert 0 < checkpoint["step"] < steps
    assert len(checkpoint["metrics"]["step"]) == checkpoint["step"] + 1


def test_other_data_tokenizer_or_geometry_is_refused_by_name(
    spec: TrainingSpec, corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    spec = spec.model_copy(update={"checkpoint_every_steps": 2})
    interrupted(spec, 5, monkeypatch)
    copy = tmp_path / "tokenizer"
    copy.mkdir()
    for file in spec.tokenizer_dir.iterdir():
        (copy / file.name).write_text(file.read_text() + "\n")
    others = {
        r"\n  data: \w{16} → \w{16}\n": {"data": StreamData(repeated=[Source(directory=corpus)])},
        r"\n  tokenizer: \w{16} → \w{16}\n": {"tokenizer_dir": copy},
        r"\n  model.layers: 2 → 3\n": {"model": spec.model.model_copy(update={"layers": 3})},
        r"\n  optimizer.learning_rate: 0.01 → 0.02\n": {
            "optimizer": spec.optimizer.model_copy(update={"learning_rate": 0.02})
        },
        r"\n  seed: 0 → 1\n": {"seed": 1},
        r"\n  steps: 12 → 13\n": {"steps": 13},
    }
    for message, update in others.items():
        with pytest.raises(CheckpointMismatch, match=message):
            train(spec.model_copy(update=update), CPU)
    # How it runs is not what it is.
    assert train(spec.model_copy(update={"microbatch_tokens": 64, "name": "renamed"}), CPU) is not None


def test_finished_run_returns_at_once_and_another_replaces_it(spec: TrainingSpec, monkeypatch: pytest.MonkeyPatch):
    run(spec)
    before = (spec.output_dir / "run.json").read_text()
    run(spec)
    assert (spec.output_dir / "run.json").read_text() == before
    run(spec.model_copy(update={"seed": 7}))
    assert json.loads((spec.output_dir / "run.json").read_text())["fingerprint"]["seed"] == 7


def test_interrupted_write_leaves_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save_checkpoint(tmp_path, {"fingerprint": {}, "step": 1})

    def broken(*_):
        raise Killed

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(Killed):
        save_checkpoint(tmp_path, {"fingerprint": {}, "step": 2})
    checkpoint = load_checkpoint(tmp_path, {})
    assert checkpoint is not None and checkpoint["step"] == 1
