"""What only all shards of candidates and pairs show: unknown ids anywhere, the number of ranks, caps over the corpus.

A shard's table is opened once, and of it the identifiers alone are read. They are staged, and DuckDB joins and groups
them within a memory limit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import duckdb
import polars as pl

from sbp_assets.corpus.split import UNIQUE
from sbp_assets.pairing.audit import Result, some
from sbp_assets.settings import Pairing
from sbp_assets.storage.database import database
from sbp_assets.storage.paths import duckdb_table

SHOWN = 10


def check_all_candidates(
    candidates: Mapping[str, pl.LazyFrame],
    embeddings: Mapping[str, pl.LazyFrame],
    k: int,
    scratch: Path,
    memory_limit: str,
) -> Result:
    """Return whether all ids of all shards are known, and each document has as many neighbours as there can be.

    candidates and embeddings: tables by shard, of the same shards. `scratch` is an empty directory, where the ids of
    both are staged and DuckDB spills; memory holds `memory_limit` in DuckDB and one shard's ids.
    """
    sizes = {shard: _stage(frame.select("id"), shard, scratch) for shard, frame in embeddings.items()}
    expected = min(k, sum(sizes.values()) - 1)
    short, wrong, examples = 0, 0, []
    for shard, frame in candidates.items():
        rows = frame.select("query_id", "neighbor_id", "neighbor_shard").collect()
        ranks = rows.group_by("query_id").len()
        short += max(0, sizes[shard] - len(ranks)) if expected > 0 else 0
        bad = ranks.filter(pl.col("len") != expected)
        wrong += len(bad)
        examples.append(bad["query_id"].head(SHOWN))
        references = [
            ranks.select(id="query_id", shard=pl.lit(shard)),
            rows.select(id="neighbor_id", shard="neighbor_shard"),
        ]
        pl.concat(references).unique().write_parquet(scratch / f"references-{shard}.parquet")
    with _staged(scratch, memory_limit) as db:
        unknown, of_no_document = _count(db, f"SELECT DISTINCT id FROM ({_UNKNOWN})")
    return not (short or wrong or unknown), {
        "documents": sum(sizes.values()),
        "queries_without_neighbors": short,
        "queries_with_wrong_ranks": wrong,
        "unknown_ids": unknown,
        "offending_ids": some(*examples, of_no_document),
    }


def check_all_pairs(
    pairs: Mapping[str, pl.LazyFrame],
    documents: Mapping[str, pl.LazyFrame],
    settings: Pairing,
    scratch: Path,
    memory_limit: str,
) -> Result:
    """Return whether all d1 and d2 of all shards are of D, no pair is kept twice, and no document exceeds the caps.

    pairs and documents: tables by shard, of the same shards. `scratch` is an empty directory, where ids and pairs are
    staged and DuckDB spills; memory holds `memory_limit` in DuckDB and one shard's ids.
    """
    for shard, frame in documents.items():
        _stage(frame.filter(pl.col("split") == UNIQUE).select("id"), shard, scratch)
    total = 0
    for shard, frame in pairs.items():
        rows = frame.select("d1", "d2", "d2_shard").collect()
        total += len(rows)
        rows.write_parquet(scratch / f"pairs-{shard}.parquet")
        references = [rows.select(id="d1", shard=pl.lit(shard)), rows.select(id="d2", shard="d2_shard")]
        pl.concat(references).unique().write_parquet(scratch / f"references-{shard}.parquet")
    with _staged(scratch, memory_limit) as db:
        table, cap = duckdb_table(scratch, "pairs-*.parquet"), settings.max_pairs_per_document
        found = {
            "documents_not_in_d": _count(db, f"SELECT DISTINCT id FROM ({_UNKNOWN})"),
            "repeated_pairs": _count(db, f"SELECT d1 AS id FROM {table} GROUP BY d1, d2 HAVING count(*) > 1"),
            **(
                {
                    f"{side}_over_cap": _count(
                        db, f"SELECT {side} AS id FROM {table} GROUP BY {side} HAVING count(*) > {cap}"
                    )
                    for side in ("d1", "d2")
                }
                if cap is not None
                else {}
            ),
        }
    return not any(count for count, _ in found.values()), {
        **{name: count for name, (count, _) in found.items()},
        "pairs": total,
        "offending_ids": some(*(ids for _, ids in found.values())),
    }


# A null id, and one of a shard that does not exist, are equal to none.
_UNKNOWN = "SELECT id FROM referenced ANTI JOIN known USING (shard, id)"


def _stage(ids: pl.LazyFrame, shard: str, scratch: Path) -> int:
    """Write the ids of a shard, with its key; return how many there are."""
    rows = ids.collect().with_columns(shard=pl.lit(shard))
    rows.write_parquet(scratch / f"known-{shard}.parquet")
    return len(rows)


@contextmanager
def _staged(scratch: Path, memory_limit: str) -> Iterator[duckdb.DuckDBPyConnection]:
    with database(scratch, memory_limit) as db:
        db.execute(f"CREATE VIEW known AS SELECT * FROM {duckdb_table(scratch, 'known-*.parquet')}")
        db.execute(f"CREATE VIEW referenced AS SELECT * FROM {duckdb_table(scratch, 'references-*.parquet')}")
        yield db


def _count(db: duckdb.DuckDBPyConnection, query: str) -> tuple[int, pl.Series]:
    """Return how many rows the query gives, and the SHOWN least ids of them."""
    db.execute(f"CREATE OR REPLACE TEMP TABLE found AS {query}")
    ids = [name for (name,) in db.execute(f"SELECT id FROM found ORDER BY id LIMIT {SHOWN}").fetchall()]
    (count,) = db.execute("SELECT count(*) FROM found").fetchall()[0]
    return int(count), pl.Series("id", ids, pl.String)
