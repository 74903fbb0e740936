"""Checks of the pairing stage; `audit` does the work for one shard, `global_audit` for all of them."""

from pathlib import Path

import dagster as dg
import polars as pl

from sbp_assets.corpus.split import UNIQUE
from sbp_assets.dagster_support.check_results import check_result, problems_result
from sbp_assets.dagster_support.partitions import key_blocks, shard_check, shards
from sbp_assets.dagster_support.stage import for_settings
from sbp_assets.pairing import audit, global_audit, search_audit
from sbp_assets.pairing.embed import Embedder
from sbp_assets.pairing.filter import bucket_shards
from sbp_assets.pairing.ground_truth import not_above_chance, truth_problems
from sbp_assets.pairing.quantizer import Quantizer
from sbp_assets.settings import Settings
from sbp_assets.storage.artifacts import release_staging, staging
from sbp_assets.storage.checks import all_partitions
from sbp_assets.storage.io_managers import DirectoryIOManager, ParquetIOManager


@shard_check(
    asset=["pairing", "embeddings"],
    additional_ins={"documents": dg.AssetIn(["corpus", "documents"])},
    blocking=True,
    description="There is one finite unit vector for each document of D in the shard, and none besides.",
)
def embeddings_are_unit_vectors(embeddings: pl.LazyFrame, documents: pl.LazyFrame) -> dg.AssetCheckResult:
    ids = documents.filter(pl.col("split") == UNIQUE).select("id").collect()["id"]
    return check_result(*audit.check_embeddings(embeddings.collect(), ids))


@shard_check(
    asset=["pairing", "embeddings"],
    additional_ins={"documents": dg.AssetIn(["corpus", "documents"])},
    blocking=True,
    description=f"{audit.EMBEDDED_SAMPLE} documents, embedded again, get the vectors that they have.",
)
def embeddings_match_documents(
    settings: dg.ResourceParam[Settings],
    embedder: dg.ResourceParam[Embedder],
    embeddings: pl.LazyFrame,
    documents: pl.LazyFrame,
) -> dg.AssetCheckResult:
    pairing, batch_size = settings.experiment.pairing, settings.deployment.embedding_batch_size
    engine = embedder.load(pairing.embedding_model, pairing.embedding_dtype, settings.deployment.device)
    return check_result(*audit.check_texts(embeddings.collect(), documents, engine, pairing, batch_size))


@dg.asset_check(
    asset=["pairing", "quantizer"],
    additional_deps=[["pairing", "embeddings"]],
    blocking=True,
    description=f"Of a sample of vectors at least {1 - search_audit.MAX_LOST:.0%} have the direction of their codes, "
    "and the cells have centres.",
)
def codes_keep_directions(
    settings: dg.ResourceParam[Settings], parquet: dg.ResourceParam[ParquetIOManager], quantizer: Path
) -> dg.AssetCheckResult:
    embeddings = all_partitions(parquet, "pairing/embeddings", shards(settings))
    fitted, others = Quantizer.load(quantizer), settings.deployment.checked_shards
    return check_result(*search_audit.check_quantizer(fitted, embeddings, others))


@dg.asset_check(
    asset=["pairing", "quantizer"],
    additional_deps=[["pairing", "embeddings"]],
    description=f"D has not changed much since the quantisers were fitted: it has grown less than "
    f"{search_audit.MAX_GROWTH:.0f} times, and lies as near to the centres of the cells.",
)
def quantizer_fits_documents(
    settings: dg.ResourceParam[Settings], parquet: dg.ResourceParam[ParquetIOManager], quantizer: Path
) -> dg.AssetCheckResult:
    embeddings = all_partitions(parquet, "pairing/embeddings", shards(settings))
    passed, found = search_audit.check_drift(Quantizer.load(quantizer), embeddings)
    return check_result(passed, found, severity=dg.AssetCheckSeverity.WARN)


