"""Column lineage: which columns of its inputs a column is made of, declared beside the asset's column schema.

An artifact that is a directory has columns too: those of its tables, and its arrays or weights by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import dagster as dg

LINEAGE = "dagster/column_lineage"
SCHEMA = "dagster/column_schema"


def schema(*columns: tuple[str, str, str]) -> dict[str, dg.TableSchema]:
    """Metadata entry of an asset's columns: (name, type, description) each."""
    return {SCHEMA: dg.TableSchema([dg.TableColumn(*column) for column in columns])}


def lineage(same: Mapping[str, Iterable[str]] | None = None, /, **columns: str) -> dict[str, dg.TableColumnLineage]:
    """Metadata entry of what an asset's columns are made of; the IO managers put it on each materialisation, too.

    `same` lists, by asset, columns taken over under their own names. Further columns name what they are made of as
    "stage/asset.column", several parted by spaces. A column of no input (a counter, a constant) is left out.
    """
    made_of: dict[str, list[str]] = {}
    for asset, names in (same or {}).items():
        for name in names:
            made_of.setdefault(name, []).append(f"{asset}.{name}")
    for name, sources in columns.items():
        made_of.setdefault(name, []).extend(sources.split())

    def dep(source: str) -> dg.TableColumnDep:
        asset, _, column = source.rpartition(".")
        return dg.TableColumnDep(dg.AssetKey(asset.split("/")), column)

    return {LINEAGE: dg.TableColumnLineage({name: [dep(s) for s in sources] for name, sources in made_of.items()})}


def with_sources(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """`metadata` with each column's sources behind its description, as in "The seed document. ← corpus/documents.id".

    Open-source Dagster keeps and serves column lineage but does not draw it; an asset's table of columns it does show.
    """
    if SCHEMA not in metadata or LINEAGE not in metadata:
        return dict(metadata)
    sources = metadata[LINEAGE].deps_by_column

    def column(own: dg.TableColumn) -> dg.TableColumn:
        names = ", ".join(f"{dep.asset_key.to_user_string()}.{dep.column_name}" for dep in sources.get(own.name, ()))
        description = f"{own.description or ''} ← {names}".strip() if names else own.description
        return dg.TableColumn(own.name, own.type, description, own.constraints, own.tags)

    return {**metadata, SCHEMA: dg.TableSchema([column(own) for own in metadata[SCHEMA].columns])}
