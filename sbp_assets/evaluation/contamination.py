"""Contamination: which evaluation items the training documents contain, by shared runs of words (n-grams).

An item and a document share an n-gram where n consecutive words are the same, case and punctuation aside (Brown et al.
2020, GPT-3, appendix C: n = 13). Two things are counted, per evaluation set and corpus:

- *hit*: items with an n-gram that the corpus holds, in COMMON documents at most (GPT-3's rule: what more hold is
  boilerplate or a quotation). Templated text shares runs of words without a leak, so a hit is a hint.
- *contained*: items of whose n-grams one single document holds CONTAINED or more, common ones too (the share of Llama
  2's "dirty" samples: Touvron et al. 2023, appendix A.6). That is a leak.

Words are those of every measure (`corpus.shingles`), and n of them are as much text in scripts without spaces. An item
of fewer than n words is one n-gram, all of it, from `min_words` on; a shorter one is not judged. A question is compared
together with its right answer.

The items' n-grams are held as sorted 64-bit hashes, and training documents stream past them: memory is that of the
evaluation sets and of one batch of documents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from sbp_assets.corpus.shingles import UNITS_PER_WORD, KnownHashes, Words, batched, normalise, segment
from sbp_assets.corpus.split import ORACLE, UNIQUE
from sbp_assets.evaluation.tasks import DATA, Tasks
from sbp_assets.settings import Contamination
from sbp_assets.storage.columns import Column, table_schema
from sbp_assets.storage.paths import read_table
from sbp_assets.storage.progress import Progress

JUDGED = 0.5  # Share of a set's items that are long enough, below which a comparison says little of the set.
COMMON = 10  # Documents that may hold an n-gram before it counts as boilerplate.
CONTAINED = 0.8  # Share of an item's n-grams in one document from which on the item counts as contained.
SYNTHETIC = "synthetic"
CORPORA = (UNIQUE, ORACLE, SYNTHETIC)

_TEXTS = "corpus/documents.text evaluation/tasks.text synthesis/synthetic_documents.text"
_SET = Column("evaluation_set", pl.String, "A task of evaluation/tasks")
_CORPUS = Column("corpus", pl.String, f"{UNIQUE} (D), {ORACLE} or {SYNTHETIC}")
_SHARE = "Of the judged items; null where there are none"
CONTAMINATION_COLUMNS = (
    _SET,
    _CORPUS,
    Column("documents", pl.Int64, "Documents of the corpus"),
    # 1.5 Chinese characters or 3 letters of other scripts without spaces are as long as a word.
    Column("words", pl.Int64, "n of the n-grams, or as much unspaced text; an item of fewer words is one n-gram"),
    Column("items", pl.Int64, "Items of the set"),
    Column("judged", pl.Int64, "Items that are long enough"),
    Column("hit", pl.Int64, f"Items with an n-gram that 1 to {COMMON} documents hold", _TEXTS),
    Column("hit_share", pl.Float64, _SHARE, _TEXTS),
    Column("contained", pl.Int64, f"Items of whose n-grams one document holds {CONTAINED:.0%} or more", _TEXTS),
    Column("contained_share", pl.Float64, _SHARE, _TEXTS),
)
CONTAMINATED_ITEM_COLUMNS = (
    _SET,
    Column("item", pl.String, "Document id, or row of the task's data, from 0", "evaluation/tasks.id"),
    _CORPUS,
    Column("hit", pl.Boolean, "As in contamination", _TEXTS),
    Column("contained", pl.Boolean, "As in contamination", _TEXTS),
    Column("ngrams", pl.Int64, "Different n-grams of the item"),
    Column("shared_ngrams", pl.Int64, "Of these, in any document of the corpus", _TEXTS),
    Column(
        "document",
        pl.String,
        "The document that holds most of them; of equals, the first",
        "corpus/documents.id synthesis/synthetic_documents.id",
    ),
    Column("document_share", pl.Float64, "Share of the item's n-grams that this document holds", _TEXTS),
    Column("ngram", pl.String, "The first that the two share: words as compared, joined by spaces", _TEXTS),
)

_INDEX_SCHEMA = {"hash": pl.UInt64, "number": pl.Int64, "place": pl.Int64, "n": pl.Int64}
_HOLDERS_SCHEMA = {"hash": pl.UInt64, "documents": pl.Int64}
_BEST_SCHEMA = {"number": pl.Int64, "document": pl.String, "shared": pl.Int64, "place": pl.Int64, "n": pl.Int64}


def _chosen(row: Mapping[str, Any]) -> str:
    return f"{row['question']} {row['choices'][row['answer']]}"


def _labelled(row: Mapping[str, Any]) -> str:
    return f"{row['question']} {row['choices']['text'][row['choices']['label'].index(row['answerKey'])]}"


TEXTS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "heldout": itemgetter("text"),
    "openwebtext2": itemgetter("text"),
    "lambada": itemgetter("text"),
    "concept_questions": _chosen,
    "reversed_questions": _chosen,
    "mmlu": _chosen,
    "arc_challenge": _labelled,
    "arc_easy": _labelled,
    "sciq": lambda row: f"{row['support']} {row['question']} {row['correct_answer']}",
    "winogrande": lambda row: row["sentence"].replace("_", row[f"option{row['answer']}"]),
    "triviaqa": lambda row: f"{row['question']} {row['answer']['value']}",
    "webqs": lambda row: f"{row['question']} {next(iter(row['answers']), '')}",
}
"""By task, the text of a row of its data that is compared: the document, or the question with its right answer."""


def evaluation_items(tasks: Path) -> pl.DataFrame:
    """Return every item that is scored (evaluation_set, item, text), from an evaluation/tasks directory.

    An item is named by its id where the data has one, else by its row (from 0).
    """
    frames = [pl.DataFrame(schema={"evaluation_set": pl.String, "item": pl.String, "text": pl.String})]
    for task in Tasks.load(tasks).tasks:
        rows = read_table(tasks / DATA / f"{task.lm_eval}.test.parquet")
        names = rows["id"] if "id" in rows.columns else pl.Series(range(len(rows)))
        texts = [TEXTS[task.name](row) for row in rows.iter_rows(named=True)]
        frames.append(
            pl.DataFrame({"item": names.cast(pl.String), "text": pl.Series(texts, dtype=pl.String)}).select(
                evaluation_set=pl.lit(task.name), item="item", text="text"
            )
        )
    return pl.concat(frames)


def training_documents(
    documents: Mapping[str, pl.LazyFrame], synthetic: Mapping[str, pl.LazyFrame]
) -> Iterator[tuple[str, pl.DataFrame]]:
    """Yield the name of the corpus and rows (id, text) of D, the oracle's documents and the synthetic documents.

    Both arguments are frames by shard. One shard is in memory at a time.
    """
    for key in sorted(documents):
        rows = documents[key].filter(pl.col("split").is_in([UNIQUE, ORACLE])).select("id", "text", "split").collect()
        for (split,), part in rows.partition_by("split", as_dict=True).items():
            yield str(split), part.drop("split")
    for key in sorted(synthetic):
        yield SYNTHETIC, synthetic[key].select("id", "text").collect()


class Comparison:
    """Evaluation items, and the n-grams that the training documents given to `feed` share with them."""

    def __init__(self, items: pl.DataFrame, settings: Contamination) -> None:
        """Index the n-grams of `items` (evaluation_set, item, text)."""
        self._settings, self._words = settings, segment(map(normalise, items["text"]))
        words, self._n = Words.of(self._words), UNITS_PER_WORD * settings.words
        judged = words.totals >= UNITS_PER_WORD * settings.min_words
        places, ends = words.runs(self._n)
        own = judged[words.text_of(places)]
        places, ends = places[own], ends[own]
        # Shorter items are one n-gram each, of as many lengths. Documents are searched for their beginnings alone,
        # which have one length, and what follows there is compared.
        short = np.flatnonzero(judged & (words.totals < self._n))
        first, last = words.starts[short], words.starts[short + 1]
        begin = np.searchsorted(words.reach, words.reach[first] + UNITS_PER_WORD * settings.min_words)
        self._short = pl.DataFrame(
            {"beginning": words.hash(first, begin), "n": last - first, "hash": words.hash(first, last)}
        ).unique(maintain_order=True)
        places, ends = np.concatenate([places, first]), np.concatenate([ends, last])
        number = words.text_of(places)
        # An n-gram counts once for an item that repeats it.
        self._index = pl.DataFrame(
            [words.hash(places, ends), number, places - words.starts[number], ends - places], schema=_INDEX_SCHEMA
        ).unique(["hash", "number"], keep="first", maintain_order=True)
        self._known = KnownHashes(self._index["hash"].to_numpy())
        self._beginnings = KnownHashes(self._short["beginning"].to_numpy())
        self._items = items.select("evaluation_set", "item", number=pl.int_range(pl.len()), judged=pl.Series(judged))
        self._documents = dict.fromkeys(CORPORA, 0)
        self._holders = dict.fromkeys(CORPORA, pl.DataFrame(schema=_HOLDERS_SCHEMA))
        self._best = dict.fromkeys(CORPORA, pl.DataFrame(schema=_BEST_SCHEMA))

    def feed(self, corpus: str, ids: pl.Series, texts: Sequence[str]) -> None:
        """Compare a batch of documents of one of CORPORA, `texts` as `normalise` returns them, with all items."""
        self._documents[corpus] += len(ids)
        held = self._held(texts)
        if held.is_empty():
            return
        holders = pl.concat([self._holders[corpus], held.group_by("hash").agg(documents=pl.len().cast(pl.Int64))])
        self._holders[corpus] = holders.group_by("hash").agg(pl.col("documents").sum())
        overlaps = (
            held.join(self._index, on="hash")
            .group_by("position", "number")
            .agg(shared=pl.len().cast(pl.Int64), place=pl.col("place").min(), n=pl.col("n").sort_by("place").first())
            .sort("position")
        )
        overlaps = overlaps.with_columns(document=ids.gather(overlaps["position"])).select(_BEST_SCHEMA.keys())
        # Of equal overlaps the first document's stays, so that batches do not matter.
        best = pl.concat([self._best[corpus], overlaps]).sort("shared", descending=True, maintain_order=True)
        self._best[corpus] = best.unique("number", keep="first", maintain_order=True)

    def sharing(self, texts: Iterable[str]) -> np.ndarray:
        """Return for each text whether it holds an n-gram of any item, however common."""
        flags = [np.zeros(0, bool)]
        for batch in batched(texts):
            flags.append(np.zeros(len(batch), bool))
            flags[-1][self._held(batch)["position"].to_numpy()] = True
        return np.concatenate(flags)

    def _held(self, texts: Sequence[str]) -> pl.DataFrame:
        """Return the items' n-grams (hash) that each of `texts` (position) holds, once each."""
        if self._index.is_empty():
            return pl.DataFrame(schema={"hash": pl.UInt64, "position": pl.Int64})
        words = Words.of(segment(texts))
        places, ends = words.runs(self._n)
        hashes = words.hash(places, ends)
        at = self._known.places(hashes)
        found = pl.concat([pl.DataFrame({"place": places[at], "hash": hashes[at]}), self._short_items(words)])
        return found.select("hash", position=words.text_of(found["place"].to_numpy())).unique()

    def _short_items(self, words: Words) -> pl.DataFrame:
        """Return place and hash of the runs that are an item shorter than n words."""
        places, ends = words.runs(UNITS_PER_WORD * self._settings.min_words)
        hashes = words.hash(places, ends)
        at = self._beginnings.places(hashes)
        starts = pl.DataFrame({"place": places[at], "beginning": hashes[at]})
        runs = starts.join(self._short, on="beginning").with_columns(end=pl.col("place") + pl.col("n"))
        text_ends = words.starts[words.text_of(runs["place"].to_numpy()) + 1]
        runs = runs.filter(pl.col("end") <= pl.Series(text_ends))
        same = words.hash(runs["place"].to_numpy(), runs["end"].to_numpy()) == runs["hash"].to_numpy()
        return runs.filter(pl.Series(same)).select("place", "hash")

    def results(self) -> tuple[pl.DataFrame, pl.DataFrame]:
        """Return the tables of CONTAMINATION_COLUMNS and of CONTAMINATED_ITEM_COLUMNS.

        The first has a row per set and corpus. The second lists the items that are hit or contained, once per corpus,
        the largest overlap with a single document first.
        """
        sizes = self._index.group_by("number").agg(ngrams=pl.len().cast(pl.Int64))
        frames = []
        for corpus in CORPORA:
            held = self._index.join(self._holders[corpus], on="hash").group_by("number").agg(
                shared_ngrams=pl.len().cast(pl.Int64), hit=(pl.col("documents") <= COMMON).any()
            )  # fmt: skip
            frames.append(
                self._items.join(sizes, on="number", how="left")
                .join(held, on="number", how="left")
                .join(self._best[corpus], on="number", how="left")
                .with_columns(
                    corpus=pl.lit(corpus),
                    documents=pl.lit(self._documents[corpus], dtype=pl.Int64),
                    hit=pl.col("hit").fill_null(False),
                    document_share=pl.col("shared") / pl.col("ngrams"),
                )
                .with_columns(contained=(pl.col("document_share") >= CONTAINED).fill_null(False))
            )
        every = pl.concat(frames).sort("number", maintain_order=True)
        counts = [pl.col(name).sum().cast(pl.Int64) for name in ("judged", "hit", "contained")]
        # Nothing judged: no share, rather than a reassuring zero.
        judged = pl.when(pl.col("judged") > 0).then("judged")
        shares = {f"{name}_share": pl.col(name) / judged for name in ("hit", "contained")}
        summary = (
            every.group_by("evaluation_set", "corpus", maintain_order=True)
            .agg(pl.col("documents").first(), *counts, items=pl.len().cast(pl.Int64))
            .with_columns(words=pl.lit(self._settings.words, dtype=pl.Int64), **shares)
        )
        listed = every.filter(pl.col("hit") | pl.col("contained")).sort(
            "contained", "document_share", descending=True, maintain_order=True
        )
        ngrams = [
            " ".join(self._words[number][place : place + n])
            for number, place, n in listed.select("number", "place", "n").iter_rows()
        ]
        listed = listed.with_columns(ngram=pl.Series(ngrams, dtype=pl.String))
        return (
            summary.select(table_schema(CONTAMINATION_COLUMNS).keys()),
            listed.select(table_schema(CONTAMINATED_ITEM_COLUMNS).keys()),
        )