@shard_check(
    asset=["pairing", "ann_index"],
    additional_ins={
        "quantizer": dg.AssetIn(["pairing", "quantizer"]),
        "embeddings": dg.AssetIn(["pairing", "embeddings"]),
    },
    blocking=True,
    description="The index holds the shard's embeddings, each with its code and its cells.",
)
def index_matches_embeddings(
    settings: dg.ResourceParam[Settings], ann_index: Path, quantizer: Path, embeddings: pl.LazyFrame
) -> dg.AssetCheckResult:
    nprobe = settings.experiment.pairing.nprobe
    return check_result(*search_audit.check_index(ann_index, embeddings.collect(), Quantizer.load(quantizer), nprobe))


@for_settings(
    lambda settings: dg.asset_check(
        asset=["pairing", "partial_candidates"],
        partitions_def=key_blocks(settings),
        additional_deps=[["pairing", "ann_index"]],
        blocking=True,
        description="The block was searched for all shards in the present keys; of a sample of shards, no document has "
        "too many neighbours or itself, and similarities are those of the vectors.",
    )
)
def partials_are_of_the_block(
    context: dg.AssetCheckExecutionContext,
    settings: dg.ResourceParam[Settings],
    directory: dg.ResourceParam[DirectoryIOManager],
    partial_candidates: Path,
) -> dg.AssetCheckResult:
    indexes = all_partitions(directory, "pairing/ann_index", shards(settings))
    block, pairing, others = context.partition_key, settings.experiment.pairing, settings.deployment.checked_shards
    return check_result(*search_audit.check_partials(partial_candidates, indexes, block, pairing, others))


@shard_check(
    asset=["pairing", "neighbor_candidates"],
    additional_ins={"quantizer": dg.AssetIn(["pairing", "quantizer"])},
    additional_deps=[["pairing", "embeddings"]],
    blocking=True,
    description=f"Ranks are complete; of the shard and a sample of others, ids are known, and recall "
    f"against exact search on a sample is at least {search_audit.MIN_RECALL:.0%}.",
)
def candidates_are_nearest_neighbors(
    context: dg.AssetCheckExecutionContext,
    settings: dg.ResourceParam[Settings],
    parquet: dg.ResourceParam[ParquetIOManager],
    neighbor_candidates: pl.LazyFrame,
    quantizer: Path,
) -> dg.AssetCheckResult:
    embeddings = all_partitions(parquet, "pairing/embeddings", shards(settings))
    candidates, shard, others = neighbor_candidates.collect(), context.partition_key, settings.deployment.checked_shards
    k, queries = settings.experiment.pairing.neighbors, embeddings[shard].collect()
    found = search_audit.check_candidates(candidates, queries, embeddings, shard, Quantizer.load(quantizer), k, others)
    return check_result(*found)


# A check of all shards is of no partition. It does not block: it would hold up every shard.
@dg.asset_check(
    asset=["pairing", "neighbor_candidates"],
    additional_deps=[["pairing", "embeddings"]],
    description="Over all shards, every document and every neighbour is of D and in the shard that is stated, and each "
    "document has all of its neighbours.",
)
def candidates_are_known_over_all_shards(
    settings: dg.ResourceParam[Settings], parquet: dg.ResourceParam[ParquetIOManager]
) -> dg.AssetCheckResult:
    scratch = staging(settings.deployment.work_dir, "all_candidates")
    found = global_audit.check_all_candidates(
        all_partitions(parquet, "pairing/neighbor_candidates", shards(settings)),
        all_partitions(parquet, "pairing/embeddings", shards(settings)),
        settings.experiment.pairing.neighbors,
        scratch,
        settings.deployment.memory_limit,
    )
    release_staging(scratch)
    return check_result(*found)


@for_settings(
    lambda settings: dg.asset_check(
        asset=["pairing", "neighbor_edges"],
        partitions_def=key_blocks(settings),
        blocking=True,
        description="Edges are related, are not copies, occur once and have their d2 in the shards of the bucket; no "
        "document exceeds the cap as d2, and none of the candidates is unaccounted for.",
    )
)
def edges_are_related_and_capped(
    context: dg.AssetCheckExecutionContext, settings: dg.ResourceParam[Settings], neighbor_edges: Path
) -> dg.AssetCheckResult:
    pairing = settings.experiment.pairing
    bucket = bucket_shards(settings.experiment.shard_keys, int(context.partition_key), pairing.key_blocks)
    return check_result(*audit.check_edges(neighbor_edges, bucket, pairing))


