"""The five quality metrics of synthetic text, beside the same metrics on real documents. No dagster.

They follow the paper's quality table (non-factual and pair-irrelevance are judged by a model there). Each value is a
share of documents, so lower is better everywhere. Null means that the metric does not exist for this corpus or
cannot be decided, never zero: the pair metrics have no meaning for a real document, and non-factual and
pair-irrelevance need a source whose truth is known (`concepts`).
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

import polars as pl

from sbp_assets.corpus.concepts import ConceptWorld

SYNTHETIC, REAL = "synthetic", "real"

REPETITION_WORDS = 4
REPETITION_THRESHOLD = 0.2
COPY_THRESHOLD = 0.5

# In the order of the paper's table.
DEFINITIONS = {
    "repetition": (
        f"Share of documents in which more than {REPETITION_THRESHOLD:.0%} of the {REPETITION_WORDS}-word sequences "
        "repeat an earlier one of the same document."
    ),
    "duplicates": (
        "Share of documents of a fixed sample per shard that equal an earlier one of the sample (case and white space "
        "aside) or reach the corpus' deduplication threshold (exact Jaccard similarity of word shingles) with one. It "
        "grows with the sample, whose size is in `documents`; the paper samples 1M."
    ),
    "non_factual": "Share of documents that state a fact which is false in the world of concepts.",
    "pair_irrelevance": "Share of syntheses that do not name the concept of their seed document.",
    "pair_copying": (
        f"Share of syntheses of which more than {COPY_THRESHOLD:.0%} of the word shingles (of the pair filter's "
        "length) stand in their seed document."
    ),
}
METRICS = tuple(DEFINITIONS)
SCHEMA = {"metric": pl.String(), "corpus": pl.String(), "value": pl.Float64(), "documents": pl.Int64()}


def quality_rows(
    synthetic: pl.DataFrame,
    real: pl.DataFrame,
    duplicate_words: int,
    duplicate_threshold: float,
    copy_words: int,
    world: ConceptWorld | None,
) -> pl.DataFrame:
    """All metrics of a sample: metric, corpus, value (null: does not exist), documents (scored).

    `synthetic`: text, seed_text; `real`: text. `world`: the truth, for the concepts source.
    """
    pairs = synthetic.select("text", "seed_text").rows()
    rows = []
    for corpus, texts in ((SYNTHETIC, synthetic["text"].to_list()), (REAL, real["text"].to_list())):
        flags: dict[str, list[bool] | None] = dict.fromkeys(METRICS)
        flags["repetition"] = [is_repetitive(text) for text in texts]
        flags["duplicates"] = duplicate_flags(texts, duplicate_words, duplicate_threshold)
        if world:
            flags["non_factual"] = [is_non_factual(text, world) for text in texts]
        if corpus == SYNTHETIC:
            flags["pair_copying"] = [is_copy(text, seed, copy_words) for text, seed in pairs]
            if world:
                flags["pair_irrelevance"] = [is_irrelevant(text, seed, world) for text, seed in pairs]
        for metric, found in flags.items():
            value = sum(found) / len(found) if found else None
            rows.append({"metric": metric, "corpus": corpus, "value": value, "documents": len(found or ())})
    return pl.DataFrame(rows, schema=SCHEMA)


def quality_over_shards(shards: Mapping[str, pl.LazyFrame]) -> pl.DataFrame:
    """The metrics over all shards, each shard weighted by its scored documents; with a `definition` column.

    Duplicates are counted within the sample of each shard, never across shards.
    """
    scored = pl.col("value").is_not_null()
    overall = (
        pl.concat([frame for _, frame in sorted(shards.items())])
        .group_by("metric", "corpus")
        .agg(
            total=pl.when(scored).then(pl.col("value") * pl.col("documents")).sum(),
            documents=pl.when(scored).then(pl.col("documents")).sum(),
        )
        .collect()
    )
    order = pl.DataFrame(
        [
            {"metric": metric, "corpus": corpus, "definition": definition}
            for metric, definition in DEFINITIONS.items()
            for corpus in (SYNTHETIC, REAL)
        ]
    )
    return order.join(overall, on=["metric", "corpus"], how="left", maintain_order="left").select(
        "metric",
        "corpus",
        value=pl.when(pl.col("documents") > 0).then(pl.col("total") / pl.col("documents")),
        documents=pl.col("documents").fill_null(0).cast(pl.Int64),
        definition="definition",
    )


def fixed_sample(ids: Sequence[str], size: int) -> list[str]:
    """At most `size` of `ids`, chosen by hash: the same on every machine and little changed as ids are added."""
    return sorted(ids, key=lambda document_id: hashlib.sha256(document_id.encode()).digest())[:size]


def is_repetitive(text: str) -> bool:
    """More than 20% of the text's 4-word sequences have occurred before in it."""
    words = text.lower().split()
    total = len(words) - REPETITION_WORDS + 1
    if total <= 0:
        return False
    distinct = len({tuple(words[start : start + REPETITION_WORDS]) for start in range(total)})
    return (total - distinct) / total > REPETITION_THRESHOLD


def duplicate_flags(texts: Sequence[str], shingle_words: int, threshold: float) -> list[bool]:
    """For each text whether an earlier one has a Jaccard similarity of shingles at or above `threshold`. Exact.

    Candidates come by prefix filtering (Chaudhuri et al. 2006, Bayardo et al. 2007): two sets that similar must share
    one of their rarest shingles, so a text is compared only with those that do.
    """
    documents = [shingles(text, shingle_words) for text in texts]
    frequency = Counter(shingle for document in documents for shingle in document)
    index: dict[str, list[int]] = defaultdict(list)
    flags = []
    for number, document in enumerate(documents):
        rarest = sorted(document, key=lambda shingle: (frequency[shingle], shingle))
        # |A ∩ B| >= t |A|, so a similar B holds one of any |A| - ceil(t |A|) + 1 of A; floor is on the safe side.
        prefix = rarest[: len(rarest) - int(threshold * len(rarest)) + 1]
        candidates = {other for shingle in prefix for other in index[shingle]}
        flags.append(any(_jaccard(document, documents[other]) >= threshold for other in candidates))
        for shingle in prefix:
            index[shingle].append(number)
    return flags


def is_copy(text: str, seed_text: str, shingle_words: int) -> bool:
    """More than half of the synthesis' shingles stand in its seed document."""
    own = shingles(text, shingle_words)
    if len(text.split()) < shingle_words:
        # Too short for a shingle: a copy where the seed holds it word for word.
        return bool(text.split()) and f" {_normal(text)} " in f" {_normal(seed_text)} "
    return len(own & shingles(seed_text, shingle_words)) / len(own) > COPY_THRESHOLD


def is_non_factual(text: str, world: ConceptWorld) -> bool:
    """At least one statement of the text is false in `world`."""
    return any(not statement.true for statement in world.statements(text))


def is_irrelevant(text: str, seed_text: str, world: ConceptWorld) -> bool:
    """The synthesis does not name the concept that its seed document is about."""
    concept = world.concept_of(seed_text)
    return concept is None or world.names[concept] not in re.findall(r"\w+", text)


def shingles(text: str, words: int) -> set[str]:
    """Sets of `words` consecutive words, lower-cased; of a shorter text, the text itself."""
    tokens = _normal(text).split(" ")
    return {" ".join(tokens[start : start + words]) for start in range(max(len(tokens) - words + 1, 1))}


def _normal(text: str) -> str:
    return " ".join(text.lower().split())


def _jaccard(a: set[str], b: set[str]) -> float:
    shared = len(a & b)
    return shared / (len(a) + len(b) - shared)
