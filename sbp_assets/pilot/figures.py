"""The figures of a pilot, read off the stores that the pipeline has filled for its sample."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from sbp_assets.corpus.concepts import ConceptWorld
from sbp_assets.corpus.split import UNIQUE
from sbp_assets.pairing.embed import Embedder, embed, vectors_of
from sbp_assets.pilot import measures
from sbp_assets.pilot.measures import Documents, RareWords
from sbp_assets.pilot.sample import Sample, place
from sbp_assets.pretraining.curves import loss_summary
from sbp_assets.settings import Settings
from sbp_assets.storage.paths import read_table
from sbp_assets.storage.progress import Progress
from sbp_assets.storage.token_arrays import TokenArrays

SHARD = "00000"
Figures = dict[str, Any]


def sample_documents(own: Settings) -> Documents:
    """Return the documents of D in the pilot's store, in a random order that is always the same."""
    data = Path(own.deployment.data_dir)
    rows = read_table(data / f"pairing/embeddings/{SHARD}.parquet").join(
        read_table(data / f"corpus/documents/{SHARD}.parquet", ["id", "text"]), on="id", how="left"
    )
    order = pl.Series([place(name, "order") for name in rows["id"]], dtype=pl.Binary)
    rows = rows[order.arg_sort()]
    return Documents(rows["id"].to_list(), rows["text"].to_list(), vectors_of(rows))


def document_tokens(own: Settings) -> dict[str, int]:
    """Return the tokens of each document of D in the pilot's store, `<bos>` and `<eos>` included."""
    arrays = TokenArrays.load(Path(own.deployment.data_dir) / "corpus/tokens" / SHARD)
    rows = arrays.documents.select("id", "split").with_columns(tokens=pl.Series(arrays.lengths))
    return dict(rows.filter(split=UNIQUE).select("id", "tokens").iter_rows())


