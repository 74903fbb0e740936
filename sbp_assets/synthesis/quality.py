"""The quality metrics of synthetic text, beside the same metrics on real documents.

Those of the paper's quality table are repetition, duplicate@1M, non-factual, pair-irrelevance and pair-copying.
Each value is a share of documents, so lower is better everywhere. Null means that the metric does not exist for this
corpus or was not judged, never zero: the pair metrics have no meaning for a real document. How a value was found
stands beside it:

- exact: decided without error. What the ground truth of the `concepts` source decides (non-factual, pair-irrelevance
  and the two details below); duplicates of every source, whose threshold is the corpus' own definition of a duplicate.
- heuristic: the others, of every source: a rule, such as a threshold on word sequences, stands for what a reader would
  say, and text may quote and list.
- judge: non-factual and pair-irrelevance of other sources, which only a model can tell (see `judge`).

For `concepts` two more rows tell what lies behind non-factual and pair-irrelevance: false_statements, among all
statements, and no_concept, documents about nothing.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from sbp_assets.corpus.concepts import ConceptWorld
from sbp_assets.corpus.shingles import Words, batched, segment, shared, shingled
from sbp_assets.settings import Dedup
from sbp_assets.storage.columns import Column, table_schema
from sbp_assets.storage.database import database
from sbp_assets.storage.paths import duckdb_table

SYNTHETIC, REAL = "synthetic", "real"
CORPORA = (SYNTHETIC, REAL)
EXACT, HEURISTIC, JUDGE = "exact", "heuristic", "judge"

REPETITION_WORDS = 4
REPETITION_THRESHOLD = 0.2
COPY_THRESHOLD = 0.5

# In the order of the paper's table, each detail behind the metric that it explains; then those that the paper lacks.
DEFINITIONS = {
    "repetition": (
        f"Share of documents in which more than {REPETITION_THRESHOLD:.0%} of the {REPETITION_WORDS}-word sequences "
        "repeat an earlier one of the same document (words and symbols, without punctuation; of a script without "
        "spaces, 6 Chinese characters or 12 letters of another)."
    ),
    "duplicates": (
        "Share of documents of a fixed sample that equal an earlier one of it (case, forms of characters and white "
        "space aside) or reach the corpus' deduplication threshold (exact Jaccard similarity of word shingles) with "
        "one. It grows with the sample, whose size is in `sample`: of all shards together in quality_table, of one "
        "shard in quality; the paper samples 1M."
    ),
    "non_factual": "Share of documents that state a fact which is false in the world of concepts.",
    "false_statements": "Share of the documents' statements of facts that are false in the world of concepts.",
    "pair_irrelevance": "Share of syntheses that do not name the concept of their seed document.",
    "no_concept": "Share of documents that name no concept at all.",
    "pair_copying": (
        f"Share of syntheses of which more than {COPY_THRESHOLD:.0%} of the word shingles (of the pair filter's "
        "length, or that of the shorter text) stand in their seed document."
    ),
}
JUDGED_DEFINITIONS = {
    "non_factual": "Share of documents that state something false, of those that the judge gave a verdict on.",
    "pair_irrelevance": (
        "Share of syntheses that are about something else than their seed document, of those that the judge gave a "
        "verdict on."
    ),
}
NEEDS_A_JUDGE = "Not judged: this needs a judge (experiment.synthesis.judge)."
DETAILS = ("false_statements", "no_concept")
OF_THE_WORLD = (*JUDGED_DEFINITIONS, *DETAILS)
METRICS = tuple(metric for metric in DEFINITIONS if metric not in DETAILS)
# Of the metrics on documents and, where they compare a synthetic document with its seed, of both.
DOCUMENTS_AND_SEEDS = "synthesis/synthetic_documents.text synthesis/synthetic_documents.seed_id corpus/documents.text"
QUALITY_COLUMNS = [
    Column("metric", pl.String, "Defined in quality_table."),
    Column("corpus", pl.String, "synthetic, or real (documents of D)."),
    Column(
        "value",
        pl.Float64,
        "flagged / scored; null where the metric does not exist or nothing was judged.",
        DOCUMENTS_AND_SEEDS,
    ),
    Column("flagged", pl.Int64, "Documents (for false_statements: statements) found at fault.", DOCUMENTS_AND_SEEDS),
    Column("scored", pl.Int64, "Documents (statements) that there is a decision on.", DOCUMENTS_AND_SEEDS),
    Column("documents", pl.Int64, "Documents scored.", DOCUMENTS_AND_SEEDS),
    Column("sample", pl.Int64, "Documents drawn; those beyond `documents` are unjudged.", DOCUMENTS_AND_SEEDS),
    Column(
        "method",
        pl.String,
        "exact, heuristic (a rule stands for what a reader would say) or judge (a language model).",
    ),
]
QUALITY_SCHEMA = table_schema(QUALITY_COLUMNS)
QUALITY_TABLE_COLUMNS = [*QUALITY_COLUMNS, Column("definition", pl.String, "Of the metric.")]


def row(
    metric: str, corpus: str, method: str, flagged: int, scored: int, documents: int, sample: int
) -> dict[str, Any]:
    """Return a row of QUALITY_SCHEMA; its value is the share `flagged` of `scored`, null where nothing was."""
    share = flagged / scored if scored else None
    return dict(zip(QUALITY_SCHEMA, (metric, corpus, share, flagged, scored, documents, sample, method), strict=True))


def expected_rows(world_is_known: bool, judged: bool) -> list[tuple[str, str, str]]:
    """Return (metric, corpus, method) of every row that a table must have, in order.

    `judged` says whether a judge is configured. Where neither the world nor a judge can tell, the row is there with a
    null.
    """
    rows = []
    for metric in DEFINITIONS:
        for corpus in CORPORA:
            if metric not in OF_THE_WORLD:
                rows.append((metric, corpus, EXACT if metric == "duplicates" else HEURISTIC))
            elif world_is_known:
                rows.append((metric, corpus, EXACT))
            if metric in JUDGED_DEFINITIONS and (judged or not world_is_known):
                rows.append((metric, corpus, JUDGE))
    return rows


def quality_rows(
    synthetic: pl.DataFrame,
    real: pl.DataFrame,
    dedup_settings: Dedup,
    copy_words: int,
    world: ConceptWorld | None,
    scratch: Path,
    memory_limit: str,
) -> pl.DataFrame:
    """Return all metrics of one shard's sample as rows of QUALITY_SCHEMA; those that need a judge are null.

    `synthetic` has columns text and seed_text, `real` has text. `copy_words` is the words per shingle of the pair
    filter, `world` the ground truth of the concepts source, `scratch` an empty directory for `duplicate_flags`.
    """
    pairs = synthetic.select("text", "seed_text").rows()
    copied = copies(synthetic["text"].to_list(), synthetic["seed_text"].to_list(), copy_words)
    sizes = {SYNTHETIC: len(synthetic), REAL: len(real)}
    found: dict[tuple[str, str], tuple[int, int]] = {}  # flagged, scored
    for corpus, texts in ((SYNTHETIC, synthetic["text"].to_list()), (REAL, real["text"].to_list())):
        duplicates = duplicate_flags([texts], dedup_settings, scratch / corpus, memory_limit)
        found["repetition", corpus] = sum(repetitive(texts)), len(texts)
        found["duplicates", corpus] = sum(duplicates), len(texts)
        if world:
            stated = [world.statements(text) for text in texts]
            false = [sum(not statement.true for statement in statements) for statements in stated]
            found["non_factual", corpus] = sum(count > 0 for count in false), len(texts)
            found["false_statements", corpus] = sum(false), sum(map(len, stated))
            found["no_concept", corpus] = sum(world.concept_of(text) is None for text in texts), len(texts)
    found["pair_copying", SYNTHETIC] = sum(copied), len(pairs)
    if world:
        found["pair_irrelevance", SYNTHETIC] = sum(is_irrelevant(text, seed, world) for text, seed in pairs), len(pairs)
    rows = []
    for metric, corpus, method in expected_rows(world is not None, judged=False):
        size = sizes[corpus] if (metric, corpus) in found else 0
        rows.append(row(metric, corpus, method, *found.get((metric, corpus), (0, 0)), size, size))
    return pl.DataFrame(rows, schema=QUALITY_SCHEMA)


def duplicates_over_shards(
    corpora: Mapping[str, Mapping[str, pl.LazyFrame]], size: int, settings: Dedup, scratch: Path, memory_limit: str
) -> pl.DataFrame:
    """Return duplicates@`size` as rows of QUALITY_SCHEMA, of one fixed sample of each corpus over all its shards.

    `corpora` maps each corpus to its shards' documents (id, text).
    """
    rows = []
    for corpus, shards in corpora.items():
        chosen = fixed_sample({shard: ids_of(frame) for shard, frame in shards.items()}, size)
        batches = (texts_of(shards[shard], chosen[shard])["text"].to_list() for shard in sorted(chosen))
        flags = duplicate_flags(batches, settings, scratch / corpus, memory_limit)
        rows.append(row("duplicates", corpus, EXACT, sum(flags), len(flags), len(flags), len(flags)))
    return pl.DataFrame(rows, schema=QUALITY_SCHEMA)


def quality_over_shards(
    shards: Mapping[str, pl.LazyFrame], duplicates: pl.DataFrame, judged: pl.DataFrame, judge: str | None
) -> pl.DataFrame:
    """Return the metrics over all shards, each shard weighted by what was scored of it, with a `definition` column.

    `duplicates` and `judged` are rows of QUALITY_SCHEMA over all shards: duplicates cannot be added up, for those of
    two shards with each other would be missed, and the judge reads one sample of the whole corpus. `judge` names the
    judge; where it is None, `judged` is empty.
    """
    summed = (
        pl.concat([frame for _, frame in sorted(shards.items())])
        .filter(pl.col("metric") != "duplicates")
        .group_by("metric", "corpus", "method")
        .agg(pl.col("flagged", "scored", "documents", "sample").sum())
        .collect()
        .join(judged, on=["metric", "corpus", "method"], how="anti")
        .with_columns(value=pl.when(pl.col("scored") > 0).then(pl.col("flagged") / pl.col("scored")))
    )
    ranks = {name: place for place, name in enumerate((*DEFINITIONS, *CORPORA, EXACT, HEURISTIC, JUDGE))}
    table = pl.concat([frame.select(list(QUALITY_SCHEMA)) for frame in (summed, duplicates, judged)])
    table = table.sort(pl.col("metric", "corpus", "method").replace_strict(ranks))
    keys = table.select("metric", "method", "sample").iter_rows()
    definitions = [definition(metric, method, sample, judge) for metric, method, sample in keys]
    return table.with_columns(definition=pl.Series(definitions, dtype=pl.String))


def definition(metric: str, method: str, sample: int, judge: str | None) -> str:
    """Return what a value means, with the sample's size where that decides the value, and the judge where one does."""
    if method == JUDGE:
        return f"{JUDGED_DEFINITIONS[metric]} {f'Judge: {judge}.' if judge else NEEDS_A_JUDGE}"
    return DEFINITIONS[metric] + (f" This is duplicates@{sample:,}." if metric == "duplicates" else "")


