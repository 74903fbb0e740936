from __future__ import annotations

import hashlib
import shutil
import tempfile
from pathlib import Path

import duckdb
import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sbp_assets.storage.token_arrays import TokenArrays, write_token_arrays
from sbp_assets.synthesizer import audit
from sbp_assets.synthesizer.audit import check_contents, check_examples
from sbp_assets.synthesizer.examples import (
    HELDOUT,
    ExamplesError,
    format_example,
    format_prompt,
    random_partners,
    split_of_seeds,
    write_examples,
)

BOS, EOS, RELATED = 0, 1, 3
DOCUMENTS = {
    "00000": {"a": [10, 11], "b": [20, 21, 22, 23, 24], "x": [90]},
    "00001": {"c": [30, 31, 32], "d": [40]},
}
PAIRS = {
    "00000": [("b", "c", "00001"), ("a", "b", "00000"), ("a", "c", "00001")],
    "00001": [("c", "a", "00000"), ("d", "c", "00001")],
}


@pytest.fixture
def tokens(tmp_path: Path) -> dict[str, Path]:
    for shard, documents in DOCUMENTS.items():
        frame = pl.DataFrame(
            {"id": list(documents), "split": ["heldout" if name == "x" else "unique" for name in documents]}
        )
        write_token_arrays(tmp_path / shard, frame, [[BOS, *ids, EOS] for ids in documents.values()], 100)
    return {shard: tmp_path / shard for shard in DOCUMENTS}


def frames(pairs: dict[str, list[tuple[str, str, str]]]) -> dict[str, pl.LazyFrame]:
    schema = {"d1": pl.String, "d2": pl.String, "d2_shard": pl.String}
    return {shard: pl.LazyFrame(rows, schema=schema, orient="row") for shard, rows in pairs.items()}


def written(
    directory: Path, pairs: dict[str, pl.LazyFrame], tokens: dict[str, Path], shuffle_seed: int | None = None
) -> pl.DataFrame:
    """Write examples of documents of 3 ids at most; return the rows of documents.parquet."""
    with tempfile.TemporaryDirectory() as scratch:
        write_examples(directory, pairs, tokens, RELATED, 3, 100, Path(scratch), "100MB", shuffle_seed=shuffle_seed)
    return pl.read_parquet(directory / "documents.parquet")


def examples(arrays: TokenArrays) -> dict[str, list[int]]:
    return {
        name: arrays.tokens[start:stop].tolist()
        for name, start, stop in zip(arrays.documents["id"], arrays.offsets[:-1], arrays.offsets[1:], strict=True)
    }


def test_examples_join_documents_across_shards_and_cut_them(tokens: dict[str, Path], tmp_path: Path) -> None:
    written(tmp_path / "out", frames(PAIRS), tokens)
    arrays = TokenArrays.load(tmp_path / "out")
    assert examples(arrays) == {
        "a->b": [BOS, 10, 11, RELATED, 20, 21, 22],
        "a->c": [BOS, 10, 11, RELATED, 30, 31, 32, EOS],
        "b->c": [BOS, 20, 21, 22, RELATED, 30, 31, 32, EOS],
        "c->a": [BOS, 30, 31, 32, RELATED, 10, 11, EOS],
        "d->c": [BOS, 40, RELATED, 30, 31, 32, EOS],
    }
    assert arrays.documents["prompt_tokens"].to_list() == [4, 4, 5, 5, 3]
    assert arrays.documents["cut"].to_list() == [True, False, False, False, False]
    # One seed document's pairs at least are held out, and not all of them.
    assert arrays.documents.group_by("split").agg(pl.col("d1").n_unique()).sort("split")["d1"].to_list() == [1, 3]


