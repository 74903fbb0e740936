import math
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from sbp_assets.training import loop
from sbp_assets.training.divergence import TrainingDiverged
from sbp_assets.training.loop import train
from sbp_assets.training.model import build_model, load_training_tokenizer, model_config, save_model
from sbp_assets.training.order import ExamplesOrder
from sbp_assets.training.packed_loss import PackedLoss
from sbp_assets.training.parallel import World
from sbp_assets.training.spec import Source, StreamData, TrainingSpec
from sbp_assets.training.worker import run
from sbp_assets_tests.training.conftest import MODEL, with_optimizer

CPU = World(torch.device("cpu"))


def trained(spec: TrainingSpec) -> loop.Trained:
    result = train(spec, CPU)
    assert result is not None
    return result


def test_loss_falls_and_the_curve_is_complete(spec: TrainingSpec):
    result = trained(spec.model_copy(update={"steps": 40}))
    metrics = result.metrics
    assert metrics["step"].to_list() == list(range(41)) and metrics["tokens"][-1] == 40 * 256
    measured = metrics.drop_nulls("heldout_loss")
    assert measured["step"].to_list() == [0, 14, 27, 40]
    assert measured["heldout_loss"][0] == pytest.approx(math.log(304), abs=0.2)
    assert measured["heldout_loss"][-1] < 2.6 and metrics["train_loss"][-1] < 2.6


@pytest.mark.parametrize("data", ["stream", "examples"])
def test_microbatch_size_does_not_change_the_curve(spec: TrainingSpec, tuning_spec: TrainingSpec, data: str):
    chosen = spec if data == "stream" else tuning_spec
    one, many = (trained(chosen.model_copy(update={"microbatch_tokens": n})).metrics for n in (1024, 64))
    difference = (one["train_loss"] - many["train_loss"]).drop_nulls().abs().max()
    assert difference < 1e-4


def test_tuning_loss_is_on_d2_alone(tuning_spec: TrainingSpec, examples: Path, tokenizer_dir: Path):
    """By hand: the first step's loss is -log p(d2 | prompt) summed over its examples, per token of d2."""
    spec = tuning_spec.model_copy(update={"heldout": []})
    loss = trained(spec).metrics["train_loss"][1]
    model = build_model(spec.model, load_training_tokenizer(tokenizer_dir), spec.seed)
    order = ExamplesOrder(spec.data, spec.model.context_length, spec.seed, pad=2)
    tokens, offsets = np.load(examples / "tokens.npy"), np.load(examples / "offsets.npy")
    prompts = pl.read_parquet(examples / "documents.parquet")["prompt_tokens"].to_list()
    total, count = 0.0, 0
    for index in order.epoch_examples(0):
        ids = torch.tensor(tokens[offsets[index] : offsets[index + 1]].astype(np.int64))
        in_first_step = ids.numpy().tobytes() in order.rows(0, spec.rows_per_step).input_ids.tobytes()
        if in_first_step:
            with torch.no_grad():
                scores = model(ids[None]).logits[0, :-1].log_softmax(-1).gather(1, ids[1:, None])[:, 0]
            total -= float(scores[prompts[index] - 1 :].sum())
            count += len(ids) - prompts[index]
    assert count and loss == pytest.approx(total / count, rel=1e-5)


def test_sharp_learning_rate_diverges_with_the_step_named(spec: TrainingSpec, monkeypatch: pytest.MonkeyPatch):
    original = PackedLoss._loss
    calls = iter(range(10_000))
    monkeypatch.setattr(PackedLoss, "_loss", lambda *a: original(*a) * (math.nan if next(calls) >= 6 else 1.0))
    with pytest.raises(TrainingDiverged, match=r"test: at step 4 the loss is nan"):
        trained(spec.model_copy(update={"heldout": []}))


def test_bfloat16_stays_near_float32(spec: TrainingSpec):
    exact, rounded = (trained(with_optimizer(spec, dtype=dtype)).metrics for dtype in ("float32", "bfloat16"))
    assert (exact["train_loss"] - rounded["train_loss"]).drop_nulls().abs().max() < 0.05


def test_initial_model_is_where_training_starts(spec: TrainingSpec, tmp_path: Path, tokenizer_dir: Path):
    run(spec)
    tuned = trained(spec.model_copy(update={"initial_model": spec.output_dir, "work_dir": tmp_path / "next"}))
    before = pl.read_parquet(spec.output_dir / "metrics.parquet")["heldout_loss"][-1]
    assert tuned.metrics["heldout_loss"][0] == pytest.approx(before, abs=1e-6)


def test_initial_model_of_another_geometry_is_refused(spec: TrainingSpec, tmp_path: Path, tokenizer_dir: Path):
    tokenizer = load_training_tokenizer(tokenizer_dir)
    other = MODEL.model_copy(update={"intermediate_size": 96})
    save_model(tmp_path / "m", model_config(other, tokenizer), build_model(other, tokenizer, 0).state_dict(), tokenizer)
    with pytest.raises(ValueError, match="intermediate_size: 96 → 64"):
        trained(spec.model_copy(update={"initial_model": tmp_path / "m"}))


def test_finite_data_shorter_than_the_run_is_refused(spec: TrainingSpec, corpus: Path):
    data = StreamData(once=[Source(directory=corpus, split="unique")], passes=1)
    with pytest.raises(ValueError, match=r"1000 steps read 4000 rows of 64 tokens, but the data ends after"):
        trained(spec.model_copy(update={"data": data, "steps": 1000}))
