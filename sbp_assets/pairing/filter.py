"""Filter nearest neighbours into training pairs: similar, no near-copies, and a cap on the pairs of a document.

A pair (d1, d2) is kept in the shard of its d1 and nowhere else, so no pair can occur twice in the corpus. With
`both_directions`, the shard of a document reads the candidates of every shard for rows that found its documents; the
pairs of the corpus are then symmetric before the caps. The steps, in this order:

1. similarity at least `min_similarity`, and at most `max_similarity`;
2. near-copies: a pair is dropped when more than `max_shared_shingles` of d2's word shingles occur in d1, or when one
   of the two is shorter than a shingle and stands in the other as a whole;
3. the cap on d2, which spans shards: see `d2_places`;
4. the cap on d1, exact, for all pairs of a d1 are here. The most similar stay; ties go to the smaller d2.
"""

from __future__ import annotations

from collections.abc import Mapping

import polars as pl

from sbp_assets.corpus.shingles import Text, overlap, shingled
from sbp_assets.settings import Pairing
from sbp_assets.storage.columns import Column, table_schema
from sbp_assets.storage.progress import Progress

# (a, b) also gives (b, a), so that either side may have been the query.
_EITHER_SIDE = "corpus/documents.id pairing/neighbor_candidates.neighbor_id pairing/neighbor_candidates.query_id"
PAIR_COLUMNS = [
    Column("d1", pl.String, "Seed document, of this shard.", _EITHER_SIDE),
    Column("d2", pl.String, "Related document that the synthesizer learns to write from d1.", _EITHER_SIDE),
    Column("d2_shard", pl.String, "Shard of d2.", "pairing/neighbor_candidates.neighbor_shard"),
    Column("similarity", pl.Float32, "Cosine of the two.", "pairing/neighbor_candidates"),
    Column(
        "shared_shingles",
        pl.Float32,
        "Share of d2's word shingles that occur in d1; where one of the two is shorter than a shingle, 1 if it stands "
        "in the other as a whole, else 0.",
        "corpus/documents.text",
    ),
]
PAIR_SCHEMA = table_schema(PAIR_COLUMNS)

_EDGE_SCHEMA = {
    "d1": pl.String,
    "d1_shard": pl.String,
    "d2": pl.String,
    "d2_shard": pl.String,
    "similarity": pl.Float32,
}


def edges(candidates: pl.LazyFrame, shard: str, settings: Pairing) -> pl.LazyFrame:
    """Return the directed edges (d1, d1_shard, d2, d2_shard, similarity) of the candidates of query shard `shard`."""
    forward = candidates.select(
        d1="query_id", d1_shard=pl.lit(shard), d2="neighbor_id", d2_shard="neighbor_shard", similarity="similarity"
    )
    if not settings.both_directions:
        return forward
    reverse = candidates.select(
        d1="neighbor_id", d1_shard="neighbor_shard", d2="query_id", d2_shard=pl.lit(shard), similarity="similarity"
    )
    return pl.concat([forward, reverse])


def within(settings: Pairing) -> pl.Expr:
    """Return the condition that a row's similarity lies in the settings' bounds."""
    return pl.col("similarity").is_between(settings.min_similarity, settings.max_similarity)


def d2_places(d2: pl.Series, candidates: Mapping[str, pl.LazyFrame], shard: str, settings: Pairing) -> pl.DataFrame:
    """Return how many pairs of this shard may have each document of `d2` as d2 (columns d2, places).

    The cap is on the whole corpus, but a shard sees the texts of its own d1 only. So the places of a d2 are divided
    among the shards by what all can see: the `max_pairs_per_document` most similar edges to it among the candidates of
    every shard (ties to the smaller d1). Each shard has as many places as it has d1 among them, and fills them with its
    best pairs that pass the text filter. Every shard computes the same division, so their sum never exceeds the cap.
    Memory: the cap's number of edges per d2, and the matching edges of one shard.
    """
    wanted = d2.unique().sort().rename("d2").to_frame()
    top = pl.DataFrame(schema=_EDGE_SCHEMA)
    for key in sorted(candidates):
        found = edges(candidates[key], key, settings).filter(within(settings))
        found = found.join(wanted.lazy(), on="d2", how="semi").select(top.columns)
        # A pair found from both sides counts once, at its higher similarity.
        ranked = pl.concat([top, found.collect(engine="streaming")]).sort(
            ["d2", "similarity", "d1"], descending=[False, True, False]
        )
        ranked = ranked.unique(["d1", "d2"], keep="first", maintain_order=True)
        top = ranked.group_by("d2", maintain_order=True).head(settings.max_pairs_per_document).select(top.columns)
    return top.filter(pl.col("d1_shard") == shard).group_by("d2").agg(places=pl.len())


