"""What the UI shows of candidates and pairs: histograms, quantiles, the funnel of the filter, pairs side by side."""

from __future__ import annotations

import polars as pl

from sbp_assets.dagster_support.preview import table_preview
from sbp_assets.pairing.filter import texts_of


def histogram(similarity: pl.Series, low: float = 0.0, bins: int = 20) -> pl.DataFrame:
    """Return counts of similarities in equal bins from `low` to 1 (from, to, pairs); the first holds all below it."""
    width = (1 - low) / bins
    counts = [0] * bins
    for value in similarity:
        counts[min(max(int((value - low) / width), 0), bins - 1)] += 1
    bounds = [low + i * width for i in range(bins + 1)]
    return pl.DataFrame({"from": bounds[:-1], "to": bounds[1:], "pairs": counts}, schema_overrides={"pairs": pl.Int64})


def histogram_markdown(table: pl.DataFrame, unit: str = "pairs", width: int = 40) -> str:
    """Return a `histogram` as a Markdown table with bars, without its empty ends."""
    rows = list(table.iter_rows())
    full = [i for i, row in enumerate(rows) if row[2]]
    if not full:
        return f"No {unit}."
    rows = rows[full[0] : full[-1] + 1]
    top = max(row[2] for row in rows)
    lines = [f"| similarity | {unit} | |", "|---|---:|---|"]
    lines += [f"| {low:.3f} – {high:.3f} | {n:,} | {'█' * round(width * n / top)} |" for low, high, n in rows]
    return "\n".join(lines)


def quantiles(values: pl.Series, name: str) -> dict[str, float]:
    """Return quantiles of `values` as metadata: name_p5 to name_p95; {} of nothing."""
    if values.is_empty():
        return {}
    shares = (0.05, 0.25, 0.5, 0.75, 0.95)
    return {
        f"{name}_p{round(100 * share)}": round(float(values.quantile(share, "nearest") or 0), 4) for share in shares
    }


def funnel(counts: dict[str, int]) -> str:
    """Return a Markdown table of what each step of the filter has left, of the counts of `shard_pairs`."""
    steps = [("nearest neighbours", counts["candidates"], counts["candidates"])]
    left = counts["candidates"]
    for label, key, sign in (
        ("found from the other side", "reversed", 1),
        ("below min_similarity", "too_dissimilar", -1),
        ("above max_similarity", "too_similar", -1),
        ("near-copies", "near_copies", -1),
        ("over the cap as d2", "over_d2_cap", -1),
        ("over the cap as d1", "over_d1_cap", -1),
    ):
        left += sign * counts[key]
        steps.append((label, sign * counts[key], left))
    return "| step | change | left |\n|---|---:|---:|\n" + "\n".join(f"| {a} | {b:+,} | {c:,} |" for a, b, c in steps)


def side_by_side(pairs: pl.DataFrame, documents: pl.LazyFrame, rows: int = 6) -> str:
    """Return a Markdown table of some `pairs` with their texts, which are all in one shard's `documents`."""
    if pairs.is_empty():
        return "No pair has both documents in this shard."
    # Evenly over the range of similarities, as the least similar pairs tell most.
    falling = pairs.sort(["similarity", "d1", "d2"], descending=[True, False, False])
    sample = falling.gather_every(max(1, len(pairs) // rows)).head(rows)
    texts = texts_of(pl.concat([sample["d1"], sample["d2"].rename("d1")]), documents)
    return table_preview(
        sample.select(
            "similarity",
            "shared_shingles",
            seed=pl.Series([texts[i] for i in sample["d1"]], dtype=pl.String),
            related=pl.Series([texts[i] for i in sample["d2"]], dtype=pl.String),
        )
    )
