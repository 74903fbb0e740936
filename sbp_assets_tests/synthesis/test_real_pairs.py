"""The control of real pairs: which pairs stand in a shard's documents, in which order, and what their text is."""

from itertools import islice
from pathlib import Path

import polars as pl
import pytest
from transformers import PreTrainedTokenizerFast

from sbp_assets.corpus.tokenizer import encode_documents, related_id, train_tokenizer
from sbp_assets.storage.progress import Progress
from sbp_assets.storage.token_arrays import write_token_arrays
from sbp_assets.synthesis import audit
from sbp_assets.synthesis.generate import SynthesisError
from sbp_assets.synthesis.real_pairs import NO_ENGINE, concatenated_pairs, pair_order
from sbp_assets.synthesizer.examples import write_examples

TEXTS = {
    "a1": "The lamp of Orva is blue.", "a2": "Who has a blue lamp? Orva, of course.", "a3": "Orva sells rope.",
    "b1": "A rope was sold by Orva, with é and ☃.", "b2": "Long " + "and longer " * 40 + "text.",
}  # fmt: skip
PAIRS = {"00000": [("a1", "a2"), ("a1", "b1"), ("a2", "a1"), ("a1", "b2")], "00001": [("b1", "a3")]}
CUT, CONTEXT = 30, 64


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(TEXTS.values(), 300)


@pytest.fixture
def examples(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    tokens = {}
    for shard, letter in (("00000", "a"), ("00001", "b")):
        own = pl.DataFrame({"id": [name for name in TEXTS if name[0] == letter]}).with_columns(split=pl.lit("unique"))
        texts = [TEXTS[name] for name in own["id"]]
        write_token_arrays(tmp_path / shard, own, encode_documents(tokenizer, texts), len(tokenizer))
        tokens[shard] = tmp_path / shard
    frames = {
        shard: pl.DataFrame(pairs, schema=["d1", "d2"], orient="row").sort("d1", "d2").lazy()
        for shard, pairs in PAIRS.items()
    }
    (scratch := tmp_path / "scratch").mkdir()
    related = related_id(tokenizer)
    write_examples(tmp_path / "examples", frames, tokens, related, CUT, len(tokenizer), scratch, "200MB")
    return tmp_path / "examples"


def rows_of(
    examples: Path, tokenizer: PreTrainedTokenizerFast, budget: int, salt: str = "sbp", seeds: str = "a1 a2 a3"
) -> pl.DataFrame:
    with Progress("pairs", "tokens", budget) as progress:
        return concatenated_pairs(examples, seeds.split(), tokenizer, budget, salt, CONTEXT, "v", progress)[0]


def test_every_pair_has_its_turn_before_any_comes_again() -> None:
    partners = {"y": [5], "x": [1, 2, 3]}
    order = list(islice(pair_order(partners, "sbp"), 8))
    assert [(d1, rollout) for d1, rollout, _ in order] == [
        ("x", 0), ("y", 0), ("x", 1), ("x", 2), ("x", 3), ("y", 3), ("x", 4), ("x", 5),
    ]  # fmt: skip
    assert sorted(partner for _, _, partner in order[:4]) == [1, 2, 3, 5]
    orders = {tuple(p for _, _, p in islice(pair_order(partners, str(salt)), 4)) for salt in range(40)}
    assert len(orders) == 6  # all orders of x's three partners
    assert list(pair_order({}, "sbp")) == []


def test_a_document_is_both_texts_of_a_pair_of_the_shard(examples: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = rows_of(examples, tokenizer, 200)
    whole = {f"{TEXTS[d1]}\n\n{TEXTS[d2]}" for d1, d2 in PAIRS["00000"] if d2 != "b2"}
    assert set(rows.filter(finish_reason="stop")["text"]) <= whole and len(rows) > 2
    assert set(rows["seed_id"]) == {"a1", "a2"} and rows["text"].head(4).n_unique() == 4
    lengths = [len(ids) for ids in encode_documents(tokenizer, rows["text"].to_list())]
    assert rows["n_tokens"].to_list() == lengths and max(lengths) <= CONTEXT
    [cut] = rows.filter(finish_reason="length")["text"].unique()
    assert cut.startswith(TEXTS["a1"] + "\n\nLong and") and not cut.endswith("text.")


@pytest.mark.parametrize("budget", [1, 100, 2000])
def test_the_budget_is_reached_and_by_the_last_document(
    budget: int, examples: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    rows = rows_of(examples, tokenizer, budget)
    assert audit.budget_problems(rows, budget) == []
    assert audit.rollout_problems(rows, ["a1", "a2", "a3"], None) == [] and not audit.repeated_ids(rows)
    assert not audit.other_requests(rows, "sbp", "v") and not audit.other_engines(rows, [NO_ENGINE])
    assert audit.other_engines(rows)  # no synthesizer has written them


def test_another_salt_takes_the_pairs_in_another_order(examples: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    assert rows_of(examples, tokenizer, 40).equals(rows_of(examples, tokenizer, 40))
    assert len({rows_of(examples, tokenizer, 10, salt)["text"][0] for salt in "abcdefgh"}) == 3


def test_a_budget_without_pairs_is_an_error(examples: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    assert rows_of(examples, tokenizer, 0, seeds="a3").is_empty()
    with pytest.raises(SynthesisError, match=r"no neighbour pair of the shard's 1 seed documents.*min_similarity"):
        rows_of(examples, tokenizer, 10, seeds="a3")