def pairing_figures(settings: Settings, own: Settings, sample: Sample, expected: int | None) -> Figures:
    """Return what the pairs of the sample are like, and the budget that the `settings` of the user give.

    `own` are those of the pilot's store; `expected` are the documents of D in the whole corpus, None where nothing
    says. Pairs are those of a D of that size, or of the sample where it is larger.
    """
    experiment, pairing = settings.experiment, settings.experiment.pairing
    documents, tokens = sample_documents(own), document_tokens(own)
    wanted = expected or len(documents)
    chosen = documents.first(min(wanted, len(documents)))
    paired = {
        size: _pairs(documents.first(size), settings, own)
        for size in sorted({*(len(documents) // part for part in (4, 2, 1)), len(chosen)})
    }
    found = paired[len(chosen)]
    rare, second = RareWords(chosen), found["d2"].to_list()
    found = found.with_columns(
        in_d1=rare.shares(found["d1"].to_list(), second),
        in_random=rare.shares(measures.random_partners(found, chosen), second),
    )
    random = measures.random_similarities(chosen, pairing)
    texts = dict(zip(chosen.ids, chosen.texts, strict=True))
    threshold = pairing.min_similarity
    thresholds = [_at(found, random, at, len(chosen)) for at in measures.THRESHOLDS if at < pairing.max_similarity]
    kept = found.filter(pl.col("similarity") >= threshold)
    lengths = np.array(list(tokens.values()))
    most = experiment.max_document_tokens
    # <bos> d1 <related> d2 <eos>, as synthesizer.examples writes it.
    example = 2 * float(np.minimum(lengths - 2, most).mean()) + 3
    unique_tokens = float(lengths.mean()) * wanted
    if experiment.corpus.expected_unique_tokens and not sample.whole:
        unique_tokens = experiment.corpus.expected_unique_tokens
    density = measures.density(kept, len(chosen))
    figures: Figures = {
        "documents": {
            "read": sample.read, "whole_corpus": sample.whole, "sample": len(documents), "d": expected,
            "measured": len(chosen), "tokens_per_document": float(lengths.mean()),
        },
        "pairs": {
            **_at(found, random, threshold, len(chosen)), "random_similarity": float(random.mean()),
            "thresholds": thresholds,
            "sizes": [
                {"documents": size, **measures.density(pairs.filter(pl.col("similarity") >= threshold), size)}
                for size, pairs in paired.items()
            ],
        },
        "budget": {
            "tokens_of_d": round(unique_tokens), "readings": experiment.pretraining.repetitions,
            "readings_in_sbp": experiment.pretraining.repetitions * (1 - experiment.pretraining.synthetic_share),
            "tuning_epochs": experiment.synthesizer.epochs,
            "tuning_tokens": round(density["pairs_per_document"] * wanted * example * experiment.synthesizer.epochs),
        },
    }  # fmt: skip
    if experiment.ground_truth:
        world = ConceptWorld(experiment.ground_truth)
        for name, first in (
            ("truth", kept["d1"].to_list()),
            ("truth_of_random", measures.random_partners(kept, chosen)),
        ):
            figures["pairs"][name] = measures.facts_shared(first, kept["d2"].to_list(), texts, world)
    return figures


def tuning_figures(settings: Settings, own: Settings) -> Figures:
    """Return what the synthesizer writes that was tuned in the pilot's store `own`, and how its baseline has trained.

    The rare words of a synthetic document are looked for in its seed document and in a random one.
    """
    data, pairing = Path(own.deployment.data_dir), own.experiment.pairing
    documents = sample_documents(own)
    rows = read_table(data / f"synthesis/synthetic_documents/{SHARD}.parquet", ["seed_id", "text"])
    seeds, texts = rows["seed_id"].to_list(), rows["text"].to_list()
    embedder = Embedder()
    engine = embedder.load(pairing.embedding_model, pairing.embedding_dtype, own.deployment.device)
    with Progress("embed synthetic documents", "documents", len(texts)) as progress:
        size = own.deployment.embedding_batch_size
        vectors = embed(engine, texts, pairing.max_tokens, size, progress, pairing.embedding_prompt)
    embedder.close()
    rare = RareWords(documents)
    random = measures.random_partners(rows.select(d2="seed_id"), documents)
    losses = loss_summary(
        read_table(data / "pretraining/baseline_model" / own.experiment.seed_keys[0] / "metrics.parquet")
    )
    quality = read_table(data / f"synthesis/quality/{SHARD}.parquet").filter(corpus="synthetic")
    figures: Figures = {
        "synthetic_documents": len(texts),
        "subject": measures.subject_kept(seeds, vectors, documents, pairing),
        "rare_words_in_seed": measures.mean(rare.shares_of_texts(seeds, texts)),
        "rare_words_in_random": measures.mean(rare.shares_of_texts(random, texts)),
        "quality": dict(quality.drop_nulls("value").select("metric", "value").iter_rows()),
        "baseline": {
            name: losses[name] for name in ("tokens", "heldout_loss", "best_heldout_loss", "best_heldout_tokens")
        },
    }
    if settings.experiment.ground_truth:
        figures["truth"] = _stated(settings, documents, seeds, texts)
    return figures


def _stated(settings: Settings, documents: Documents, seeds: list[str], texts: list[str]) -> Mapping[str, float]:
    """Return the exact truth of synthetic documents: how many name their seed's concept, what they state rightly."""
    assert settings.experiment.ground_truth
    world = ConceptWorld(settings.experiment.ground_truth)
    about = {name: world.concept_of(text) for name, text in zip(documents.ids, documents.texts, strict=True)}
    stated = [statement.true for text in texts for statement in world.statements(text)]
    kept = [
        about[seed] is not None and world.concept_of(text) == about[seed]
        for seed, text in zip(seeds, texts, strict=True)
    ]
    return {"subject_kept": float(np.mean(kept)), "statements_right": float(np.mean(stated)) if stated else 0.0}


def _pairs(documents: Documents, settings: Settings, own: Settings) -> pl.DataFrame:
    Path(own.deployment.work_dir).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=own.deployment.work_dir, prefix="pilot-") as scratch:
        pairing = settings.experiment.pairing
        floor = min(measures.FLOOR, pairing.min_similarity)
        return measures.pairs_among(documents, pairing, Path(scratch), settings.deployment.memory_limit, floor)


def _at(pairs: pl.DataFrame, random: np.ndarray, threshold: float, documents: int) -> Figures:
    kept = pairs.filter(pl.col("similarity") >= threshold)
    return {
        "min_similarity": threshold,
        **measures.density(kept, documents),
        "rare_words_in_d1": measures.mean(kept["in_d1"].to_numpy()),
        "rare_words_in_random": measures.mean(kept["in_random"].to_numpy()),
        "random_pairs_above": float((random >= threshold).mean()),
    }
