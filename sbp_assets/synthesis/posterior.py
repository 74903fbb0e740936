"""The Bayesian reading of SBP tested: synthetic documents against the exact posterior predictive over D. No dagster.

The paper (section 5) reads the synthesizer as P(d2 | d1) = sum over concepts c of P(d2 | c) P(c | d1). In a world of
`concepts` both factors can be computed for a learner who knows the world's rules and has read D and nothing else:

- Facts. Before D, every value of a concept's attribute is equally likely, independently of all others. A document names
  its concept and states it truly, whatever the values are, so D's likelihood is the same for every world that agrees
  with D and zero for the rest. After D, a fact that D states is therefore certain, and any other is uniform over its
  attribute's values.
- Concepts. P(c | d1) is proportional to P(c) P(d1 | c): P(c) is the share of D's documents that name c (the world's
  popularities are not for a reader of D to know); a document names its own concept, so P(d1 | c) is 0 where d1 names
  another; a value that d1 states has the probability that facts after D give it. Where d1 names its concept, all mass
  lies there; where the name was cut off, what d1 states decides; where nothing of d1 was read, P(c) is left.

A statement "attribute a of c is v" of a synthetic document has posterior predictive P(c | d1) P(v | c, a, D), and is
judged in these two parts. No learner that read only D can, over worlds, be right about the values more often than the
second part's mode. About facts that D states nowhere it is right one time in as many values as there are: a synthesizer
that does better has seen text outside D. Derivation and limits: docs/bayes.md. The learner, its grades, the table and
the verdicts on it are one argument, so they stay in one module, which is therefore a little longer than others.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import polars as pl

from sbp_assets.corpus.concept_texts import ATTRIBUTES
from sbp_assets.corpus.concepts import ConceptWorld
from sbp_assets.corpus.split import UNIQUE
from sbp_assets.corpus.tokenizer import decode, related_id
from sbp_assets.storage.progress import Progress
from sbp_assets.storage.token_arrays import TokenArrays
from sbp_assets.synthesizer.examples import format_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

T = TypeVar("T")

CONCEPT = "concept"
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

SCHEMA = {
    "group": pl.String(), "statements": pl.Int64(), "facts": pl.Int64(), "seed_documents": pl.Int64(),
    "accuracy": pl.Float64(), "stderr": pl.Float64(), "posterior_sampling": pl.Float64(),
    "posterior_mode": pl.Float64(), "chance": pl.Float64(), "p_above_chance": pl.Float64(), "definition": pl.String(),
}  # fmt: skip
STATEMENTS = {
    "seed_id": pl.String(), "group": pl.String(), "concept": pl.Int64(), "attribute": pl.String(),
    "value": pl.String(), "right": pl.Boolean(), "sampling": pl.Float64(), "mode": pl.Float64(),
    "chance": pl.Float64(),
}  # fmt: skip

RESAMPLES = 1000
DRAWS = 10_000
SEED = 0
# Of each check as a whole: one passing run in a thousand shows a leak where there is none. Where a check tests several
# groups, each is tested at an equal share of it (Bonferroni).
LEVEL = 0.001


@dataclass(frozen=True)
class Seed:
    """A seed document d1: its text, and the part of it that the synthesizer read."""

    text: str
    read: str


class Learner:
    """What can be known of `world` by its rules and the documents of D read so far. It never sees the ground truth."""

    def __init__(self, world: ConceptWorld) -> None:
        self.world = world
        self.facts: dict[tuple[int, str], str] = {}
        self.documents: Counter[int] = Counter()
        self._named: dict[str, int] = {}

    def read(self, texts: Iterable[str]) -> None:
        """Learn from the texts of documents of D."""
        for text in texts:
            if (concept := self.world.concept_of(text)) is not None:
                self.documents[concept] += 1
                self._named[self.world.names[concept]] = concept
            self.facts |= {(concept, attribute): value for concept, attribute, value in facts_of(self.world, text)}

    def values(self, concept: int, attribute: str) -> dict[str, float]:
        """P(value | concept, attribute, D): certain where D states the fact, else uniform."""
        if known := self.facts.get((concept, attribute)):
            return {known: 1.0}
        return dict.fromkeys(ATTRIBUTES[attribute], 1 / len(ATTRIBUTES[attribute]))

    def prior(self, concept: int) -> float:
        """P(concept): the share of D's documents that are about it."""
        return self.documents[concept] / max(self.documents.total(), 1)

    def concepts(self, text: str) -> dict[int, float]:
        """P(concept | text, D) for a document `text`, or a part of one; empty where nothing of D has been read.

        Of several names those that occur most often are candidates, which is the limit of names that are seldom
        wrong; of no name, all concepts of D.
        """
        named = Counter(self._named[word] for word in re.findall(r"\w+", text) if word in self._named)
        candidates = [concept for concept, count in named.items() if count == max(named.values())] or [*self.documents]
        weights = {concept: self.prior(concept) for concept in candidates}
        if len(candidates) > 1:
            # Read as if the first candidate were named: what is said of "it" does not depend on who it is.
            said = {(a, v) for _, a, v in facts_of(self.world, f"{self.world.names[candidates[0]]}. {text}")}
            for concept in candidates:
                for attribute, value in said:
                    weights[concept] *= self.values(concept, attribute).get(value, 0.0)
        total = sum(weights.values())
        if not total:  # What is said is true of no candidate, which no document of the world does.
            weights = {concept: self.prior(concept) for concept in candidates}
            total = sum(weights.values())
        return {concept: weight / total for concept, weight in weights.items() if weight}


