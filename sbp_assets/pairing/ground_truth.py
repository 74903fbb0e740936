"""Ground truth of pairing: how well neighbour pairs recover the concepts that documents were written about.

SBP assumes that a pair of neighbours renders one latent concept twice (paper, section 5). In the world of concepts the
ground truth is known, so pairing has a precision and a recall like any retrieval.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import polars as pl

from sbp_assets.corpus.concepts import ConceptWorld, view_of
from sbp_assets.corpus.split import UNIQUE
from sbp_assets.storage.columns import Column, table_schema
from sbp_assets.storage.database import create_view, database

OVERALL = "all"
SHARES = ("precision", "crossing", "recall", "recall_of_attainable", "chance_precision")
DEFINITIONS = {
    "precision": "Share of the pairs (d1, d2) whose two documents are about the same concept.",
    "crossing": "Share of those pairs about one concept that hold one entry and one inverted form: they teach to tell "
    "what d1 says in the other view.",
    "recall": "Share of all ordered pairs of different documents of D about one concept that are among the pairs.",
    "recall_of_attainable": (
        "As recall, of the most such pairs that max_pairs_per_document allows: a concept of m documents gives each of "
        "them at most min(m - 1, cap) partners."
    ),
    "chance_precision": "Precision that pairs of different documents drawn at random from D would have.",
}

_COMPARED = "corpus/documents.text pairing/neighbor_pairs.d1 pairing/neighbor_pairs.d2"
PAIR_TRUTH_COLUMNS = [
    Column("shard", pl.String, f"Of d1; `{OVERALL}`: over all shards."),
    Column("documents", pl.Int64, "Documents of D.", "corpus/documents.id corpus/documents.split"),
    Column("pairs", pl.Int64, "Pairs whose d1 is one of them.", "pairing/neighbor_pairs.d1"),
    Column("same_concept_pairs", pl.Int64, "Of those, about the same concept.", _COMPARED),
    Column("crossing_pairs", pl.Int64, "Of those, of which one document is an entry and one inverted.", _COMPARED),
    Column("precision", pl.Float64, DEFINITIONS["precision"], _COMPARED),
    Column("crossing", pl.Float64, DEFINITIONS["crossing"], _COMPARED),
    Column("recall", pl.Float64, DEFINITIONS["recall"], _COMPARED),
    Column("recall_of_attainable", pl.Float64, DEFINITIONS["recall_of_attainable"], _COMPARED),
    Column("chance_precision", pl.Float64, DEFINITIONS["chance_precision"], "corpus/documents.text"),
]
PAIR_TRUTH_SCHEMA = table_schema(PAIR_TRUTH_COLUMNS)


def pair_truth(
    pairs: Mapping[str, Path],
    documents: Mapping[str, pl.LazyFrame],
    world: ConceptWorld,
    cap: int | None,
    scratch: Path,
    memory_limit: str,
) -> pl.DataFrame:
    """Return PAIR_TRUTH_COLUMNS: a row per shard of d1, then one for `all`; a share of nothing is null.

    `pairs` (d1, d2) are Parquet files and `documents` (id, text, split) tables by shard, `cap` is
    pairing.max_pairs_per_document. A document is about the concept that it names most often; one that names none
    matches no other. Memory holds one shard's texts and, in DuckDB, `memory_limit`, which spills into the folder
    `scratch`; the concepts of D's documents are files there.
    """
    about: dict[str, Path] = {}
    for shard in sorted(documents):
        _concepts(documents[shard], world).write_parquet(about.setdefault(shard, scratch / f"concepts-{shard}.parquet"))
    with database(scratch, memory_limit) as db:
        create_view(db, "about", about)
        create_view(db, "pairs", pairs)
        # Other documents about the same concept: the partners that a document should find.
        expected = db.execute(
            """
            WITH members AS (SELECT concept, count(*) AS members FROM about WHERE concept IS NOT NULL GROUP BY concept)
            SELECT shard, count(*)::BIGINT AS documents, sum(coalesce(members - 1, 0))::BIGINT AS partners,
                   sum(least(coalesce(members - 1, 0), $1))::BIGINT AS attainable
            FROM about LEFT JOIN members USING (concept) GROUP BY shard
            """,
            [cap],
        ).pl()
        found = db.execute(
            """
            SELECT pairs.shard, count(*)::BIGINT AS pairs,
                   count_if(one.concept = other.concept)::BIGINT AS same_concept_pairs,
                   count_if(one.concept = other.concept AND one.view <> other.view)::BIGINT AS crossing_pairs
            FROM pairs LEFT JOIN about one ON d1 = one.id LEFT JOIN about other ON d2 = other.id GROUP BY pairs.shard
            """
        ).pl()
    counts = (
        pl.DataFrame({"shard": sorted(pairs)}, schema={"shard": pl.String})
        .join(found, on="shard", how="left", maintain_order="left")
        .join(expected, on="shard", how="left", maintain_order="left")
        .fill_null(0)
    )
    total = counts.select(pl.lit(OVERALL).alias("shard"), pl.exclude("shard").sum())
    others = int(expected["documents"].sum()) - 1
    return (
        pl.concat([counts, total.select(counts.columns)])
        .with_columns(
            precision=_share("same_concept_pairs", pl.col("pairs")),
            crossing=_share("crossing_pairs", pl.col("same_concept_pairs")),
            recall=_share("same_concept_pairs", pl.col("partners")),
            recall_of_attainable=_share("same_concept_pairs", pl.col("attainable")),
            chance_precision=_share("partners", pl.col("documents") * others),
        )
        .select(list(PAIR_TRUTH_SCHEMA))
        .cast(PAIR_TRUTH_SCHEMA)
    )


def truth_problems(table: pl.DataFrame, shards: Sequence[str]) -> list[str]:
    """Return what is wrong with a table of `pair_truth`: its rows, shares outside [0, 1], shares unlike its counts."""
    if sorted(table["shard"]) != sorted([*shards, OVERALL]):
        return [f"rows are of {', '.join(table['shard'])}"]
    wrong = [
        f"{name} of {shard}: {value}"
        for name in SHARES
        for shard, value in table.filter(~pl.col(name).is_between(0, 1)).select("shard", name).iter_rows()
    ]
    stated = pl.col("precision").ne_missing(_share("same_concept_pairs", pl.col("pairs")))
    wrong += [f"precision of {shard} is not that of its counts" for shard in table.filter(stated)["shard"]]
    parts, total = table.filter(pl.col("shard") != OVERALL), table.filter(shard=OVERALL)
    wrong += [
        f"{name} of all shards is not their sum"
        for name in ("documents", "pairs", "same_concept_pairs", "crossing_pairs")
        if parts[name].sum() != total[name].sum()
    ]
    return wrong


def not_above_chance(table: pl.DataFrame) -> list[str]:
    """Return one sentence where there are pairs that share a concept no more often than random ones; else nothing."""
    overall = table.filter(pl.col("shard") == OVERALL, pl.col("pairs") > 0)
    beaten = overall.filter(pl.col("precision") > pl.col("chance_precision"))
    return ["precision is not above that of random pairs"] if len(overall) and not len(beaten) else []


def _concepts(documents: pl.LazyFrame, world: ConceptWorld) -> pl.DataFrame:
    """Return id, concept and view of the documents of D of a shard."""
    rows = documents.filter(pl.col("split") == UNIQUE).select("id", "text").collect()
    concepts, views = ([of(text) for text in rows["text"]] for of in (world.concept_of, view_of))
    schema = {"id": pl.String, "concept": pl.Int64, "view": pl.String}
    return pl.DataFrame({"id": rows["id"], "concept": concepts, "view": views}, schema=schema)


def _share(part: str, of: pl.Expr) -> pl.Expr:
    return pl.when(of > 0).then(pl.col(part) / of)
