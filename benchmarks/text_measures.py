"""What benchmarks.text_gpu measures of models and of synthetic documents, from tokens alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from sbp_assets.training.model import load_model

NGRAMS = (4, 8, 16)  # tokens
RESAMPLES = 2000
BATCH_TOKENS = 1 << 15
NEAREST = 0.01  # share of D that counts as near to a document, so that a random document of D is near to 1% of them
_BASE = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no power of it is 0 modulo 2**64


@torch.inference_mode()
def document_losses(model: Path, documents: Sequence[np.ndarray], context: int, device: str) -> np.ndarray:
    """Return the nats of each document and the tokens that they are of, (2, documents).

    Every token but the first is predicted, from the document's own tokens; of a longer document than the context, the
    first `context` tokens are read.
    """
    causal = load_model(model).to(device).eval()
    found = np.zeros((2, len(documents)))
    order = sorted(range(len(documents)), key=lambda row: len(documents[row]))
    while order:
        width = min(context, len(documents[order[-1]]))
        rows, order = order[-max(1, BATCH_TOKENS // width) :], order[: -max(1, BATCH_TOKENS // width)]
        ids = np.zeros((len(rows), width), np.int64)
        labels = np.full((len(rows), width), -100, np.int64)
        for place, row in enumerate(rows):
            tokens = documents[row][:width].astype(np.int64)
            ids[place, : len(tokens)] = tokens
            labels[place, : len(tokens) - 1] = tokens[1:]
        # On the right, padding needs no mask under causal attention.
        with torch.autocast(device, dtype=torch.bfloat16):
            logits = causal(torch.from_numpy(ids).to(device), use_cache=False).logits
        target = torch.from_numpy(labels).to(device)
        nats = F.cross_entropy(logits.float().flatten(0, 1), target.flatten(), reduction="none").view(target.shape)
        found[0, rows] = nats.sum(1).double().cpu().numpy()
        found[1, rows] = (labels != -100).sum(1)
    return found


def perplexities(name: str, losses: Mapping[str, np.ndarray]) -> dict[str, object]:
    """Return the perplexity of model `name`, and the share of the oracle's gain against both baselines.

    `losses` are `document_losses` by model. Where the oracle, a baseline or the model itself is missing, or the oracle
    gains nothing, there is no share. Intervals are the 2.5th and 97.5th percentile over resampled documents.
    """
    own = losses[name]
    result: dict[str, object] = {"nats": _nats(own), "perplexity": math.exp(_nats(own))}
    for against in ("baseline", "early_stopped"):
        if against not in losses or "oracle" not in losses or name in (against, "oracle"):
            continue
        models = [losses[against], own, losses["oracle"]]
        base, arm, oracle = (math.exp(_nats(model)) for model in models)
        drawn = np.random.default_rng(0).multinomial(own.shape[1], np.full(own.shape[1], 1 / own.shape[1]), RESAMPLES)
        of_base, of_arm, of_oracle = (np.exp((drawn @ model[0]) / (drawn @ model[1])) for model in models)
        with np.errstate(divide="ignore", invalid="ignore"):
            shares = (of_base - of_arm) / (of_base - of_oracle)
        result[f"against_{against}"] = {
            "delta": arm - base,
            "delta_interval": np.percentile(of_arm - of_base, [2.5, 97.5]).tolist(),
            "share_of_oracle_gain": (base - arm) / (base - oracle) if base > oracle else None,
            "share_interval": np.percentile(shares, [2.5, 97.5]).tolist() if (of_base > of_oracle).all() else None,
        }
    return result


def novel_shares(
    documents: Sequence[np.ndarray], corpus: Sequence[np.ndarray], seeds: Sequence[int] | None = None
) -> dict[str, float]:
    """Return the share of the documents' n-grams of tokens that no document of `corpus` has, by n.

    With `seeds`, the number in `corpus` of each document's own, also the share of those that the seed lacks. n-grams
    are told apart by hashes of 64 bits; `<bos>` and `<eos>` do not count.
    """
    found: dict[str, float] = {}
    for n in NGRAMS:
        own, owner = _ngrams(documents, n)
        if not len(own):
            continue
        theirs, whose = _ngrams(corpus, n)
        found[f"of_d_{n}"] = 1 - _contained(own, np.unique(theirs)).mean()
        if seeds is not None:
            in_seed = _contained(_mixed(own, np.array(seeds)[owner]), np.unique(_mixed(theirs, whose)))
            found[f"of_d1_{n}"] = 1 - in_seed.mean()
    return {name: float(share) for name, share in found.items()}


def subject_kept(
    documents: Sequence[np.ndarray], seeds: Sequence[int], corpus: Sequence[np.ndarray], vocabulary: int
) -> dict[str, float]:
    """Return how many documents are nearer to their seed than to 99% of `corpus`, by TF-IDF over tokens.

    `seeds` are numbers of documents in `corpus`. Of a random seed it would be 1%. Also the mean cosine similarity to
    the seed, and to a random document of the corpus.
    """
    real = np.stack([_counts(document, vocabulary) for document in corpus])
    weights = np.log(len(real) / np.maximum((real > 0).sum(0), 1)).astype(np.float32)
    real = _unit(real, weights)
    near = max(1, round(NEAREST * len(real)))
    kept, to_seed, to_random = 0, 0.0, 0.0
    for start in range(0, len(documents), 1000):
        part = _unit(np.stack([_counts(ids, vocabulary) for ids in documents[start : start + 1000]]), weights)
        similarities = part @ real.T
        own = similarities[np.arange(len(part)), list(seeds[start : start + 1000])]
        kept += int(((similarities >= own[:, None]).sum(1) <= near).sum())
        to_seed += float(own.sum())
        to_random += float(similarities.mean(1).sum())
    total = len(documents)
    return {"kept": kept / total, "similarity_to_seed": to_seed / total, "similarity_to_random": to_random / total}


def _nats(losses: np.ndarray) -> float:
    return float(losses[0].sum() / losses[1].sum())


def _ngrams(documents: Sequence[np.ndarray], n: int) -> tuple[np.ndarray, np.ndarray]:
    """Return a hash of every n-gram, uint64, and the number of the document that it is in."""
    inner = [document[1:-1] for document in documents]
    lengths = np.array([len(ids) for ids in inner])
    tokens = np.concatenate([*inner, np.zeros(0, np.int64)]).astype(np.uint64) + np.uint64(1)
    owner = np.repeat(np.arange(len(inner)), lengths)
    count = max(0, len(tokens) - n + 1)
    hashes = np.zeros(count, np.uint64)
    for place in range(n):
        hashes = hashes * _BASE + tokens[place : place + count]
    whole = owner[:count] == owner[n - 1 : n - 1 + count]
    return hashes[whole], owner[:count][whole]


def _mixed(hashes: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    return (hashes ^ (hashes >> np.uint64(29))) * _BASE + numbers.astype(np.uint64) * np.uint64(0xD1B54A32D192ED03)


def _contained(values: np.ndarray, among: np.ndarray) -> np.ndarray:
    """Return which `values` are in the sorted, unique `among`."""
    if not len(among):
        return np.zeros(len(values), bool)
    places = np.minimum(np.searchsorted(among, values), len(among) - 1)
    return np.asarray(among[places] == values)


def _counts(document: np.ndarray, vocabulary: int) -> np.ndarray:
    return np.bincount(document[1:-1].astype(np.int64), minlength=vocabulary).astype(np.float32)


def _unit(counts: np.ndarray, weights: np.ndarray) -> np.ndarray:
    vectors = np.log1p(counts) * weights
    return np.asarray(vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9))
