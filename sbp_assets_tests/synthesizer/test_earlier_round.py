from __future__ import annotations

import tempfile
from pathlib import Path

import polars as pl
import pytest

from sbp_assets.corpus.tokenizer import encode_documents, related_id, train_tokenizer
from sbp_assets.storage.token_arrays import TokenArrays, write_token_arrays
from sbp_assets.synthesizer.audit import check_contents, check_examples
from sbp_assets.synthesizer.earlier_round import PAIRS, EarlierRoundError, write_earlier_pairs
from sbp_assets.synthesizer.examples import format_prompt, write_examples

D = {"a": "a red stone lies here", "b": "the stone is red", "c": "a blue stone"}
# id, seed document, sampling seed, text
SYNTHETIC = [
    ("syn-a-0", "a", 30, "here lies a red stone"),
    ("syn-a-1", "a", 10, "red is the stone"),
    ("syn-b-0", "b", 20, "it is a red stone"),
    ("syn-c-0", "c", 5, "dropped by the filter of that run"),
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(D.values(), 300)


@pytest.fixture
def tokens(tmp_path: Path, tokenizer) -> dict[str, Path]:
    frame = pl.DataFrame({"id": [*D, "held"], "split": [*["unique"] * len(D), "heldout"]})
    write_token_arrays(tmp_path / "00000", frame, encode_documents(tokenizer, [*D.values(), "x"]), len(tokenizer))
    return {"00000": tmp_path / "00000"}


@pytest.fixture
def artifacts(tmp_path: Path, tokenizer) -> Path:
    """The store of an earlier run of two shards."""
    rows = pl.DataFrame(SYNTHETIC, schema=["id", "seed_id", "sampling_seed", "text"], orient="row")
    for shard, own in enumerate((rows[:2], rows[2:])):
        path = tmp_path / f"earlier/synthesis/synthetic_documents/{shard:05d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        own.write_parquet(path)
        kept = own.filter(pl.col("id") != "syn-c-0")
        directory = tmp_path / f"earlier/synthesis/synthetic_tokens/{shard:05d}"
        encoded = encode_documents(tokenizer, kept["text"].to_list())
        write_token_arrays(directory, kept.select("id", "seed_id"), encoded, len(tokenizer))
    return tmp_path / "earlier"


@pytest.mark.parametrize(
    ("pairs", "expected"),
    [
        (1, {("a", "earlier-syn-a-1")}),
        (2, {("a", "earlier-syn-a-1"), ("earlier-syn-a-1", "a")}),
        (3, {("a", "earlier-syn-a-1"), ("b", "earlier-syn-b-0"), ("earlier-syn-a-1", "a")}),
        (99, {(one, f"earlier-{two}") for two, one, *_ in SYNTHETIC[:3]}
             | {(f"earlier-{one}", two) for one, two, *_ in SYNTHETIC[:3]}),
    ],
)  # fmt: skip
def test_documents_of_the_lowest_sampling_seeds_are_paired_both_ways(
    pairs: int, expected: set, artifacts: Path, tokens: dict[str, Path], tokenizer, tmp_path: Path
) -> None:
    counts = write_earlier_pairs(tmp_path / "out", artifacts, tokens.values(), pairs, tokenizer)
    assert set(pl.read_parquet(tmp_path / "out" / PAIRS).rows()) == expected
    assert counts["pairs"] == len(expected) and counts["documents"] == (min(pairs, 6) + 1) // 2
    held = TokenArrays.load(tmp_path / "out")
    texts = {f"earlier-{name}": text for name, _, _, text in SYNTHETIC}
    encoded = encode_documents(tokenizer, [texts[name] for name in held.documents["id"]])
    assert held.tokens.tolist() == [token for ids in encoded for token in ids]


def test_they_become_examples_beside_those_of_neighbours(
    artifacts: Path, tokens: dict[str, Path], tokenizer, tmp_path: Path
) -> None:
    earlier, out = tmp_path / "pairs_of_earlier", tmp_path / "examples"
    write_earlier_pairs(earlier, artifacts, tokens.values(), 2, tokenizer)
    neighbours = pl.DataFrame({"d1": ["a", "b"], "d2": ["b", "a"], "similarity": [0.9, 0.9]})
    neighbours.write_parquet(tmp_path / "neighbours.parquet")
    pairs = {"00000": tmp_path / "neighbours.parquet", "earlier": earlier / PAIRS}
    located = tokens | {"earlier": earlier}
    related, vocabulary, eos = related_id(tokenizer), len(tokenizer), tokenizer.eos_token_id
    with tempfile.TemporaryDirectory() as scratch:
        frames = {shard: pl.scan_parquet(path) for shard, path in pairs.items()}
        counts = write_examples(out, frames, located, related, 50, vocabulary, Path(scratch), "100MB")
    assert counts["examples"] == 4
    held = TokenArrays.load(out)
    place = held.documents["id"].to_list().index("earlier-syn-a-1->a")
    d1, d2 = encode_documents(tokenizer, ["red is the stone", D["a"]])
    expected = [*format_prompt(d1, related, 50), *d2[1:]]
    assert held.tokens[held.offsets[place] : held.offsets[place + 1]].tolist() == expected
    for checked, rest in ((4, {}), (5, {"count": ["4 examples for 5 pairs"]})):
        with tempfile.TemporaryDirectory() as scratch:
            assert check_examples(out, located, checked, 200, related, eos, Path(scratch), "100MB") == rest
    with tempfile.TemporaryDirectory() as scratch:
        assert not check_contents(out, pairs, located, related, 50, False, Path(scratch), "100MB")
    with tempfile.TemporaryDirectory() as scratch:
        of_neighbours = {"00000": pairs["00000"]}
        found = check_contents(out, of_neighbours, located, related, 50, False, Path(scratch), "100MB")
    assert found == {"not the pairs": ["a->earlier-syn-a-1", "earlier-syn-a-1->a"]}


def test_a_run_on_another_corpus_is_refused(artifacts: Path, tmp_path: Path, tokenizer) -> None:
    other = pl.DataFrame({"id": ["a", "b"], "split": ["unique", "oracle"]})
    write_token_arrays(tmp_path / "other", other, encode_documents(tokenizer, ["x", "y"]), len(tokenizer))
    with pytest.raises(EarlierRoundError, match=r"1 synthetic documents .* not in D, the first is 'b'"):
        write_earlier_pairs(tmp_path / "out", artifacts, [tmp_path / "other"], 9, tokenizer)


@pytest.mark.parametrize("missing", ["synthesis/synthetic_documents", "synthesis/synthetic_tokens"])
def test_a_folder_without_synthetic_documents_is_refused(
    missing: str, artifacts: Path, tokens: dict[str, Path], tokenizer, tmp_path: Path
) -> None:
    (artifacts / missing).rename(tmp_path / "elsewhere")
    with pytest.raises(EarlierRoundError, match=f"has no {missing}: name the data_dir"):
        write_earlier_pairs(tmp_path / "out", artifacts, tokens.values(), 9, tokenizer)
