"""Example inputs of the report, about documents of the embedded corpus.

Scores and losses are made up but plausible; everything else is computed from the documents.
"""

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from sbp_assets.corpus.concept_texts import ATTRIBUTES
from sbp_assets.corpus.concepts import ConceptWorld
from sbp_assets.evaluation import contamination
from sbp_assets.evaluation.comparison import SCORED, compare
from sbp_assets.evaluation.scores import ACCURACIES, SAMPLES_SCHEMA, SCORES_SCHEMA, estimate, with_samples
from sbp_assets.pairing.ground_truth import pair_truth
from sbp_assets.report.samples import example_pairs, example_synthetic_documents, similarity_counts
from sbp_assets.settings import ConceptsSource, load_settings
from sbp_assets.storage.progress import Progress
from sbp_assets.synthesis.novelty import novelty_table, partner_similarities
from sbp_assets.synthesis.posterior import Learner, Seed, grade
from sbp_assets.synthesis.posterior_table import posterior_table

SETTINGS = load_settings("demo", {}).experiment
WORLD = ConceptWorld(ConceptsSource(documents=60, concepts=6, attributes=6, facts_per_document=2))
SEEDS = ("0", "1", "2")
# Of baseline, early-stopped baseline, SBP, oracle.
SCORES = [
    ("heldout", "perplexity", (4.83, 4.42, 3.91, 3.12), 0.06, 300, False),
    ("heldout", "nats_per_token", (1.575, 1.486, 1.364, 1.138), 0.012, 300, False),
    ("heldout", "bits_per_byte", (0.72, 0.68, 0.62, 0.52), 0.006, 300, False),
    ("concept_questions", "acc", (0.412, 0.52, 0.533, 0.861), 0.028, 300, True),
    ("concept_questions", "perplexity", (3.4, 2.88, 2.9, 1.5), 0.08, 300, False),
    ("reversed_questions", "acc", (0.3, 0.35, 0.5, 0.8), 0.028, 300, True),
    ("reversed_questions_by_entries_alone", "acc", (0.2, 0.25, 0.6, 0.8), 0.05, 80, True),
    ("arc_easy", "acc", (0.27, 0.281, 0.232, 0.281), 0.018, 400, True),
    ("winogrande", "acc", (0.51, 0.498, 0.5, 0.497), 0.014, 400, True),
]  # fmt: skip
QUALITY = [
    ("repetition", "exact", 43, 18), ("duplicates", "exact", 8, 7), ("non_factual", "exact", 151, 0),
    ("false_statements", "exact", 62, 0), ("non_factual", "judge", None, None),
    ("pair_irrelevance", "exact", 256, None), ("no_concept", "exact", 31, 0), ("pair_copying", "exact", 1, None),
]  # fmt: skip


def scores(model: int, seed: int) -> pl.DataFrame:
    """Scores of one model (its place in SCORED) and seed, with samples.

    The samples scatter about the model's value as its standard error says; that value differs a little by seed.
    """
    rows, samples = [], []
    for number, (task, metric, values, stderr, count, higher) in enumerate(SCORES):
        random = np.random.default_rng(number)
        mean = values[model] * (1 + 0.01 * np.random.default_rng([seed, model]).normal())
        if higher:
            found = (random.permutation(count) < round(mean * count)).astype(float)
        else:
            noise = random.normal(size=count)
            scale = stderr * count**0.5 / (mean if metric == "perplexity" else 1)
            found = (np.log(mean) if metric == "perplexity" else mean) + scale * (noise - noise.mean())
        rows.append((task, metric, estimate(metric, found, np.ones(count)), stderr, count, metric in ACCURACIES))
        samples += [(task, metric, place, value, 1, place) for place, value in enumerate(found.tolist())]
    table = pl.DataFrame(rows, schema=SCORES_SCHEMA, orient="row")
    return with_samples(table, pl.DataFrame(samples, schema=SAMPLES_SCHEMA, orient="row"))


@cache
def comparison() -> pl.DataFrame:
    return compare({
        name: {seed: scores(place, int(seed)) for seed in SEEDS} for place, name in enumerate(SCORED)
    }, resamples=400)  # fmt: skip


def dynamics() -> pl.DataFrame:
    rows = [
        (
            arm, seed, step * 30_000,
            floor + 5 * 0.6**step + overfit * max(0, step - 10 - int(seed)) + 0.04 * int(seed),
        )
        for arm, floor, overfit in (("baseline", 1.5, 0.012), ("sbp", 1.36, 0.0), ("oracle", 1.13, 0.0))
        for seed in SEEDS
        for step in range(21)
    ]  # fmt: skip
    return pl.DataFrame(rows, schema=["arm", "seed", "tokens", "heldout_loss"], orient="row")


def misremembered(text: str, attributes: int) -> str:
    """`text` with every value of the first `attributes` attributes replaced by the next value of that attribute."""
    for statement in WORLD.statements(text):
        values = list(ATTRIBUTES[statement.attribute])
        if list(ATTRIBUTES).index(statement.attribute) < attributes:
            text = text.replace(statement.value, values[(values.index(statement.value) + 1) % len(values)])
    return text


