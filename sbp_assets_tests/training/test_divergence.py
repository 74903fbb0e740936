"""Runs whose numbers are no longer finite: what they say, and what is left of them."""

import math
from pathlib import Path

import pytest
import torch

from sbp_assets.training import loop
from sbp_assets.training.checkpoint import load_checkpoint
from sbp_assets.training.divergence import TrainingDiverged
from sbp_assets.training.loop import train
from sbp_assets.training.parallel import World
from sbp_assets.training.plan import fingerprint, make_order, total_steps
from sbp_assets.training.spec import TrainingSpec

CPU = World(torch.device("cpu"))


@pytest.fixture
def saving(spec: TrainingSpec) -> TrainingSpec:
    return spec.model_copy(update={"checkpoint_every_steps": 2, "heldout": []})


def spoil_weights(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """Let the step `at` end in weights that are not finite, though its loss and gradient were."""
    original = loop._Run._optimize

    def optimize(self, rate):
        taken = original(self, rate)
        if self.step + 1 == at:
            next(self.module.parameters()).data.view(-1)[0] = math.inf
        return taken

    monkeypatch.setattr(loop._Run, "_optimize", optimize)


def spoil_loss(monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    original = loop.PackedLoss._loss
    running: list[loop._Run] = []
    optimize = loop._Run._optimize
    monkeypatch.setattr(loop._Run, "_optimize", lambda self, rate: (running.append(self), optimize(self, rate))[1])
    monkeypatch.setattr(
        loop.PackedLoss, "_loss", lambda *a: original(*a) * (math.nan if running[-1].step + 1 == at else 1.0)
    )


def checkpoint_of(spec: TrainingSpec) -> dict | None:
    order = make_order(spec, pad=2)
    identity = fingerprint(spec, order, total_steps(spec, order), 304)
    return load_checkpoint(spec.work_dir, identity)


def test_the_step_and_its_documents_are_named_and_the_checkpoint_before_is_kept(
    saving: TrainingSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    with monkeypatch.context() as patch:
        spoil_loss(patch, at=5)
        with pytest.raises(TrainingDiverged) as error:
            train(saving, CPU)
    told = str(error.value)
    read = make_order(saving, pad=2).documents(16, 20)
    assert "\n" not in told and "test: at step 5 the loss is nan" in told
    assert f"on rows 16 to 19 of its data: {', '.join(read[:3])}" in told and "`sbp trace ID`" in told
    assert str(saving.work_dir / "checkpoint.pt") in told
    # What is left is a checkpoint that a run resumes from, to the same bits as one that nothing disturbed.
    checkpoint = checkpoint_of(saving)
    assert checkpoint is not None and checkpoint["step"] == 4
    assert all(weight.isfinite().all() for weight in checkpoint["weights"].values())
    resumed, whole = train(saving, CPU), train(saving.model_copy(update={"work_dir": tmp_path / "whole"}), CPU)
    assert resumed is not None and whole is not None
    assert all(torch.equal(resumed.state[name], whole.state[name]) for name in whole.state)


def test_a_checkpoint_of_weights_that_are_not_finite_is_never_written(
    saving: TrainingSpec, monkeypatch: pytest.MonkeyPatch
):
    spoil_weights(monkeypatch, at=4)
    with pytest.raises(TrainingDiverged, match=r"at step 4 .*embed_tokens.* has weights that are no finite numbers"):
        train(saving, CPU)
    checkpoint = checkpoint_of(saving)
    assert checkpoint is not None and checkpoint["step"] == 2
    assert all(weight.isfinite().all() for weight in checkpoint["weights"].values())


def test_a_heldout_loss_that_is_not_finite_ends_the_run(spec: TrainingSpec, monkeypatch: pytest.MonkeyPatch):
    spoil_weights(monkeypatch, at=12)  # the last one: no training loss follows
    with pytest.raises(TrainingDiverged, match=r"at step 12 the held-out loss is (nan|inf).*No checkpoint was due yet"):
        train(spec.model_copy(update={"keep_best": True}), CPU)
    assert not spec.work_dir.exists() or not list(spec.work_dir.glob("best-12.pt"))


def test_weights_that_are_not_finite_from_the_start_are_told_apart(spec: TrainingSpec, monkeypatch: pytest.MonkeyPatch):
    original = loop.initial_weights

    def spoilt(*arguments):
        model = original(*arguments)
        next(model.parameters()).data.fill_(math.nan)
        return model

    monkeypatch.setattr(loop, "initial_weights", spoilt)
    with pytest.raises(TrainingDiverged, match="before any step the held-out loss is nan: the weights that it starts"):
        train(spec, CPU)
