"""Filter nearest neighbours into training pairs: similar, no near-copies, and a cap on the pairs of a document.

A pair (d1, d2) is kept in the shard of its d1 and nowhere else, so no pair can occur twice in the corpus. With
`both_directions`, each candidate gives a pair either way. The steps, in this order:

1. similarity at least `min_similarity`, and at most `max_similarity`;
2. near-copies: a pair is dropped when more than `max_shared_shingles` of d2's word shingles occur in d1, or when one
   of the two is shorter than a shingle and stands in the other as a whole;
3. the cap on d2: the most similar pairs stay, ties go to the smaller d1;
4. the cap on d1, likewise, and ties go to the smaller d2.

The first three need all pairs of a d2 at one place, the last one all pairs of a d1. So they are done by bucket
(`bucket_edges`), each for some of the shards, and of every bucket's edges a shard then takes its own (`shard_pairs`):
a bucket reads each shard once, and no shard reads all shards. The pairs are the same whatever the number of either.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import duckdb
import polars as pl
import pyarrow.parquet as pq

from sbp_assets.corpus.shingles import Text, overlap, shingled
from sbp_assets.corpus.split import UNIQUE
from sbp_assets.settings import Pairing
from sbp_assets.storage.columns import Column, table_schema
from sbp_assets.storage.database import batches, create_view, database, scalar
from sbp_assets.storage.paths import scan_table
from sbp_assets.storage.progress import Progress

EDGES_FILE, COUNTS_FILE = "edges.parquet", "counts.parquet"

# (a, b) also gives (b, a), so that either side may have been the query.
_EITHER_SIDE = "corpus/documents.id pairing/neighbor_candidates.neighbor_id pairing/neighbor_candidates.query_id"
_EITHER_SHARD = "pairing/neighbor_candidates.neighbor_shard"
_SHARED = (
    "Share of d2's word shingles that occur in d1; where one of the two is shorter than a shingle, 1 if it stands in "
    "the other as a whole, else 0."
)
EDGE_COLUMNS = [
    Column("d1", pl.String, f"Seed document; of {EDGES_FILE}.", _EITHER_SIDE),
    Column("d1_shard", pl.String, f"Shard of d1; of {EDGES_FILE}.", _EITHER_SHARD),
    Column("d2", pl.String, f"Related document, of a shard of this bucket; of {EDGES_FILE}.", _EITHER_SIDE),
    Column("d2_shard", pl.String, f"Shard of d2; of {EDGES_FILE}.", _EITHER_SHARD),
    Column("similarity", pl.Float32, f"Cosine of the two; of {EDGES_FILE}.", "pairing/neighbor_candidates"),
    Column("shared_shingles", pl.Float32, f"{_SHARED} Of {EDGES_FILE}.", "corpus/documents.text"),
]
_EDGES = "pairing/neighbor_edges"
PAIR_COLUMNS = [
    Column("d1", pl.String, "Seed document, of this shard.", _EDGES),
    Column("d2", pl.String, "Related document that the synthesizer learns to write from d1.", _EDGES),
    Column("d2_shard", pl.String, "Shard of d2.", _EDGES),
    Column("similarity", pl.Float32, "Cosine of the two.", _EDGES),
    Column("shared_shingles", pl.Float32, _SHARED, _EDGES),
]
EDGE_SCHEMA, PAIR_SCHEMA = table_schema(EDGE_COLUMNS), table_schema(PAIR_COLUMNS)

# What a bucket counts per shard of d1: candidates of its own and those found from the other side, and drops per step.
COUNTED = ("candidates", "reversed", "too_dissimilar", "too_similar", "near_copies", "over_d2_cap")

PAIRS_PER_BATCH = 2000  # Pairs whose texts are read together.
EDGES_PER_GROUP = 2**16  # Edges that are written together: a row group of their file.
SHINGLES_KEPT = 5_000_000  # Of texts that later pairs may share: with their words about 100 MB.


def bucket_shards(shards: Sequence[str], bucket: int, buckets: int) -> list[str]:
    """Return the shards whose documents are the d2 of a bucket. One more shard changes no other's bucket."""
    return [shard for number, shard in enumerate(sorted(shards)) if number % buckets == bucket]


