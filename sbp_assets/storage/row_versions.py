"""Versions of the rows that each shard reads of a fan-in table.

Such a table has one version as a whole, so without these every shard would be stale whenever one row of it changes.
"""

from __future__ import annotations

import hashlib

import polars as pl

# Metadata key, on the materialisation of the table: {shard's partition key: version of its rows}.
ROW_VERSIONS = "row_versions"


def row_versions(table: pl.DataFrame, shards: list[str], columns: list[str]) -> dict[str, str]:
    """Return a version (16 hex digits) per partition key of `shards`: of the rows whose `shard` is its number.

    The order of the rows counts. A row with no shard, or one that is not in `shards`, belongs to none. `columns` are
    those that the shard-wise reader uses.
    """
    groups = {
        int(number): rows for (number,), rows in table.partition_by("shard", as_dict=True).items() if number is not None
    }
    empty = table.clear()
    return {
        key: hashlib.sha256(groups.get(int(key), empty).select(columns).write_json().encode()).hexdigest()[:16]
        for key in shards
    }
