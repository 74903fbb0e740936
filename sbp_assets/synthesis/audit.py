"""What must hold of synthetic documents, their tokens and their quality, as functions that the asset checks call.

Each returns the ids that break a rule, or what is wrong in words, ten at the most; an empty list means that it holds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

import numpy as np
import polars as pl

from sbp_assets.storage.token_arrays import TokenArrays
from sbp_assets.synthesis.engine import ENGINES
from sbp_assets.synthesis.generate import FINISH_REASONS, request_order, sampling_seed

SHOWN = 10
# A synthesizer that was tuned at all ends most documents by itself; one that rarely does writes on without a subject.
MAX_LENGTH_SHARE = 0.5
# An empty synthetic document leaves a gap in the rollouts of its seed; more gaps than this are lost rows or a bad
# synthesizer.
MAX_EMPTY_SHARE = 0.1
# With fewer verdicts the share at fault is not known: what a judge cannot answer is seldom the easy part.
MIN_JUDGED_SHARE = 0.9


def repeated_ids(rows: pl.DataFrame) -> list[str]:
    """Return the ids that occur more than once."""
    return rows["id"].filter(rows["id"].is_duplicated()).unique(maintain_order=True).head(SHOWN).to_list()


def foreign_seeds(rows: pl.DataFrame, unique_ids: Sequence[str]) -> list[str]:
    """Return the seed ids that are not documents of D in this shard."""
    return rows.filter(~pl.col("seed_id").is_in(list(unique_ids)))["seed_id"].unique().sort().head(SHOWN).to_list()


def budget_problems(rows: pl.DataFrame, budget: int) -> list[str]:
    """Return that the tokens do not reach `budget`, or that rows follow the one that reached it."""
    total = int(rows["n_tokens"].sum())
    if total < budget:
        return [f"{total} tokens of {budget}"]
    if len(rows) and total - int(rows["n_tokens"][-1]) >= budget:
        return [f"{total} tokens, and {total - int(rows['n_tokens'][-1])} without the last row already reach {budget}"]
    return []


def bad_rows(rows: pl.DataFrame) -> list[str]:
    """Return the ids with an unknown finish reason, blank text, or an id that is not its seed's and rollout's."""
    wrong = (
        ~pl.col("finish_reason").is_in(FINISH_REASONS)
        | (pl.col("text").str.strip_chars() == "")
        | (pl.col("id") != pl.format("syn-{}-{}", "seed_id", "rollout"))
    )
    return rows.filter(wrong.fill_null(True))["id"].head(SHOWN).to_list()


def other_requests(rows: pl.DataFrame, salt: str, version: str | None) -> list[str]:
    """Return the ids whose sampling seed is not that of their request, or whose weights are not those of `version`."""
    seeds = [sampling_seed(salt, seed_id, rollout) for seed_id, rollout in rows["seed_id", "rollout"].iter_rows()]
    same = pl.Series(seeds, dtype=pl.Int64) == rows["sampling_seed"]
    same &= rows["synthesizer_version"].eq_missing(pl.Series([version], dtype=pl.String))
    return rows["id"].filter(~same.fill_null(False)).head(SHOWN).to_list()


def other_engines(rows: pl.DataFrame, known: Sequence[str] = ENGINES) -> list[str]:
    """Return the ids that were sampled by an engine that is not `known`, or by another one than most of the shard."""
    engine = rows["engine"] if "engine" in rows.columns else pl.Series([None] * len(rows), dtype=pl.String)
    usual = engine.drop_nulls().mode().sort().head(1)
    same = engine.is_in(list(known)) & engine.is_in(usual.to_list())
    return rows["id"].filter(~same.fill_null(False)).head(SHOWN).to_list()


def miscounted(rows: pl.DataFrame, count: Callable[[list[str]], list[int]], sample: int = 200) -> list[str]:
    """Return the ids, of an evenly spaced sample, whose text does not have `n_tokens` tokens.

    `count` counts the tokens of texts, `<bos>` and `<eos>` included.
    """
    chosen = rows.gather_every(max(len(rows) // sample, 1))
    counted = pl.Series(count(chosen["text"].to_list()), dtype=pl.Int64)
    return chosen["id"].filter(counted != chosen["n_tokens"]).head(SHOWN).to_list()


def allowed_empty(rows: int) -> int:
    """Return how many places of the request order may lack a row, their document being empty: 10%, one at least."""
    return max(1, int(MAX_EMPTY_SHARE * rows))


def rollout_problems(
    rows: pl.DataFrame, unique_ids: Sequence[str], empty: int | None, salt: str | None = None
) -> list[str]:
    """Return repeated (seed, rollout), rows out of request order (of `salt`), or that it has more than `empty` gaps.

    Where `empty` is None, rows are real pairs: rollout by rollout, and in each those seeds that have a pair left.
    """
    repeated = rows.filter(pl.struct("seed_id", "rollout").is_duplicated())
    if len(repeated):
        return [
            f"repeated: {seed_id} rollout {rollout}"
            for seed_id, rollout in repeated["seed_id", "rollout"].head(SHOWN).iter_rows()
        ]
    known = rows.filter(pl.col("seed_id").is_in(list(unique_ids)))
    if empty is None:
        turns = known.select("rollout", "seed_id")
        return (
            [] if turns.equals(turns.sort("rollout", "seed_id")) else ["rows are out of order: rollout, then seed"]
        )
    # No row of a good table is behind these places.
    order = islice(request_order(unique_ids, salt), len(known) + empty)
    place_of = {key: place for place, key in enumerate(order)}
    places = np.array([place_of.get(key, len(place_of)) for key in known["seed_id", "rollout"].iter_rows()], np.int64)
    within = places[places < len(place_of)]
    if (np.diff(within) <= 0).any():
        row = known.filter(pl.Series(places < len(place_of)))[int(np.flatnonzero(np.diff(within) <= 0)[0]) + 1]
        return [f"out of order: {row['id'][0]}"]
    if beyond := len(places) - len(within):
        return [
            f"{beyond} rows are not among the first {len(place_of)} places of the request order, and only {empty} "
            "synthetic documents were empty"
        ]
    return []


def token_problems(
    rows: pl.DataFrame, arrays: TokenArrays, decode: Callable[[Any], str], bos_id: int, eos_id: int, sample: int = 200
) -> list[str]:
    """Return how rows and token arrays differ: ids, seeds, lengths, and of a sample <bos>, <eos> and decoded text."""
    if not arrays.documents.select("id", "seed_id").equals(rows.select("id", "seed_id")):
        return [f"ids differ: {len(arrays.documents)} documents of tokens for {len(rows)} rows"]
    problems = [
        f"{row_id}: n_tokens {wanted}, array {length}"
        for row_id, wanted, length in zip(rows["id"], rows["n_tokens"], arrays.lengths, strict=True)
        if wanted != length
    ]
    for i in range(0, len(rows), max(len(rows) // sample, 1)):
        ids = arrays.tokens[arrays.offsets[i] : arrays.offsets[i + 1]]
        if len(ids) < 2 or ids[0] != bos_id or ids[-1] != eos_id:
            problems.append(f"{rows['id'][i]}: not <bos> … <eos>")
        elif decode(ids[1:-1]) != rows["text"][i]:
            problems.append(f"{rows['id'][i]}: decodes to another text")
    return problems[:SHOWN]


def length_share(rows: pl.DataFrame) -> float:
    """Return the share of synthetic documents that the context cut off, from 0 to 1."""
    return float((rows["finish_reason"] == "length").sum()) / max(len(rows), 1)


def quality_problems(rows: pl.DataFrame, expected: Sequence[tuple[str, str, str]]) -> list[str]:
    """Return rows that are not the `expected` (metric, corpus, method), or values that are not flagged / scored.

    A value must be null where nothing was scored.
    """
    found = rows.select("metric", "corpus", "method").rows()
    if sorted(found) != sorted(expected):
        return [f"rows are {sorted(found)}"]
    share = pl.col("flagged").is_between(0, pl.col("scored")) & (
        (pl.col("value") - pl.col("flagged") / pl.col("scored")).abs() < 1e-9
    )
    valid = pl.when(pl.col("scored") > 0).then(share).otherwise(pl.col("value").is_null())
    wrong = rows.filter(~(valid.fill_null(False) & (pl.col("documents") <= pl.col("sample"))))
    return [f"{metric} ({corpus}): {value}" for metric, corpus, value in wrong["metric", "corpus", "value"].iter_rows()]


def judgement_problems(rows: pl.DataFrame) -> list[str]:
    """Return the questions that occur twice or have both or neither of verdict and reason."""
    wrong = rows.filter(
        pl.struct("id", "corpus", "metric").is_duplicated()
        | (pl.col("verdict").is_null() == pl.col("unjudged").is_null())
    )
    return [f"{metric} of {id_}" for id_, metric in wrong.select("id", "metric").head(SHOWN).iter_rows()]


def unjudged_problems(rows: pl.DataFrame) -> list[str]:
    """Return that too few questions have a verdict, with the reasons; empty where enough have."""
    judged = rows["verdict"].count()
    if judged >= MIN_JUDGED_SHARE * len(rows):
        return []
    reasons = rows["unjudged"].drop_nulls().value_counts(sort=True)
    listed = ", ".join(f"{count} {reason}" for reason, count in reasons.iter_rows())
    return [f"{judged} of {len(rows)} questions have a verdict; unjudged: {listed}"]
