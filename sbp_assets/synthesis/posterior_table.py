"""The table of the posterior predictive, one row per group of facts, and what must hold of it."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import duckdb
import numpy as np
import polars as pl
import pyarrow as pa

from sbp_assets.corpus.concept_texts import ATTRIBUTES
from sbp_assets.corpus.concepts import ConceptWorld
from sbp_assets.storage.columns import Column, table_schema
from sbp_assets.storage.database import batches, database
from sbp_assets.storage.paths import duckdb_table
from sbp_assets.storage.progress import Progress
from sbp_assets.storage.token_arrays import TokenArrays
from sbp_assets.synthesis.posterior import CONCEPT, STATEMENT_SCHEMA, Learner, Seed, grade, seed_documents

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

UNKNOWN = ("new_unknown", "other_unknown")
DEFINITIONS = {
    CONCEPT: "Every fact stated: is it about the concept that d1 is about? Chance: that concept's share of D.",
    "restated": "Facts that the part of d1 which the synthesizer read states, too.",
    "new": "Other facts of d1's concept: new_known and new_unknown together.",
    "new_known": "Facts of d1's concept that D states, but not the part of d1 which the synthesizer read.",
    "new_unknown": "Facts of d1's concept that D states nowhere: nobody who read only D can know them.",
    "other": "Facts of a concept that d1 is not about: other_known and other_unknown together.",
    "other_known": "Facts of another concept that D states.",
    "other_unknown": "Facts of another concept that D states nowhere.",
}
_PARTS = {"new": ("new_known", "new_unknown"), "other": ("other_known", "other_unknown")}

STATED = "synthesis/synthetic_documents.seed_id synthesis/synthetic_documents.text corpus/tokens.tokens"
POSTERIOR_COLUMNS = [
    Column("group", pl.String, "Which facts, or concept; see definition."),
    Column("statements", pl.Int64, "Facts stated, each once per synthetic document.", STATED),
    Column("facts", pl.Int64, "Different (concept, attribute) among them.", STATED),
    Column("seed_documents", pl.Int64, "Seed documents whose synthetic documents state them.", STATED),
    Column("accuracy", pl.Float64, "Share of the statements that are right; null where there are none.", STATED),
    Column("stderr", pl.Float64, "Standard error of accuracy: bootstrap over the seed documents.", STATED),
    Column(
        "posterior_sampling",
        pl.Float64,
        "Accuracy expected of values sampled from the exact posterior predictive.",
        STATED,
    ),
    Column("posterior_mode", pl.Float64, "Accuracy of its most probable values: the best that D allows.", STATED),
    Column("chance", pl.Float64, "Accuracy of guessing: one in as many values as the attribute has.", STATED),
    Column(
        "p_above_chance",
        pl.Float64,
        "Probability of such an accuracy or a higher one by chance (randomisation test).",
        STATED,
    ),
    Column("definition", pl.String, "Of the group."),
]
POSTERIOR_SCHEMA = table_schema(POSTERIOR_COLUMNS)

MEASURES = ("right", "sampling", "mode", "chance")
RESAMPLES = 1000
PIECE = 1 << 16  # Seed documents that are drawn at a time.
DRAWS = 10_000
SEED = 0
# Of each check as a whole: one passing run in a thousand shows a leak where there is none. Where a check tests several
# groups, each is tested at an equal share of it (Bonferroni).
LEVEL = 0.001


def posterior_over_shards(
    world: ConceptWorld,
    synthetic_documents: Mapping[str, pl.LazyFrame],
    tokens: Mapping[str, Path],
    tokenizer: PreTrainedTokenizerFast,
    max_document_tokens: int,
    scratch: Path,
    memory_limit: str,
    conditional: bool = True,
    progress: Progress | None = None,
) -> pl.DataFrame:
    """Return the `posterior_table` of synthetic documents (seed_id, text) and the corpus' token arrays, by shard.

    Without `conditional` the synthetic documents were sampled without their seed documents.

    What D states is gathered from all shards first. One shard's texts and statements are in memory at a time, beside
    the world's facts and what `posterior_table` holds.
    """
    learner = Learner(world)

    def seeds(shard: str) -> dict[str, Seed]:
        return seed_documents(TokenArrays.load(tokens[shard]), tokenizer, max_document_tokens, conditional)

    def graded(shard: str) -> pl.DataFrame:
        statements = grade(learner, seeds(shard), synthetic_documents[shard].select("seed_id", "text").collect())
        if progress:
            progress.advance()
        return statements

    for shard in sorted(tokens):
        learner.read(seed.text for seed in seeds(shard).values())
    return posterior_table(map(graded, sorted(tokens)), world, scratch, memory_limit)


def posterior_table(
    shards: Iterable[pl.DataFrame], world: ConceptWorld, scratch: Path, memory_limit: str
) -> pl.DataFrame:
    """Return one row per group of DEFINITIONS from the graded statements of each shard, of which one is held at a time.

    accuracy, posterior_sampling, posterior_mode and chance are means over the statements, null where there are none;
    stderr is a bootstrap over the seed documents (null below two); p_above_chance see `p_above_chance`.

    The numbers of each seed document are files in the empty folder `scratch`, which DuckDB joins in `memory_limit`.
    Beside it memory holds how often each value of the world was stated.
    """
    answered = ("group", "concept", "attribute", "value")
    answers = pl.DataFrame(schema={**{name: STATEMENT_SCHEMA[name] for name in answered}, "len": pl.UInt32()})
    for number, statements in enumerate(itertools.chain([pl.DataFrame(schema=STATEMENT_SCHEMA)], shards)):
        by_seed = statements.group_by("seed_id", "group").agg(
            pl.col(MEASURES).cast(pl.Float64).sum(), statements=pl.len()
        )
        by_seed.write_parquet(scratch / f"seeds-{number:06d}.parquet")
        answers = pl.concat([answers, statements.group_by(answered).len()]).group_by(answered).agg(pl.col("len").sum())
    with database(scratch, memory_limit) as db:
        db.execute(f"CREATE VIEW seeds AS FROM {duckdb_table(scratch, 'seeds-*.parquet')}")
        return pl.DataFrame(_rows(db, answers, world, scratch), schema=POSTERIOR_SCHEMA)


def _rows(
    db: duckdb.DuckDBPyConnection, answers: pl.DataFrame, world: ConceptWorld, scratch: Path
) -> Iterator[dict[str, object]]:
    for group, definition in DEFINITIONS.items():
        parts = _PARTS.get(group, (group,))
        own = _by_seed(db, parts, scratch)
        said = answers.filter(pl.col("group").is_in(parts))
        sums = {name: float(pl.Series(pa.array(numbers)).sum()) for name, numbers in own.items()}
        total = int(sums["statements"])
        means = {name: sums[name] / total if total else None for name in MEASURES}
        yield {
            "group": group,
            "statements": total,
            "facts": said.select("concept", "attribute").n_unique(),
            "seed_documents": len(own["statements"]),
            "accuracy": means["right"],
            "stderr": bootstrap_stderr(own["right"], own["statements"]),
            "posterior_sampling": means["sampling"],
            "posterior_mode": means["mode"],
            "chance": means["chance"],
            "p_above_chance": p_above_chance(said.drop("group"), world) if total and group != CONCEPT else None,
            "definition": definition,
        }


def _by_seed(db: duckdb.DuckDBPyConnection, groups: Sequence[str], scratch: Path) -> dict[str, np.ndarray]:
    """Return the sums of MEASURES and statements of each seed document in the `groups`, by name, mapped from files.

    Each is (seeds,) float64, in the order of the ids.
    """
    paths = {name: scratch / f"{name}.float64" for name in (*MEASURES, "statements")}
    sums = ", ".join(f'sum("{name}")::DOUBLE AS "{name}"' for name in paths)
    query = f'SELECT {sums} FROM seeds WHERE list_contains($1, "group") GROUP BY seed_id ORDER BY seed_id'
    with ExitStack() as stack:
        for path in paths.values():
            path.unlink(missing_ok=True)  # Who has mapped that of the last groups keeps it.
        files = {name: stack.enter_context(path.open("wb")) for name, path in paths.items()}
        for rows in batches(db, query, parameters=[list(groups)], file=scratch / "by_seed.parquet"):
            for name, file in files.items():
                file.write(rows[name].to_numpy().tobytes())
    # Nothing cannot be mapped.
    return {n: np.memmap(path, np.float64, "r") if path.stat().st_size else np.zeros(0) for n, path in paths.items()}


def bootstrap_stderr(right: np.ndarray, statements: np.ndarray) -> float | None:
    """Return the standard error of sum(right) / sum(statements) over resamples of the seed documents, (seeds,) each.

    None below two seed documents. It says how the figure would move with other seed documents of the same world; it
    is too small to hold the figure against chance, since seed documents share facts.
    """
    count = len(statements)
    if count < 2:
        return None
    generator = np.random.default_rng(SEED)
    shares = []
    for _ in range(RESAMPLES):
        # Drawn in pieces, the numbers are those drawn at once; sums of whole numbers do not depend on the order.
        sums = np.zeros(2)
        for first in range(0, count, PIECE):
            seeds = generator.integers(count, size=min(PIECE, count - first))
            sums += right[seeds].sum(), statements[seeds].sum()
        shares.append(sums[0] / sums[1])
    return float(np.std(shares, ddof=1))


def p_above_chance(answers: pl.DataFrame, world: ConceptWorld) -> float:
    """Return how probable it is that as many answers are right by chance: a randomisation test, one-sided.

    `answers`: concept, attribute, value (null: outside the vocabulary), len (times stated). The answers stay as they
    are and the ground truth of each fact is drawn at random from its uniform prior, 10,000 times: for facts that D does
    not state this is the exact distribution, however often and however alike a synthesizer answers.
    """
    generator = np.random.default_rng(SEED)
    scores, right = np.zeros(DRAWS, dtype=np.int64), 0
    times: defaultdict[tuple[int, str], Counter[str]] = defaultdict(Counter)
    for concept, attribute, value, count in answers.drop_nulls("value").sort(pl.all()).iter_rows():
        times[concept, attribute][value] += count
    for (concept, attribute), answer in times.items():
        counts = np.array([answer[value] for value in ATTRIBUTES[attribute]])
        scores += counts[generator.integers(len(counts), size=DRAWS)]
        right += answer[world.facts[concept][attribute]]
    return float((1 + np.count_nonzero(scores >= right)) / (1 + DRAWS))


def table_problems(table: pl.DataFrame) -> list[str]:
    """Return groups that are missing, unknown or repeated, shares outside [0, 1], and groups not their parts' sum."""
    if table["group"].to_list() != list(DEFINITIONS):
        return [f"groups are {', '.join(table['group'])}"]
    shares = ("accuracy", "posterior_sampling", "posterior_mode", "chance")
    stated = pl.col("statements") > 0
    problems = [
        f"{name} of {group}: {value}"
        for name in shares
        for group, value in table.filter(
            ~pl.when(stated).then(pl.col(name).is_between(0, 1)).otherwise(pl.col(name).is_null()).fill_null(False)
        )
        .select("group", name)
        .iter_rows()
    ]
    counts = dict(table.select("group", "statements").iter_rows())
    problems += [
        f"{group}: {counts[group]} statements, its parts have {sum(counts[part] for part in parts)}"
        for group, parts in _PARTS.items()
        if counts[group] != sum(counts[part] for part in parts)
    ]
    return problems


