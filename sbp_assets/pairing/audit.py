"""What the pairing checks verify, as plain functions: each returns whether its check passes, and what it found.

Samples find errors of whole artifacts: vectors of other texts, shuffled pairs, an index of another model.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import polars as pl

from sbp_assets.corpus.shingles import overlap, shingled
from sbp_assets.corpus.split import UNIQUE
from sbp_assets.pairing.embed import Engine, embed, vectors_of
from sbp_assets.pairing.filter import texts_of
from sbp_assets.pairing.index import KeyShard, self_recall
from sbp_assets.pairing.search import exact_neighbors, recall
from sbp_assets.settings import Pairing
from sbp_assets.storage.progress import Progress

# Float32 rounding of a norm over a thousand components stays below this.
NORM_TOLERANCE = 1e-4
SELF_RECALL_SAMPLE, MIN_SELF_RECALL = 500, 0.99
RECALL_SAMPLE, MIN_RECALL = 50, 0.95
# Exact search reads whole shards of vectors: a few of many are enough.
RECALL_SHARDS = 8
# One byte per component of a unit vector moves a cosine by a few thousandths, a few bits of bfloat16 by less.
SIMILARITY_TOLERANCE = 0.02
EMBEDDED_SAMPLE = 8
PAIRS_SAMPLE, PAIRS_SHARDS = 100, 8

# Whether the property that a function's docstring names holds, and the metadata of the check.
Result = tuple[bool, dict[str, int | float | str]]


def check_embeddings(embeddings: pl.DataFrame, document_ids: pl.Series) -> Result:
    """Return whether all vectors are finite and of unit length, and each document of D in the shard has exactly one.

    `embeddings` has EMBEDDING_COLUMNS; `document_ids` are the ids of those documents.
    """
    vectors = vectors_of(embeddings)
    norms = np.linalg.norm(vectors, axis=1)
    wrong = ~(np.abs(norms - 1) <= NORM_TOLERANCE)  # also true of NaN
    ids = embeddings["id"]
    missing = document_ids.filter(~document_ids.is_in(ids.implode()))
    extra = ids.filter(~ids.is_in(document_ids.implode()))
    repeated = len(ids) - ids.n_unique()
    return not (wrong.any() or len(missing) or len(extra) or repeated), {
        "not_unit_length": int(wrong.sum()),
        "documents_without_vector": len(missing),
        "vectors_without_document": len(extra),
        "repeated_ids": repeated,
        "offending_ids": _some(ids.filter(pl.Series(wrong)), missing, extra),
    }


def check_texts(
    embeddings: pl.DataFrame, documents: pl.LazyFrame, engine: Engine, settings: Pairing, batch_size: int
) -> Result:
    """Return whether a sample of vectors, computed again from their documents' texts, has the stored directions.

    Raises ValueError where the model returns a vector without direction.
    """
    sample = embeddings.sample(min(EMBEDDED_SAMPLE, len(embeddings)), seed=0)
    texts = texts_of(sample["id"], documents)
    sample = sample.filter(pl.col("id").is_in(list(texts)))
    with Progress("embed a sample", "documents") as progress:
        chosen = [texts[name] for name in sample["id"]]
        computed = embed(engine, chosen, settings.max_tokens, batch_size, progress, settings.embedding_prompt)
    stored = vectors_of(sample)
    same_space = stored.shape == computed.shape
    cosines = np.einsum("ij,ij->i", stored, computed) if same_space else np.zeros(len(sample))
    wrong = ~(cosines >= 1 - SIMILARITY_TOLERANCE)
    return not wrong.any(), {
        "sample": len(sample),
        "of_another_text": int(wrong.sum()),
        "least_cosine": float(cosines.min(initial=1.0)),
        "offending_ids": _some(sample["id"].filter(pl.Series(wrong))),
    }


def check_index(directory: Path, embeddings: pl.DataFrame, nprobe: int) -> Result:
    """Return whether the index has the ids of the embeddings, in order, and a document's nearest key is itself."""
    key = KeyShard.load(directory, nprobe)
    same = key.ids.equals(embeddings["id"])
    found = self_recall(key.index, vectors_of(embeddings), SELF_RECALL_SAMPLE) if same else 0.0
    return same and found >= MIN_SELF_RECALL, {
        "keys": key.index.ntotal,
        "embeddings": len(embeddings),
        "same_ids": int(same),
        "self_recall": found,
    }