def texts_of(frame: pl.LazyFrame, ids: Sequence[str], *columns: str) -> pl.DataFrame:
    """Return id, text and further columns of the rows with these ids, in the frame's order."""
    return frame.filter(pl.col("id").is_in(list(ids))).select("id", "text", *columns).collect()


def with_seeds(synthetic: pl.DataFrame, documents: pl.LazyFrame) -> pl.DataFrame:
    """Return a shard's synthetic documents (seed_id, …) with the text of their seed documents, of its `documents`."""
    seeds = texts_of(documents, synthetic["seed_id"].unique().to_list()).select(seed_id="id", seed_text="text")
    return synthetic.join(seeds, on="seed_id", how="inner", maintain_order="left")


def fixed_sample(ids: Mapping[str, Iterable[str]], size: int) -> dict[str, list[str]]:
    """Return at most `size` of the ids of all shards, by shard, chosen by hash: little changes as ids are added.

    Shards are read one after another (lazily, where `ids` gives iterators); memory is that of the sample.
    """
    hashed = (
        (hashlib.sha256(document_id.encode()).digest(), shard, document_id)
        for shard, members in ids.items()
        for document_id in members
    )
    chosen: dict[str, list[str]] = {}
    for _, shard, document_id in heapq.nsmallest(size, hashed):
        chosen.setdefault(shard, []).append(document_id)
    return chosen


