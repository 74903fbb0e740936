"""Selects what the page shows of the corpus: similarities of all pairs and a few texts, without loading the corpus."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import polars as pl

BIN_WIDTH = 0.02  # Cosine similarity that one bar of the histogram spans.


@dataclass(frozen=True)
class Pair:
    """A pair of related documents: cosine similarity, ids and texts."""

    similarity: float
    d1: str
    d2: str
    d1_text: str
    d2_text: str


@dataclass(frozen=True)
class SyntheticSample:
    """A seed document of D, and synthetic documents written from it."""

    seed_id: str
    seed_text: str
    documents: tuple[tuple[str, str], ...]  # (id, text)


def similarity_counts(pairs: Mapping[str, pl.LazyFrame]) -> pl.DataFrame:
    """Return the number of pairs per bin of cosine similarity, over `pairs` by shard (with a column `similarity`).

    The columns are `low` (the bin's lower edge) and `count`, in order of `low`. Empty bins inside the range are
    included.
    """
    per_shard = [
        frame.select(bin=(pl.col("similarity") / BIN_WIDTH + 1e-6).floor().cast(pl.Int64))
        .group_by("bin")
        .len("count")
        .collect(engine="streaming")
        for frame in pairs.values()
    ]
    if not per_shard or not sum(map(len, per_shard)):
        return pl.DataFrame(schema={"low": pl.Float64, "count": pl.Int64})
    counts = pl.concat(per_shard).group_by("bin").agg(pl.col("count").sum().cast(pl.Int64))
    bins = pl.DataFrame({"bin": range(counts["bin"].min(), counts["bin"].max() + 1)})  # type: ignore[arg-type,operator]
    return (
        bins.join(counts, on="bin", how="left")
        .sort("bin")
        .select(low=pl.col("bin") * BIN_WIDTH, count=pl.col("count").fill_null(0))
    )


def example_pairs(
    pairs: Mapping[str, pl.LazyFrame], documents: Mapping[str, pl.LazyFrame], count: int = 3
) -> list[Pair]:
    """Return at most `count` pairs over the range of similarities, most similar first, no document shown twice.

    `pairs` (d1, d2, similarity) and `documents` (id, text) are given by shard. A deterministic draw of 200 pairs per
    shard stands for all of them, so that memory does not grow with the corpus.
    """
    drawn = []
    for frame in pairs.values():
        # seed: polars' hash, stable within one version; examples may change with an upgrade, figures do not.
        hashed = pl.concat_str("d1", pl.lit(">"), "d2").hash(seed=0)
        drawn.append(
            frame.select("d1", "d2", "similarity").with_columns(h=hashed).sort("h").head(200).drop("h").collect()
        )
    candidates = (
        pl.concat(drawn).sort("similarity", "d1", "d2", descending=[True, False, False]) if drawn else pl.DataFrame()
    )
    chosen: list[tuple[str, str, float]] = []
    seen: set[str] = set()
    for number in range(count):
        # The middle of each of `count` equal parts of the ranking, or the next pair of two unseen documents.
        start = int((number + 0.5) * len(candidates) / count)
        for d1, d2, similarity in candidates.slice(start).iter_rows():
            if not {d1, d2} & seen:
                chosen.append((d1, d2, similarity))
                seen |= {d1, d2}
                break
    texts = texts_of(seen, documents)
    return [
        Pair(similarity, d1, d2, texts[d1], texts[d2]) for d1, d2, similarity in chosen if d1 in texts and d2 in texts
    ]


def example_synthetic_documents(
    synthetic: Mapping[str, pl.LazyFrame], documents: Mapping[str, pl.LazyFrame], rollouts: int = 2
) -> SyntheticSample | None:
    """Return a seed document with at most `rollouts` complete synthetic documents written from it; None without any.

    `synthetic` (id, seed_id, rollout, text, finish_reason) and `documents` (id, text) are given by shard. Of the seed
    documents with the most complete ones the lowest SHA-256 of the id is chosen.
    """
    best: tuple[int, bytes, str, str] | None = None
    for shard, frame in synthetic.items():
        counts = (
            frame.filter(pl.col("finish_reason") == "stop", pl.col("text").str.strip_chars().str.len_chars() > 0)
            .group_by("seed_id").len().collect(engine="streaming")
        )  # fmt: skip
        for seed_id, found in counts.iter_rows():
            key = (-min(found, rollouts), hashlib.sha256(seed_id.encode()).digest(), shard, seed_id)
            best = key if best is None else min(best, key)
    if best is None:
        return None
    *_, shard, seed_id = best
    rows = (
        synthetic[shard]
        .filter(pl.col("seed_id") == seed_id, pl.col("finish_reason") == "stop")
        .filter(pl.col("text").str.strip_chars().str.len_chars() > 0)
        .sort("rollout").head(rollouts).select("id", "text").collect()
    )  # fmt: skip
    seed_text = texts_of({seed_id}, documents).get(seed_id)
    return None if seed_text is None else SyntheticSample(seed_id, seed_text, tuple(rows.iter_rows()))


def texts_of(ids: set[str], documents: Mapping[str, pl.LazyFrame]) -> dict[str, str]:
    """Return the texts of the documents with these ids, by id; ids of no document are left out."""
    found: dict[str, str] = {}
    for frame in documents.values():
        rows = frame.filter(pl.col("id").is_in(sorted(ids))).select("id", "text").collect(engine="streaming")
        found.update(rows.iter_rows())
    return found
