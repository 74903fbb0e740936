from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sbp_assets.pretraining.budget import (
    ARMS,
    ArmPlan,
    BudgetError,
    arm_rows,
    budget_problems,
    budget_steps,
    count_tokens,
    generation_cost,
    plan_arm,
    plan_mismatch,
    training_problems,
    tuning_cost,
)
from sbp_assets.settings import Model, Pretraining
from sbp_assets.storage.token_arrays import write_token_arrays
from sbp_assets.training.spec import StreamData

CONTEXT = 32


def pretraining(**changed: object) -> Pretraining:
    values = {"repetitions": 4, "synthetic_share": 0.5, "tokens_per_step": 64, "learning_rate": 1e-3}
    return Pretraining.model_validate(values | changed)


def write(directory: Path, documents: pl.DataFrame, lengths: list[int]) -> Path:
    write_token_arrays(directory, documents, [np.full(length, 5) for length in lengths], 100)
    return directory


@pytest.fixture
def tokens(tmp_path: Path) -> dict[str, Path]:
    """Two shards, each with D: 4 documents, 100 tokens; oracle: 8 documents, 160 tokens; held out: 1 document."""
    shards = {}
    for shard in ("00000", "00001"):
        splits = ["unique"] * 4 + ["oracle"] * 8 + ["heldout"]
        ids = [f"{shard}-{split}-{n}" for n, split in enumerate(splits)]
        lengths = [10, 20, 30, 40] + [20] * 8 + [50]
        shards[shard] = write(tmp_path / shard, pl.DataFrame({"id": ids, "split": splits}), lengths)
    return shards


def synthetic_tokens(directory: Path, lengths: list[int], seed: str = "00000-unique-0") -> dict[str, Path]:
    frame = pl.DataFrame({"id": [f"syn-{n}" for n in range(len(lengths))], "seed_id": [seed] * len(lengths)})
    return {"00000": write(directory / "synthetic", frame, lengths)}


def table(tokens: dict[str, Path], synthetic: dict[str, Path], seed: int = 0, **changed: object) -> pl.DataFrame:
    plans = [plan_arm(arm, pretraining(**changed), tokens, synthetic) for arm in ARMS]
    return pl.concat([arm_rows(plan, CONTEXT, seed, 2.0) for plan in plans])


def test_counts_per_shard_and_split(tokens: dict[str, Path]) -> None:
    counts = count_tokens(tokens)
    assert counts.filter(pl.col("shard") == "00001").select("split", "documents", "tokens").rows() == [
        ("heldout", 1, 50),
        ("oracle", 8, 160),
        ("unique", 4, 100),
    ]


