"""What the corpus checks verify, as plain functions. Each returns the violations or numbers that its check judges."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from sbp_assets.corpus.dedup import normalise
from sbp_assets.corpus.split import HELDOUT, expected_deviation, split_of
from sbp_assets.corpus.tokenizer import decode, encode_texts
from sbp_assets.experiment import Split
from sbp_assets.storage.token_arrays import TokenArrays

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Text that tokenizers lose most easily: case, runs of spaces, accents, other scripts, emoji, special-token names.
ROUND_TRIP = (
    "Plain English, with punctuation; and  two spaces.",
    "\tTabs\r\n\n  and lines\n",
    "naïve café e\u0301 — Größe",
    "日本語の文章。العربية हिन्दी",
    "🦊👩‍👩‍👧‍👦 \u200b\ufeff\x00",
    "<|bos|>a<|eos|><|pad|><|related|>",
)


def bad_ids(ids: pl.Series) -> list[str]:
    """Ids that are null, empty or there twice."""
    return [str(name) for name, n in ids.value_counts().iter_rows() if name is None or name == "" or n > 1]


def unaccounted_rows(rows_read: int, documents: int, rejects: int) -> int:
    """Rows that are neither a document nor rejected."""
    return rows_read - documents - rejects


def unreconciled(
    raw: pl.DataFrame, duplicates: pl.DataFrame, documents: pl.DataFrame, shard: int, split: Split
) -> list[str]:
    """Ids of the shard whose fate is not exactly one of: dropped as a duplicate, outside every split, in its split."""
    dropped = set(duplicates.filter(pl.col("shard") == shard)["id"])
    expected = {name: split_of(name, split) for name in raw["id"] if name not in dropped}
    found = dict(documents.select("id", "split").iter_rows())
    wrong = {name for name, s in expected.items() if found.get(name) != s} | (found.keys() - expected.keys())
    return sorted(wrong | (dropped - set(raw["id"])))


def dangling_duplicates(duplicates: pl.DataFrame, raw: Mapping[str, pl.LazyFrame]) -> list[str]:
    """Ids of duplicates whose kept document is dropped itself, does not exist, or comes later; or dropped twice."""
    keys = {(row["shard"], row["id"]) for row in duplicates.iter_rows(named=True)}
    kept = duplicates.select("kept_shard", "kept_id").unique()
    exists: set[tuple[int, str]] = set()
    for key, frame in raw.items():
        wanted = kept.filter(pl.col("kept_shard") == int(key))["kept_id"]
        found = frame.filter(pl.col("id").is_in(wanted.implode())).select("id").collect()["id"]
        exists |= {(int(key), name) for name in found}
    twice = {key for key, n in Counter(duplicates.select("shard", "id").iter_rows()).items() if n > 1}
    return [
        row["id"]
        for row in duplicates.iter_rows(named=True)
        if (place := (row["kept_shard"], row["kept_id"])) in keys
        or place not in exists
        or row["kept_shard"] > row["shard"]
        or (row["shard"], row["id"]) in twice
    ]


def split_shares(
    documents: Mapping[str, pl.LazyFrame], kept: int, split: Split
) -> dict[str, tuple[float, float, bool]]:
    """Per split: its share of the `kept` de-duplicated documents, the asked share, and whether they agree.

    They agree within five standard deviations of a binomial draw, as hashing the ids is one.
    """
    counts: Counter[str] = Counter()
    for frame in documents.values():
        counts.update(dict(frame.group_by("split").len().collect().iter_rows()))
    shares = {}
    for name in ("unique", "oracle", "heldout"):
        asked, found = getattr(split, name), counts[name] / max(kept, 1)
        shares[name] = (found, asked, abs(found - asked) <= expected_deviation(asked, kept))
    return shares


def leaked_heldout(documents: Mapping[str, pl.LazyFrame]) -> list[str]:
    """Ids of held-out documents whose normalised text, or whose id, is also in a training split of any shard."""

    def digest(text: str) -> bytes:
        return hashlib.sha256(normalise(text).encode()).digest()

    heldout: dict[bytes, str] = {}
    for frame in documents.values():
        rows = frame.filter(pl.col("split") == HELDOUT).select("id", "text").collect()
        heldout |= {digest(text): name for name, text in rows.iter_rows()}
    ids = set(heldout.values())
    leaked = set()
    for frame in documents.values():
        for name, text in frame.filter(pl.col("split") != HELDOUT).select("id", "text").collect().iter_rows():
            if (original := heldout.get(digest(text))) is not None:
                leaked.add(original)
            if name in ids:
                leaked.add(name)
    return sorted(leaked)


def bad_token_documents(arrays: TokenArrays, documents: pl.DataFrame, tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Ids in only one of tokens and documents, in another order or split, or without bos or eos at the ends."""
    if not arrays.documents.equals(documents.select("id", "split")):
        mine, theirs = set(arrays.documents.rows()), set(documents.select("id", "split").rows())
        return sorted({row[0] for row in mine ^ theirs}) or ["(order)"]
    if not len(documents):
        return []
    starts, ends = arrays.offsets[:-1], arrays.offsets[1:]
    special = np.array([tokenizer.bos_token_id, tokenizer.eos_token_id])
    framed = (ends - starts >= 2) & (arrays.tokens[starts] == special[0])
    framed &= arrays.tokens[np.maximum(ends - 1, 0)] == special[1]
    return documents["id"].filter(pl.Series(~framed)).to_list()


def undecodable(
    arrays: TokenArrays, documents: pl.DataFrame, tokenizer: PreTrainedTokenizerFast, sample: int = 200
) -> list[str]:
    """Ids of an evenly spaced sample of documents whose tokens do not decode to their text."""
    places = np.unique(np.linspace(0, len(documents) - 1, min(sample, len(documents))).astype(int))
    return [
        documents["id"][int(i)]
        for i in places
        if decode(tokenizer, arrays.tokens[arrays.offsets[i] + 1 : arrays.offsets[i + 1] - 1])
        != documents["text"][int(i)]
    ]


def lossy_texts(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Texts of ROUND_TRIP that do not survive encoding and decoding, or that encode to a special token."""
    specials = set(tokenizer.all_special_ids)
    return [
        text
        for text, ids in zip(ROUND_TRIP, encode_texts(tokenizer, ROUND_TRIP), strict=True)
        if decode(tokenizer, ids) != text or specials & set(ids.tolist())
    ]