def bucket_edges(
    candidates: Mapping[str, Path],
    documents: Mapping[str, Path],
    bucket: Sequence[str],
    settings: Pairing,
    directory: Path,
    memory_limit: str,
    progress: Progress,
) -> dict[str, int]:
    """Write the edges whose d2 is of a shard of `bucket`, after three of the four steps; return how many each dropped.

    candidates and documents: the Parquet files of all shards. Into the existing `directory` go EDGES_FILE (by d1_shard,
    d1 and falling similarity) and COUNTS_FILE (COUNTED by d1_shard). Memory holds `memory_limit` in DuckDB, which
    spills beside the directory, PAIRS_PER_BATCH pairs of texts, and EDGES_PER_GROUP edges. Advances `progress` by pairs
    compared as text. Raises ValueError for a candidate that is not in corpus/documents.
    """
    with database(directory.parent, memory_limit) as db:
        _find_edges(db, candidates, bucket, settings)
        progress.total = scalar(db, "SELECT count(*) FROM edges WHERE dropped IS NULL")
        _compare(db, documents, settings.shingle_tokens, progress)
        db.execute(
            """
            CREATE TABLE placed AS
            SELECT d1, d2, row_number() OVER (PARTITION BY d2 ORDER BY similarity DESC, d1) AS place
            FROM edges JOIN compared USING (d1, d2) WHERE shared_shingles <= ?
            """,
            [settings.max_shared_shingles],
        )
        cap = settings.max_pairs_per_document
        kept = """
            SELECT d1, d1_shard, d2, d2_shard, similarity, shared_shingles
            FROM placed JOIN edges USING (d1, d2) JOIN compared USING (d1, d2)
            WHERE $1 IS NULL OR place <= $1 ORDER BY d1_shard, d1, similarity DESC, d2
        """
        written, arrow = 0, pl.DataFrame(schema=EDGE_SCHEMA).to_arrow().schema
        with pq.ParquetWriter(directory / EDGES_FILE, arrow, compression="zstd") as file:
            for batch in batches(db, kept, EDGES_PER_GROUP, [cap]):
                rows = batch.cast(EDGE_SCHEMA)  # type: ignore[arg-type]
                file.write_table(rows.to_arrow())
                written += len(rows)
        counts = db.execute(
            """
            SELECT d1_shard, count_if(forward) AS candidates, count_if(NOT forward) AS reversed,
                   count_if(dropped = 'too_dissimilar') AS too_dissimilar,
                   count_if(dropped = 'too_similar') AS too_similar,
                   count_if(dropped IS NULL AND place IS NULL) AS near_copies,
                   count_if($1 IS NOT NULL AND place > $1) AS over_d2_cap
            FROM edges LEFT JOIN placed USING (d1, d2) GROUP BY d1_shard ORDER BY d1_shard
            """,
            [cap],
        ).pl()
    counts = counts.cast({"d1_shard": pl.String, **dict.fromkeys(COUNTED, pl.Int64)})
    counts.write_parquet(directory / COUNTS_FILE)
    return {**{name: int(counts[name].sum()) for name in COUNTED}, "edges": written}


def shard_pairs(edges: Mapping[str, Path], shard: str, settings: Pairing) -> tuple[pl.DataFrame, dict[str, int]]:
    """Return the pairs of `shard` (PAIR_COLUMNS, by d1 and falling similarity) and how many each step dropped.

    edges: the directory of every bucket. The counts, in order: COUNTED, over_d1_cap, pairs.
    """
    found, counted = (
        pl.concat([scan_table(path / name).filter(d1_shard=shard) for path in edges.values()]).collect()
        for name in (EDGES_FILE, COUNTS_FILE)
    )
    counts = {name: int(counted[name].sum()) for name in COUNTED}
    pairs = found.sort(["d1", "similarity", "d2"], descending=[False, True, False])
    if settings.max_pairs_per_document is not None:
        pairs = pairs.group_by("d1", maintain_order=True).head(settings.max_pairs_per_document)
    counts["over_d1_cap"] = len(found) - len(pairs)
    counts["pairs"] = len(pairs)
    return pairs.select(list(PAIR_SCHEMA)), counts


