"""What the corpus checks verify, as plain functions: each returns the violations or numbers that its check judges."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import polars as pl

from sbp_assets.corpus.dedup import signatures
from sbp_assets.corpus.shingles import jaccard, normalise, shingled
from sbp_assets.corpus.split import HELDOUT, ORACLE, UNIQUE, expected_deviation, split_of
from sbp_assets.corpus.tokenizer import decode, encode_texts
from sbp_assets.settings import Dedup, Split
from sbp_assets.storage.progress import Progress
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

# Samples find errors of whole tables (rows shifted, another shard's file); `artifact_is_intact` finds those of one row.
SIGNATURE_SAMPLE = 50
DUPLICATE_SAMPLE, DUPLICATE_SHARDS = 50, 8
TOKEN_SAMPLE = 200
TOKENS_AT_ONCE = 1 << 22
KEPT_SAMPLE = 2_000_000  # Documents among which repetitions are looked for: all of most corpora.


def manifest_problems(manifest: pl.DataFrame, shards: int, files_per_shard: int | None, is_files: bool) -> list[str]:
    """Return what is wrong with a manifest: repeated files, wrong shards, generated shards without a row."""
    problems = [f"{name}: listed {n} times" for name, n in manifest["file"].value_counts().iter_rows() if n > 1]
    place = pl.int_range(pl.len())
    assigned = place // files_per_shard if files_per_shard else place % shards
    expected = pl.when(assigned < shards).then(assigned)
    wrong = manifest.filter(pl.col("file").is_null() | pl.col("shard").ne_missing(expected))
    problems += [f"{file}: in shard {shard}" for file, shard in wrong.select("file", "shard").iter_rows()]
    if manifest.is_empty():
        problems.append("no files")
    elif not is_files and len(manifest) != shards:
        problems.append(f"{len(manifest)} rows for {shards} shards")
    return problems


def invalid_documents(raw: pl.DataFrame, manifest: pl.DataFrame, shard: int) -> list[str]:
    """Return the ids of documents without text, or not from a file of `shard`."""
    files = manifest.filter(pl.col("shard") == shard)["file"].implode()
    valid = (pl.col("text").str.strip_chars() != "") & pl.col("file").is_in(files) & (pl.col("line") >= 1)
    return raw.filter(~valid.fill_null(False))["id"].cast(pl.String).to_list()


def wrong_signatures(found: pl.DataFrame, raw: pl.DataFrame, settings: Dedup) -> list[str]:
    """Return the ids whose signature is missing, extra or of too few bands or, in a sample, not that of the text.

    "(order)": the ids are right, but in another order.
    """
    if not found["id"].equals(raw["id"]):
        return sorted(set(found["id"]) ^ set(raw["id"])) or ["(order)"]
    short = found.filter(pl.col("bands").list.len() != settings.bands)["id"].to_list()
    sample = raw.select("id", "text").sample(min(SIGNATURE_SAMPLE, len(raw)), seed=0)
    with Progress("signatures checked", "docs") as progress:
        expected = signatures(sample, settings, progress)
    other = expected.join(found, on=["id", "bands", "text_sha256"], how="anti")["id"].to_list()
    return short + other


def invalid_ids(ids: pl.Series) -> list[str]:
    """Return the ids that are null, empty or repeated."""
    return [str(name) for name, n in ids.value_counts().iter_rows() if name is None or name == "" or n > 1]


def unaccounted_rows(rows_read: int, documents: int, rejects: int) -> int:
    """Return the number of rows that are neither a document nor rejected."""
    return rows_read - documents - rejects


def misassigned_documents(
    raw: pl.DataFrame, duplicates: pl.DataFrame, documents: pl.DataFrame, shard: int, split: Split
) -> list[str]:
    """Return the ids that are not exactly one of: a dropped duplicate, outside every split, in their split."""
    dropped = set(duplicates.filter(pl.col("shard") == shard)["id"])
    expected = {name: split_of(name, split) for name in raw["id"] if name not in dropped}
    found = dict(documents.select("id", "split").iter_rows())
    wrong = {name for name, s in expected.items() if found.get(name) != s} | (found.keys() - expected.keys())
    return sorted(wrong | (dropped - set(raw["id"])))


def altered_documents(raw: pl.DataFrame, documents: pl.DataFrame) -> list[str]:
    """Return the ids of documents whose text, or another column, is not that of the raw document of this id."""
    return documents.join(raw, on=raw.columns, how="anti", nulls_equal=True)["id"].to_list()


def dangling_duplicates(duplicates: pl.DataFrame, raw: Mapping[str, pl.LazyFrame]) -> list[str]:
    """Return the ids of duplicates that repeat, or whose kept document is dropped, does not exist or comes later."""
    keys = {(row["shard"], row["id"]) for row in duplicates.iter_rows(named=True)}
    kept = duplicates.select("kept_shard", "kept_id").unique()
    exists: set[tuple[int, str]] = set()
    for key, frame in raw.items():
        wanted = kept.filter(pl.col("kept_shard") == int(key))["kept_id"]
        found = frame.filter(pl.col("id").is_in(wanted.implode())).select("id").collect()["id"]
        exists |= {(int(key), name) for name in found}
    repeated = {key for key, n in Counter(duplicates.select("shard", "id").iter_rows()).items() if n > 1}
    return [
        row["id"]
        for row in duplicates.iter_rows(named=True)
        if (place := (row["kept_shard"], row["kept_id"])) in keys
        or place not in exists
        or row["kept_shard"] > row["shard"]
        or (row["shard"], row["id"]) in repeated
    ]


def incorrect_duplicates(duplicates: pl.DataFrame, raw: Mapping[str, pl.LazyFrame], settings: Dedup) -> list[str]:
    """Return the ids of duplicates below the threshold or, in a sample, of another similarity than they state."""
    near = (pl.col("kind") == "near") & pl.col("jaccard").is_between(settings.threshold, 1)
    exact = (pl.col("kind") == "exact") & (pl.col("jaccard") == 1)
    same_id = (pl.col("kind") == "id") & pl.col("jaccard").is_null() & (pl.col("id") == pl.col("kept_id"))
    wrong = duplicates.filter(~(near | exact | same_id).fill_null(False))["id"].to_list()
    compared = duplicates.filter(pl.col("kind") != "id")
    shards = pl.concat([compared["shard"], compared["kept_shard"]]).unique().sort()
    few = shards.sample(min(DUPLICATE_SHARDS, len(shards)), seed=0).implode()
    compared = compared.filter(pl.col("shard").is_in(few) & pl.col("kept_shard").is_in(few))
    compared = compared.sample(min(DUPLICATE_SAMPLE, len(compared)), seed=0)
    texts: dict[tuple[int, str], str] = {}
    for (shard,), rows in (
        pl.concat([compared.select("shard", "id"), compared.select(shard="kept_shard", id="kept_id")])
        .partition_by("shard", as_dict=True)
        .items()
    ):
        found = raw[f"{shard:05d}"].filter(pl.col("id").is_in(rows["id"].implode())).select("id", "text").collect()
        texts |= {(int(str(shard)), name): normalise(text) for name, text in found.iter_rows()}
    for name, shard, kept, kept_shard, stated, kind in compared.iter_rows():
        a, b = texts.get((shard, name)), texts.get((kept_shard, kept))
        if a is None or b is None:
            correct = False
        elif kind == "exact":
            correct = a == b
        else:
            first, second = shingled([a, b], settings.shingle_words)
            correct = abs(jaccard(first.shingles, second.shingles) - stated) < 1e-9
        if not correct:
            wrong.append(name)
    return wrong


def missed_duplicates(duplicates: pl.DataFrame, signatures: Mapping[str, pl.LazyFrame]) -> list[str]:
    """Return the ids of kept documents whose normalised text, or whose id, another kept document has.

    Of more than KEPT_SAMPLE documents, about that many are compared: those whose text's digest (or id's hash) lies in a
    range. Of two documents with one text, either both are in the sample or neither.
    """
    total = sum(frame.select(pl.len()).collect().item() for frame in signatures.values())
    share = min(1.0, KEPT_SAMPLE / max(total, 1))
    kept = pl.concat([
        frame.select("id", "text_sha256").join(
            duplicates.lazy().filter(pl.col("shard") == int(key)).select("id"), on="id", how="anti"
        )
        for key, frame in signatures.items()
    ])  # fmt: skip
    sampled = {
        "text_sha256": pl.col("text_sha256").str.slice(0, 8).str.to_integer(base=16) < share * 2**32,
        "id": pl.col("id").hash(seed=0) < int(share * (2**64 - 1)),
    }
    missed: list[str] = []
    for column, chosen in sampled.items():
        rows = kept.filter(chosen).select(key=column, id="id")
        repeated = rows.group_by("key").agg(pl.col("id"), n=pl.len()).filter(pl.col("n") > 1)
        missed += repeated.collect(engine="streaming")["id"].explode().to_list()
    return sorted(set(missed))


def split_shares(
    documents: Mapping[str, pl.LazyFrame], kept: int, split: Split
) -> dict[str, tuple[float, float, bool]]:
    """Return by split: its share of the `kept` de-duplicated documents, the configured share, whether they agree.

    They agree within five standard deviations of a binomial draw: hashing the ids amounts to one.
    """
    counts: Counter[str] = Counter()
    for frame in documents.values():
        counts.update(dict(frame.group_by("split").len().collect().iter_rows()))
    shares = {}
    for name in (UNIQUE, ORACLE, HELDOUT):
        configured, found = getattr(split, name), counts[name] / max(kept, 1)
        shares[name] = (found, configured, abs(found - configured) <= expected_deviation(configured, kept))
    return shares


def leaked_heldout(documents: Mapping[str, pl.LazyFrame]) -> list[str]:
    """Return the ids of held-out documents whose normalised text or id is also in a training split of any shard."""

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


def wrong_token_documents(
    arrays: TokenArrays, documents: pl.DataFrame, tokenizer: PreTrainedTokenizerFast
) -> list[str]:
    """Return the ids in only one of tokens and documents, of another split, or without bos and eos at the ends.

    "(order)": the ids are right, but in another order. "(tokens)": there are token ids beyond the vocabulary, or bos or
    eos inside documents, as where tokens are repeated.
    """
    if not arrays.documents.equals(documents.select("id", "split")):
        stored, expected = set(arrays.documents.rows()), set(documents.select("id", "split").rows())
        return sorted({row[0] for row in stored ^ expected}) or ["(order)"]
    if not len(documents):
        return []
    starts, ends = arrays.offsets[:-1], arrays.offsets[1:]
    special = np.array([tokenizer.bos_token_id, tokenizer.eos_token_id])
    framed = (ends - starts >= 2) & (arrays.tokens[starts] == special[0])
    framed &= arrays.tokens[np.maximum(ends - 1, 0)] == special[1]
    wrong = documents["id"].filter(pl.Series(~framed)).to_list()
    highest, inside = 0, -2 * len(documents)
    for first in range(0, len(arrays.tokens), TOKENS_AT_ONCE):
        block = np.asarray(arrays.tokens[first : first + TOKENS_AT_ONCE])
        highest, inside = max(highest, int(block.max())), inside + int(np.isin(block, special).sum())
    return wrong + ["(tokens)"] * (highest >= len(tokenizer) or inside > 0)


def undecodable_documents(
    arrays: TokenArrays, documents: pl.DataFrame, tokenizer: PreTrainedTokenizerFast
) -> list[str]:
    """Return the ids, in an evenly spaced sample, of documents whose tokens do not decode to their text."""
    places = np.unique(np.linspace(0, len(documents) - 1, min(TOKEN_SAMPLE, len(documents))).astype(int))
    return [
        documents["id"][int(i)]
        for i in places
        if decode(tokenizer, arrays.tokens[arrays.offsets[i] + 1 : arrays.offsets[i + 1] - 1])
        != documents["text"][int(i)]
    ]


def lossy_texts(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Return the texts of ROUND_TRIP that do not survive encoding and decoding, or that encode to a special token."""
    specials = set(tokenizer.all_special_ids)
    return [
        text
        for text, ids in zip(ROUND_TRIP, encode_texts(tokenizer, ROUND_TRIP), strict=True)
        if decode(tokenizer, ids) != text or specials & set(ids.tolist())
    ]