def test_writing_twice_gives_the_same_bytes(tokens: dict[str, Path], tmp_path: Path) -> None:
    shuffled = {shard: rows[::-1] for shard, rows in reversed(PAIRS.items())}
    written(tmp_path / "one", frames(PAIRS), tokens)
    written(tmp_path / "two", frames(shuffled), tokens)
    for name in ("tokens.npy", "offsets.npy", "documents.parquet"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_no_pairs_name_the_setting(tokens: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ExamplesError, match=r"pairing\.min_similarity"):
        written(tmp_path / "out", frames({"00000": [], "00001": []}), tokens)


def test_a_pair_outside_d_is_named(tokens: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(ExamplesError, match="shard 00000: d2 'x'"):
        written(tmp_path / "out", frames({"00000": [("a", "x", "00000")]}), tokens)


documents = st.lists(st.integers(4, 99), max_size=12).map(lambda ids: np.array([BOS, *ids, EOS], dtype=np.uint16))


@given(documents, documents, st.integers(1, 10))
def test_tuning_and_synthesis_share_the_prefix(d1: np.ndarray, d2: np.ndarray, most: int) -> None:
    example, prompt_tokens = format_example(d1, d2, RELATED, most)
    assert example[:prompt_tokens] == format_prompt(d1, RELATED, most)
    assert len(example) <= 2 * most + 3
    assert (example[-1] == EOS) == (len(d2) - 2 <= most)


def held_out(seeds: list[str]) -> set[str]:
    with duckdb.connect() as db:
        db.register("pairs", pl.DataFrame({"d1": seeds * 2}, schema={"d1": pl.String}).to_arrow())
        rows = db.execute(f"SELECT d1, {split_of_seeds(db, 'pairs')} FROM pairs").fetchall()
    return {d1 for d1, split in rows if split == HELDOUT}


def ranked(seed: str) -> bytes:
    return hashlib.sha256(f"tuning-heldout:{seed}".encode()).digest()


@given(st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=5), unique=True))
@settings(max_examples=30, deadline=None)
def test_held_out_seeds_are_the_lowest_and_leave_something_on_both_sides(seeds: list[str]) -> None:
    chosen = held_out(seeds)
    if len(seeds) > 1:
        assert 0 < len(chosen) < len(seeds)
    assert chosen == set(sorted(seeds, key=ranked)[: len(chosen)])


def test_where_all_would_be_held_out_the_highest_is_not() -> None:
    low = [seed for seed in map(str, range(1000)) if ranked(seed)[0] == 0]
    assert len(low) > 2 and held_out(low) == {*low} - {max(low, key=ranked)}
    assert held_out(low[:1]) == held_out([]) == set()


def test_held_out_share_is_about_two_percent_and_stable() -> None:
    chosen = held_out([str(i) for i in range(10_000)])
    assert chosen == {str(i) for i in range(10_000) if ranked(str(i))[:8] < int(0.02 * 2**64).to_bytes(8, "big")}
    assert 120 < len(chosen) < 290
    assert chosen <= held_out([str(i) for i in range(20_000)])


def changed(directory: Path, **columns: pl.Expr) -> Path:
    """A copy of the examples in `directory` with other `columns`."""
    shutil.copytree(directory, copy := Path(tempfile.mkdtemp(dir=directory.parent)), dirs_exist_ok=True)
    rows = pl.read_parquet(directory / "documents.parquet").with_columns(**columns)
    rows.write_parquet(copy / "documents.parquet")
    return copy


def files(folder: Path, pairs: dict[str, pl.LazyFrame]) -> dict[str, Path]:
    """The tables `pairs` as files in a new folder."""
    folder = Path(tempfile.mkdtemp(dir=folder))
    for shard, rows in pairs.items():
        rows.collect().write_parquet(folder / f"{shard}.parquet")
    return {shard: folder / f"{shard}.parquet" for shard in pairs}


def form_problems(directory: Path, tokens: dict[str, Path], pairs: int, context: int = 9) -> dict[str, list[str]]:
    with tempfile.TemporaryDirectory() as scratch:
        return check_examples(directory, tokens, pairs, context, RELATED, EOS, Path(scratch), "100MB")


def content_problems(
    directory: Path, tokens: dict[str, Path], pairs: dict[str, pl.LazyFrame], shuffled: bool = False
) -> dict[str, list[str]]:
    given = files(directory.parent, pairs)
    with tempfile.TemporaryDirectory() as scratch:
        return check_contents(directory, given, tokens, RELATED, 3, shuffled, Path(scratch), "100MB")