def texts_of(ids: pl.Series, documents: pl.LazyFrame) -> dict[str, str]:
    """Return the texts of the documents with these ids, by id; ids of other shards are left out."""
    wanted = pl.LazyFrame({"id": ids.unique()}, schema={"id": pl.String})
    rows = documents.select("id", "text").join(wanted, on="id", how="semi").collect(engine="streaming")
    return dict(rows.iter_rows())


def _find_edges(
    db: duckdb.DuckDBPyConnection, candidates: Mapping[str, Path], bucket: Sequence[str], settings: Pairing
) -> None:
    """Create table `edges` (EDGE_COLUMNS without shingles, forward, dropped) of all pairs whose d2 is in `bucket`.

    `forward`: d1 was the query. A pair found from both sides is one edge: its two similarities are the same.
    """
    create_view(db, "candidates", candidates)
    db.execute("CREATE TABLE bucket AS SELECT unnest($1::VARCHAR[]) AS shard", [list(bucket)])
    reverse = """
        UNION ALL SELECT neighbor_id, neighbor_shard, query_id, shard, similarity, false
        FROM candidates WHERE shard IN (FROM bucket)
    """
    db.execute(
        f"""
        CREATE TABLE edges AS
        SELECT d1, any_value(d1_shard) AS d1_shard, d2, any_value(d2_shard) AS d2_shard,
               max(similarity) AS similarity, bool_or(forward) AS forward,
               CASE WHEN max(similarity) < $1::FLOAT THEN 'too_dissimilar'
                    WHEN max(similarity) > $2::FLOAT THEN 'too_similar' END AS dropped
        FROM (
            SELECT query_id AS d1, shard AS d1_shard, neighbor_id AS d2, neighbor_shard AS d2_shard, similarity,
                   true AS forward
            FROM candidates WHERE neighbor_shard IN (FROM bucket)
            {reverse if settings.both_directions else ""}
        ) GROUP BY d1, d2
        """,
        [settings.min_similarity, settings.max_similarity],
    )


def _compare(db: duckdb.DuckDBPyConnection, documents: Mapping[str, Path], words: int, progress: Progress) -> None:
    """Create table `compared` (d1, d2, shared_shingles) of the edges that are not dropped."""
    create_view(db, "documents", documents)
    # The ids are in memory, and the documents are streamed past them.
    db.execute(
        """
        CREATE TABLE texts AS SELECT id, text FROM documents SEMI JOIN (
            SELECT d1 AS id FROM edges WHERE dropped IS NULL UNION SELECT d2 FROM edges WHERE dropped IS NULL
        ) USING (id) WHERE split = $1
        """,
        [UNIQUE],
    )
    db.execute("CREATE TABLE compared (d1 VARCHAR, d2 VARCHAR, shared_shingles DOUBLE)")
    pairs = """
        SELECT d1, d2, one.text AS first, other.text AS second
        FROM edges LEFT JOIN texts one ON d1 = one.id LEFT JOIN texts other ON d2 = other.id WHERE dropped IS NULL
    """
    known: dict[str, Text] = {}
    for rows in batches(db, pairs, PAIRS_PER_BATCH):
        db.register("shares", rows.select("d1", "d2", shared_shingles=_shared(rows, words, known)).to_arrow())
        db.execute("INSERT INTO compared FROM shares")
        progress.advance(len(rows))


def _shared(pairs: pl.DataFrame, words: int, known: dict[str, Text]) -> pl.Series:
    """Return the share of d2's shingles that occur in d1, of each of `pairs` (d1, d2, first, second).

    `known` are texts of earlier pairs, by id, which those of these pairs join.
    """
    texts = dict(pairs.select("d1", "first").iter_rows()) | dict(pairs.select("d2", "second").iter_rows())
    if missing := [name for name, text in texts.items() if text is None]:
        raise ValueError(
            f"document {min(missing)!r} is a neighbour candidate but not in corpus/documents of its shard; "
            "re-materialise pairing from the present documents"
        )
    if sum(len(text.shingles) for text in known.values()) > SHINGLES_KEPT:
        known.clear()
    new = {name: text for name, text in texts.items() if name not in known}
    known |= zip(new, shingled(new.values(), words), strict=True)
    shares = [overlap(known[d1], known[d2]) for d1, d2 in pairs.select("d1", "d2").iter_rows()]
    return pl.Series(shares, dtype=pl.Float64)
