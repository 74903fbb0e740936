"""Curves of training runs in TensorBoard event files and in Weights & Biases."""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import polars as pl
import pytest
import torch

from sbp_assets.training import loop
from sbp_assets.training.loop import train
from sbp_assets.training.parallel import World
from sbp_assets.training.spec import TrainingSpec
from sbp_assets.training.tracking import Tracker, TrackerError, open_tracker
from sbp_assets.training.worker import run
from sbp_assets_tests.training.conftest import Launch

CPU = World(torch.device("cpu"))
CURVES = {"tokens", "train_loss", "heldout_loss", "learning_rate", "gradient_norm"}


@pytest.fixture
def tracked(spec: TrainingSpec, tmp_path: Path) -> TrainingSpec:
    pytest.importorskip("tensorboard")
    return spec.model_copy(update={"tensorboard_dir": str(tmp_path / "tensorboard"), "checkpoint_every_steps": 4})


def curves(spec: TrainingSpec) -> list[dict[str, list[tuple[int, float]]]]:
    """(step, value) of each curve of each run of `spec.tensorboard_dir`, as TensorBoard shows them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert spec.tensorboard_dir is not None
    shown = []
    for folder in sorted(Path(spec.tensorboard_dir).iterdir()):
        events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
        shown.append({tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]})
    return shown


def recorded(spec: TrainingSpec) -> dict[str, list[tuple[int, float]]]:
    """The same of metrics.parquet, in the float32 of event files."""
    metrics = pl.read_parquet(spec.output_dir / "metrics.parquet").cast({name: pl.Float32 for name in CURVES})
    return {name: metrics.drop_nulls(name).select("step", name).rows() for name in CURVES}


def ended(spec: TrainingSpec, after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Train `spec` until something ends it right after the step `after`, beyond its last checkpoint."""
    original = loop._Run._optimize

    def optimize(self: Any, rate: float) -> tuple[float, float]:
        if self.step == after:
            raise KeyboardInterrupt
        return original(self, rate)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(loop._Run, "_optimize", optimize)
        train(spec, CPU)


def test_tensorboard_shows_the_metrics_by_step(tracked: TrainingSpec):
    run(tracked)
    assert curves(tracked) == [recorded(tracked)]


def test_a_resumed_run_continues_its_curves_without_doubled_points(
    tracked: TrainingSpec, monkeypatch: pytest.MonkeyPatch
):
    ended(tracked, 7, monkeypatch)
    (before,) = curves(tracked)
    assert [step for step, _ in before["train_loss"]] == [1, 2, 3, 4, 5, 6, 7]
    run(tracked)  # from the checkpoint after step 4
    assert curves(tracked) == [recorded(tracked)]


@pytest.mark.faults
@pytest.mark.processes
def test_a_killed_run_leaves_every_step_before_its_checkpoint(tracked: TrainingSpec, launch: Launch):
    long = tracked.model_copy(update={"steps": 4000})
    checkpoint = long.work_dir / "checkpoint.pt"
    process = launch(long)
    while process.poll() is None and not checkpoint.exists():
        time.sleep(0.05)
    process.kill()
    process.wait()
    saved = torch.load(checkpoint, weights_only=True)["step"]
    (shown,) = curves(long)
    assert {step for step, _ in shown["train_loss"]} >= set(range(1, saved + 1))


def test_another_experiment_has_a_curve_of_its_own_and_the_same_one_takes_the_place_of_the_old(tracked: TrainingSpec):
    run(tracked)
    (first,) = curves(tracked)
    other = {"seed": 7, "output_dir": tracked.output_dir.with_name("other")}
    run(tracked.model_copy(update=other))
    assert first in curves(tracked) and len(curves(tracked)) == 2
    run(tracked.model_copy(update={"output_dir": tracked.output_dir.with_name("again")}))
    assert first in curves(tracked) and len(curves(tracked)) == 2


def test_only_the_leading_process_writes(tracked: TrainingSpec):
    with open_tracker(tracked, {}, after=0, leads=False) as tracker:
        tracker.record({"step": 0, "tokens": 0})
    assert not Path(str(tracked.tensorboard_dir)).exists()


def test_the_model_does_not_depend_on_its_trackers(tracked: TrainingSpec, tmp_path: Path):
    plain = tracked.model_copy(
        update={"tensorboard_dir": None, "work_dir": tmp_path / "w", "output_dir": tmp_path / "plain"}
    )
    run(tracked)
    run(plain)
    records = [json.loads((spec.output_dir / "run.json").read_text()) for spec in (tracked, plain)]
    assert records[0]["fingerprint"] == records[1]["fingerprint"]
    weights = [(spec.output_dir / "model.safetensors").read_bytes() for spec in (tracked, plain)]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(("setting", "module"), [("tensorboard_dir", "tensorboard"), ("wandb_project", "wandb")])