def compare(
    items: pl.DataFrame, documents: Iterable[tuple[str, pl.DataFrame]], settings: Contamination, progress: Progress
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Return the `Comparison.results` of `items` (evaluation_set, item, text).

    `documents` are names of corpora, each with rows (id, text).
    """
    comparison = Comparison(items, settings)
    for corpus, rows in documents:
        start = 0
        for texts in batched(rows["text"]):
            comparison.feed(corpus, rows["id"].slice(start, len(texts)), texts)
            start += len(texts)
            progress.advance(len(texts))
    return comparison.results()


def uncompared(summary: pl.DataFrame, listed: pl.DataFrame, tasks: Path) -> list[str]:
    """Return the evaluation sets that were not compared with each corpus in full, or have no item that is long enough.

    Also those of which `listed` (CONTAMINATED_ITEM_COLUMNS) holds another number of items than `summary`
    (CONTAMINATION_COLUMNS) counts. `tasks` is an evaluation/tasks directory.
    """
    by = ["evaluation_set", "corpus"]
    found = listed.group_by(by).agg(pl.col("hit", "contained").sum().cast(pl.Int64))
    both = summary.select(*by, "hit", "contained").join(found, on=by, how="full", suffix="_listed").fill_null(0)
    other = (pl.col("hit") != pl.col("hit_listed")) | (pl.col("contained") != pl.col("contained_listed"))
    problems = [
        f"{row['evaluation_set']} in {row['corpus']}: {row['hit']} hit and {row['contained']} contained, but "
        f"{row['hit_listed']} and {row['contained_listed']} are listed"
        for row in both.filter(other).iter_rows(named=True)
    ]
    for task in Tasks.load(tasks).tasks:
        rows = summary.filter(pl.col("evaluation_set") == task.name)
        if sorted(rows["corpus"]) != sorted(CORPORA):
            problems.append(f"{task.name}: compared with {', '.join(sorted(rows['corpus'])) or 'nothing'}")
        elif rows["items"].unique().to_list() != [task.documents]:
            problems.append(f"{task.name}: {rows['items'][0]} items compared of {task.documents}")
        elif not rows["judged"].sum():
            problems.append(
                f"{task.name}: none of {task.documents} items has enough words to compare: lower "
                "contamination.min_words"
            )
    return problems


def mostly_unjudged(summary: pl.DataFrame) -> list[str]:
    """Return the evaluation sets of which some items are long enough to compare, but less than the share JUDGED."""
    sets = summary.select("evaluation_set", "judged", "items").unique(maintain_order=True)
    few = sets.filter(pl.col("judged") > 0, pl.col("judged") < JUDGED * pl.col("items"))
    return [f"{name}: {judged} of {items} items have enough words" for name, judged, items in few.iter_rows()]


def above(summary: pl.DataFrame, column: str, max_share: float) -> list[str]:
    """Return the sets and corpora of whose judged items more than `max_share` are `column` ('hit' or 'contained')."""
    return [
        f"{row['evaluation_set']} in {row['corpus']}: {row[column]} of {row['judged']} items {column}"
        for row in summary.filter(pl.col(f"{column}_share") > max_share).iter_rows(named=True)
    ]


def misplaced(listed: pl.DataFrame, documents: Iterable[tuple[str, pl.DataFrame]]) -> list[str]:
    """Return the items of `listed` (CONTAMINATED_ITEM_COLUMNS) whose document lacks the n-gram or does not exist."""
    missing = {(row["corpus"], row["document"], row["ngram"]): row["item"] for row in listed.iter_rows(named=True)}
    for corpus, rows in documents:
        wanted = listed.filter(pl.col("corpus") == corpus).select("document", "ngram")
        found = wanted.unique().join(rows, left_on="document", right_on="id")
        texts = segment(map(normalise, found["text"])).list.join(" ")
        for document, ngram, text in zip(found["document"], found["ngram"], texts, strict=True):
            if f" {ngram} " in f" {text} ":
                missing.pop((corpus, document, ngram), None)
    return [f"{item}: not in {document} ({corpus})" for (corpus, document, _), item in missing.items()]
