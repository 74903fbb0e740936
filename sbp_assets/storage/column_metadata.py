"""The column metadata and the column lineage that Dagster shows of an artifact, from its one list of columns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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
    if any("←" in (column.description or "") for column in metadata[SCHEMA].columns):
        return dict(metadata)  # `column_metadata` has written them

    def column(own: dg.TableColumn) -> dg.TableColumn:
        names = ", ".join(f"{dep.asset_key.to_user_string()}.{dep.column_name}" for dep in sources.get(own.name, ()))
        shown = "←" in (own.description or "")  # column_metadata has written them.
        description = f"{own.description or ''} ← {names}".strip() if names and not shown else own.description
        return dg.TableColumn(own.name, own.type, description, own.constraints, own.tags)

    return {**metadata, SCHEMA: dg.TableSchema([column(own) for own in metadata[SCHEMA].columns])}
