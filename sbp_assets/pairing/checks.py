"""What must hold of pairing's artifacts before anything is trained on them.

Two checks look at every shard at once. Dagster (1.13) gives a partitioned check only its own partition of an input, so
these are evaluated by the asset itself, from the inputs that it has: `CANDIDATES_CHECK` and `PAIRS_CHECK`.
"""

from pathlib import Path

import dagster as dg
import numpy as np
import polars as pl

from sbp_assets.experiment import Pairing
from sbp_assets.pairing.embed import vectors_of
from sbp_assets.pairing.index import KeyShard, self_recall
from sbp_assets.pairing.search import exact_neighbors, recall
from sbp_assets.pairing.truth import truth_problems
from sbp_assets.partitions import EXPERIMENT, SHARDS

# Float32 rounding of a norm over a thousand components stays below this.
NORM_TOLERANCE = 1e-4
SELF_RECALL_SAMPLE, MIN_SELF_RECALL = 500, 0.99
RECALL_SAMPLE, MIN_RECALL = 50, 0.95
# Exact search reads whole shards of vectors: a few of many are enough.
RECALL_SHARDS = 8

Result = tuple[bool, dict[str, int | float | str]]


def check_embeddings(embeddings: pl.DataFrame, document_ids: pl.Series) -> Result:
    """Unit length, finite, and exactly one row for each document of D in the shard."""
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


def check_index(directory: Path, embeddings: pl.DataFrame, nprobe: int) -> Result:
    """As many keys as embeddings, with the same ids, and a document's nearest key is itself."""
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
    candidates: pl.DataFrame, queries: pl.DataFrame, embeddings: dict[str, pl.LazyFrame], k: int
) -> Result:
    """Ranks 1 … k without gaps, no document its own neighbour, known ids, and recall@k against exact search."""
    ranks = candidates.group_by("query_id").agg(n=pl.len(), ranks=pl.col("rank").sort())
    total = sum(frame.select(pl.len()).collect().item() for frame in embeddings.values())
    expected = min(k, total - 1)
    short = len(queries) - len(ranks) if expected else 0
    whole = pl.int_ranges(1, pl.col("n") + 1).cast(pl.List(pl.Int64))
    bad_ranks = ranks.filter((pl.col("n") != expected) | (pl.col("ranks") != whole))
    itself = candidates.filter(pl.col("query_id") == pl.col("neighbor_id"))
    outside = candidates.filter(~pl.col("similarity").is_between(-1, 1))
    stray = candidates.select(id="query_id").join(queries, on="id", how="anti")["id"]
    for (shard,), rows in candidates.partition_by("neighbor_shard", as_dict=True).items():
        known = embeddings[str(shard)].select("id").collect()
        stray = pl.concat([stray, rows.select(id="neighbor_id").join(known, on="id", how="anti")["id"]])
    sample = queries.sample(min(RECALL_SAMPLE, len(queries)), seed=0)
    shards = pl.Series(sorted(embeddings)).sample(min(RECALL_SHARDS, len(embeddings)), seed=0).to_list()
    exact = exact_neighbors(sample["id"].to_list(), vectors_of(sample), {s: embeddings[s] for s in shards}, k)
    found = recall(candidates, exact, k)
    passed = not (short or len(bad_ranks) or len(itself) or len(outside) or len(stray)) and found >= MIN_RECALL
    return passed, {
        "queries_without_neighbors": short,
        "queries_with_wrong_ranks": len(bad_ranks),
        "own_neighbors": len(itself),
        "similarities_out_of_range": len(outside),
        "unknown_ids": len(stray),
        f"recall_at_{k}": found,
        "recall_sample": len(sample),
        "recall_shards": len(shards),
        "offending_ids": _some(bad_ranks["query_id"], itself["query_id"], outside["query_id"], stray),
    }