def ids_of(frame: pl.LazyFrame) -> Iterator[str]:
    """Yield the frame's ids, which are read when the first is asked for."""
    yield from frame.select("id").collect()["id"]


def repetitive(texts: Iterable[str]) -> list[bool]:
    """Return for each text whether more than 20% of its 4-word sequences have occurred before in it."""
    return [share > REPETITION_THRESHOLD for share in repetition(texts)]


def repetition(texts: Iterable[str]) -> list[float]:
    """Return of each text the share of its 4-word sequences that have occurred before in it."""
    shares: list[float] = []
    for batch in batched(texts):
        sequences, bounds = Words.of(segment(batch)).shingles(REPETITION_WORDS)
        for first, end in pairwise(bounds.tolist()):
            repeated = end - first - len(np.unique(sequences[first:end]))
            shares.append(repeated / (end - first))
    return shares


def duplicate_flags(batches: Iterable[Sequence[str]], settings: Dedup, scratch: Path, memory_limit: str) -> list[bool]:
    """Return for each text, in order, whether the Jaccard similarity of shingles with an earlier one is high enough.

    Normalisation, shingles and threshold are those of the corpus' deduplication. No pair is missed: candidates come by
    prefix filtering (Chaudhuri et al. 2006, Bayardo et al. 2007), for two sets that similar must share one of their
    rarest shingles, so a text is compared only with those that do. Copies are set aside first, so that a text with
    thousands of them costs one.

    Batches of texts are read one at a time. `scratch` is a directory that may be filled: shingles are staged there and
    DuckDB spills there; memory holds one batch, the digests of the texts, and at most `memory_limit` in DuckDB.
    """
    scratch.mkdir(parents=True, exist_ok=True)
    seen: set[bytes] = set()
    flags: list[bool] = []
    staged = False
    for number, texts in enumerate(part for batch in batches for part in batched(batch)):
        numbers, different = [], []
        for text in texts:
            digest = hashlib.sha256(text.encode()).digest()
            if digest not in seen:
                numbers.append(len(flags))
                different.append(text)
            flags.append(digest in seen)
            seen.add(digest)
        if numbers:
            shingles, bounds = Words.of(segment(different)).shingles(settings.shingle_words)
            frame = pl.DataFrame({"n": np.repeat(np.array(numbers), np.diff(bounds)), "shingle": shingles})
            frame.unique().write_parquet(scratch / f"shingles-{number}.parquet")
            staged = True
    if staged:
        with database(scratch, memory_limit) as db:
            db.execute(f"CREATE VIEW shingles AS SELECT * FROM {duckdb_table(scratch, 'shingles-*.parquet')}")
            for (near,) in db.execute(_NEAR, {"threshold": settings.threshold}).fetchall():
                flags[near] = True
    return flags


