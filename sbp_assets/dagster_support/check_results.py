"""What checks report: whether they passed, and in words why not."""

from collections.abc import Mapping
from typing import Any

import dagster as dg

from sbp_assets.dagster_support.preview import escape

DATA_VERSION = "dagster/data_version"
SHOWN = 5


def check_result(
    passed: bool, metadata: Mapping[str, Any], severity: dg.AssetCheckSeverity = dg.AssetCheckSeverity.ERROR
) -> dg.AssetCheckResult:
    """A check's result that says in words why it failed: the UI hides lists among the metadata behind a button.

    The words are the entries of `problems`, and the first few of the other lists and texts that are not empty.
    """
    reasons: list[str] = []
    for name, value in ({} if passed else metadata).items():
        found = [value] if isinstance(value, str) and value else value if isinstance(value, list) else []
        words = [escape(str(entry)) for entry in found[:SHOWN]]
        if len(found) > SHOWN:
            words.append(f"and {len(found) - SHOWN} more")
        if words:
            reasons += words if name == "problems" else [f"{escape(name)}: {', '.join(words)}"]
    description = "\n".join(f"- {reason}" for reason in reasons) or None
    return dg.AssetCheckResult(passed=passed, severity=severity, metadata=metadata, description=description)


def problems_result(
    problems: list[str], severity: dg.AssetCheckSeverity = dg.AssetCheckSeverity.ERROR, **numbers: float | str
) -> dg.AssetCheckResult:
    """Return the result of a check that passes where `problems` is empty, with `numbers` among its metadata."""
    return check_result(passed=not problems, severity=severity, metadata={**numbers, "problems": problems})


def last_version(instance: dg.DagsterInstance, asset: dg.AssetKey, partition: str | None) -> str | None:
    """Content version that the last materialisation of an asset (or partition) recorded; None without one."""
    wanted = dg.AssetRecordsFilter(asset, asset_partitions=[partition] if partition else None)
    records = instance.fetch_materializations(wanted, limit=1).records
    materialization = records[0].asset_materialization if records else None
    return (materialization.tags or {}).get(DATA_VERSION) if materialization else None
