"""Every function of the audit reports the defect that it is there for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from sbp_assets.corpus import audit
from sbp_assets.corpus.dedup import signatures
from sbp_assets.corpus.split import split_of
from sbp_assets.corpus.tokenizer import encode_documents, train_tokenizer
from sbp_assets.settings import Dedup, Split
from sbp_assets.storage.progress import Progress
from sbp_assets.storage.token_arrays import TokenArrays, write_token_arrays

SPLIT = Split(unique=0.5, oracle=0.2, heldout=0.3)
IDS = [f"d{i}" for i in range(20)]
RAW = pl.DataFrame({"id": IDS})
DOCUMENTS = pl.DataFrame({"id": IDS, "split": [split_of(i, SPLIT) for i in IDS], "text": [f"text of {i}" for i in IDS]})
DROPPED = pl.DataFrame({"id": ["d0"], "shard": [0], "kept_id": ["d1"], "kept_shard": [0]})
NONE = DROPPED.clear()
TOKENIZER = train_tokenizer(iter(DOCUMENTS["text"]), 300)


def test_ids_and_rows() -> None:
    assert audit.invalid_ids(pl.Series(["a", "b"])) == []
    assert sorted(audit.invalid_ids(pl.Series(["a", "a", "", None]))) == ["", "None", "a"]
    assert audit.unaccounted_rows(5, 3, 2) == 0
    assert audit.unaccounted_rows(5, 3, 1) == 1


@pytest.mark.parametrize(("files_per_shard", "shards"), [(None, [0, 1, 0, 1, 0]), (2, [0, 0, 1, 1, None])])
def test_manifest(files_per_shard: int | None, shards: list[int | None]) -> None:
    good = pl.DataFrame({"file": list("abcde"), "shard": shards})
    assert audit.manifest_problems(good, 2, files_per_shard, is_files=True) == []
    assert audit.manifest_problems(good[1:], 2, files_per_shard, is_files=True)
    assert audit.manifest_problems(good.reverse(), 2, 3, is_files=True)
    assert audit.manifest_problems(pl.concat([good, good[:1]]), 2, files_per_shard, True)[0] == "a: listed 2 times"
    assert audit.manifest_problems(good.clear(), 2, files_per_shard, is_files=True) == ["no files"]


def test_a_generated_shard_without_a_row_is_missed() -> None:
    good = pl.DataFrame({"file": ["concepts:0", "concepts:1"], "shard": [0, 1]})
    assert audit.manifest_problems(good, 2, None, is_files=False) == []
    assert audit.manifest_problems(good[:1], 2, None, is_files=False) == ["1 rows for 2 shards"]


@pytest.mark.parametrize("change", [{"text": " "}, {"text": None}, {"file": "of-shard-1"}, {"file": None}, {"line": 0}])
def test_unusable_documents(change: dict[str, object]) -> None:
    manifest = pl.DataFrame({"file": ["of-shard-0", "of-shard-1"], "shard": [0, 1]})
    raw = pl.DataFrame({"id": ["a", "b"], "text": ["x", "y"], "file": ["of-shard-0"] * 2, "line": [1, 2]})
    assert audit.invalid_documents(raw, manifest, 0) == []
    row = pl.int_range(pl.len()) == 1
    changed = {name: pl.when(row).then(pl.lit(value)).otherwise(name) for name, value in change.items()}
    assert audit.invalid_documents(raw.with_columns(**changed), manifest, 0) == ["b"]


def sign(documents: pl.DataFrame) -> pl.DataFrame:
    with Progress("test", "docs") as progress:
        return signatures(documents, Dedup(), progress)


def test_signatures_of_other_texts() -> None:
    raw = DOCUMENTS.select("id", "text")
    signed = sign(raw)
    assert audit.wrong_signatures(signed, raw, Dedup()) == []
    assert audit.wrong_signatures(signed[1:], raw, Dedup()) == ["d0"]
    assert audit.wrong_signatures(signed.reverse(), raw, Dedup()) == ["(order)"]
    assert set(audit.wrong_signatures(signed, raw.with_columns(text=pl.col("text").reverse()), Dedup())) == set(IDS)
    assert set(audit.wrong_signatures(signed.with_columns(bands=pl.col("bands").list.head(3)), raw, Dedup())) == set(
        IDS
    )


def test_altered_documents() -> None:
    kept = DOCUMENTS.filter(pl.col("id") != "d3")
    raw = DOCUMENTS.select("id", "text").with_columns(url=pl.lit(None, pl.String))
    kept = kept.with_columns(url=pl.lit(None, pl.String))
    assert audit.altered_documents(raw, kept) == []
    swapped = kept.with_columns(text=pl.col("text").gather((pl.int_range(pl.len()) + 1) % pl.len()))
    assert audit.altered_documents(raw, swapped) == kept["id"].to_list()


TWINS = ["one two three four five six", "one two three four five six", "one two three four five seven", "x y"]
TWIN_RAW = pl.DataFrame({"id": list("abcd"), "text": TWINS})
TWIN_DUPLICATES = pl.DataFrame(
    {"id": ["b", "c"], "shard": 0, "kept_id": "a", "kept_shard": 0, "jaccard": [1.0, 1 / 3], "kind": ["exact", "near"]}
)


@pytest.mark.parametrize(
    "change", [{"jaccard": 0.2}, {"jaccard": 0.9}, {"kept_id": "d"}, {"kept_id": "gone"}, {"kind": "id"}, {"kind": "?"}]
)
def test_untrue_duplicates(change: dict[str, object]) -> None:
    raw, settings = {"00000": TWIN_RAW.lazy()}, Dedup(threshold=0.3)
    assert audit.incorrect_duplicates(TWIN_DUPLICATES, raw, settings) == []
    assert audit.incorrect_duplicates(TWIN_DUPLICATES.clear(), raw, settings) == []
    row = pl.col("id") == "c"
    changed = {name: pl.when(row).then(pl.lit(value)).otherwise(name) for name, value in change.items()}
    assert set(audit.incorrect_duplicates(TWIN_DUPLICATES.with_columns(**changed), raw, settings)) == {"c"}


def test_missed_duplicates(monkeypatch: pytest.MonkeyPatch) -> None:
    signed = {"00000": sign(TWIN_RAW).lazy(), "00001": sign(TWIN_RAW[3:].with_columns(id=pl.lit("e"))).lazy()}
    e = {"id": "e", "shard": 1, "kept_id": "d", "kept_shard": 0, "jaccard": 1.0, "kind": "exact"}
    every = pl.concat([TWIN_DUPLICATES, pl.DataFrame([e], schema=TWIN_DUPLICATES.schema)])
    assert audit.missed_duplicates(every, signed) == []
    assert audit.missed_duplicates(TWIN_DUPLICATES, signed) == ["d", "e"]
    assert audit.missed_duplicates(TWIN_DUPLICATES.clear(), signed) == ["a", "b", "d", "e"]
    monkeypatch.setattr(audit, "KEPT_SAMPLE", 3)
    assert audit.missed_duplicates(TWIN_DUPLICATES.clear(), signed) in (["a", "b"], ["d", "e"], ["a", "b", "d", "e"])


def test_reconciliation() -> None:
    assert audit.misassigned_documents(RAW, NONE, DOCUMENTS, 0, SPLIT) == []
    assert audit.misassigned_documents(RAW, DROPPED, DOCUMENTS, 1, SPLIT) == []
    assert audit.misassigned_documents(RAW, DROPPED, DOCUMENTS, 0, SPLIT) == ["d0"]
    assert audit.misassigned_documents(RAW, NONE, DOCUMENTS[1:], 0, SPLIT) == ["d0"]
    moved = DOCUMENTS.with_columns(split=pl.lit("unique"))
    assert audit.misassigned_documents(RAW, NONE, moved, 0, SPLIT)
    assert audit.misassigned_documents(RAW[1:], DROPPED, DOCUMENTS[1:], 0, SPLIT) == ["d0"]


def test_duplicates_that_dangle_or_chain() -> None:
    raw = {"00000": RAW.lazy()}
    backwards = pl.DataFrame({"id": ["d5"], "shard": [0], "kept_id": ["d1"], "kept_shard": [0]})
    assert audit.dangling_duplicates(backwards, raw) == []
    assert audit.dangling_duplicates(backwards.with_columns(kept_id=pl.lit("gone")), raw) == ["d5"]
    assert audit.dangling_duplicates(pl.concat([backwards, backwards]), raw) == ["d5", "d5"]
    chain = pl.DataFrame({"id": ["d1"], "shard": [0], "kept_id": ["d0"], "kept_shard": [0]})
    assert audit.dangling_duplicates(pl.concat([backwards, chain]), raw) == ["d5"]


def test_shares_and_leaks() -> None:
    shares = audit.split_shares({"00000": DOCUMENTS.lazy()}, 20, SPLIT)
    assert all(fits for _, _, fits in shares.values())
    lopsided = {"00000": pl.LazyFrame({"split": ["unique"] * 500})}
    assert not any(fits for _, _, fits in audit.split_shares(lopsided, 500, SPLIT).values())
    clean = {"00000": DOCUMENTS.lazy()}
    assert audit.leaked_heldout(clean) == []
    held = DOCUMENTS.filter(pl.col("split") == "heldout")[:1]
    copy = held.with_columns(id=pl.lit("new"), split=pl.lit("oracle"), text=pl.col("text").str.to_uppercase())
    assert audit.leaked_heldout({**clean, "00001": copy.lazy()}) == [held["id"][0]]
    same_id = held.with_columns(split=pl.lit("unique"), text=pl.lit("unlike"))
    assert audit.leaked_heldout({**clean, "00001": same_id.lazy()}) == [held["id"][0]]


def test_tokens(tmp_path: Path) -> None:
    encoded = encode_documents(TOKENIZER, DOCUMENTS["text"].to_list())
    write_token_arrays(tmp_path / "good", DOCUMENTS.select("id", "split"), encoded, 300)
    good = TokenArrays.load(tmp_path / "good")
    assert audit.wrong_token_documents(good, DOCUMENTS, TOKENIZER) == []
    assert audit.undecodable_documents(good, DOCUMENTS, TOKENIZER) == []
    assert audit.wrong_token_documents(good, DOCUMENTS[1:], TOKENIZER) == ["d0"]
    assert audit.wrong_token_documents(good, DOCUMENTS.reverse(), TOKENIZER) == ["(order)"]
    encoded[3], encoded[4] = encoded[3][:-1], np.zeros(0, dtype=np.int64)
    write_token_arrays(tmp_path / "bad", DOCUMENTS.select("id", "split"), encoded, 300)
    bad = TokenArrays.load(tmp_path / "bad")
    assert audit.wrong_token_documents(bad, DOCUMENTS, TOKENIZER) == ["d3", "d4"]
    assert audit.undecodable_documents(bad, DOCUMENTS, TOKENIZER) == ["d3", "d4"]
    twice = [np.tile(ids, 2) for ids in encode_documents(TOKENIZER, DOCUMENTS["text"].to_list())]
    write_token_arrays(tmp_path / "twice", DOCUMENTS.select("id", "split"), twice, 300)
    assert audit.wrong_token_documents(TokenArrays.load(tmp_path / "twice"), DOCUMENTS, TOKENIZER) == ["(tokens)"]
    write_token_arrays(tmp_path / "none", DOCUMENTS.select("id", "split").clear(), [], 300)
    assert audit.wrong_token_documents(TokenArrays.load(tmp_path / "none"), DOCUMENTS.clear(), TOKENIZER) == []
    assert audit.undecodable_documents(TokenArrays.load(tmp_path / "none"), DOCUMENTS.clear(), TOKENIZER) == []


def test_round_trip(monkeypatch: pytest.MonkeyPatch) -> None:
    assert audit.lossy_texts(TOKENIZER) == []
    monkeypatch.setattr(audit, "decode", lambda tokenizer, ids: "x")
    assert len(audit.lossy_texts(TOKENIZER)) == len(audit.ROUND_TRIP)
