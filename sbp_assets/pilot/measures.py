"""What is measured of a sample: pairs by threshold and by size of D, and what of a document its partner says.

All of it comes from the embeddings and texts of the sample. The pairs among some of the documents are found by exact
search and filtered as those of a run are (`pairing.filter`), so that they are the pairs of a D of that size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from sbp_assets.corpus.concepts import ConceptWorld, view_of
from sbp_assets.corpus.shingles import Words, batched, segment
from sbp_assets.corpus.split import UNIQUE
from sbp_assets.pairing.filter import bucket_edges, shard_pairs
from sbp_assets.pairing.quantizer import Centring
from sbp_assets.pairing.search import CANDIDATE_SCHEMA
from sbp_assets.settings import Pairing
from sbp_assets.storage.progress import Progress

FLOOR = 0.2  # similarity from which pairs are looked at
THRESHOLDS = tuple(round(0.2 + 0.05 * step, 2) for step in range(15))
RARE, RARE_IN = 0.02, 5  # A word is rare if at most this share of D's documents holds it, or so many.
RANDOM_PAIRS = 20_000
NEAR = 0.01  # Near to a document is this share of D, so that a random document of D is near to 1% of them.
_SHARD = "00000"
_ROWS = 512  # Documents whose similarities to all others are held.


@dataclass(frozen=True)
class Documents:
    """Documents in the order in which they join D: the first n are a random D of n documents."""

    ids: list[str]
    texts: list[str]
    vectors: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    def first(self, count: int) -> Documents:
        """Return the first `count` documents."""
        return Documents(self.ids[:count], self.texts[:count], self.vectors[:count])

    def centred(self, pairing: Pairing, vectors: np.ndarray | None = None) -> np.ndarray:
        """Return `vectors`, else those of the documents, as the search compares them."""
        given = self.vectors if vectors is None else vectors
        return given if pairing.centring is None else Centring.fit(self.vectors, pairing.centring)(given)


def pairs_among(
    documents: Documents, pairing: Pairing, scratch: Path, memory_limit: str, floor: float = FLOOR
) -> pl.DataFrame:
    """Return the pairs (d1, d2, similarity) among `documents` under `pairing`, but from the similarity `floor` on.

    The caps keep the most similar pairs, so that those of a higher threshold are the ones at or above it. `scratch` is
    an empty directory.
    """
    # As many columns as the search keeps neighbours of each document.
    wanted = min(pairing.neighbors, len(documents) - 1)
    vectors = documents.centred(pairing)
    found = []
    for start in range(0, len(vectors), _ROWS):
        similarity = vectors[start : start + _ROWS] @ vectors.T
        rows = np.arange(len(similarity))
        similarity[rows, start + rows] = -np.inf
        nearest = np.argpartition(-similarity, wanted - 1, axis=1)[:, :wanted]
        found.append((np.repeat(start + rows, wanted), nearest.ravel(), similarity[rows[:, None], nearest].ravel()))
    query, neighbor, similar = (np.concatenate(parts) for parts in zip(*found, strict=True))
    ids = pl.Series(documents.ids)
    candidates = pl.DataFrame({
        "query_id": ids.gather(query), "neighbor_id": ids.gather(neighbor), "neighbor_shard": [_SHARD] * len(query),
        "similarity": np.clip(similar, -1, 1), "rank": np.zeros(len(query), np.int64),
    }).cast(CANDIDATE_SCHEMA)  # fmt: skip
    edges = scratch / "edges"
    edges.mkdir()
    candidates.write_parquet(scratch / "candidates.parquet")
    table = pl.DataFrame({"id": documents.ids, "text": documents.texts, "split": [UNIQUE] * len(documents)})
    table.write_parquet(scratch / "documents.parquet")
    low = pairing.model_copy(update={"min_similarity": floor})
    with Progress("filter", "pairs") as progress:
        bucket_edges(
            {_SHARD: scratch / "candidates.parquet"}, {_SHARD: scratch / "documents.parquet"}, [_SHARD], low, edges,
            memory_limit, progress,
        )  # fmt: skip
    return shard_pairs({_SHARD: edges}, _SHARD, low)[0].select("d1", "d2", "similarity")


def density(pairs: pl.DataFrame, documents: int) -> dict[str, float]:
    """Return the pairs, the pairs per document, and the share of the documents that are d1 or d2 of one."""
    paired = pl.concat([pairs["d1"], pairs["d2"]]).n_unique()
    return {"pairs": len(pairs), "pairs_per_document": len(pairs) / documents, "paired_share": paired / documents}


def random_similarities(documents: Documents, pairing: Pairing, seed: int = 0) -> np.ndarray:
    """Return the similarities of RANDOM_PAIRS random pairs of different documents."""
    vectors = documents.centred(pairing)
    generator = np.random.default_rng(seed)
    one = generator.integers(0, len(documents), RANDOM_PAIRS)
    other = (one + generator.integers(1, len(documents), RANDOM_PAIRS)) % len(documents)
    return np.asarray((vectors[one] * vectors[other]).sum(axis=1))


class RareWords:
    """The rare words of D's documents, by which it is told how much of one text stands in another."""

    def __init__(self, documents: Documents) -> None:
        own = _words(documents.texts)
        words, counts = np.unique(np.concatenate([*own, np.zeros(0, np.uint64)]), return_counts=True)
        self._frequent = words[counts > max(RARE_IN, RARE * len(documents))]
        self._of = {name: self.of(found) for name, found in zip(documents.ids, own, strict=True)}

    def of(self, words: np.ndarray) -> np.ndarray:
        """Return those of different `words` that are rare in D."""
        return np.setdiff1d(words, self._frequent, assume_unique=True)

    def shares(self, first: Sequence[str], second: Sequence[str]) -> np.ndarray:
        """Return the share of each second document's rare words that its first one has, (pairs,); NaN: it has none."""
        return _shares([self._of[name] for name in first], [self._of[name] for name in second])

    def shares_of_texts(self, first: Sequence[str], texts: Sequence[str]) -> np.ndarray:
        """As `shares`, of `texts` that are none of D's."""
        return _shares([self._of[name] for name in first], list(map(self.of, _words(texts))))


