"""The column metadata and the column lineage that Dagster shows of an artifact, from its one list of columns."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import dagster as dg
import polars as pl

from sbp_assets.storage.columns import Column, PolarsType

LINEAGE = "dagster/column_lineage"
SCHEMA = "dagster/column_schema"


def column_metadata(columns: Iterable[Column], **sources: str) -> dict[str, Any]:
    """Return the metadata of an asset with `columns`: their schema and, where one has sources, their lineage.

    `sources` replaces those of the columns that it names: they may depend on the settings. Each column's sources also
    stand behind its description, as in "The seed document. ← corpus/documents.id": open-source Dagster keeps and serves
    lineage but does not draw it, while it shows an asset's table of columns.
    """
    shown, lineage = [], {}
    for column in columns:
        deps = [_dep(source, column.name) for source in sources.pop(column.name, column.sources).split()]
        names = ", ".join(f"{dep.asset_key.to_user_string()}.{dep.column_name}" for dep in deps)
        description = f"{column.description} ← {names}".strip() if names else column.description
        shown.append(dg.TableColumn(column.name, _type_name(column.type), description))
        if deps:
            lineage[column.name] = deps
    if sources:
        raise ValueError(f"sources are given for columns that do not exist: {', '.join(sources)}")
    metadata: dict[str, Any] = {SCHEMA: dg.TableSchema(shown)}
    return metadata | ({LINEAGE: dg.TableColumnLineage(lineage)} if lineage else {})


def _dep(source: str, name: str) -> dg.TableColumnDep:
    asset, dot, column = source.rpartition(".")
    return dg.TableColumnDep(dg.AssetKey((asset if dot else source).split("/")), column if dot else name)


def _type_name(kind: PolarsType | str) -> str:
    """Return 'int64', 'list<uint64>', …: the words of Dagster's column types."""
    if isinstance(kind, str):
        return kind
    if isinstance(kind, pl.List):
        return f"list<{_type_name(kind.inner)}>"
    return {"boolean": "bool"}.get(name := str(kind).lower(), name)