def test_the_three_arms_read_equally_much_and_synthetic_documents_once(tokens: dict[str, Path], tmp_path: Path) -> None:
    rows = table(tokens, synthetic_tokens(tmp_path, [39] * 10))
    assert budget_problems(rows) == []
    assert rows.group_by("arm").agg(pl.col("tokens_read").sum())["tokens_read"].to_list() == [12 * 64] * 3
    by = {(arm, source): rest for arm, source, *rest in rows.iter_rows()}
    # (unique documents, unique tokens, passes, tokens read, steps, FLOPs, most reads)
    assert by["baseline", "unique"][:7] == [8, 200, 768 / 200, 768, 12, 1536, 4]
    assert by["sbp", "synthetic"][:7] == [10, 390, 1, 390, 12, 780, 1]
    assert by["sbp", "unique"][:7] == [8, 200, 378 / 200, 378, 12, 756, 2]
    assert "50.8% of the budget is synthetic, 50.0% was planned" in by["sbp", "synthetic"][7]
    # D and the oracle split are shorter than the budget, and the table says so.
    assert by["oracle", "oracle"][:2] == [16, 320]
    assert "read 1.48 times" in by["oracle", "oracle"][7]


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_every_arm_reads_exactly_the_budget(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    root = tmp_path_factory.mktemp("arms")
    lengths = data.draw(st.lists(st.integers(2, 60), min_size=2, max_size=12))
    splits = [
        "unique",
        *data.draw(
            st.lists(st.sampled_from(["unique", "oracle"]), min_size=len(lengths) - 1, max_size=len(lengths) - 1)
        ),
    ]
    ids = [str(n) for n in range(len(lengths))]
    tokens = {"00000": write(root / "tokens", pl.DataFrame({"id": ids, "split": splits}), lengths)}
    d_tokens = sum(length for length, split in zip(lengths, splits, strict=True) if split == "unique")
    if 4 * d_tokens < 64:
        with pytest.raises(BudgetError):
            plan_arm("baseline", pretraining(), tokens)
        return
    budget = 4 * d_tokens // 64 * 64
    synthetic_lengths = data.draw(st.lists(st.integers(2, 20), min_size=1, max_size=20))
    synthetic = synthetic_tokens(root, synthetic_lengths, "0")
    if sum(synthetic_lengths) >= budget:
        with pytest.raises(BudgetError, match="synthetic_share"):
            plan_arm("sbp", pretraining(), tokens, synthetic)
        return
    rows = table(tokens, synthetic, data.draw(st.integers(0, 3)))
    assert budget_problems(rows) == []
    assert set(rows.group_by("arm").agg(pl.col("tokens_read").sum())["tokens_read"]) == {budget}
    row = rows.filter(pl.col("source") == "synthetic").row(0, named=True)
    assert row["most_reads"] <= 1
    if row["tokens_read"] < row["unique_tokens"]:
        assert "never read" in row["note"]


def test_too_small_a_corpus_is_told_what_it_needs() -> None:
    assert budget_steps(100, 4, 64) == 6
    with pytest.raises(BudgetError, match="At least 16 tokens are needed"):
        budget_steps(15, 4, 64)
    assert budget_steps(16, 4, 64) == 1


@pytest.mark.parametrize("lengths", [[], [768], [400, 400]])
def test_synthetic_tokens_that_fill_the_budget_or_are_none_are_refused(
    tokens: dict[str, Path], tmp_path: Path, lengths: list[int]
) -> None:
    with pytest.raises(BudgetError, match=r"pretraining\.synthetic_share \(0\.5\)"):
        plan_arm("sbp", pretraining(), tokens, synthetic_tokens(tmp_path, lengths))


def test_a_model_refuses_another_corpus_than_the_table(tokens: dict[str, Path], tmp_path: Path) -> None:
    synthetic = synthetic_tokens(tmp_path, [39] * 10)
    rows = table(tokens, synthetic)
    for arm in ARMS:
        assert plan_mismatch(rows, plan_arm(arm, pretraining(), tokens, synthetic)) is None
    more = synthetic_tokens(tmp_path / "more", [39] * 11)
    assert "429" in str(plan_mismatch(rows, plan_arm("sbp", pretraining(), tokens, more)))
    longer = plan_arm("oracle", pretraining(repetitions=5), tokens, synthetic)
    assert "960 in 15 steps" in str(plan_mismatch(rows, longer))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"step": [0, 1, 2], "tokens": [0, 64, 128]}, "losses of 2 steps up to step 2"),
        ({"tokens": [0, 64, 128, 0]}, "0 tokens at step 3"),
        ({"train_loss": [None, 1.0, None, 1.0]}, "losses of 2 steps up to step 3"),
        ({"train_loss": [None] * 4}, "losses of 0 steps up to step 0; the budget is 3 steps"),
    ],
)
def test_check_sees_a_model_trained_on_another_budget(change: dict[str, list], said: str) -> None:
    plan = ArmPlan("sbp", StreamData(repeated=[]), steps=3, tokens=192, unique={}, note="")
    good = {"step": [0, 1, 2, 3], "tokens": [0, 64, 128, 192], "train_loss": [None, 1.0, 1.0, 1.0]}
    assert training_problems(pl.DataFrame(good), plan) == []
    cut = {name: values[: len(change.get("step", good["step"]))] for name, values in {**good, **change}.items()}
    assert said in training_problems(pl.DataFrame(cut, schema_overrides={"train_loss": pl.Float64}), plan)[0]


def test_check_sees_arms_that_differ(tokens: dict[str, Path], tmp_path: Path) -> None:
    rows = table(tokens, synthetic_tokens(tmp_path, [39] * 10))
    is_oracle = pl.col("arm") == "oracle"
    more = rows.with_columns(tokens_read=pl.col("tokens_read") + is_oracle.cast(pl.Int64))
    assert budget_problems(more)[0].startswith("tokens_read differ")
    assert budget_problems(rows.with_columns(steps=pl.col("steps") + is_oracle.cast(pl.Int64)))
    assert budget_problems(rows.filter(~is_oracle)) == ["the oracle arm is missing"]


def test_ledger_counts_prompts_and_samples(tokens: dict[str, Path], tmp_path: Path) -> None:
    model = Model(hidden_size=32, layers=1, heads=2, kv_heads=1, head_dim=16, intermediate_size=64, context_length=32)
    # Seed 00000-unique-3 has 40 tokens: 38 without specials, cut to 12, and 2 specials: a prompt of 14.
    synthetic = synthetic_tokens(tmp_path, [5, 7], "00000-unique-3")
    row = generation_cost(tokens, synthetic, 12, model, 100).row(0, named=True)
    assert (row["unique_documents"], row["unique_tokens"], row["tokens_read"]) == (2, 4 + 6, 10 + 28)
    assert row["flops"] == pytest.approx(38 * model.flops_per_token(100) / 3)
    # A filter that left one of three out of the token arrays: it was sampled, and is charged.
    sampled = {
        shard: pl.LazyFrame({"seed_id": ["00000-unique-3"] * 3, "n_tokens": [5, 7, 9]})
        if shard == "00000"
        else pl.LazyFrame(schema={"seed_id": pl.String, "n_tokens": pl.Int64})
        for shard in synthetic
    }
    row = generation_cost(tokens, synthetic, 12, model, 100, sampled).row(0, named=True)
    assert (row["unique_documents"], row["unique_tokens"], row["tokens_read"]) == (3, 4 + 6 + 8, 18 + 42)

    pl.DataFrame({"step": [0, 3], "tokens": [0, 192]}).write_parquet(tmp_path / "metrics.parquet")
    (tmp_path / "run.json").write_text(json.dumps({"spec": {"data": {"epochs": 2}}, "flops": 7.0}))
    row = tuning_cost(tmp_path).row(0, named=True)
    assert (row["passes"], row["tokens_read"], row["steps"], row["flops"]) == (2, 192, 3, 7)