def check_pairs(pairs: pl.DataFrame, documents: dict[str, pl.LazyFrame], shard: str, settings: Pairing) -> Result:
    """Similarities and shared shingles within bounds, no pair twice or with itself, D only, both caps kept."""
    cap = settings.max_pairs_per_document
    outside = pairs.filter(~pl.col("similarity").is_between(settings.min_similarity, settings.max_similarity))
    copies = pairs.filter(pl.col("shared_shingles") > settings.max_shared_shingles)
    itself = pairs.filter(pl.col("d1") == pl.col("d2"))
    repeated = pairs.filter(pl.struct("d1", "d2").is_duplicated())
    over = {side: pairs.group_by(side).len().filter(pl.col("len") > cap)[side] for side in ("d1", "d2")}
    # That every d1 is of this shard also rules out a pair kept twice in the corpus.
    members = [pairs.select(id="d1", shard=pl.lit(shard)), pairs.select(id="d2", shard="d2_shard")]
    stray = pl.Series("id", [], pl.String)
    for (key,), rows in pl.concat(members).unique().partition_by("shard", as_dict=True).items():
        known = documents[str(key)].filter(pl.col("split") == "unique").select("id").collect()
        stray = pl.concat([stray, rows.join(known, on="id", how="anti")["id"]])
    faults = {
        "similarities_out_of_bounds": len(outside),
        "near_copies": len(copies),
        "self_pairs": len(itself),
        "repeated_pairs": len(repeated),
        "d1_over_cap": len(over["d1"]),
        "d2_over_cap": len(over["d2"]),
        "documents_not_in_d": len(stray),
    }
    return not any(faults.values()), {
        **faults,
        "pairs": len(pairs),
        "offending_ids": _some(
            outside["d1"], copies["d1"], itself["d1"], repeated["d1"], over["d1"], over["d2"], stray
        ),
    }


CANDIDATES_CHECK = dg.AssetCheckSpec(
    "candidates_are_the_nearest",
    asset=["pairing", "neighbor_candidates"],
    partitions_def=SHARDS,
    blocking=True,
    description=f"Complete ranks, known ids, and recall of at least {MIN_RECALL:.0%} against exact search on a sample.",
)
PAIRS_CHECK = dg.AssetCheckSpec(
    "pairs_are_related_and_distinct",
    asset=["pairing", "neighbor_pairs"],
    partitions_def=SHARDS,
    blocking=True,
    description="Pairs are related, are not copies, occur once, are of D only, and no document exceeds the caps.",
)


def _some(*ids: pl.Series) -> str:
    return ", ".join(sorted({str(i) for series in ids for i in series.head(10)})[:10])


@dg.asset_check(
    asset=dg.AssetKey(["pairing", "embeddings"]),
    partitions_def=SHARDS,
    blocking=True,
    additional_ins={"documents": dg.AssetIn(["corpus", "documents"])},
    description="One finite unit vector for each document of D in the shard, and none besides.",
)
def embeddings_are_unit_vectors_of_d(embeddings: pl.LazyFrame, documents: pl.LazyFrame) -> dg.AssetCheckResult:
    ids = documents.filter(pl.col("split") == "unique").select("id").collect()["id"]
    passed, metadata = check_embeddings(embeddings.collect(), ids)
    return dg.AssetCheckResult(passed=passed, metadata=metadata)


@dg.asset_check(
    asset=dg.AssetKey(["pairing", "ann_index"]),
    partitions_def=SHARDS,
    blocking=True,
    additional_ins={"embeddings": dg.AssetIn(["pairing", "embeddings"])},
    description="The index holds the shard's embeddings, and a document's nearest key is itself.",
)
def index_finds_its_own(ann_index: Path, embeddings: pl.LazyFrame) -> dg.AssetCheckResult:
    passed, metadata = check_index(ann_index, embeddings.collect(), EXPERIMENT.pairing.nprobe)
    return dg.AssetCheckResult(passed=passed, metadata=metadata)


@dg.asset_check(
    asset=dg.AssetKey(["pairing", "pair_truth"]),
    description="Shares lie in [0, 1], and pairs share a concept more often than random ones; empty without a truth.",
)
def pairs_beat_chance(pair_truth: pl.LazyFrame) -> dg.AssetCheckResult:
    table = pair_truth.collect()
    problems = truth_problems(table) if EXPERIMENT.truth else [] if table.is_empty() else ["rows without a truth"]
    return dg.AssetCheckResult(
        passed=not problems,
        # Pairing again would give the same: a person has to decide.
        severity=dg.AssetCheckSeverity.WARN,
        metadata={"rows": len(table), "problems": problems},
    )
