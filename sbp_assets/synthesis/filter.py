"""Which synthetic documents are kept out of training (`synthesis.filter`): values by document, and what is decided.

All documents are measured by the criteria that are set, and by no others. Copying is from all of D, whose shingles and
those of the synthetic documents are staged in Parquet files and joined by DuckDB: memory is that of one shard and of
DuckDB's limit, and time is linear in documents.

The budget stays equal: tokens that are dropped are made up for by D, which the SBP arm reads for the rest of its budget
(`pretraining.budget.plan_arm`). What was sampled and dropped is still charged as generation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import polars as pl

from sbp_assets.corpus.shingles import UNITS_PER_WORD, KnownHashes, Words, batched, segment
from sbp_assets.settings import Filter
from sbp_assets.storage.columns import Column, table_schema
from sbp_assets.storage.database import database
from sbp_assets.storage.paths import duckdb_table, read_table, scan_table
from sbp_assets.storage.progress import Progress
from sbp_assets.synthesis.quality import repetition

# Share of the synthetic tokens: an SBP arm that reads much less than planned is nearer to the baseline than its
# settings say.
MAX_DROPPED_SHARE = 0.3

_TEXT = "synthesis/synthetic_documents.text"
DECISION_COLUMNS = [
    Column("id", pl.String, "Synthetic document.", "synthesis/synthetic_documents"),
    Column("n_tokens", pl.Int64, "Its tokens.", "synthesis/synthetic_documents"),
    Column("repetition", pl.Float64, "Share of its 4-word sequences that repeat an earlier one.", _TEXT),
    Column("copying", pl.Float64, "Share of its shingles that stand anywhere in D.", f"{_TEXT} corpus/documents.text"),
    Column("contaminated", pl.Boolean, "Whether it shares a run of words with an item of the evaluation.", _TEXT),
    Column("seed_similarity", pl.Float64, "Cosine to its seed document.", f"{_TEXT} pairing/embeddings.vector"),
    Column("dropped_for", pl.String, "The criteria that it fails, with commas; null: it is kept."),
]
DECISION_SCHEMA = table_schema(DECISION_COLUMNS)
CRITERIA = ("repetition", "copying", "contaminated", "seed_similarity")

# Of texts, whether each shares words with an item; of a shard's rows (seed_id, text), their similarity to the seeds.
Contaminated = Callable[[Sequence[str]], np.ndarray]
SeedSimilarity = Callable[[str, pl.DataFrame], np.ndarray]


def table_of(directory: Path, shard: str) -> Path:
    """Return the table of a shard's decisions (DECISION_COLUMNS) in the directory of all."""
    return directory / f"{shard}.parquet"


def kept(rows: pl.DataFrame, directory: Path, shard: str) -> pl.DataFrame:
    """Return those of a shard's synthetic documents (id, …) that go into training, in their order."""
    dropped = read_table(table_of(directory, shard), ["id", "dropped_for"]).drop_nulls()["id"]
    return rows.filter(~pl.col("id").is_in(dropped.to_list()))


def failed_criteria(settings: Filter) -> pl.Expr:
    """Return the expression of `dropped_for`, of the other columns of DECISION_COLUMNS."""
    fails: dict[str, pl.Expr] = {}
    if settings.max_repetition is not None:
        fails["repetition"] = pl.col("repetition") > settings.max_repetition
    if settings.max_copying is not None:
        fails["copying"] = pl.col("copying") > settings.max_copying
    if settings.contamination_words is not None:
        fails["contaminated"] = pl.col("contaminated")
    if settings.min_seed_similarity is not None:
        fails["seed_similarity"] = pl.col("seed_similarity") < settings.min_seed_similarity
    named = [pl.when(failed).then(pl.lit(name)) for name, failed in fails.items()]
    listed = pl.concat_str(*named, separator=", ", ignore_nulls=True)
    return pl.when(listed != "").then(listed)