def facts_of(world: ConceptWorld, text: str) -> set[tuple[int, str, str]]:
    """Facts that `text` states, true or not: (concept, attribute, value); a value cut off in the middle is none."""
    return {(s.concept, s.attribute, s.value) for s in world.statements(text) if s.value in ATTRIBUTES[s.attribute]}


def mode_accuracy(distribution: Mapping[T, float], truth: T) -> float:
    """How often the most probable item is `truth`, ties being broken at random."""
    most = max(distribution.values(), default=0.0)
    top = [item for item, p in distribution.items() if p == most]
    return (truth in top) / len(top) if top else 0.0


def posterior_over_shards(
    world: ConceptWorld,
    synthetic_documents: Mapping[str, pl.LazyFrame],
    tokens: Mapping[str, Path],
    tokenizer: PreTrainedTokenizerFast,
    max_document_tokens: int,
    conditional: bool = True,
    progress: Progress | None = None,
) -> pl.DataFrame:
    """The table of `posterior_table` for synthetic documents (seed_id, text) and the corpus' token arrays, by shard.

    Not `conditional`: the synthetic documents were sampled without their seed documents.

    What D states is gathered from all shards first. One shard's texts and statements are in memory at a time, beside
    D's facts and a few numbers per seed document.
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
    return posterior_table(map(graded, sorted(tokens)), world)


def seed_documents(
    arrays: TokenArrays, tokenizer: PreTrainedTokenizerFast, max_document_tokens: int, conditional: bool
) -> dict[str, Seed]:
    """{id: seed document} of D's documents in `arrays`, cut as the synthesizer's prompts are.

    Not `conditional`: the synthesizer reads nothing of them.
    """
    related = related_id(tokenizer)
    seeds = {}
    for number in np.flatnonzero(arrays.documents["split"].to_numpy() == UNIQUE):
        document = arrays.tokens[arrays.offsets[number] : arrays.offsets[number + 1]]
        prompt = format_prompt(document, related, max_document_tokens)
        read = decode(tokenizer, prompt[1:-1]) if conditional else ""
        seeds[arrays.documents["id"][int(number)]] = Seed(decode(tokenizer, document[1:-1]), read)
    return seeds


def grade(learner: Learner, seeds: Mapping[str, Seed], synthetic: pl.DataFrame) -> pl.DataFrame:
    """Every fact that `synthetic` (seed_id, text) states, beside what `learner` would have got right.

    Columns of STATEMENTS: `sampling` is the posterior predictive's probability of the ground truth, `mode` how often
    its most probable value is the ground truth. A fact stated twice in a document counts once. Each fact has a second
    row of group "concept", which asks not for its value but for whom it is about. A value outside the vocabulary is
    null.

    Raises ValueError where a synthetic document's seed is not in `seeds`.
    """
    if unknown := set(synthetic["seed_id"]) - set(seeds):
        raise ValueError(
            f"synthetic documents name seed {min(unknown)!r}, which is no document of D; "
            "re-materialise synthesis/synthetic_documents"
        )
    world = learner.world
    rows: list[tuple[object, ...]] = []
    for (seed_id,), group in synthetic.group_by("seed_id", maintain_order=True):
        seed = seeds[str(seed_id)]
        own = world.concept_of(seed.text)
        read = {(own, attribute) for concept, attribute, _ in facts_of(world, seed.read) if concept == own}
        posterior = learner.concepts(seed.read)
        about = (posterior.get(own, 0.0), mode_accuracy(posterior, own), learner.prior(own)) if own is not None else ()
        for text in group["text"]:
            for fact in dict.fromkeys(world.statements(text)):
                key, vocabulary = (fact.concept, fact.attribute), ATTRIBUTES[fact.attribute]
                if about:
                    rows.append((seed_id, CONCEPT, *key, None, fact.concept == own, *about))
                known = "known" if key in learner.facts else "unknown"
                kind = "restated" if key in read else f"{'new' if fact.concept == own else 'other'}_{known}"
                values, truth = learner.values(*key), world.facts[fact.concept][fact.attribute]
                answer = fact.value if fact.value in vocabulary else None
                expected = (values.get(truth, 0.0), mode_accuracy(values, truth), 1 / len(vocabulary))
                rows.append((seed_id, kind, *key, answer, fact.true, *expected))
    return pl.DataFrame(rows, schema=STATEMENTS, orient="row")


def posterior_table(shards: Iterable[pl.DataFrame], world: ConceptWorld) -> pl.DataFrame:
    """One row per group of DEFINITIONS from the graded statements of each shard, of which one is held at a time.

    accuracy, posterior_sampling, posterior_mode and chance are means over the statements, null where there are none;
    stderr is a bootstrap over the seed documents (null below two); p_above_chance see `p_above_chance`.
    """
    measures = ("right", "sampling", "mode", "chance")
    by_seed, by_answer = [], []
    for statements in shards:
        by_seed.append(
            statements.group_by("seed_id", "group").agg(pl.col(measures).cast(pl.Float64).sum(), statements=pl.len())
        )
        by_answer.append(statements.group_by("group", "concept", "attribute", "value").len())
    empty = pl.DataFrame(schema=STATEMENTS)
    seeds = pl.concat(by_seed) if by_seed else empty.with_columns(statements=pl.lit(0))
    answers = pl.concat(by_answer) if by_answer else empty.with_columns(len=pl.lit(0))
    rows = []
    for group, definition in DEFINITIONS.items():
        member = pl.col("group").is_in(_PARTS.get(group, (group,)))
        own = seeds.filter(member).group_by("seed_id").agg(pl.col(*measures, "statements").sum()).sort("seed_id")
        said = answers.filter(member)
        total = int(own["statements"].sum())
        means = {name: float(own[name].sum()) / total if total else None for name in measures}
        rows.append(
            {
                "group": group,
                "statements": total,
                "facts": said.select("concept", "attribute").n_unique(),
                "seed_documents": len(own),
                "accuracy": means["right"],
                "stderr": bootstrap_stderr(own["right"].to_numpy(), own["statements"].to_numpy()),
                "posterior_sampling": means["sampling"],
                "posterior_mode": means["mode"],
                "chance": means["chance"],
                "p_above_chance": p_above_chance(said.drop("group"), world) if total and group != CONCEPT else None,
                "definition": definition,
            }
        )
    return pl.DataFrame(rows, schema=SCHEMA)


def bootstrap_stderr(right: np.ndarray, statements: np.ndarray) -> float | None:
    """Standard error of sum(right) / sum(statements) over resamples of the seed documents, (seeds,) each.

    None below two seed documents. It says how the figure would move with other seed documents of the same world; it
    is too small to hold the figure against chance, since seed documents share facts.
    """
    count = len(statements)
    if count < 2:
        return None
    generator = np.random.default_rng(SEED)
    drawn = (generator.integers(count, size=count) for _ in range(RESAMPLES))
    return float(np.std([right[seeds].sum() / statements[seeds].sum() for seeds in drawn], ddof=1))


def p_above_chance(answers: pl.DataFrame, world: ConceptWorld) -> float:
    """How probable it is that as many answers are right by chance: a randomisation test, one-sided.

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
    """Groups that are missing, strange or there twice, shares outside [0, 1], and groups not the sum of their parts."""
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
    """Groups of facts that D states nowhere in which a synthesizer is right too often to have read only D."""
    leaks = table.filter(pl.col("group").is_in(UNKNOWN), pl.col("p_above_chance") < LEVEL / len(UNKNOWN))
    return [
        f"{row['group']}: {row['accuracy']:.1%} of {row['statements']} statements about {row['facts']} facts are "
        f"right, chance is {row['chance']:.1%} (p = {row['p_above_chance']:.2g}): text outside D has reached the "
        "synthesizer"
        for row in leaks.iter_rows(named=True)
    ]


def copying_problems(table: pl.DataFrame) -> list[str]:
    """That the facts of d1 are restated no better than by chance: the synthesizer learned neither them nor to read.

    The reverse does not show that it reads d1, whose facts it has also met in pretraining: compare new_known.
    """
    weak = table.filter(pl.col("group") == "restated", pl.col("p_above_chance") >= LEVEL)
    return [
        f"{row['accuracy']:.1%} of {row['statements']} restated facts are right, chance is {row['chance']:.1%} "
        f"(p = {row['p_above_chance']:.2g}): the synthesizer has learned neither D's facts nor to read d1"
        for row in weak.iter_rows(named=True)
    ]
