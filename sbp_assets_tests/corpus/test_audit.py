"""Every check's function goes red on the defect it is there for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from sbp_assets.corpus import audit
from sbp_assets.corpus.split import split_of
from sbp_assets.corpus.tokenizer import encode_documents, train_tokenizer
from sbp_assets.experiment import Split
from sbp_assets.storage.token_arrays import TokenArrays, write_token_arrays

SPLIT = Split(unique=0.5, oracle=0.2, heldout=0.3)
IDS = [f"d{i}" for i in range(20)]
RAW = pl.DataFrame({"id": IDS})
DOCUMENTS = pl.DataFrame({"id": IDS, "split": [split_of(i, SPLIT) for i in IDS], "text": [f"text of {i}" for i in IDS]})
DROPPED = pl.DataFrame({"id": ["d0"], "shard": [0], "kept_id": ["d1"], "kept_shard": [0]})
NONE = DROPPED.clear()
TOKENIZER = train_tokenizer(iter(DOCUMENTS["text"]), 300)


def test_ids_and_rows() -> None:
    assert audit.bad_ids(pl.Series(["a", "b"])) == []
    assert sorted(audit.bad_ids(pl.Series(["a", "a", "", None]))) == ["", "None", "a"]
    assert audit.unaccounted_rows(5, 3, 2) == 0
    assert audit.unaccounted_rows(5, 3, 1) == 1


def test_reconciliation() -> None:
    assert audit.unreconciled(RAW, NONE, DOCUMENTS, 0, SPLIT) == []
    assert audit.unreconciled(RAW, DROPPED, DOCUMENTS, 1, SPLIT) == []
    assert audit.unreconciled(RAW, DROPPED, DOCUMENTS, 0, SPLIT) == ["d0"]
    assert audit.unreconciled(RAW, NONE, DOCUMENTS[1:], 0, SPLIT) == ["d0"]
    moved = DOCUMENTS.with_columns(split=pl.lit("unique"))
    assert audit.unreconciled(RAW, NONE, moved, 0, SPLIT)
    assert audit.unreconciled(RAW[1:], DROPPED, DOCUMENTS[1:], 0, SPLIT) == ["d0"]


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
    assert audit.bad_token_documents(good, DOCUMENTS, TOKENIZER) == []
    assert audit.undecodable(good, DOCUMENTS, TOKENIZER) == []
    assert audit.bad_token_documents(good, DOCUMENTS[1:], TOKENIZER) == ["d0"]
    assert audit.bad_token_documents(good, DOCUMENTS.reverse(), TOKENIZER) == ["(order)"]
    encoded[3], encoded[4] = encoded[3][:-1], np.zeros(0, dtype=np.int64)
    write_token_arrays(tmp_path / "bad", DOCUMENTS.select("id", "split"), encoded, 300)
    bad = TokenArrays.load(tmp_path / "bad")
    assert audit.bad_token_documents(bad, DOCUMENTS, TOKENIZER) == ["d3", "d4"]
    assert audit.undecodable(bad, DOCUMENTS, TOKENIZER) == ["d3", "d4"]
    write_token_arrays(tmp_path / "none", DOCUMENTS.select("id", "split").clear(), [], 300)
    assert audit.bad_token_documents(TokenArrays.load(tmp_path / "none"), DOCUMENTS.clear(), TOKENIZER) == []
    assert audit.undecodable(TokenArrays.load(tmp_path / "none"), DOCUMENTS.clear(), TOKENIZER) == []


def test_round_trip(monkeypatch: pytest.MonkeyPatch) -> None:
    assert audit.lossy_texts(TOKENIZER) == []
    monkeypatch.setattr(audit, "decode", lambda tokenizer, ids: "x")
    assert len(audit.lossy_texts(TOKENIZER)) == len(audit.ROUND_TRIP)