def check_candidates(
    candidates: pl.DataFrame, queries: pl.DataFrame, embeddings: Mapping[str, pl.LazyFrame], k: int
) -> Result:
    """Return whether ranks are 1 … k, none is its own neighbour, ids are known, and similarities fall with the rank.

    On a sample, recall@k and similarities are compared with those of exact search. `embeddings` are tables by shard,
    `queries` that of the candidates' own shard.
    """
    ranks = candidates.group_by("query_id").agg(n=pl.len(), ranks=pl.col("rank").sort())
    total = sum(frame.select(pl.len()).collect().item() for frame in embeddings.values())
    expected = min(k, total - 1)
    short = len(queries) - len(ranks) if expected else 0
    whole = pl.int_ranges(1, pl.col("n") + 1).cast(pl.List(pl.Int64))
    bad_ranks = ranks.filter((pl.col("n") != expected) | (pl.col("ranks") != whole))
    itself = candidates.filter(pl.col("query_id") == pl.col("neighbor_id"))
    outside = candidates.filter(~pl.col("similarity").is_between(-1, 1))
    rising = candidates.sort("query_id", "rank").filter(pl.col("similarity").diff().over("query_id") > 0)
    unknown = candidates.select(id="query_id").join(queries, on="id", how="anti")["id"]
    for (shard,), rows in candidates.partition_by("neighbor_shard", as_dict=True).items():
        known = embeddings[str(shard)].select("id").collect()
        unknown = pl.concat([unknown, rows.select(id="neighbor_id").join(known, on="id", how="anti")["id"]])
    sample = queries.sample(min(RECALL_SAMPLE, len(queries)), seed=0)
    shards = pl.Series(sorted(embeddings)).sample(min(RECALL_SHARDS, len(embeddings)), seed=0).to_list()
    exact = exact_neighbors(sample["id"].to_list(), vectors_of(sample), {s: embeddings[s] for s in shards}, k)
    found = recall(candidates, exact, k)
    ground_truth = pl.concat(
        [near.with_columns(query_id=pl.lit(query)) for query, near in exact.items()] or [candidates[:0]]
    )
    both = candidates.join(ground_truth, on=["query_id", "neighbor_id"], suffix="_exact")
    inexact = both.filter(~((pl.col("similarity") - pl.col("similarity_exact")).abs() <= SIMILARITY_TOLERANCE))
    faults = (bad_ranks, itself, outside, rising, unknown, inexact)
    return not short and all(rows.is_empty() for rows in faults) and found >= MIN_RECALL, {
        "queries_without_neighbors": short,
        "queries_with_wrong_ranks": len(bad_ranks),
        "own_neighbors": len(itself),
        "similarities_out_of_range": len(outside),
        "similarities_rising_with_rank": len(rising),
        "similarities_not_of_the_vectors": len(inexact),
        "unknown_ids": len(unknown),
        f"recall_at_{k}": found,
        "recall_sample": len(sample),
        "recall_shards": len(shards),
        "offending_ids": _some(
            bad_ranks["query_id"],
            itself["query_id"],
            outside["query_id"],
            rising["query_id"],
            inexact["query_id"],
            unknown,
        ),
    }


