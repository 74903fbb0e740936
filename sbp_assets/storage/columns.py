"""Columns of an artifact: one list gives a table's schema, the column metadata that Dagster shows, and the lineage.

An artifact that is a directory has columns too: those of its tables, and its arrays or weights by name.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import polars as pl
from polars.datatypes import DataTypeClass

PolarsType = pl.DataType | DataTypeClass


@dataclass(frozen=True)
class Column:
    """A column of a table (its type is polars'), or an array or the weights of a directory (its type is a word).

    `sources` names the columns that it is made of, as "stage/asset.column", separated by spaces; "stage/asset" alone
    stands for the column of the same name. A column of no input (a counter, a constant) has none.
    """

    name: str
    type: PolarsType | str
    description: str
    sources: str = ""


def table_schema(columns: Iterable[Column]) -> pl.Schema:
    """Return the schema of a table of `columns`; TypeError for a column that no table has."""
    schema: dict[str, PolarsType] = {}
    for column in columns:
        if isinstance(column.type, str):
            raise TypeError(f"column {column.name} of type {column.type!r} is not a table's")
        schema[column.name] = column.type
    return pl.Schema(schema)
