"""Inputs of a report with plausible figures, on real documents of the embedded corpus."""

from typing import Any

import numpy as np
import polars as pl

from sbp_assets.corpus.concepts import ConceptWorld
from sbp_assets.evaluation import report_data
from sbp_assets.evaluation.comparison import SCORED, compare, with_samples
from sbp_assets.evaluation.suite import SAMPLES_SCHEMA, score_table
from sbp_assets.experiment import ConceptsSource, load_settings

WORLD = ConceptWorld(ConceptsSource(documents=60, concepts=6))
SCORES = [
    ("heldout", "perplexity", (4.83, 3.91, 3.12), 0.06, 300, False),
    ("heldout", "nats_per_token", (1.575, 1.364, 1.138), 0.012, 300, False),
    ("heldout", "bits_per_byte", (0.72, 0.62, 0.52), 0.006, 300, False),
    ("concept_questions", "acc", (0.412, 0.533, 0.861), 0.028, 300, True),
    ("concept_questions", "perplexity", (3.4, 2.9, 1.5), 0.08, 300, False),
    ("arc_easy", "acc", (0.27, 0.262, 0.281), 0.018, 570, True),
    ("winogrande", "acc", (0.51, 0.5, 0.497), 0.014, 1267, True),
]  # fmt: skip
QUALITY = [
    ("repetition", 0.043, 0.018), ("duplicate_at_1m", 0.008, 0.007), ("non_factual", 0.151, 0.018),
    ("pair_irrelevance", 0.256, None), ("pair_copying", 0.001, None),
]  # fmt: skip


def scores(arm: int) -> pl.DataFrame:
    """Score rows whose samples scatter about the arm's value as its standard error says."""
    frames = []
    for task, metric, values, stderr, samples, higher in SCORES:
        random, mean = np.random.default_rng(len(frames)), values[arm]
        if higher:
            found = (np.arange(samples) < round(mean * samples)).astype(float)
        else:
            noise = random.normal(size=samples)
            scale = stderr * samples**0.5 / (mean if metric == "perplexity" else 1)
            found = (np.log(mean) if metric == "perplexity" else mean) + scale * (noise - noise.mean())
        rows = [(task, metric, n, value, 1) for n, value in enumerate(found.tolist())]
        frames.append(pl.DataFrame(rows, schema=SAMPLES_SCHEMA, orient="row"))
    together = pl.concat(frames)
    return with_samples(score_table(together), together)


def dynamics() -> pl.DataFrame:
    rows = [
        (arm, "0", step * 30_000, floor + 5 * 0.7**step + (overfit * max(0, step - 10)))
        for arm, floor, overfit in (("baseline", 1.5, 0.008), ("sbp", 1.36, 0.0), ("oracle", 1.13, 0.0))
        for step in range(21)
    ]
    return pl.DataFrame(rows, schema=["arm", "seed", "tokens", "heldout_loss"], orient="row")


def report_inputs(injected: str = "") -> dict[str, Any]:
    """Keyword arguments of report.render; `injected` is put into every text and id that comes from the corpus."""
    texts = [WORLD.document(number)["text"] + injected for number in range(60)]
    documents = pl.DataFrame({"id": [f"concepts-{n:06d}{injected}" for n in range(60)], "text": texts})
    ids = documents["id"].to_list()
    pairs = pl.DataFrame({
        "d1": ids[:40], "d2": ids[20:], "similarity": [0.71 + 0.28 * ((7 * n) % 40 / 40) ** 2 for n in range(40)],
    })  # fmt: skip
    synthetic = pl.DataFrame({
        "id": [f"syn-{ids[3]}-{rollout}" for rollout in range(3)], "seed_id": [ids[3]] * 3, "rollout": [0, 1, 2],
        "text": texts[50:53], "finish_reason": ["stop", "length", "stop"],
    })  # fmt: skip
    budget = [
        ("baseline", "unique", 630, 30_700, 20.0, 614_400, 600, 6.1e12, 20, ""),
        ("sbp", "unique", 630, 30_700, 10.0, 307_100, 600, 3.0e12, 10, "50.0% of the budget is synthetic"),
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
            "metric": metric,
            "corpus": corpus,
            "value": value,
            "documents": 1000,
            "sample": 1000,
            "method": "heuristic",
            "definition": f"Share of documents with {metric}.",
        }
        for metric, *values in QUALITY
        for corpus, value in zip(("synthetic", "real"), values, strict=True)
    ]
    shards = {"00000": documents[:30].lazy(), "00001": documents[30:].lazy()}
    return {
        "experiment": load_settings("demo", {}).experiment,
        "comparison": compare({name: {"0": scores(number)} for name, number in zip(SCORED, (0, 0, 1, 2), strict=True)}),
        "dynamics": dynamics(),
        "token_budget": pl.DataFrame(budget, schema=columns, orient="row"),
        "quality": pl.DataFrame(quality),
        "similarities": report_data.similarity_counts({"00000": pairs[:9].lazy(), "00001": pairs[9:].lazy()}),
        "pairs": report_data.example_pairs({"00000": pairs.lazy()}, shards),
        "syntheses": report_data.example_syntheses({"00000": synthetic.lazy()}, shards),
    }