def write_decisions(
    directory: Path,
    synthetic: Mapping[str, pl.LazyFrame],
    corpus: Mapping[str, pl.LazyFrame],
    settings: Filter,
    copy_words: int,
    contaminated: Contaminated | None,
    seed_similarity: SeedSimilarity | None,
    scratch: Path,
    memory_limit: str,
    progress: Progress,
) -> dict[str, int]:
    """Write a table of DECISION_COLUMNS for each shard into the existing `directory`, and return what was counted.

    `synthetic` (id, seed_id, text, n_tokens) and `corpus`, the documents of D (text), are frames by shard; `copy_words`
    are the words of a shingle. `contaminated` and `seed_similarity` are None where their criterion is not set. The
    folder `scratch` is filled. `progress` counts documents, those of D too where copying is measured.

    The counts are documents and tokens, those dropped, and the documents dropped for each criterion that is set.
    """
    copied = CopiedShares(copy_words, scratch, memory_limit) if settings.max_copying is not None else None
    for shard in sorted(synthetic):
        rows = synthetic[shard].select("id", "seed_id", "text", "n_tokens").collect()
        texts = rows["text"].to_list()
        values = {
            "repetition": repetition(texts) if settings.max_repetition is not None else None,
            "contaminated": contaminated(texts) if contaminated else None,
            "seed_similarity": seed_similarity(shard, rows) if seed_similarity else None,
        }
        if copied:
            copied.add(texts)
        measured = rows.select("id", "n_tokens").with_columns(
            pl.Series(name, [None] * len(rows) if found is None else found, dtype=DECISION_SCHEMA[name])
            for name, found in values.items()
        )
        measured.write_parquet(table_of(scratch, shard))
        progress.advance(len(rows))
    if copied:
        for shard in sorted(corpus):
            documents = corpus[shard].select("text").collect()["text"]
            copied.compare(documents)
            progress.advance(len(documents))
        copied.finish()
    counts = {"documents": 0, "tokens": 0, "dropped": 0, "dropped_tokens": 0}
    counts |= {f"dropped_for_{name}": 0 for name in CRITERIA if name in failed_criteria(settings).meta.root_names()}
    for shard in sorted(synthetic):
        rows = read_table(table_of(scratch, shard))
        shares = copied.take(len(rows)) if copied else pl.Series([None] * len(rows), dtype=pl.Float64)
        rows = rows.with_columns(copying=shares).with_columns(dropped_for=failed_criteria(settings))
        rows.select(list(DECISION_SCHEMA)).write_parquet(table_of(directory, shard))
        dropped = rows.filter(pl.col("dropped_for").is_not_null())
        counts["documents"] += len(rows)
        counts["tokens"] += int(rows["n_tokens"].sum())
        counts["dropped"] += len(dropped)
        counts["dropped_tokens"] += int(dropped["n_tokens"].sum())
        for name in CRITERIA:
            if f"dropped_for_{name}" in counts:
                named = dropped["dropped_for"].str.split(", ").list.contains(name)
                counts[f"dropped_for_{name}"] += int(named.sum())
    return counts


