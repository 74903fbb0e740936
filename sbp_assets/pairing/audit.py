"""What the checks of one shard verify, as plain functions: each returns whether its check passes, and what it found.

Samples find errors of whole artifacts: vectors of other texts, shuffled pairs, an index of another model. Of other
shards a check reads a sample of fixed size, so that the checks of all shards grow with their number alone; what only
all shards show is in `global_audit`. docs/checks.md says what a sample finds with what probability.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import polars as pl

from sbp_assets.corpus.shingles import overlap, shingled
from sbp_assets.corpus.split import UNIQUE
from sbp_assets.pairing.embed import Engine, embed, vectors_of
from sbp_assets.pairing.filter import COUNTED, COUNTS_FILE, EDGES_FILE, texts_of
from sbp_assets.settings import Pairing
from sbp_assets.storage.paths import read_table
from sbp_assets.storage.progress import Progress

# Float32 rounding of a norm over a thousand components stays below this.
NORM_TOLERANCE = 1e-4
# A few bits of bfloat16, in a text that is embedded again in another batch, move a cosine by a few thousandths.
SIMILARITY_TOLERANCE = 0.02
EMBEDDED_SAMPLE = 8
PAIRS_SAMPLE = 100

# Whether the property that a function's docstring names holds, and the metadata of the check.
Result = tuple[bool, dict[str, int | float | str]]


def sampled_shards(shard: str, others: Iterable[str], size: int) -> list[str]:
    """Return the `size` shards of `others` that the check of `shard` reads beside its own, or all where they are fewer.

    Those with the least hash of both keys are taken (rendezvous hashing, Thaler and Ravishankar 1998): each shard has
    its own, as if drawn by chance but always the same, and one more shard replaces at most one of them. Each key is
    hashed: 6 ms for 10,000.
    """
    return heapq.nsmallest(
        size,
        (other for other in others if other != shard),
        key=lambda other: hashlib.sha256(f"{shard} {other}".encode()).digest(),
    )


def check_embeddings(embeddings: pl.DataFrame, document_ids: pl.Series) -> Result:
    """Return whether all vectors are finite and of unit length, and each document of D in the shard has exactly one.

    `embeddings` has EMBEDDING_COLUMNS; `document_ids` are the ids of those documents.
    """
    vectors = vectors_of(embeddings)
    norms = np.linalg.norm(vectors, axis=1)
    wrong = ~(np.abs(norms - 1) <= NORM_TOLERANCE)  # also true of NaN
    ids = embeddings["id"]
    missing = document_ids.filter(~document_ids.is_in(ids.implode()))
    extra = ids.filter(~ids.is_in(document_ids.implode()))
    repeated = len(ids) - ids.n_unique()
    return not (wrong.any() or len(missing) or len(extra) or repeated), {
        "not_unit_length": int(wrong.sum()),
        "documents_without_vector": len(missing),
        "vectors_without_document": len(extra),
        "repeated_ids": repeated,
        "offending_ids": some(ids.filter(pl.Series(wrong)), missing, extra),
    }


def check_texts(
    embeddings: pl.DataFrame, documents: pl.LazyFrame, engine: Engine, settings: Pairing, batch_size: int
) -> Result:
    """Return whether a sample of vectors, computed again from their documents' texts, has the stored directions.

    Raises ValueError where the model returns a vector without direction.
    """
    sample = embeddings.sample(min(EMBEDDED_SAMPLE, len(embeddings)), seed=0)
    texts = texts_of(sample["id"], documents)
    sample = sample.filter(pl.col("id").is_in(list(texts)))
    with Progress("embed a sample", "documents") as progress:
        chosen = [texts[name] for name in sample["id"]]
        computed = embed(engine, chosen, settings.max_tokens, batch_size, progress, settings.embedding_prompt)
    stored = vectors_of(sample)
    same_space = stored.shape == computed.shape
    cosines = np.einsum("ij,ij->i", stored, computed) if same_space else np.zeros(len(sample))
    wrong = ~(cosines >= 1 - SIMILARITY_TOLERANCE)
    return not wrong.any(), {
        "sample": len(sample),
        "of_another_text": int(wrong.sum()),
        "least_cosine": float(cosines.min(initial=1.0)),
        "offending_ids": some(sample["id"].filter(pl.Series(wrong))),
    }


def check_edges(directory: Path, bucket: Sequence[str], settings: Pairing) -> Result:
    """Return whether the edges of a bucket are in bounds, distinct, with d2 in its shards, and within the cap on d2."""
    edges, counts = read_table(directory / EDGES_FILE), read_table(directory / COUNTS_FILE)
    faults = {
        "similarities_out_of_bounds": edges.filter(
            ~pl.col("similarity").is_between(settings.min_similarity, settings.max_similarity)
        )["d1"],
        "near_copies": edges.filter(pl.col("shared_shingles") > settings.max_shared_shingles)["d1"],
        "self_pairs": edges.filter(pl.col("d1") == pl.col("d2"))["d1"],
        "repeated_pairs": edges.filter(pl.struct("d1", "d2").is_duplicated())["d1"],
        "d2_of_other_shards": edges.filter(~pl.col("d2_shard").is_in(list(bucket)))["d2"],
        "d2_over_cap": _over(edges, "d2", settings.max_pairs_per_document),
    }
    dropped = sum(int(counts[name].sum()) for name in COUNTED[2:])
    missing = int(counts["candidates"].sum()) + int(counts["reversed"].sum()) - dropped - len(edges)
    return not missing and all(rows.is_empty() for rows in faults.values()), {
        **{name: len(rows) for name, rows in faults.items()},
        "edges": len(edges),
        "edges_not_accounted_for": missing,
        "offending_ids": some(*faults.values()),
    }


def _over(pairs: pl.DataFrame, side: str, cap: int | None) -> pl.Series:
    """Return the documents that are in more pairs as `side` than the cap allows."""
    found = pairs.group_by(side).len()
    return found.filter(pl.col("len") > cap)[side] if cap is not None else found[side][:0]


def check_pairs(
    pairs: pl.DataFrame,
    documents: Mapping[str, pl.LazyFrame],
    shard: str,
    settings: Pairing,
    others: int,
) -> Result:
    """Return whether similarities and shared shingles are in bounds, pairs distinct and of D, and the caps kept here.

    That every d1 is of this shard is looked up, and d2 here and in `others` of the shards that they are said to be in.
    """
    cap = settings.max_pairs_per_document
    outside = pairs.filter(~pl.col("similarity").is_between(settings.min_similarity, settings.max_similarity))
    copies = pairs.filter(pl.col("shared_shingles") > settings.max_shared_shingles)
    itself = pairs.filter(pl.col("d1") == pl.col("d2"))
    repeated = pairs.filter(pl.struct("d1", "d2").is_duplicated())
    over = {side: _over(pairs, side, cap) for side in ("d1", "d2")}
    references = pl.concat([pairs.select(id="d1", shard=pl.lit(shard)), pairs.select(id="d2", shard="d2_shard")])
    known = {
        key: documents[key].filter(pl.col("split") == UNIQUE).select("id").collect()["id"]
        for key in (_shards_to_read(pairs, documents, shard, others) if len(pairs) else ())
    }
    unknown = unknown_ids(references, known, documents)
    faults = {
        "similarities_out_of_bounds": len(outside),
        "near_copies": len(copies),
        "self_pairs": len(itself),
        "repeated_pairs": len(repeated),
        "d1_over_cap": len(over["d1"]),
        "d2_over_cap": len(over["d2"]),
        "documents_not_in_d": len(unknown),
    }
    return not any(faults.values()), {
        **faults,
        "pairs": len(pairs),
        "shards_read": len(known),
        "offending_ids": some(
            outside["d1"], copies["d1"], itself["d1"], repeated["d1"], over["d1"], over["d2"], unknown
        ),
    }


def check_origin(
    pairs: pl.DataFrame,
    candidates: Mapping[str, pl.LazyFrame],
    documents: Mapping[str, pl.LazyFrame],
    shard: str,
    settings: Pairing,
    others: int,
) -> Result:
    """Return whether a sample of pairs, with d2 here or in `others` shards, are candidates and have the stated figures.

    The figures, similarity and shared shingles, are those of the candidates and of the documents' texts.
    """
    few = _shards_to_read(pairs, documents, shard, others)
    sample = pairs.filter(pl.col("d2_shard").is_in(few))
    sample = sample.sample(min(PAIRS_SAMPLE, len(sample)), seed=seed_of(shard))
    found = [_similarities(candidates[shard], sample, {"query_id": "d1", "neighbor_id": "d2"})]
    first = texts_of(sample["d1"], documents[shard])
    second: dict[str, str] = {}
    for (key,), rows in sample.partition_by("d2_shard", as_dict=True).items():
        second |= texts_of(rows["d2"], documents[str(key)])
        if settings.both_directions:
            found.append(_similarities(candidates[str(key)], rows, {"query_id": "d2", "neighbor_id": "d1"}))
    near = pl.concat(found).group_by("d1", "d2").agg(pl.col("found").max())
    joined = sample.join(near, on=["d1", "d2"], how="left")
    close = (pl.col("similarity") - pl.col("found")).abs() <= SIMILARITY_TOLERANCE
    unfound = joined.filter(~close.fill_null(False))
    wrong = [
        d1
        for d1, d2, stated in sample.select("d1", "d2", "shared_shingles").iter_rows()
        if not abs(_shared(first.get(d1), second.get(d2), settings.shingle_tokens) - stated) < 1e-6
    ]
    return not len(unfound) and not wrong, {
        "sample": len(sample),
        "no_such_candidate": len(unfound),
        "other_shared_shingles": len(wrong),
        "offending_ids": some(unfound["d1"], pl.Series(wrong, dtype=pl.String)),
    }


def seed_of(shard: str) -> int:
    """Return the seed of a shard's samples."""
    # Of each shard other places: samples of one seed would leave out the same rows of all.
    return int.from_bytes(hashlib.sha256(shard.encode()).digest()[:8], "big")


