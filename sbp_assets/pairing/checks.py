"""What must hold of pairing's artifacts before anything is trained on them.

Samples find what is wrong throughout: vectors of other texts, shuffled pairs, an index of another model.
"""

from pathlib import Path

import dagster as dg
import numpy as np
import polars as pl

from sbp_assets.corpus.shingles import shared, whitespace_shingles
from sbp_assets.dagster_support.check_results import check_result
from sbp_assets.dagster_support.partitions import shards
from sbp_assets.dagster_support.stage import for_settings
from sbp_assets.pairing.embed import Embedder, Engine, embed, vectors_of
from sbp_assets.pairing.filter import texts_of
from sbp_assets.pairing.index import KeyShard, self_recall
from sbp_assets.pairing.search import exact_neighbors, recall
from sbp_assets.pairing.truth import not_above_chance, truth_problems
from sbp_assets.settings import Pairing, Settings
from sbp_assets.storage.checks import all_partitions
from sbp_assets.storage.io_managers import ParquetIOManager
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


def check_texts(
    embeddings: pl.DataFrame, documents: pl.LazyFrame, engine: Engine, settings: Pairing, batch_size: int
) -> Result:
    """A sample of vectors, made again from their documents' texts, point where they did."""
    sample = embeddings.sample(min(EMBEDDED_SAMPLE, len(embeddings)), seed=0)
    texts = texts_of(sample["id"], documents)
    sample = sample.filter(pl.col("id").is_in(list(texts)))
    with Progress("embed again", "documents") as progress:
        again = embed(engine, [texts[name] for name in sample["id"]], settings.max_tokens, batch_size, progress)
    stored = vectors_of(sample)
    same_space = stored.shape == again.shape
    cosines = np.einsum("ij,ij->i", stored, again) if same_space else np.zeros(len(sample))
    wrong = ~(cosines >= 1 - SIMILARITY_TOLERANCE)
    return not wrong.any(), {
        "sample": len(sample),
        "of_another_text": int(wrong.sum()),
        "least_cosine": float(cosines.min(initial=1.0)),
        "offending_ids": _some(sample["id"].filter(pl.Series(wrong))),
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
    """Ranks 1 … k without gaps, no document its own neighbour, known ids, similarities that fall with the rank.

    On a sample, recall@k against exact search, and similarities against exact ones.
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
    stray = candidates.select(id="query_id").join(queries, on="id", how="anti")["id"]
    for (shard,), rows in candidates.partition_by("neighbor_shard", as_dict=True).items():
        known = embeddings[str(shard)].select("id").collect()
        stray = pl.concat([stray, rows.select(id="neighbor_id").join(known, on="id", how="anti")["id"]])
    sample = queries.sample(min(RECALL_SAMPLE, len(queries)), seed=0)
    shards = pl.Series(sorted(embeddings)).sample(min(RECALL_SHARDS, len(embeddings)), seed=0).to_list()
    exact = exact_neighbors(sample["id"].to_list(), vectors_of(sample), {s: embeddings[s] for s in shards}, k)
    found = recall(candidates, exact, k)
    truth = pl.concat([near.with_columns(query_id=pl.lit(query)) for query, near in exact.items()] or [candidates[:0]])
    both = candidates.join(truth, on=["query_id", "neighbor_id"], suffix="_exact")
    untrue = both.filter(~((pl.col("similarity") - pl.col("similarity_exact")).abs() <= SIMILARITY_TOLERANCE))
    faults = (bad_ranks, itself, outside, rising, stray, untrue)
    return not short and all(rows.is_empty() for rows in faults) and found >= MIN_RECALL, {
        "queries_without_neighbors": short,
        "queries_with_wrong_ranks": len(bad_ranks),
        "own_neighbors": len(itself),
        "similarities_out_of_range": len(outside),
        "similarities_rising_with_rank": len(rising),
        "similarities_not_of_the_vectors": len(untrue),
        "unknown_ids": len(stray),
        f"recall_at_{k}": found,
        "recall_sample": len(sample),
        "recall_shards": len(shards),
        "offending_ids": _some(
            bad_ranks["query_id"],
            itself["query_id"],
            outside["query_id"],
            rising["query_id"],
            untrue["query_id"],
            stray,
        ),
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


def check_origin(
    pairs: pl.DataFrame,
    candidates: dict[str, pl.LazyFrame],
    documents: dict[str, pl.LazyFrame],
    shard: str,
    settings: Pairing,
) -> Result:
    """A sample of pairs, with d2 in a few shards: each is a candidate of its similarity, and shares what it states."""
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
    apart = (pl.col("similarity") - pl.col("found")).abs() <= SIMILARITY_TOLERANCE
    unfound = joined.filter(~apart.fill_null(False))
    first = texts_of(sample["d1"], documents[shard])
    second: dict[str, str] = {}
    for key in few:
        second |= texts_of(sample.filter(d2_shard=key)["d2"], documents[key])
    untrue = [
        d1
        for d1, d2, stated in sample.select("d1", "d2", "shared_shingles").iter_rows()
        if not abs(_shared(first.get(d1), second.get(d2), settings.shingle_tokens) - stated) < 1e-6
    ]
    return not len(unfound) and not untrue, {
        "sample": len(sample),
        "no_such_candidate": len(unfound),
        "other_shared_shingles": len(untrue),
        "offending_ids": _some(unfound["d1"], pl.Series(untrue, dtype=pl.String)),
    }


def _similarities(candidates: pl.LazyFrame, pairs: pl.DataFrame, sides: dict[str, str]) -> pl.DataFrame:
    edges = candidates.select(*(pl.col(name).alias(side) for name, side in sides.items()), found="similarity")
    return (
        edges.join(pairs.lazy().select("d1", "d2"), on=["d1", "d2"], how="semi").select("d1", "d2", "found").collect()
    )


def _shared(d1: str | None, d2: str | None, words: int) -> float:
    return (
        float("nan")
        if d1 is None or d2 is None
        else shared(whitespace_shingles(d1, words), whitespace_shingles(d2, words))
    )


def _some(*ids: pl.Series) -> str:
    return ", ".join(sorted({str(i) for series in ids for i in series.head(10)})[:10])


@for_settings(
    lambda settings: dg.asset_check(
        asset=dg.AssetKey(["pairing", "embeddings"]),
        partitions_def=shards(settings),
        blocking=True,
        additional_ins={"documents": dg.AssetIn(["corpus", "documents"])},
        description="One finite unit vector for each document of D in the shard, and none besides.",
    )
)
def embeddings_are_unit_vectors(embeddings: pl.LazyFrame, documents: pl.LazyFrame) -> dg.AssetCheckResult:
    ids = documents.filter(pl.col("split") == "unique").select("id").collect()["id"]
    passed, metadata = check_embeddings(embeddings.collect(), ids)
    return check_result(passed=passed, metadata=metadata)


@for_settings(
    lambda settings: dg.asset_check(
        asset=dg.AssetKey(["pairing", "embeddings"]),
        partitions_def=shards(settings),
        blocking=True,
        additional_ins={"documents": dg.AssetIn(["corpus", "documents"])},
        description=f"{EMBEDDED_SAMPLE} documents, embedded again, get the vectors that they have.",
    )
)
def embeddings_match_documents(
    settings: dg.ResourceParam[Settings],
    embedder: dg.ResourceParam[Embedder],
    embeddings: pl.LazyFrame,
    documents: pl.LazyFrame,
) -> dg.AssetCheckResult:
    pairing = settings.experiment.pairing
    engine = embedder.load(pairing.embedding_model, pairing.embedding_dtype, settings.deployment.device)
    passed, metadata = check_texts(
        embeddings.collect(), documents, engine, pairing, settings.deployment.embedding_batch_size
    )
    return check_result(passed=passed, metadata=metadata)


@for_settings(
    lambda settings: dg.asset_check(
        asset=dg.AssetKey(["pairing", "ann_index"]),
        partitions_def=shards(settings),
        blocking=True,
        additional_ins={"embeddings": dg.AssetIn(["pairing", "embeddings"])},
        description="The index holds the shard's embeddings, and a document's nearest key is itself.",
    )
)
def index_matches_embeddings(
    settings: dg.ResourceParam[Settings], ann_index: Path, embeddings: pl.LazyFrame
) -> dg.AssetCheckResult:
    passed, metadata = check_index(ann_index, embeddings.collect(), settings.experiment.pairing.nprobe)
    return check_result(passed=passed, metadata=metadata)


@for_settings(
    lambda settings: dg.asset_check(
        asset=dg.AssetKey(["pairing", "neighbor_candidates"]),
        partitions_def=shards(settings),
        blocking=True,
        additional_deps=[["pairing", "embeddings"]],
        description=f"Complete ranks, known ids, and recall of at least {MIN_RECALL:.0%} against exact search on a "
        "sample.",
    )
)
def candidates_are_nearest_neighbors(
    context: dg.AssetCheckExecutionContext,
    settings: dg.ResourceParam[Settings],
    parquet: dg.ResourceParam[ParquetIOManager],
    neighbor_candidates: pl.LazyFrame,
) -> dg.AssetCheckResult:
    embeddings = all_partitions(parquet, "pairing/embeddings", shards(settings))
    queries = embeddings[context.partition_key].collect()
    passed, metadata = check_candidates(
        neighbor_candidates.collect(), queries, embeddings, settings.experiment.pairing.neighbors
    )
    return check_result(passed=passed, metadata=metadata)


@for_settings(
    lambda settings: dg.asset_check(
        asset=dg.AssetKey(["pairing", "neighbor_pairs"]),
        partitions_def=shards(settings),
        blocking=True,
        additional_deps=[["corpus", "documents"]],
        description="Pairs are related, are not copies, occur once, are of D only, and no document exceeds the caps.",
    )
)
def pairs_are_related_and_distinct(
    context: dg.AssetCheckExecutionContext,
    settings: dg.ResourceParam[Settings],
    parquet: dg.ResourceParam[ParquetIOManager],
    neighbor_pairs: pl.LazyFrame,
) -> dg.AssetCheckResult:
    documents = all_partitions(parquet, "corpus/documents", shards(settings))
    passed, metadata = check_pairs(
        neighbor_pairs.collect(), documents, context.partition_key, settings.experiment.pairing
    )
    return check_result(passed=passed, metadata=metadata)


@for_settings(
    lambda settings: dg.asset_check(
        asset=dg.AssetKey(["pairing", "neighbor_pairs"]),
        partitions_def=shards(settings),
        blocking=True,
        additional_deps=[["corpus", "documents"], ["pairing", "neighbor_candidates"]],
        description=f"Of {PAIRS_SAMPLE} pairs, each was found as a neighbour of that similarity and shares the "
        "shingles "
        "that it states.",
    )
)
def pairs_match_candidates(
    context: dg.AssetCheckExecutionContext,
    settings: dg.ResourceParam[Settings],
    parquet: dg.ResourceParam[ParquetIOManager],
    neighbor_pairs: pl.LazyFrame,
) -> dg.AssetCheckResult:
    passed, metadata = check_origin(
        neighbor_pairs.collect(),
        all_partitions(parquet, "pairing/neighbor_candidates", shards(settings)),
        all_partitions(parquet, "corpus/documents", shards(settings)),
        context.partition_key,
        settings.experiment.pairing,
    )
    return check_result(passed=passed, metadata=metadata)


@dg.asset_check(
    asset=dg.AssetKey(["pairing", "pair_truth"]),
    blocking=True,
    description="A row per shard and one for all, with shares that lie in [0, 1] and follow from the counts; that "
    "pairs share a concept no more often than random ones is a warning. Empty without a truth.",
)
def pair_precision_is_above_chance(
    settings: dg.ResourceParam[Settings], pair_truth: pl.LazyFrame
) -> dg.AssetCheckResult:
    table = pair_truth.collect()
    if settings.experiment.truth:
        problems, by_chance = truth_problems(table, settings.experiment.shard_keys), not_above_chance(table)
    else:
        problems, by_chance = [] if table.is_empty() else ["rows without a truth"], []
    return check_result(
        passed=not problems and not by_chance,
        # Pairing again would give the same: a person has to decide.
        severity=dg.AssetCheckSeverity.ERROR if problems else dg.AssetCheckSeverity.WARN,
        metadata={"rows": len(table), "problems": problems + by_chance},
    )
