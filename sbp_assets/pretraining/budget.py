"""The compute-matched comparison: what each arm reads, how often, and what synthesis cost on top.

Every arm trains on B = floor(repetitions * |D| / tokens_per_step) * tokens_per_step tokens (paper section 3.1).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import polars as pl

from sbp_assets.corpus.split import ORACLE, UNIQUE
from sbp_assets.settings import Model, Pretraining
from sbp_assets.storage.columns import Column, table_schema
from sbp_assets.storage.paths import read_table
from sbp_assets.training.mapped import MappedArrays, in_pieces
from sbp_assets.training.order import StreamOrder
from sbp_assets.training.spec import Source, StreamData

Arm = Literal["baseline", "sbp", "oracle"]
ARMS: tuple[Arm, ...] = get_args(Arm)
LEDGER = "synthesizer"

SYNTHETIC = "synthetic"

BUDGET_COLUMNS = [
    Column("arm", pl.String, "baseline, sbp, oracle; 'synthesizer' for the ledger of what synthesis cost on top."),
    Column("source", pl.String, "unique (D), synthetic, oracle; of the ledger: tuning, generation."),
    Column("unique_documents", pl.Int64, "Documents of the source.", "corpus/tokens.id synthesis/synthetic_tokens.id"),
    Column("unique_tokens", pl.Int64, "Tokens of the source."),
    Column("passes", pl.Float64, "Epochs over the source: tokens_read / unique_tokens; of tuning, its own."),
    Column(
        "tokens_read",
        pl.Int64,
        "Tokens of the source the arm trains on, counted along the first seed's reading order.",
    ),
    Column("steps", pl.Int64, "Optimizer steps of the arm."),
    Column("flops", pl.Float64, "Training FLOPs; of generation, forward FLOPs."),
    Column("most_reads", pl.Int64, "Times that the document read most often is begun."),
    Column("note", pl.String, "Where the arm departs from the plan, and by how much."),
]
BUDGET_SCHEMA = table_schema(BUDGET_COLUMNS)


class BudgetError(ValueError):
    """No matched token budget exists for the corpus and the settings; the message says what is needed."""


@dataclass(frozen=True)
class ArmPlan:
    """What one arm trains on: `steps` optimizer steps of `data`, `tokens` tokens in all."""

    arm: Arm
    data: StreamData
    steps: int
    tokens: int
    unique: dict[str, tuple[int, int]]  # source -> (documents, tokens), each counted once
    note: str


def count_tokens(directories: Mapping[str, Path], split: str | None = None) -> pl.DataFrame:
    """Return the documents and tokens of token-array directories by shard and split.

    Columns: shard, split, documents, tokens. `split` names the split of arrays without such a column. The offsets and
    documents.parquet are read, not the tokens.
    """
    frames = []
    for shard, directory in sorted(directories.items()):
        documents = read_table(directory / "documents.parquet", columns=["id" if split else "split"]).lazy()
        lengths = np.diff(np.load(directory / "offsets.npy", allow_pickle=False))
        named = pl.lit(split, dtype=pl.String) if split else pl.col("split")
        frames.append(
            documents.select(shard=pl.lit(shard), split=named, length=pl.lit(pl.Series(lengths, dtype=pl.Int64)))
            .group_by("shard", "split")
            .agg(documents=pl.len().cast(pl.Int64), tokens=pl.col("length").sum())
            .sort("split")
            .collect()
        )
    return pl.concat(frames)


def budget_steps(unique_tokens: int, repetitions: float, tokens_per_step: int) -> int:
    """Return the optimizer steps of every arm: the whole steps in `repetitions` epochs over D.

    Raises BudgetError where there is not one.
    """
    steps = int(repetitions * unique_tokens // tokens_per_step)
    if steps < 1:
        needed = math.ceil(tokens_per_step / repetitions)
        raise BudgetError(
            f"D has {unique_tokens:,} tokens: {repetitions:g} repetitions are less than one step of "
            f"{tokens_per_step:,} tokens. At least {needed:,} tokens are needed: add documents, raise "
            "corpus.split.unique or pretraining.repetitions, or lower pretraining.tokens_per_step"
        )
    return steps


def plan_arm(
    arm: Arm, settings: Pretraining, tokens: Mapping[str, Path], synthetic: Mapping[str, Path] | None = None
) -> ArmPlan:
    """Return what `arm` reads of corpus/tokens and (SBP alone) of synthesis/synthetic_tokens, directories by shard.

    The SBP arm reads every synthetic document once, spread evenly over `passes` epochs over D, and D for the rest.
    Raises BudgetError where the budget holds less than one step or synthetic tokens fill it.
    """
    counts = count_tokens(tokens)
    unique = {split: _total(counts, split) for split in (UNIQUE, ORACLE)}
    d_tokens = unique[UNIQUE][1]
    steps = budget_steps(d_tokens, settings.repetitions, settings.tokens_per_step)
    budget = steps * settings.tokens_per_step
    shards = sorted(tokens)
    d_sources = [Source(directory=tokens[shard], split=UNIQUE) for shard in shards]

    if arm == "baseline":
        return ArmPlan(arm, StreamData(repeated=d_sources), steps, budget, {UNIQUE: unique[UNIQUE]}, "")

    if arm == "oracle":
        real_tokens = d_tokens + unique[ORACLE][1]
        note = (
            ""
            if real_tokens >= budget
            else (
                f"D and the oracle split hold {real_tokens:,} tokens, less than the budget: they are read "
                f"{budget / real_tokens:.2f} times; raise corpus.split.oracle for an oracle without repetition"
            )
        )
        sources = d_sources + [Source(directory=tokens[shard], split=ORACLE) for shard in shards]
        return ArmPlan(arm, StreamData(repeated=sources), steps, budget, unique, note)

    if synthetic is None:
        raise ValueError("the SBP arm needs the synthetic tokens")
    synthetic_total = _total(count_tokens(synthetic, SYNTHETIC), SYNTHETIC)
    share = synthetic_total[1] / budget
    if not 0 < share < 1:
        raise BudgetError(
            f"{synthetic_total[1]:,} synthetic tokens do not fit a budget of {budget:,}"
            + (": none was generated, or synthesis.filter drops all" if not share else ", which leaves no room for D")
            + "; re-materialise synthesis/synthetic_documents with the present pretraining.synthetic_share "
            f"({settings.synthetic_share:g}) and pretraining.repetitions ({settings.repetitions:g}), or change them"
        )
    note = f"{share:.1%} of the budget is synthetic, {settings.synthetic_share:.1%} was planned"
    passes = int((budget - synthetic_total[1]) // d_tokens)
    if passes < 1:
        note += "; the budget ends within the first pass: some documents are never read"
        passes = 1
    once = [Source(directory=synthetic[shard], split=None) for shard in sorted(synthetic)]
    data = StreamData(repeated=d_sources, once=once, passes=passes)
    return ArmPlan(arm, data, steps, budget, {UNIQUE: unique[UNIQUE], SYNTHETIC: synthetic_total}, note)


def arm_rows(
    plan: ArmPlan, context_length: int, seed: int, flops_per_token: float, scratch: Path | None = None
) -> pl.DataFrame:
    """Return the arm's rows of token_budget, one per source, counted along the order in which training reads tokens.

    Which documents the last, unfinished epoch reaches depends on `seed`; the arm's total does not. The order and the
    counts of each document are files in the folder `scratch`, or else temporary ones.
    """
    order = StreamOrder(plan.data, context_length, seed, scratch)
    names = list(plan.unique)
    name_of = np.array([names.index(source.split or SYNTHETIC) for source in [*plan.data.repeated, *plan.data.once]])
    ends = np.cumsum(order.sizes)
    zeros = (np.zeros(stop - start, np.int32) for start, stop in in_pieces(0, int(ends[-1])))
    begun = MappedArrays(scratch=scratch).array("begun", np.int32, lambda: zeros)
    tokens_read = np.zeros(len(names), np.int64)
    for documents, _, taken in order.reading(plan.tokens):
        np.add.at(begun, documents, 1)
        np.add.at(tokens_read, name_of[np.searchsorted(ends, documents, side="right")], taken)
    most_reads = [0] * len(names)
    for name, end, size in zip(name_of, ends, order.sizes, strict=True):
        most_reads[name] = max(most_reads[name], int(begun[end - size : end].max(initial=0)))
    rows = []
    for position, name in enumerate(names):
        documents_of, tokens_of = plan.unique[name]
        read = int(tokens_read[position])
        passes = read / tokens_of if tokens_of else 0.0
        note = plan.note if position == len(names) - 1 else ""
        rows.append(
            (
                plan.arm,
                name,
                documents_of,
                tokens_of,
                passes,
                read,
                plan.steps,
                read * flops_per_token,
                most_reads[position],
                note,
            )
        )
    return pl.DataFrame(rows, schema=BUDGET_SCHEMA, orient="row")


def plan_mismatch(table: pl.DataFrame, plan: ArmPlan) -> str | None:
    """Return in a sentence how `plan` differs from its rows in the token_budget `table`; None where they agree."""
    rows = table.filter(pl.col("arm") == plan.arm)
    listed = {
        source: (documents, tokens)
        for source, documents, tokens in rows.select("source", "unique_documents", "unique_tokens").iter_rows()
    }
    if listed != plan.unique:
        return (
            f"pretraining/token_budget lists {listed} (documents, tokens) for {plan.arm}, its inputs hold {plan.unique}"
        )
    if rows["steps"].unique().to_list() != [plan.steps] or rows["tokens_read"].sum() != plan.tokens:
        return (
            f"pretraining/token_budget gives {plan.arm} {rows['tokens_read'].sum():,} tokens, the settings and inputs "
            f"{plan.tokens:,} in {plan.steps:,} steps"
        )
    return None


def training_problems(metrics: pl.DataFrame, plan: ArmPlan) -> list[str]:
    """Return how the steps and tokens of a model's metrics.parquet differ from `plan`; empty where they do not."""
    per_step = plan.tokens // plan.steps
    wrong = metrics.filter(pl.col("tokens") != pl.col("step") * per_step)
    problems = [f"{tokens:,} tokens at step {step:,}" for step, tokens in wrong.select("step", "tokens").head(3).rows()]
    steps = metrics.drop_nulls("train_loss")["step"].to_list()
    if steps != list(range(1, plan.steps + 1)):
        last = steps[-1] if steps else 0
        problems.append(f"losses of {len(steps):,} steps up to step {last:,}; the budget is {plan.steps:,} steps")
    return problems