def posterior(documents: pl.DataFrame) -> pl.DataFrame:
    """The posterior table where D is the first 12 documents.

    Each is the seed of four synthetic documents, which also state false and unknown facts.
    """
    learner = Learner(WORLD)
    known, texts = documents["id"].to_list()[:12], [WORLD.document(n)["text"] for n in range(60)]
    learner.read(texts[:12])
    seeds = {name: Seed(text, text[: len(text) // 2]) for name, text in zip(known, texts, strict=False)}
    written = pl.DataFrame({
        "seed_id": known * 4,
        "text": [misremembered(texts[n % 12 + 16 * (n // 12)], 8 if n > 12 and n % 9 else n % 3) for n in range(48)],
    })  # fmt: skip
    with tempfile.TemporaryDirectory() as scratch:
        return posterior_table([grade(learner, seeds, written)], WORLD, Path(scratch), "100MB")


def truth(pairs: dict[str, pl.LazyFrame], documents: dict[str, pl.LazyFrame]) -> pl.DataFrame:
    with tempfile.TemporaryDirectory() as folder:
        (scratch := Path(folder, "scratch")).mkdir()
        files = {shard: Path(folder, f"{shard}.parquet") for shard in pairs}
        for shard, rows in pairs.items():
            rows.sink_parquet(files[shard])
        return pair_truth(files, documents, WORLD, 8, scratch, "100MB")


def novelty(texts: list[str]) -> pl.DataFrame:
    """The novelty table where D is all but the last 20 documents, and those are half synthetic, half held out."""
    vectors = np.eye(40, dtype=np.float32)
    similarities = partner_similarities(vectors[:10] + vectors[10:20], vectors[:10], vectors[:20], 0.7)
    return novelty_table(texts[40:50], texts[50:], [texts[:40]], 13, similarities)


def same_concept(number: int) -> int:
    """The next document about the same concept as this one; for every fifth, simply the next."""
    concepts = [WORLD.concept_of(WORLD.document(n)["text"]) for n in range(60)]
    others = [n for n in range(number + 1, 60) if number % 5 == 0 or concepts[n] == concepts[number]]
    return others[0] if others else number - 1


def report_inputs(injected: str = "") -> dict[str, Any]:
    """Keyword arguments of `page.render`; `injected` is appended to each text and id that the project did not write."""
    return dict(_inputs(injected))


@cache
def _inputs(injected: str) -> dict[str, Any]:
    texts = [WORLD.document(number)["text"] + injected for number in range(60)]
    documents = pl.DataFrame(
        {"id": [f"concepts-{n:06d}{injected}" for n in range(60)], "text": texts, "split": ["unique"] * 60}
    )
    ids = documents["id"].to_list()
    pairs = pl.DataFrame({
        "d1": ids[:40], "d2": [ids[same_concept(n)] for n in range(40)],
        "similarity": [0.71 + 0.28 * ((7 * n) % 40 / 40) ** 2 for n in range(40)],
    })  # fmt: skip
    synthetic = pl.DataFrame({
        "id": [f"syn-{ids[3]}-{rollout}" for rollout in range(3)], "seed_id": [ids[3]] * 3, "rollout": [0, 1, 2],
        "text": texts[50:53], "finish_reason": ["stop", "length", "stop"],
    })  # fmt: skip
    budget = [
        ("baseline", "unique", 630, 30_700, 20.0, 614_400, 600, 6.1e12, 20, ""),
        ("sbp", "unique", 630, 30_700, 10.0, 307_100, 600, 3.0e12, 10, f"50.0% of the budget is synthetic{injected}"),
        ("sbp", "synthetic", 6200, 307_300, 1.0, 307_300, 600, 3.1e12, 1, ""),
        ("oracle", "unique", 630, 30_700, 1.0, 30_000, 600, 0.3e12, 1, ""),
        ("oracle", "oracle", 12_600, 590_000, 0.99, 584_400, 600, 5.8e12, 1, ""),
        ("synthesizer", "tuning", 4000, 400_000, 1.0, 400_000, 390, 4.0e12, None, ""),
        ("synthesizer", "generation", 6200, 307_300, 1.0, 307_300, None, 1.1e12, None, ""),
    ]  # fmt: skip
    columns = ["arm", "source", "unique_documents", "unique_tokens", "passes", "tokens_read", "steps", "flops",
               "most_reads", "note"]  # fmt: skip
    quality = [
        {
            "metric": metric, "corpus": corpus, "value": None if count is None else count / 1000,
            "flagged": count or 0, "scored": 0 if count is None else 1000, "documents": 0 if count is None else 1000,
            "sample": 0 if count is None else 1000, "method": method,
            "definition": f"Share of documents with {metric}.{injected}",
        }
        for metric, method, *counts in QUALITY
        for corpus, count in zip(("synthetic", "real"), counts, strict=True)
    ]  # fmt: skip
    items = documents.tail(12).select(
        evaluation_set=pl.Series(["heldout", f"sciq{injected}"] * 6), item="id", text="text"
    )
    with Progress("contamination", "documents") as progress:
        contaminated, _ = contamination.compare(
            items, [("unique", documents[:50]), ("synthetic", synthetic)], SETTINGS.contamination, progress
        )
    shards = {"00000": documents[:30].lazy(), "00001": documents[30:].lazy()}
    pair_shards = {"00000": pairs[:30].lazy(), "00001": pairs[30:].lazy()}
    return {
        "experiment": SETTINGS,
        "comparison": comparison(),
        "dynamics": dynamics(),
        "token_budget": pl.DataFrame(budget, schema=columns, orient="row"),
        "quality": pl.DataFrame(quality),
        "novelty": novelty(texts).with_columns(pl.col("definition") + injected),
        "posterior": posterior(documents).with_columns(pl.col("definition") + injected),
        "pair_truth": truth(pair_shards, shards),
        "contamination": contaminated,
        "similarities": similarity_counts(pair_shards),
        "pairs": example_pairs(pair_shards, shards),
        "synthetic": example_synthetic_documents({"00000": synthetic.lazy()}, shards),
    }