def test_a_tracker_that_is_not_installed_is_one_line_before_training(
    spec: TrainingSpec, setting: str, module: str, monkeypatch: pytest.MonkeyPatch
):
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(TrackerError, match=rf"deployment\.{setting} is set.*pip install {module}, or set") as error:
        train(spec.model_copy(update={setting: "anything"}), CPU)
    assert "\n" not in str(error.value) and not list(spec.work_dir.glob("*.pt")) and not spec.output_dir.exists()


def test_a_folder_that_cannot_be_written_is_named_before_training(tracked: TrainingSpec):
    Path(str(tracked.tensorboard_dir)).write_text("a file")
    with pytest.raises(TrackerError, match=r"deployment\.tensorboard_dir cannot be written: .*tensorboard"):
        train(tracked, CPU)


def test_training_continues_without_a_tracker_that_fails(spec: TrainingSpec, caplog: pytest.LogCaptureFixture):
    class Full:
        def record(self, step: int, values: dict[str, float]) -> None:
            raise OSError(28, "No space left on device")

        flush: Callable = record
        close: Callable = record

    with Tracker("test", [Full()]) as tracker:
        tracker.record({"step": 1, "train_loss": 2.0})
        tracker.record({"step": 2, "train_loss": 1.0})
    (message,) = caplog.messages
    assert "test: its curves are no longer written, training continues (OSError: [Errno 28] No space left" in message


class FakeWandb(ModuleType):
    """What the tracker needs of Weights & Biases, and a service that leaves out steps it has, as the real one does."""

    class Error(Exception):
        pass

    def __init__(self) -> None:
        super().__init__("wandb")
        self.started: list[dict[str, Any]] = []
        self.logged: dict[int, dict[str, float]] = {}
        self.axes: list[tuple[str, str | None]] = []
        self.ended: list[int] = []

    def init(self, **options: Any) -> SimpleNamespace:
        self.started.append(options)
        return SimpleNamespace(
            log=lambda values, step: self.logged.setdefault(step, values),
            define_metric=lambda name, step_metric=None: self.axes.append((name, step_metric)),
            finish=lambda exit_code: self.ended.append(exit_code),
        )


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_weights_and_biases_gets_the_metrics_and_a_resumed_run_continues(
    spec: TrainingSpec, wandb: FakeWandb, monkeypatch: pytest.MonkeyPatch
):
    spec = spec.model_copy(update={"wandb_project": "sbp", "checkpoint_every_steps": 4})
    ended(spec, 7, monkeypatch)
    run(spec)
    metrics = pl.read_parquet(spec.output_dir / "metrics.parquet")
    rows = {row["step"]: row for row in metrics.iter_rows(named=True)}
    assert wandb.logged == {
        step: {name: row[name] for name in CURVES if row[name] is not None} for step, row in rows.items()
    }
    first, second = wandb.started
    assert first["project"] == "sbp" and first["name"] == "test" and first["resume"] == "allow"
    assert first["id"] == second["id"] and first["dir"] == str(spec.work_dir)
    assert first["config"]["optimizer"]["learning_rate"] == spec.optimizer.learning_rate
    assert wandb.ended == [1, 0] and ("*", "tokens") in wandb.axes
    # Trained from the start again, it is another run.
    run(spec.model_copy(update={"output_dir": spec.output_dir.with_name("again")}))
    assert wandb.started[2]["id"] != first["id"]


def test_weights_and_biases_without_a_key_is_one_line(spec: TrainingSpec, wandb: FakeWandb):
    def refuse(**_: Any) -> None:
        raise FakeWandb.Error("api_key not configured (no-tty)")

    wandb.init = refuse  # type: ignore[method-assign, assignment]
    with pytest.raises(TrackerError, match=r"does not start \(api_key not configured.*WANDB_MODE=offline"):
        train(spec.model_copy(update={"wandb_project": "sbp"}), CPU)


def test_weights_and_biases_itself_works_offline(spec: TrainingSpec, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("wandb", reason="it is not among the packages of the lock")
    monkeypatch.setenv("WANDB_MODE", "offline")
    run(spec.model_copy(update={"wandb_project": "sbp"}))
    (folder,) = (spec.work_dir / "wandb").glob("offline-run-*")
    (file,) = folder.glob("run-*.wandb")
    assert b"heldout_loss" in file.read_bytes()