def _shards_to_read(pairs: pl.DataFrame, documents: Mapping[str, pl.LazyFrame], shard: str, others: int) -> list[str]:
    """Return the pairs' own shard, and those in which d2 are looked up; a shard that does not exist is not among them.

    Two checks of one shard read the same.
    """
    return [shard, *sampled_shards(shard, [key for key in pairs["d2_shard"].unique() if key in documents], others)]


def unknown_ids(references: pl.DataFrame, known: Mapping[str, pl.Series], shards: Iterable[str]) -> pl.Series:
    """Return the ids of `references` (id, shard) that their shard does not have, where it is one of `known`.

    Also those of a shard that is none of `shards`.
    """
    references = references.unique()
    found = [references.filter(~pl.col("shard").is_in(list(shards)).fill_null(False))["id"]]
    for key, ids in known.items():
        rows = references.filter(shard=key)
        found.append(rows.join(ids.to_frame("id"), on="id", how="anti")["id"])
    return pl.concat(found)


def _similarities(candidates: pl.LazyFrame, pairs: pl.DataFrame, sides: dict[str, str]) -> pl.DataFrame:
    edges = candidates.select(*(pl.col(name).alias(side) for name, side in sides.items()), found="similarity")
    return (
        edges.join(pairs.lazy().select("d1", "d2"), on=["d1", "d2"], how="semi").select("d1", "d2", "found").collect()
    )


def _shared(d1: str | None, d2: str | None, words: int) -> float:
    if d1 is None or d2 is None:
        return float("nan")
    return overlap(*shingled([d1, d2], words))


def some(*ids: pl.Series) -> str:
    """Return up to ten of the ids, of those that begin each series, for a check's metadata."""
    return ", ".join(sorted({str(i) for series in ids for i in series.head(10)})[:10])
