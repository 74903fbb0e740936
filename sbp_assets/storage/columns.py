"""Column lineage: which columns of its inputs a column is made of, declared beside the asset's column schema.

An artifact that is a directory has columns too: those of its tables, and its arrays or weights by name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import dagster as dg

LINEAGE = "dagster/column_lineage"


def schema(*columns: tuple[str, str, str]) -> dict[str, dg.TableSchema]:
    """Metadata entry of an asset's columns: (name, type, description) each."""
    return {"dagster/column_schema": dg.TableSchema([dg.TableColumn(*column) for column in columns])}


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