def check_pairs(pairs: pl.DataFrame, documents: Mapping[str, pl.LazyFrame], shard: str, settings: Pairing) -> Result:
    """Return whether similarities and shared shingles are in bounds, pairs distinct and of D, and both caps kept."""
    cap = settings.max_pairs_per_document
    outside = pairs.filter(~pl.col("similarity").is_between(settings.min_similarity, settings.max_similarity))
    copies = pairs.filter(pl.col("shared_shingles") > settings.max_shared_shingles)
    itself = pairs.filter(pl.col("d1") == pl.col("d2"))
    repeated = pairs.filter(pl.struct("d1", "d2").is_duplicated())
    over = {side: pairs.group_by(side).len().filter(pl.col("len") > cap)[side] for side in ("d1", "d2")}
    # That every d1 is of this shard also rules out that two shards keep the same pair.
    members = [pairs.select(id="d1", shard=pl.lit(shard)), pairs.select(id="d2", shard="d2_shard")]
    unknown = pl.Series("id", [], pl.String)
    for (key,), rows in pl.concat(members).unique().partition_by("shard", as_dict=True).items():
        known = documents[str(key)].filter(pl.col("split") == UNIQUE).select("id").collect()
        unknown = pl.concat([unknown, rows.join(known, on="id", how="anti")["id"]])
    faults = {
        "similarities_out_of_bounds": len(outside),
        "near_copies": len(copies),
        "self_pairs": len(itself),
        "repeated_pairs": len(repeated),
        "d1_over_cap": len(over["d1"]),
        "d2_over_cap": len(over["d2"]),
        "documents_not_in_d": len(unknown),
    }
    return not any(faults.values()), {
        **faults,
        "pairs": len(pairs),
        "offending_ids": _some(
            outside["d1"], copies["d1"], itself["d1"], repeated["d1"], over["d1"], over["d2"], unknown
        ),
    }


def check_origin(
    pairs: pl.DataFrame,
    candidates: Mapping[str, pl.LazyFrame],
    documents: Mapping[str, pl.LazyFrame],
    shard: str,
    settings: Pairing,
) -> Result:
    """Return whether a sample of pairs, with d2 in a few shards, are candidates and have the stated figures.

    The figures, similarity and shared shingles, are those of the candidates and of the documents' texts.
    """
    others = pairs["d2_shard"].unique().sort()
    few = others.sample(min(PAIRS_SHARDS, len(others)), seed=0)
    sample = pairs.filter(pl.col("d2_shard").is_in(few.implode()))
    sample = sample.sample(min(PAIRS_SAMPLE, len(sample)), seed=0)
    sides = {"query_id": "d1", "neighbor_id": "d2"}
    found = [_similarities(candidates[shard], sample, sides)]
    if settings.both_directions:
        sides = {"query_id": "d2", "neighbor_id": "d1"}
        found += [_similarities(candidates[key], sample.filter(d2_shard=key), sides) for key in few]
    near = pl.concat(found).group_by("d1", "d2").agg(pl.col("found").max())
    joined = sample.join(near, on=["d1", "d2"], how="left")
    close = (pl.col("similarity") - pl.col("found")).abs() <= SIMILARITY_TOLERANCE
    unfound = joined.filter(~close.fill_null(False))
    first = texts_of(sample["d1"], documents[shard])
    second: dict[str, str] = {}
    for key in few:
        second |= texts_of(sample.filter(d2_shard=key)["d2"], documents[key])
    wrong = [
        d1
        for d1, d2, stated in sample.select("d1", "d2", "shared_shingles").iter_rows()
        if not abs(_shared(first.get(d1), second.get(d2), settings.shingle_tokens) - stated) < 1e-6
    ]
    return not len(unfound) and not wrong, {
        "sample": len(sample),
        "no_such_candidate": len(unfound),
        "other_shared_shingles": len(wrong),
        "offending_ids": _some(unfound["d1"], pl.Series(wrong, dtype=pl.String)),
    }


def _similarities(candidates: pl.LazyFrame, pairs: pl.DataFrame, sides: dict[str, str]) -> pl.DataFrame:
    edges = candidates.select(*(pl.col(name).alias(side) for name, side in sides.items()), found="similarity")
    return (
        edges.join(pairs.lazy().select("d1", "d2"), on=["d1", "d2"], how="semi").select("d1", "d2", "found").collect()
    )


def _shared(d1: str | None, d2: str | None, words: int) -> float:
    if d1 is None or d2 is None:
        return float("nan")
    return overlap(*shingled([d1, d2], words))


def _some(*ids: pl.Series) -> str:
    return ", ".join(sorted({str(i) for series in ids for i in series.head(10)})[:10])