def mean(shares: np.ndarray) -> float | None:
    """Return the mean of the `shares` that are no NaN; None where all are."""
    known = shares[~np.isnan(shares)]
    return float(known.mean()) if len(known) else None


def facts_shared(
    first: Sequence[str], second: Sequence[str], texts: Mapping[str, str], world: ConceptWorld
) -> dict[str, float]:
    """Return the exact truth of pairs in the world of concepts, by ids into `texts`.

    The share of d2's facts that d1 states, of pairs about one concept, and, of those, of pairs that cross views.
    """
    stated = {name: {(s.concept, s.attribute, s.value) for s in world.statements(text)} for name, text in texts.items()}
    about = {name: world.concept_of(text) for name, text in texts.items()}
    shares = [len(stated[a] & stated[b]) / len(stated[b]) for a, b in zip(first, second, strict=True) if stated[b]]
    same = [(a, b) for a, b in zip(first, second, strict=True) if about[a] is not None and about[a] == about[b]]
    crossing = [view_of(texts[a]) != view_of(texts[b]) for a, b in same]
    return {
        "facts_in_d1": float(np.mean(shares)) if shares else 0.0,
        "one_concept": len(same) / max(1, len(first)),
        "crossing": float(np.mean(crossing)) if crossing else 0.0,
    }


def random_partners(pairs: pl.DataFrame, documents: Documents, seed: int = 0) -> list[str]:
    """Return a random document of D for each pair's d2, which is another one."""
    number = {name: place for place, name in enumerate(documents.ids)}
    second = np.array([number[name] for name in pairs["d2"]])
    shift = np.random.default_rng(seed).integers(1, len(documents), len(second))
    return [documents.ids[place] for place in (second + shift) % len(documents)]


def subject_kept(seeds: Sequence[str], vectors: np.ndarray, documents: Documents, pairing: Pairing) -> dict[str, float]:
    """Return how many synthetic documents, embedded as `vectors`, are nearer to their seed than to 99% of D.

    Of a random seed it would be 1%. Also the mean similarity to the seed, and to a random document of D.
    """
    number = {name: place for place, name in enumerate(documents.ids)}
    similarity = documents.centred(pairing, vectors) @ documents.centred(pairing).T
    own = similarity[np.arange(len(similarity)), [number[name] for name in seeds]]
    near = max(1, round(NEAR * len(documents)))
    return {
        "kept": float(((similarity >= own[:, None]).sum(axis=1) <= near).mean()),
        "to_seed": float(own.mean()),
        "to_random": float(similarity.mean()),
    }


def _words(texts: Sequence[str]) -> list[np.ndarray]:
    """Return the different words of each text, as sorted hashes."""
    found: list[np.ndarray] = []
    for batch in batched(texts):
        words = Words.of(segment(batch))
        found += [np.unique(words.hashes[a:b]) for a, b in zip(words.starts[:-1], words.starts[1:], strict=True)]
    return found


def _shares(first: Sequence[np.ndarray], second: Sequence[np.ndarray]) -> np.ndarray:
    return np.array([
        np.isin(b, a, assume_unique=True).mean() if len(b) else np.nan for a, b in zip(first, second, strict=True)
    ])  # fmt: skip
