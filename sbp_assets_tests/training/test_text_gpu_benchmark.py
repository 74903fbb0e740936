"""The experiment on real text: its measures, and all of it on a CPU with a tiny store."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import polars as pl
import pytest
import torch

from benchmarks import text_gpu
from benchmarks.text_measures import document_losses, novel_shares, perplexities, subject_kept
from sbp_assets.corpus.tokenizer import encode_documents, train_tokenizer
from sbp_assets.settings import load_settings
from sbp_assets.storage.token_arrays import write_token_arrays
from sbp_assets.training.model import build_model, load_model, save_model

WORDS = [f"{a}{b}" for a in ("ba", "do", "fi", "gu", "le", "mo", "ni") for b in ("ra", "so", "ti", "vu", "xe", "za")]


def _texts(count: int, seed: int) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, 30)) for _ in range(count)]


def _document(*tokens: int) -> np.ndarray:
    return np.array([0, *tokens, 1])


def test_ngrams_of_the_corpus_and_of_the_seed_are_not_novel():
    corpus = [_document(5, 6, 7, 8, 9), _document(9, 8, 7, 6)]
    documents = [_document(5, 6, 7, 8), _document(5, 6, 7, 8, 7)]
    found = novel_shares(documents, corpus, [0, 1])
    # Three 4-grams: 5678 twice, in D both times but in the seed of the first document alone, and 6787.
    assert found == {"of_d_4": pytest.approx(1 / 3), "of_d1_4": pytest.approx(2 / 3)}
    assert novel_shares([_document(9, 9, 8, 7)], corpus) == {"of_d_4": 1.0}  # not across documents


def test_a_document_keeps_the_subject_of_the_seed_whose_words_it_has():
    rng = np.random.default_rng(0)
    corpus = [_document(*rng.integers(10 * i + 2, 10 * i + 12, 40)) for i in range(200)]
    rewritten = [_document(*rng.permutation(ids[1:-1])) for ids in corpus]
    own = subject_kept(rewritten, range(200), corpus, 2100)
    other = subject_kept(rewritten, [(i + 100) % 200 for i in range(200)], corpus, 2100)
    assert own["kept"] > 0.95 and other["kept"] < 0.05
    assert own["similarity_to_seed"] > 0.9 > 0.1 > own["similarity_to_random"]


def test_shares_of_the_oracles_gain_have_an_interval_over_documents():
    tokens = np.full(500, 20.0)
    base = np.stack([np.random.default_rng(0).normal(60, 5, 500), tokens])
    half = np.stack([base[0] - 5, tokens])
    losses = {"baseline": base, "early_stopped": half, "sbp": half, "oracle": np.stack([base[0] - 10, tokens])}
    found = perplexities("sbp", losses)
    against = found["against_baseline"]
    low, high = against["share_interval"]
    assert low < against["share_of_oracle_gain"] < high and high - low < 0.1
    assert against["delta_interval"][1] < 0
    assert found["against_early_stopped"]["share_of_oracle_gain"] == 0
    assert set(perplexities("oracle", losses)) == {"nats", "perplexity"}


def test_losses_of_documents_are_those_of_each_alone(tmp_path: Path):
    tokenizer = train_tokenizer(_texts(20, 0), 320)
    model = load_settings("tiny", environ={}).experiment.model
    built = build_model(model, tokenizer, 0)
    save_model(tmp_path / "model", built.config, built.state_dict(), tokenizer)
    documents = encode_documents(tokenizer, [*_texts(5, 1), "badora"])
    found = document_losses(tmp_path / "model", documents, model.context_length, "cpu")
    causal = load_model(tmp_path / "model").eval()
    for document, nats, count in zip(documents, *found, strict=True):
        ids = torch.from_numpy(document[: model.context_length])[None]
        with torch.no_grad():
            alone = float(causal(ids, labels=ids).loss)
        assert count == ids.shape[1] - 1 and nats / count == pytest.approx(alone, rel=0.02)  # bfloat16


@pytest.mark.faults
@pytest.mark.processes
def test_every_part_runs_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    data, texts = tmp_path / "data", _texts(120, 2)
    tokenizer = train_tokenizer(texts, 320)
    tokenizer.save_pretrained(data / "tokenizer")
    ids = [f"{number:03d}" for number in range(len(texts))]
    splits = ["unique"] * 60 + ["oracle"] * 40 + ["heldout"] * 20
    documents = pl.DataFrame({"id": ids, "split": splits})
    write_token_arrays(data / "tokens", documents, encode_documents(tokenizer, texts), len(tokenizer))
    pl.DataFrame({"d1": ids[:60], "d2": [*ids[1:60], ids[0]]}).write_parquet(data / "pairs.parquet")
    experiment = load_settings("text", environ={"SBP_EXPERIMENT__CORPUS__SOURCE__PATH": "none"}).experiment
    (data / "experiment.json").write_text(experiment.model_dump_json())
    results = tmp_path / "results.jsonl"
    text_gpu.main(
        SimpleNamespace(
            data=data, results=results, device="cpu", size="tiny", minutes=10, weight_decays=[0.1, 1.5], compile=False,
            sequences=64, tuning_epochs=0.5,
        )
    )  # fmt: skip
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    assert not [line for line in lines if "failed" in line] and lines[-1]["ended"] == "all parts"
    arms = {line["arm"]: line for line in lines if "arm" in line}
    assert {"baseline_0.1", "baseline_1.5", "oracle", "sbp", "unconditional", "random_pairs"} <= set(arms)
    assert len({arms[name]["tokens"] for name in arms if "tokens" in arms[name]}) == 1  # all read equally many
    syntheses = {line["syntheses"]: line for line in lines if "syntheses" in line}
    assert "subject" in syntheses["random_pairs_syntheses"] and "subject" not in syntheses["unconditional_syntheses"]