def budget_problems(table: pl.DataFrame) -> list[str]:
    """Return why the arms of a token_budget `table` are not compute-matched; empty where they are."""
    rows = table.filter(pl.col("arm") != LEDGER)
    arms = rows.group_by("arm").agg(pl.col("tokens_read").sum(), pl.col("steps").min(), last=pl.col("steps").max())
    problems = [f"the {arm} arm is missing" for arm in ARMS if arm not in arms["arm"]]
    for column in ("tokens_read", "steps"):
        if arms[column].n_unique() > 1:
            values = ", ".join(f"{arm} {value:,}" for arm, value in arms.select("arm", column).sort("arm").iter_rows())
            problems.append(f"{column} differ: {values}")
    if (arms["steps"] != arms["last"]).any():
        problems.append("steps differ within an arm")
    return problems


def generation_cost(
    tokens: Mapping[str, Path],
    synthetic: Mapping[str, Path],
    max_document_tokens: int | None,
    model: Model,
    vocab_size: int,
    sampled: Mapping[str, pl.LazyFrame] | None = None,
) -> pl.DataFrame:
    """Return the ledger's row of generation: prompts read and tokens sampled for every synthetic document.

    `synthetic` are the token arrays of all of them by shard; where a filter has left some out, `sampled` are the rows
    (seed_id, n_tokens) of all.

    `max_document_tokens` is where d1 is cut; None where it was not shown, and a prompt is `<bos>` alone. A forward pass
    takes a third of a training step's FLOPs per token. Prompts are counted for each rollout: an engine that caches
    shared prefixes does less. A seed document is looked for in the shard of its synthetic documents.
    """
    prompts = generated = documents = 0
    for shard in sorted(synthetic):
        if sampled is None:
            seeds = read_table(synthetic[shard] / "documents.parquet", columns=["seed_id"])
            offsets = np.load(synthetic[shard] / "offsets.npy", allow_pickle=False)
            tokens_sampled = int(offsets[-1])
        else:
            seeds = sampled[shard].select("seed_id", "n_tokens").collect()
            tokens_sampled = int(seeds["n_tokens"].sum())
        known = seeds.join(_d_lengths(tokens[shard]), left_on="seed_id", right_on="id", how="inner")
        if max_document_tokens is None:
            prompts += len(known)
        else:
            # <bos> d1 <related>: d1 without its own <bos> and <eos>, cut.
            prompts += int((known["length"] - 2).clip(upper_bound=max_document_tokens).sum()) + 2 * len(known)
        documents += len(seeds)
        generated += tokens_sampled - len(seeds)
    flops = (prompts + generated) * model.flops_per_token(vocab_size) / 3
    return _ledger(
        "generation",
        documents,
        generated,
        1.0,
        prompts + generated,
        None,
        flops,
        f"{generated:,} tokens sampled after {prompts:,} prompt tokens",
    )