@shard_check(
    asset=["pairing", "neighbor_pairs"],
    additional_deps=[["corpus", "documents"]],
    blocking=True,
    description="Pairs are related, are not copies, occur once, are of D only (d2 of the shard and "
    "a sample of others), and no document exceeds the caps in the shard.",
)
def pairs_are_related_and_distinct(
    context: dg.AssetCheckExecutionContext,
    settings: dg.ResourceParam[Settings],
    parquet: dg.ResourceParam[ParquetIOManager],
    neighbor_pairs: pl.LazyFrame,
) -> dg.AssetCheckResult:
    pairs, documents = neighbor_pairs.collect(), all_partitions(parquet, "corpus/documents", shards(settings))
    shard, pairing, others = context.partition_key, settings.experiment.pairing, settings.deployment.checked_shards
    return check_result(*audit.check_pairs(pairs, documents, shard, pairing, others))


@shard_check(
    asset=["pairing", "neighbor_pairs"],
    additional_deps=[["corpus", "documents"], ["pairing", "neighbor_candidates"]],
    blocking=True,
    description=f"Of {audit.PAIRS_SAMPLE} pairs with d2 in the shard or a sample of others, each was found "
    "as a neighbour of that similarity and shares the shingles that it states.",
)
def pairs_match_candidates(
    context: dg.AssetCheckExecutionContext,
    settings: dg.ResourceParam[Settings],
    parquet: dg.ResourceParam[ParquetIOManager],
    neighbor_pairs: pl.LazyFrame,
) -> dg.AssetCheckResult:
    candidates = all_partitions(parquet, "pairing/neighbor_candidates", shards(settings))
    pairs, documents = neighbor_pairs.collect(), all_partitions(parquet, "corpus/documents", shards(settings))
    shard, pairing, others = context.partition_key, settings.experiment.pairing, settings.deployment.checked_shards
    return check_result(*audit.check_origin(pairs, candidates, documents, shard, pairing, others))


@dg.asset_check(
    asset=["pairing", "neighbor_pairs"],
    additional_deps=[["corpus", "documents"]],
    description="Over all shards, every d1 and d2 is of D and in the shard that is stated, no pair is kept twice, and "
    "no document exceeds the caps.",
)
def pairs_are_distinct_over_all_shards(
    settings: dg.ResourceParam[Settings], parquet: dg.ResourceParam[ParquetIOManager]
) -> dg.AssetCheckResult:
    scratch = staging(settings.deployment.work_dir, "all_pairs")
    found = global_audit.check_all_pairs(
        all_partitions(parquet, "pairing/neighbor_pairs", shards(settings)),
        all_partitions(parquet, "corpus/documents", shards(settings)),
        settings.experiment.pairing,
        scratch,
        settings.deployment.memory_limit,
    )
    release_staging(scratch)
    return check_result(*found)


@dg.asset_check(
    asset=["pairing", "pair_truth"],
    blocking=True,
    description="There is a row per shard and one for all, with shares that lie in [0, 1] and follow from the counts; "
    "that pairs share a concept no more often than random ones is a warning. Without a ground truth there is no row.",
)
def pair_precision_is_above_chance(
    settings: dg.ResourceParam[Settings], pair_truth: pl.LazyFrame
) -> dg.AssetCheckResult:
    table = pair_truth.collect()
    if settings.experiment.ground_truth:
        problems, by_chance = truth_problems(table, settings.experiment.shard_keys), not_above_chance(table)
    else:
        problems, by_chance = [] if table.is_empty() else ["rows without a ground truth"], []
    # Pairing again would give the same precision: a person has to decide.
    severity = dg.AssetCheckSeverity.ERROR if problems else dg.AssetCheckSeverity.WARN
    return problems_result(problems + by_chance, severity, rows=len(table))