def leak_problems(table: pl.DataFrame) -> list[str]:
    """Return the groups of facts stated nowhere in D that a synthesizer gets right too often to have read only D."""
    leaks = table.filter(pl.col("group").is_in(UNKNOWN), pl.col("p_above_chance") < LEVEL / len(UNKNOWN))
    return [
        f"{row['group']}: {row['accuracy']:.1%} of {row['statements']} statements about {row['facts']} facts are "
        f"right, chance is {row['chance']:.1%} (p = {row['p_above_chance']:.2g}): text outside D has reached the "
        "synthesizer"
        for row in leaks.iter_rows(named=True)
    ]


def copying_problems(table: pl.DataFrame) -> list[str]:
    """Return that facts of d1 are restated no better than by chance: the synthesizer learned neither them nor to read.

    The reverse does not show that it reads d1, whose facts it has also met in pretraining: compare new_known.
    """
    weak = table.filter(pl.col("group") == "restated", pl.col("p_above_chance") >= LEVEL)
    return [
        f"{row['accuracy']:.1%} of {row['statements']} restated facts are right, chance is {row['chance']:.1%} "
        f"(p = {row['p_above_chance']:.2g}): the synthesizer has learned neither D's facts nor to read d1"
        for row in weak.iter_rows(named=True)
    ]