class CopiedShares:
    """The share of each text's shingles that stand in any text of a corpus.

    First every text is given to `add`, then the corpus to `compare`; after `finish`, `take` returns shares in order.
    A text that is shorter than a shingle is one as a whole, and looked for as such.
    """

    def __init__(self, words: int, scratch: Path, memory_limit: str) -> None:
        self._words, self._scratch, self._memory_limit = words, scratch, memory_limit
        self._texts = self._taken = self._files = 0
        self._short: dict[int, list[tuple[int, int]]] = {}  # units -> (hash, number) of texts of that length
        self._known: dict[int, tuple[KnownHashes, set[int]]] = {}
        for name in ("own", "corpus"):
            (scratch / name).mkdir()

    def add(self, texts: Sequence[str]) -> None:
        """Stage the shingles of more texts."""
        for batch in batched(texts):
            words = Words.of(segment(batch))
            shingles, bounds = words.shingles(self._words)
            numbers = np.arange(self._texts, self._texts + len(batch))
            short = words.totals < UNITS_PER_WORD * self._words
            for place in np.flatnonzero(short & (words.totals > 0)).tolist():
                found = int(shingles[bounds[place]]), int(numbers[place])
                self._short.setdefault(int(words.totals[place]), []).append(found)
            frame = pl.DataFrame({"n": np.repeat(numbers, np.diff(bounds)), "shingle": shingles})
            long_ = pl.Series(np.repeat(~short, np.diff(bounds)))
            self._stage("own", frame.filter(long_))
            self._texts += len(batch)

    def compare(self, texts: Iterable[str]) -> None:
        """Stage the shingles of more texts of the corpus."""
        if not self._known:
            hashes = {units: np.array([one for one, _ in found], np.uint64) for units, found in self._short.items()}
            self._known = {units: (KnownHashes(own), set()) for units, own in hashes.items()}
        for batch in batched(texts):
            words = Words.of(segment(batch))
            whole = words.hash(*words.runs(UNITS_PER_WORD * self._words))
            self._stage("corpus", pl.DataFrame({"shingle": np.unique(whole)}))
            for units, (known, found) in self._known.items():
                runs = words.hash(*words.runs(units))
                found.update(runs[known.places(runs)].tolist())

    def finish(self) -> None:
        """Compute the shares."""
        numbers = [
            number for units, (_, found) in self._known.items() for one, number in self._short[units] if one in found
        ]
        pl.DataFrame({"n": numbers}, schema={"n": pl.Int64}).write_parquet(self._scratch / "short.parquet")
        self._stage("own", pl.DataFrame(schema={"n": pl.Int64, "shingle": pl.UInt64}))
        self._stage("corpus", pl.DataFrame(schema={"shingle": pl.UInt64}))
        with database(self._scratch, self._memory_limit) as db:
            own, corpus = (duckdb_table(self._scratch / name, "*.parquet") for name in ("own", "corpus"))
            short = duckdb_table(self._scratch, "short.parquet")
            target = str(self._scratch / "shares.parquet").replace("'", "''")
            db.execute(_SHARES.format(own=own, corpus=corpus, short=short, texts=self._texts, target=target))

    def take(self, count: int) -> pl.Series:
        """Return the shares of the next `count` texts."""
        start, self._taken = self._taken, self._taken + count
        shares = scan_table(self._scratch / "shares.parquet").filter(pl.col("n").is_between(start, start + count - 1))
        return shares.sort("n").collect()["share"]

    def _stage(self, name: str, frame: pl.DataFrame) -> None:
        frame.write_parquet(self._scratch / name / f"{self._files}.parquet")
        self._files += 1


_SHARES = """
COPY (
    WITH held AS (
        SELECT n, avg(CASE WHEN known.shingle IS NULL THEN 0 ELSE 1 END) AS share
        FROM {own} own LEFT JOIN (SELECT DISTINCT shingle FROM {corpus}) known USING (shingle) GROUP BY n
    )
    SELECT numbers.n AS n, CASE WHEN short.n IS NOT NULL THEN 1.0 ELSE coalesce(held.share, 0.0) END AS share
    FROM (SELECT range AS n FROM range({texts})) numbers
    LEFT JOIN held USING (n) LEFT JOIN {short} short USING (n)
    ORDER BY n
) TO '{target}' (FORMAT parquet)
"""


def decision_problems(directory: Path, synthetic: Mapping[str, pl.LazyFrame], settings: Filter) -> Iterator[str]:
    """Yield the shards whose decisions are not of their documents, or do not follow from the values."""
    for shard in sorted(synthetic):
        path = table_of(directory, shard)
        rows = read_table(path) if path.exists() else pl.DataFrame(schema=DECISION_SCHEMA)
        documents = synthetic[shard].select("id", "n_tokens").collect()
        if not rows.select("id", "n_tokens").equals(documents):
            yield f"shard {shard}: {len(rows)} decisions, not on its {len(documents)} documents in their order"
        wrong = rows.filter(pl.col("dropped_for").ne_missing(failed_criteria(settings)))
        if len(wrong):
            yield f"shard {shard}: {len(wrong)} decisions do not follow from their values, as of {wrong['id'][0]}"


def dropped_share(directory: Path, shards: Iterable[str]) -> float:
    """Return the share of the synthetic tokens that are dropped."""
    dropped = total = 0
    for shard in shards:
        rows = read_table(table_of(directory, shard), ["n_tokens", "dropped_for"])
        total += int(rows["n_tokens"].sum())
        dropped += int(rows.filter(pl.col("dropped_for").is_not_null())["n_tokens"].sum())
    return dropped / max(total, 1)
