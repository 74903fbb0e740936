"""How much of the synthetic documents is new: against all of D, beside real documents that nobody has read.

A synthetic document may copy any document that its synthesizer was trained on, not only its seed. So a fixed sample of
synthetic documents is compared with every document of D, and as a reference a sample of held-out documents too, which
are real and which no model has read: what they share with D is the language and the subject, not copying (McCoy et al.
2023, "How much do language models copy from their training data?", arXiv 2111.09509, whose n-gram novelty this is).

Words and n-grams are those of `corpus.shingles`. The samples' n-grams are sorted arrays of 64-bit hashes and D streams
past them, so memory is that of the samples and of one shard, and time is linear in D.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl

from sbp_assets.corpus.shingles import UNITS_PER_WORD, KnownHashes, Words, batched, normalise, segment
from sbp_assets.storage.columns import Column, table_schema
from sbp_assets.storage.progress import Progress
from sbp_assets.synthesis.quality import COPY_THRESHOLD, SYNTHETIC, fixed_sample, ids_of, texts_of
from sbp_assets.synthesis.similarity import Similarity

HELDOUT, SEED = "heldout", "seed"
NGRAMS = (1, 2, 3, 4, 5, 7, 10)
# Synthetic documents that are embedded: a mean of cosines over so many has a standard error below 0.01.
SIMILARITY_SAMPLE = 500
# Points of the share of mostly copied documents by which synthetic ones may exceed held-out ones: the paper reports at
# most 0.9% of documents that copy their seed.
MAX_EXCESS = 0.05

DEFINITIONS = {
    "novel_ngrams": "Share of all n-grams of the documents that stand nowhere in D (McCoy et al. 2023).",
    "copied_ngrams": (
        "Share of a document's n-grams that stand anywhere in D; a shorter document is one n-gram, all of it."
    ),
    "mostly_copied": f"Share of documents of whose n-grams more than {COPY_THRESHOLD:.0%} stand anywhere in D.",
    "longest_copy": "Words of a document's longest run that stands in one document of D.",
    "longest_copy_share": "The longest run as a share of its document.",
    "length": "Words of a document.",
    "partner_similarity": (
        "Cosine to the held-out partner: of a sample of held-out documents, which no model has read, the one nearest "
        "to the seed document, where it is as similar to it as pairs must be (pairing.min_similarity). That of the "
        "seed itself is an upper bound, for the partner was chosen by it."
    ),
    "random_similarity": "Cosine to a held-out document drawn at random, of the same documents.",
    "nearer_to_partner": "Share of documents that are more similar to the partner than to the random document.",
}
OF_N = ("copied_ngrams", "mostly_copied")  # At the pair filter's n alone.
SIMILARITIES = ("partner_similarity", "random_similarity", "nearer_to_partner")
SHARES = ("novel_ngrams", "copied_ngrams", "mostly_copied", "longest_copy_share", "nearer_to_partner")

_TEXTS = "synthesis/synthetic_documents.text corpus/documents.text"
_SPREAD = f"{_TEXTS} pairing/embeddings.vector pairing/quantizer.queries"
NOVELTY_COLUMNS = [
    Column("measure", pl.String, "What `definition` says."),
    Column("words", pl.Int64, "n of the n-grams, or as much text without spaces; null for other measures."),
    Column("corpus", pl.String, "synthetic, heldout (real, and read by no model) or seed (documents of D)."),
    Column("mean", pl.Float64, "Over the documents; of novel_ngrams over all n-grams. Null without any.", _SPREAD),
    Column("p10", pl.Float64, "Over the documents; null for shares of documents and of all n-grams.", _SPREAD),
    Column("median", pl.Float64, "As p10.", _SPREAD),
    Column("p90", pl.Float64, "As p10.", _SPREAD),
    Column("maximum", pl.Float64, "As p10.", _SPREAD),
    Column("documents", pl.Int64, "Documents measured.", _TEXTS),
    Column("definition", pl.String, "Of the measure."),
]
NOVELTY_SCHEMA = table_schema(NOVELTY_COLUMNS)


def expected_rows(copy_words: int) -> list[tuple[str, int | None, str]]:
    """Return (measure, words, corpus) of every row of the table, in order."""
    rows: list[tuple[str, int | None, str]] = []
    for measure in DEFINITIONS:
        corpora = (SYNTHETIC, SEED) if measure in SIMILARITIES else (SYNTHETIC, HELDOUT)
        sizes: Sequence[int | None] = [None]
        if measure == "novel_ngrams":
            sizes = sorted({*NGRAMS, copy_words})
        elif measure in OF_N:
            sizes = [copy_words]
        rows += [(measure, words, corpus) for words in sizes for corpus in corpora]
    return rows


def sampled_texts(shards: Mapping[str, pl.LazyFrame], size: int) -> list[str]:
    """Return the texts of a fixed sample of the documents (id, text) of all shards."""
    chosen = fixed_sample({shard: ids_of(frame) for shard, frame in shards.items()}, size)
    return [text for shard in sorted(chosen) for text in texts_of(shards[shard], chosen[shard])["text"]]


def sampled_similarities(
    synthetic: Mapping[str, pl.LazyFrame],
    embeddings: Mapping[str, pl.LazyFrame],
    heldout: Sequence[str],
    similarity: Similarity,
    progress: Progress,
) -> dict[tuple[str, str], np.ndarray]:
    """Return `partner_similarities` of a fixed sample of SIMILARITY_SAMPLE synthetic documents (id, seed_id, text).

    `embeddings` are the tables of pairing/embeddings by shard; seed documents are in the shard of what was written from
    them. Partners are looked for among the texts `heldout`.
    """
    chosen = fixed_sample({shard: ids_of(frame) for shard, frame in synthetic.items()}, SIMILARITY_SAMPLE)
    texts, seeds = [], [np.zeros((0, similarity.quantizer.dimensions), np.float32)]
    for shard in sorted(chosen):
        rows = texts_of(synthetic[shard], chosen[shard], "seed_id")
        known, vectors = similarity.with_seeds(rows, embeddings[shard])
        texts += known["text"].to_list()
        seeds.append(vectors)
    written, real = (similarity.vectors(part, progress) for part in (texts, heldout))
    return partner_similarities(written, np.concatenate(seeds), real, similarity.pairing.min_similarity)


def tracked(texts: Iterable[pl.Series], progress: Progress) -> Iterator[pl.Series]:
    """Yield each of some series of texts, and advance `progress` by them once they have been read."""
    for part in texts:
        yield part
        progress.advance(len(part))


def novelty_table(
    written: Sequence[str],
    real: Sequence[str],
    corpus: Iterable[Iterable[str]],
    copy_words: int,
    similarities: Mapping[tuple[str, str], np.ndarray],
) -> pl.DataFrame:
    """Return the table (NOVELTY_SCHEMA) of synthetic and held-out texts (`written`, `real`) compared with those of D.

    `corpus` yields the texts of D, some at a time. `copy_words` are the words of a shingle of the pair filter.
    `similarities` is what `partner_similarities` returns.
    """
    values: dict[tuple[str, int | None, str], np.ndarray] = {}
    own = np.repeat([SYNTHETIC, HELDOUT], [len(written), len(real)])
    comparison = CorpusComparison([*written, *real], sorted({*NGRAMS, copy_words}))
    for part in corpus:
        comparison.feed(part)
    lengths = comparison.words.totals / UNITS_PER_WORD
    copied, longest = comparison.copied(copy_words), comparison.longest.words
    for name in (SYNTHETIC, HELDOUT):
        among = own == name
        values["copied_ngrams", copy_words, name] = copied[among]
        values["mostly_copied", copy_words, name] = (copied[among] > COPY_THRESHOLD).astype(float)
        values["longest_copy", None, name] = longest[among].astype(float)
        values["longest_copy_share", None, name] = longest[among] / np.maximum(comparison.longest.most[among], 1)
        values["length", None, name] = lengths[among]
        for words in comparison.sizes:
            values["novel_ngrams", words, name] = comparison.novel(words, among)
    values |= {(measure, None, name): found for (measure, name), found in similarities.items()}
    rows = [
        _row(measure, words, name, values[measure, words, name], int((own == name).sum()))
        for measure, words, name in expected_rows(copy_words)
    ]
    return pl.DataFrame(rows, schema=NOVELTY_SCHEMA)


def _row(measure: str, words: int | None, corpus: str, values: np.ndarray, documents: int) -> dict[str, Any]:
    spread: list[float | None] = [None] * 4
    if len(values) and measure not in ("novel_ngrams", "mostly_copied", "nearer_to_partner"):
        spread = [*np.quantile(values, (0.1, 0.5, 0.9)).tolist(), float(values.max())]
    mean = float(values.mean()) if len(values) else None
    # Of all n-grams there is one value each.
    count = documents if measure == "novel_ngrams" else len(values)
    return dict(zip(NOVELTY_SCHEMA, (measure, words, corpus, mean, *spread, count, DEFINITIONS[measure]), strict=True))


class CorpusComparison:
    """Texts, and which of their n-grams stand in the texts of a corpus that is given to `feed`."""

    def __init__(self, texts: Sequence[str], sizes: Sequence[int]) -> None:
        """Index the n-grams of `texts` for each n of `sizes` (words)."""
        self.words, self.sizes = Words.of(segment(map(normalise, texts))), sizes
        self.longest = LongestRuns(self.words)
        self._known: dict[int, KnownHashes] = {}
        self._held: dict[int, np.ndarray] = {}
        for size in sizes:
            self._known[size] = KnownHashes(self.words.hash(*self.words.runs(UNITS_PER_WORD * size)))
            self._held[size] = np.zeros(len(self._known[size].hashes), bool)

    def feed(self, texts: Iterable[str]) -> None:
        """Compare with more texts of the corpus."""
        for batch in batched(texts):
            words = Words.of(segment(batch))
            for size, known in self._known.items():
                hashes = words.hash(*words.runs(UNITS_PER_WORD * size))
                found = np.unique(hashes[known.places(hashes)])
                self._held[size][np.searchsorted(known.hashes, found)] = True
            self.longest.feed(words)

    def _found(self, size: int) -> tuple[np.ndarray, np.ndarray]:
        """Return of every n-gram of the texts which text it is of, and whether the corpus holds it."""
        places, ends = self.words.runs(UNITS_PER_WORD * size)
        known = np.searchsorted(self._known[size].hashes, self.words.hash(places, ends))
        return self.words.text_of(places), self._held[size][known]

    def copied(self, size: int) -> np.ndarray:
        """Return of each text the share of its n-grams that the corpus holds; one that is shorter is a single n-gram.

        An empty text holds nothing of the corpus.
        """
        texts, held = self._found(size)
        count = len(self.words.lengths)
        total = np.bincount(texts, minlength=count)
        share = np.bincount(texts, weights=held, minlength=count) / np.maximum(total, 1)
        whole = (self.longest.words == self.longest.most) & (self.longest.most > 0)
        return np.where(total > 0, share, whole)

    def novel(self, size: int, among: np.ndarray) -> np.ndarray:
        """Return for each n-gram of the texts `among` (a mask) whether it is not in the corpus, 1.0 or 0.0."""
        texts, held = self._found(size)
        return (~held[among[texts]]).astype(float)


class LongestRuns:
    """The longest run of words of each of some texts that stands in one text of a corpus, exactly.

    A run that stands there does so with all runs in it, so of each batch of the corpus a text's longest run is found by
    searching among lengths: only runs one word longer than the longest so far are looked for, and longer ones where
    those are found. Runs of equal length are looked for together, of all texts.
    """

    def __init__(self, words: Words) -> None:
        self._words = words
        self.most = words.totals // UNITS_PER_WORD
        self.words = np.zeros(len(words.lengths), np.int64)
        self._sought: dict[int, tuple[bytes, np.ndarray, np.ndarray, KnownHashes]] = {}

    def feed(self, batch: Words) -> None:
        """Compare with the `batch` of words of the corpus."""
        low, high = self.words, self.most + 1
        step, failed, first = np.ones_like(low), np.zeros(len(low), bool), True
        while len(active := np.flatnonzero(high - low > 1)):
            trial = np.where(failed, (low + high) // 2, np.minimum(low + step, self.most))[active]
            held = np.zeros(len(low), bool)
            sizes = np.unique(trial)
            for size in sizes.tolist():
                held[self._holding(batch, active[trial == size], size, first)] = True
            if first:
                self._sought = {size: self._sought[size] for size in sizes.tolist()}
            found, lost = active[held[active]], active[~held[active]]
            low[found] = trial[held[active]]
            high[lost] = trial[~held[active]]
            failed[lost], first = True, False
            step[found] *= 2

    def _holding(self, batch: Words, texts: np.ndarray, size: int, keep: bool) -> np.ndarray:
        """Return those of `texts` of which a run of `size` words stands in the batch."""
        sought = self._sought.get(size)
        if sought is None or sought[0] != texts.tobytes():
            places, ends = self._words.runs(UNITS_PER_WORD * size)
            owners = self._words.text_of(places)
            among = np.isin(owners, texts)
            hashes = self._words.hash(places[among], ends[among])
            sought = texts.tobytes(), hashes, owners[among], KnownHashes(hashes)
            if keep:
                self._sought[size] = sought
        _, own, owners, known = sought
        hashes = batch.hash(*batch.runs(UNITS_PER_WORD * size))
        return owners[np.isin(own, hashes[known.places(hashes)])]


def partner_similarities(
    synthetic: np.ndarray, seeds: np.ndarray, heldout: np.ndarray, min_similarity: float
) -> dict[tuple[str, str], np.ndarray]:
    """Return the values of SIMILARITIES by measure and corpus (SYNTHETIC, SEED), for the seeds that have a partner.

    The arguments are unit vectors: of synthetic documents and their seed documents, (documents, dim) each, and of
    held-out documents, (held-out documents, dim).
    """
    found = {(measure, name): np.zeros(0) for measure in SIMILARITIES for name in (SYNTHETIC, SEED)}
    if not len(synthetic) or not len(heldout):
        return found
    nearest = seeds @ heldout.T
    partner = nearest.argmax(axis=1)
    has_one = nearest[np.arange(len(seeds)), partner] >= min_similarity
    drawn = np.random.Generator(np.random.PCG64(0)).integers(0, len(heldout), len(seeds))
    for name, vectors in ((SYNTHETIC, synthetic[has_one]), (SEED, seeds[has_one])):
        to_partner, to_random = ((vectors * heldout[rows[has_one]]).sum(axis=1) for rows in (partner, drawn))
        values = to_partner, to_random, to_partner > to_random
        found |= {(measure, name): row.astype(float) for measure, row in zip(SIMILARITIES, values, strict=True)}
    return found


def table_problems(table: pl.DataFrame, copy_words: int) -> list[str]:
    """Return rows that are not the expected ones, shares outside [0, 1], or quantiles out of order."""
    if (found := table.select("measure", "words", "corpus").rows()) != expected_rows(copy_words):
        return [f"rows are {found}"]
    share = ~pl.col("measure").is_in(SHARES) | pl.col("mean").is_between(0, 1)
    counted = (pl.col("documents") > 0) == pl.col("mean").is_not_null()
    # A mean of n-grams may lack documents that are shorter.
    counted |= (pl.col("measure") == "novel_ngrams") & pl.col("mean").is_null()
    ordered = (pl.col("p10") <= pl.col("median")) & (pl.col("median") <= pl.col("p90"))
    ordered &= pl.col("p90") <= pl.col("maximum")
    wrong = table.filter(~(share.fill_null(True) & counted & ordered.fill_null(True)))
    return [f"{row['measure']} ({row['corpus']}): {row['mean']}" for row in wrong.iter_rows(named=True)]


def copying_problems(table: pl.DataFrame) -> list[str]:
    """Return that clearly more synthetic than held-out documents are mostly copied from D; empty where not."""
    shares = dict(table.filter(measure="mostly_copied").select("corpus", "mean").iter_rows())
    copied, reference = shares.get(SYNTHETIC) or 0.0, shares.get(HELDOUT) or 0.0
    if copied <= reference + MAX_EXCESS:
        return []
    return [f"{copied:.1%} of the synthetic documents are mostly copied from D, and {reference:.1%} of held-out ones"]


def subject_problems(table: pl.DataFrame) -> list[str]:
    """Return that synthetic documents are not nearer to the seeds' held-out partners than to random documents.

    The share that is nearer has to be three standard errors above one half, which is chance.
    """
    row = table.filter(measure="nearer_to_partner", corpus=SYNTHETIC).row(0, named=True)
    count = row["documents"]
    if not count or row["mean"] > 0.5 + 1.5 / np.sqrt(count):
        return []
    return [
        f"{row['mean']:.1%} of {count} synthetic documents are more similar to the held-out partner of their seed than "
        "to a random held-out document: chance is 50%"
    ]
