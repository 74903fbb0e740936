"""Leaks that are planted in what an arm reads, and what the queries say of ordinary data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl

from sbp_assets.pretraining.audit import foreign_seeds, leaked_documents, repeated_ids
from sbp_assets.storage.token_arrays import write_token_arrays
from sbp_assets.training.spec import Source, StreamData

LIMIT = "100MB"


def write(directory: Path, ids: list[str], **columns: list[str]) -> Path:
    write_token_arrays(directory, pl.DataFrame({"id": ids, **columns}), [np.full(9, 5)] * len(ids), 100)
    return directory


def corpus(folder: Path) -> dict[str, Path]:
    """Two shards of two documents of D, one of the oracle's and one that is held out, in folders with odd names."""
    splits = ["unique", "unique", "oracle", "heldout"]
    return {
        shard: write(folder / f"it's [{shard}]", [f"{shard}-{n}" for n in range(4)], split=splits)
        for shard in ("00000", "00001")
    }


def synthetic(directory: Path, seed: str, *ids: str) -> Path:
    return write(directory, list(ids), seed_id=[seed] * len(ids))


def test_a_held_out_document_is_found_wherever_it_is_trained_on(tmp_path: Path) -> None:
    tokens = corpus(tmp_path)
    heldout = [Source(directory=path, split="heldout") for path in tokens.values()]
    sources = [Source(directory=path, split=split) for split in ("unique", "oracle") for path in tokens.values()]
    once = [Source(directory=synthetic(tmp_path / "good", "00001-0", "s0", "s1"))]
    assert leaked_documents(StreamData(repeated=sources, once=once), heldout, tmp_path, LIMIT) == []
    # As a document of the oracle's, and as the seed of a synthetic document.
    twin = Source(directory=write(tmp_path / "twin", ["00000-2"], split=["heldout"]), split="heldout")
    assert leaked_documents(StreamData(repeated=sources), [*heldout, twin], tmp_path, LIMIT) == ["00000-2"]
    once.append(Source(directory=synthetic(tmp_path / "bad", "00001-3", "s2", "s3")))
    assert leaked_documents(StreamData(repeated=sources, once=once), heldout, tmp_path, LIMIT) == ["00001-3"]


def test_seeds_outside_d_and_repeated_ids_are_named_over_all_shards(tmp_path: Path) -> None:
    tokens = corpus(tmp_path)
    good = {shard: synthetic(tmp_path / f"syn {shard}", f"{shard}-1", f"{shard}a", f"{shard}b") for shard in tokens}
    assert foreign_seeds(good, tokens, tmp_path, LIMIT) == repeated_ids(good, tmp_path, LIMIT) == []
    bad = good | {"00001": synthetic(tmp_path / "bad", "00000-3", "00000b", "new")}
    assert foreign_seeds(bad, tokens, tmp_path, LIMIT) == ["00000-3"], "held out, and so not in D"
    assert repeated_ids(bad, tmp_path, LIMIT) == ["00000b"]