def tuning_cost(checkpoint: Path) -> pl.DataFrame:
    """Return the ledger's row of synthesizer-tuning, from run.json and metrics.parquet of the checkpoint."""
    record = json.loads((checkpoint / "run.json").read_text(encoding="utf-8"))
    last = read_table(checkpoint / "metrics.parquet").row(-1, named=True)
    epochs = float(record["spec"]["data"]["epochs"])
    return _ledger(
        "tuning",
        None,
        None,
        epochs,
        int(last["tokens"]),
        int(last["step"]),
        float(record["flops"]),
        "tokens trained on, prompts and padding included",
    )


@dataclass(frozen=True)
class EqualCompute:
    """What a baseline reads that costs as much as SBP does with tuning and generation charged."""

    flops: float
    tokens: int
    repetitions: float  # epochs over D
    with_start: float  # the same with the baseline charged, too, that the synthesizer starts from


def equal_total_compute(table: pl.DataFrame) -> EqualCompute | None:
    """Return what the FLOPs of the SBP arm, of tuning and of generation in a token_budget `table` buy a baseline.

    None where the table lacks one of them. Embedding and the search for pairs are not in the table, and not charged.
    """
    baseline, sbp, charged = (table.filter(arm=arm) for arm in ("baseline", "sbp", LEDGER))
    if baseline.is_empty() or sbp.is_empty() or charged.is_empty():
        return None
    arm = float(baseline["flops"].sum())
    flops = float(sbp["flops"].sum()) + float(charged["flops"].sum())
    tokens, d_tokens = flops / arm * int(baseline["tokens_read"].sum()), int(baseline["unique_tokens"][0])
    return EqualCompute(flops, round(tokens), tokens / d_tokens, tokens / d_tokens * (1 + arm / flops))


def _ledger(
    source: str,
    documents: int | None,
    unique: int | None,
    passes: float,
    read: int,
    steps: int | None,
    flops: float,
    note: str,
) -> pl.DataFrame:
    row = (LEDGER, source, documents, unique, passes, read, steps, flops, None, note)
    return pl.DataFrame([row], schema=BUDGET_SCHEMA, orient="row")


def _total(counts: pl.DataFrame, split: str) -> tuple[int, int]:
    rows = counts.filter(pl.col("split") == split)
    return int(rows["documents"].sum()), int(rows["tokens"].sum())


def _d_lengths(directory: Path) -> pl.DataFrame:
    offsets = np.load(directory / "offsets.npy", allow_pickle=False)
    documents = read_table(directory / "documents.parquet", columns=["id", "split"])
    return documents.with_columns(length=pl.Series(np.diff(offsets))).filter(pl.col("split") == UNIQUE).drop("split")
