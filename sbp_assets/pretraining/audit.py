"""What may not be among the documents that the arms train on: held-out documents, foreign seeds, repeated ids.

Ids are compared by DuckDB, within a memory limit and whatever their number.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import groupby
from pathlib import Path

from sbp_assets.corpus.split import UNIQUE
from sbp_assets.storage.database import database
from sbp_assets.storage.paths import duckdb_tables
from sbp_assets.training.spec import Source, StreamData


def leaked_documents(data: StreamData, heldout: list[Source], scratch: Path, memory_limit: str) -> list[str]:
    """Return the ids of held-out documents that an arm trains on, or on synthetic documents of (sorted).

    DuckDB takes `memory_limit` and spills into the folder `scratch`, as in the other functions.
    """
    trained = [_ids("id", data.repeated), *([_ids("seed_id", data.once)] if data.once else [])]
    read = " UNION ALL ".join(trained)
    query = f"SELECT DISTINCT id FROM ({read}) SEMI JOIN ({_ids('id', heldout)}) USING (id) ORDER BY id"
    return _found(query, scratch, memory_limit)


def foreign_seeds(
    synthetic: Mapping[str, Path], tokens: Mapping[str, Path], scratch: Path, memory_limit: str
) -> list[str]:
    """Return the seed ids of synthetic documents that are not documents of D (sorted)."""
    seeds, unique = _ids("seed_id", _sources(synthetic)), _ids("id", _sources(tokens, UNIQUE))
    query = f"SELECT DISTINCT id FROM ({seeds}) ANTI JOIN ({unique}) USING (id) ORDER BY id"
    return _found(query, scratch, memory_limit)


def repeated_ids(synthetic: Mapping[str, Path], scratch: Path, memory_limit: str) -> list[str]:
    """Return the ids that more than one synthetic document has (sorted)."""
    query = f"SELECT id FROM ({_ids('id', _sources(synthetic))}) GROUP BY id HAVING count(*) > 1 ORDER BY id"
    return _found(query, scratch, memory_limit)


def _sources(directories: Mapping[str, Path], split: str | None = None) -> list[Source]:
    return [Source(directory=directory, split=split) for _, directory in sorted(directories.items())]


def _ids(column: str, sources: Iterable[Source]) -> str:
    """Return the query of the column `id`, which is `column` of the sources' documents."""
    queries = []
    for split, group in groupby(
        sorted(sources, key=lambda source: source.split or ""), key=lambda source: source.split
    ):
        table = duckdb_tables([source.directory / "documents.parquet" for source in group])
        quoted = split and split.replace("'", "''")
        queries.append(f"SELECT {column} AS id FROM {table}" + (f" WHERE split = '{quoted}'" if split else ""))
    return " UNION ALL ".join(queries)


def _found(query: str, scratch: Path, memory_limit: str) -> list[str]:
    with database(scratch, memory_limit) as db:
        return [name for (name,) in db.execute(query).fetchall()]