@pytest.mark.parametrize("batch", [2, 20_000])
def test_check_sees_every_broken_rule(
    tokens: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    monkeypatch.setattr(audit, "BATCH", batch)
    written(out := tmp_path / "out", frames(PAIRS), tokens)
    assert form_problems(out, tokens, 5) == {}
    assert set(form_problems(out, tokens, 6)) == {"count"}
    assert form_problems(out, tokens, 5, context=8) == {"longer than the context": ["b->c"]}
    heldout = pl.read_parquet(tmp_path / "00001/documents.parquet").with_columns(
        split=pl.when(pl.col("id") == "d").then(pl.lit("heldout")).otherwise("split")
    )
    shutil.copytree(tmp_path / "00001", other := tmp_path / "other")
    heldout.write_parquet(other / "documents.parquet")
    assert form_problems(out, {**tokens, "00001": other}, 5) == {"not in D": ["d->c"]}

    def broken(**columns: pl.Expr) -> set[str]:
        return set(form_problems(changed(out, **columns), tokens, 5))

    assert broken(cut=~pl.col("cut")) == {"eos"}
    assert broken(prompt_tokens=pl.lit(2)) == {"prompt_tokens"}
    assert broken(prompt_tokens=pl.lit(99)) == {"prompt_tokens"}
    assert broken(id=pl.lit("a->b")) == {"repeated"}


@pytest.mark.parametrize("batch", [2, 20_000])
def test_check_sees_examples_of_other_pairs_and_documents(
    tokens: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    monkeypatch.setattr(audit, "BATCH", batch)
    written(out := tmp_path / "out", frames(PAIRS), tokens)

    def check(directory: Path, pairs: dict[str, list[tuple[str, str, str]]] = PAIRS) -> dict[str, list[str]]:
        return content_problems(directory, tokens, frames(pairs))

    assert check(out) == {}
    assert set(check(changed(out, d2=pl.col("d2").reverse()))) == {"not the pairs", "id", "other tokens"}
    assert set(check(changed(out, split=pl.lit("train")))) == {"split"}
    fewer = {shard: rows[:-1] for shard, rows in PAIRS.items()}
    assert check(out, fewer) == {"not the pairs": ["a->c", "d->c"]}
    more = {**PAIRS, "00001": [*PAIRS["00001"], ("d", "a", "00000")]}
    assert check(out, more) == {"not the pairs": ["d->a"]}
    arrays = TokenArrays.load(out)
    parts = [arrays.tokens[a:b] for a, b in zip(arrays.offsets[:-1], arrays.offsets[1:], strict=True)]
    write_token_arrays(shifted := tmp_path / "shifted", arrays.documents, parts[1:] + parts[:1], 100)
    assert set(check(shifted)) == {"other tokens"}
    np.save(shifted / "offsets.npy", np.zeros(3, np.int64))
    with pytest.raises(ValueError, match="do not belong together"):
        check(shifted)


@given(st.integers(0, 100), st.integers(4, 40))
def test_random_partners_deal_the_same_documents_without_repeats(seed: int, count: int) -> None:
    ring = [f"doc{n}" for n in range(count)]
    d1 = pl.Series([ring[n] for n in range(count) for _ in (1, 2)])
    d2 = pl.Series([ring[(n + step) % count] for n in range(count) for step in (1, 2)])
    order = random_partners(d1, d2, seed)
    dealt = d2[order]
    assert sorted(dealt) == sorted(d2)
    assert not (dealt == d1).any()
    assert len(set(zip(d1, dealt, strict=True))) == len(d1)
    assert (random_partners(d1, d2, seed) == order).all()


def test_random_partners_make_valid_examples_of_the_same_documents(tokens: dict[str, Path], tmp_path: Path) -> None:
    # Of these another deal exists; of PAIRS none, since three of the d2 are c.
    pairs = frames(
        {"00000": [("a", "b", "00000"), ("b", "a", "00000")], "00001": [("c", "d", "00001"), ("d", "c", "00001")]}
    )
    nearest = written(tmp_path / "nearest", pairs, tokens)
    seeds = range(8)
    dealt = [written(tmp_path / str(s), pairs, tokens, shuffle_seed=s) for s in seeds]
    for seed, rows in zip(seeds, dealt, strict=True):
        assert sorted(rows["d1"]) == sorted(nearest["d1"]) and sorted(rows["d2"]) == sorted(nearest["d2"])
        directory = tmp_path / str(seed)
        assert not form_problems(directory, tokens, len(nearest))
        assert not content_problems(directory, tokens, pairs, shuffled=True)
        others = changed(directory, d2=pl.lit("a"))
        assert content_problems(others, tokens, pairs, shuffled=True)["not the pairs"] == ["(documents)"]
    assert any(rows["id"].to_list() != nearest["id"].to_list() for rows in dealt)


def test_a_deal_that_is_not_found_says_what_to_do() -> None:
    with pytest.raises(ExamplesError, match=r"synthesizer\.partners"):
        random_partners(pl.Series(["a", "b"]), pl.Series(["b", "a"]), 0, attempts=0)