def filter_pairs(
    candidates: Mapping[str, pl.LazyFrame],
    documents: Mapping[str, pl.LazyFrame],
    shard: str,
    settings: Pairing,
    progress: Progress,
) -> tuple[pl.DataFrame, dict[str, int]]:
    """Return pairs of `shard` (PAIR_COLUMNS, by d1 and falling similarity) and how many each filter removed.

    candidates and documents: every shard's tables. Reads the texts of this shard's d1, and per other shard those of the
    d2 that pairs need, one shard at a time. Advances `progress` by pairs compared as text. The counts, in order:
    candidates, reversed, too_dissimilar, too_similar, near_copies, over_d2_cap, over_d1_cap, pairs.
    """
    mine = [
        edges(frame, key, settings).filter(pl.col("d1_shard") == shard)
        for key, frame in sorted(candidates.items())
        if settings.both_directions or key == shard
    ]
    found = pl.concat(mine).collect(engine="streaming")
    # A pair found from both sides has two similarities, apart by the rounding of codes: the higher is kept.
    found = found.sort(["d1", "similarity", "d2"], descending=[False, True, False]).unique(
        ["d1", "d2"], keep="first", maintain_order=True
    )
    own = candidates[shard].select(pl.len()).collect().item()
    counts = {"candidates": own, "reversed": len(found) - own}
    counts["too_dissimilar"] = found.filter(pl.col("similarity") < settings.min_similarity).height
    counts["too_similar"] = found.filter(pl.col("similarity") > settings.max_similarity).height
    found = found.filter(within(settings))

    progress.total = len(found)
    compared = _shared_shingles(found, documents, shard, settings.shingle_tokens, progress)
    kept = compared.filter(pl.col("shared_shingles") <= settings.max_shared_shingles)
    counts["near_copies"] = len(compared) - len(kept)

    places = d2_places(found["d2"], candidates, shard, settings)
    by_d2 = kept.sort(["d2", "similarity", "d1"], descending=[False, True, False])
    capped = (
        by_d2.with_columns(place=pl.int_range(pl.len()).over("d2"))
        .join(places, on="d2", how="left")
        .filter(pl.col("place") < pl.col("places").fill_null(0))
    )
    counts["over_d2_cap"] = len(kept) - len(capped)

    pairs = capped.sort(["d1", "similarity", "d2"], descending=[False, True, False])
    pairs = pairs.group_by("d1", maintain_order=True).head(settings.max_pairs_per_document)
    counts["over_d1_cap"] = len(capped) - len(pairs)
    counts["pairs"] = len(pairs)
    return pairs.select(list(PAIR_SCHEMA)).cast(PAIR_SCHEMA), counts


def texts_of(ids: pl.Series, documents: pl.LazyFrame) -> dict[str, str]:
    """Return the texts of the documents with these ids, by id; ids of other shards are left out."""
    wanted = pl.LazyFrame({"id": ids.unique()}, schema={"id": pl.String})
    rows = documents.select("id", "text").join(wanted, on="id", how="semi").collect(engine="streaming")
    return dict(rows.iter_rows())


def _compared(ids: pl.Series, documents: pl.LazyFrame, words: int) -> dict[str, Text]:
    texts = texts_of(ids, documents)
    return dict(zip(texts, shingled(texts.values(), words), strict=True))


def _shared_shingles(
    found: pl.DataFrame, documents: Mapping[str, pl.LazyFrame], shard: str, words: int, progress: Progress
) -> pl.DataFrame:
    first = _compared(found["d1"], documents[shard], words)
    parts = [found.clear().with_columns(shared_shingles=pl.lit(None, pl.Float64))]
    for (key,), rows in found.partition_by("d2_shard", as_dict=True, maintain_order=True).items():
        second = _compared(rows["d2"], documents[str(key)], words)
        shares = []
        for d1, d2 in rows.select("d1", "d2").iter_rows():
            if d1 not in first or d2 not in second:
                missing = d1 if d1 not in first else d2
                raise ValueError(
                    f"document {missing!r} is a neighbour candidate but not in corpus/documents of its shard; "
                    "re-materialise pairing from the present documents"
                )
            shares.append(overlap(first[d1], second[d2]))
            progress.advance()
        parts.append(rows.with_columns(shared_shingles=pl.Series(shares, dtype=pl.Float64)))
    return pl.concat(parts)


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