# |A ∩ B| >= t |A|, so a similar B holds one of any |A| - ceil(t |A|) + 1 shingles of A; floor is on the safe side, and
# so is the margin below, for the lengths' ratio bounds the similarity from above. A shingle of one text meets no other.
_NEAR = """
WITH frequencies AS (SELECT shingle, count(*) AS frequency FROM shingles GROUP BY shingle),
ranked AS (
    SELECT n, shingle, frequency, count(*) OVER (PARTITION BY n) AS size,
           row_number() OVER (PARTITION BY n ORDER BY frequency, shingle) AS place
    FROM shingles JOIN frequencies USING (shingle)
),
prefixes AS (
    SELECT n, shingle, size FROM ranked
    WHERE frequency > 1 AND place <= size - CAST(floor($threshold * size) AS BIGINT) + 1
),
candidates AS (
    SELECT DISTINCT a.n AS a, b.n AS b, a.size AS size_a, b.size AS size_b
    FROM prefixes a JOIN prefixes b ON a.shingle = b.shingle AND a.n < b.n
    WHERE least(a.size, b.size) >= $threshold * greatest(a.size, b.size) - 1e-6
),
compared AS (
    SELECT b, size_a, size_b, count(*) AS shared
    FROM candidates JOIN shingles left_ ON left_.n = a JOIN shingles right_ ON right_.n = b
    WHERE left_.shingle = right_.shingle GROUP BY a, b, size_a, size_b
)
SELECT DISTINCT b FROM compared WHERE shared / (size_a + size_b - shared) >= $threshold
"""


def copies(texts: Sequence[str], seed_texts: Sequence[str], shingle_words: int) -> list[bool]:
    """Return for each synthetic document whether more than half of its shingles stand in its seed document.

    Shingles are those of the pair filter, so a synthetic document is held to the limit that pairs were held to; where
    one of two texts is shorter than a shingle, they are as long as it. An empty document copies nothing.
    """
    pairs = zip(shingled(texts, shingle_words), shingled(seed_texts, shingle_words), strict=True)
    return [bool(text.units) and shared(seed, text) > COPY_THRESHOLD for text, seed in pairs]


def is_irrelevant(text: str, seed_text: str, world: ConceptWorld) -> bool:
    """Return whether the synthetic document does not name the concept that its seed document is about."""
    concept = world.concept_of(seed_text)
    return concept is None or world.names[concept] not in world.names_in(text)
