from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from sbp_assets.corpus import tokenizer
from sbp_assets.corpus.errors import CorpusError
from sbp_assets.settings import Split

TEXTS = ["the red fox runs over the red bridge", "a letter about the fox and the bridge"] * 5
TOKENIZER = tokenizer.train_tokenizer(iter(TEXTS), 300)


@given(st.text(st.characters(codec="utf-8")))
def test_law_any_text_survives_without_special_tokens(text: str) -> None:
    (ids,) = tokenizer.encode_texts(TOKENIZER, [text])
    assert tokenizer.decode(TOKENIZER, ids) == text
    assert not set(ids.tolist()) & set(TOKENIZER.all_special_ids)


def test_special_names_in_text_are_ordinary_text_and_documents_are_framed() -> None:
    text = f"x {tokenizer.EOS}{tokenizer.RELATED} {tokenizer.BOS}"
    (ids,) = tokenizer.encode_documents(TOKENIZER, [text])
    specials = [i for i in ids.tolist() if i in TOKENIZER.all_special_ids]
    assert specials == [TOKENIZER.bos_token_id, TOKENIZER.eos_token_id] == [ids[0], ids[-1]]
    assert tokenizer.decode(TOKENIZER, ids[1:-1]) == text
    assert tokenizer.encode_documents(TOKENIZER, []) == []


def test_saved_tokenizer_is_the_same_and_training_is_deterministic(tmp_path: Path) -> None:
    TOKENIZER.save_pretrained(tmp_path / "one")
    tokenizer.train_tokenizer(iter(TEXTS), 300).save_pretrained(tmp_path / "two")
    assert (tmp_path / "one/tokenizer.json").read_bytes() == (tmp_path / "two/tokenizer.json").read_bytes()
    loaded = tokenizer.load_tokenizer(tmp_path / "one")
    once, again = (tokenizer.encode_documents(one, TEXTS)[1].tolist() for one in (TOKENIZER, loaded))
    assert once == again
    assert len(loaded) <= 300
    assert tokenizer.related_id(loaded) == loaded.convert_tokens_to_ids(tokenizer.RELATED)


@pytest.mark.parametrize("run", ["=" * 500_000, " " * 500_000, "ab" * 250_000, "漢" * 170_000])
def test_a_long_run_is_read_in_pieces_and_costs_no_more_than_its_length(run: str) -> None:
    trained = tokenizer.train_tokenizer([*TEXTS, run], 400)  # as one word, 100 s
    assert max(map(len, trained.get_vocab())) <= tokenizer.LONGEST_WORD
    assert trained.backend_tokenizer.pre_tokenizer.pre_tokenize_str("a" * 3000)[0][1] == (0, 3000)
    (ids,) = tokenizer.encode_texts(trained, [run[:5000]])
    assert tokenizer.decode(trained, ids) == run[:5000]


@given(st.lists(st.text("ab =1é", max_size=tokenizer.LONGEST_WORD // 2), max_size=5))
def test_words_that_are_not_too_long_are_learned_whole(texts: list[str]) -> None:
    raw = tokenizers.Tokenizer(tokenizers.models.BPE())
    raw.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=350, special_tokens=list(tokenizer.SPECIALS), show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    raw.train_from_iterator(texts, trainer)
    assert tokenizer.train_tokenizer(texts, 350).backend_tokenizer.get_vocab() == raw.get_vocab()


def test_named_tokenizer_gets_what_it_lacks_and_keeps_its_own(tmp_path: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    bare = PreTrainedTokenizerFast(tokenizer_object=TOKENIZER.backend_tokenizer, eos_token="<|eos|>")
    bare.save_pretrained(tmp_path / "bare")
    named = tokenizer.named_tokenizer(str(tmp_path / "bare"))
    assert (named.bos_token, named.eos_token, named.pad_token) == (tokenizer.BOS, "<|eos|>", tokenizer.PAD)
    named.save_pretrained(tmp_path / "full")
    assert tokenizer.related_id(tokenizer.load_tokenizer(tmp_path / "full")) == tokenizer.related_id(named)
    with pytest.raises(CorpusError, match=r"corpus\.tokenizer\.name"):
        tokenizer.named_tokenizer(str(tmp_path / "nothing"))


def frames(*splits: str) -> dict[str, pl.LazyFrame]:
    return {"00000": pl.LazyFrame({"text": ["a b"] * len(splits), "split": list(splits)})}


@pytest.mark.parametrize(
    ("splits", "named"),
    [
        (["unique", "heldout", "oracle"], "unique"),
        (["unique", "unique", "oracle"], "heldout"),
        (["unique", "unique", "heldout"], "oracle"),
    ],
)
def test_a_split_that_is_too_small_is_refused_by_name(splits: list[str], named: str) -> None:
    with pytest.raises(CorpusError, match=rf"split '{named}' holds .* raise corpus\.split\.{named}"):
        tokenizer.require_splits(frames(*splits), Split(unique=0.5, oracle=0.2, heldout=0.1))


def test_no_oracle_is_fine_when_none_is_asked_for() -> None:
    counts = tokenizer.require_splits(frames("unique", "unique", "heldout"), Split(unique=0.5, oracle=0, heldout=0.1))
    assert counts == {"unique": 2, "oracle": 0, "heldout": 1}


def test_less_than_one_optimizer_step_is_refused() -> None:
    tokenizer.require_tokens(TOKENIZER, frames("unique"), 3)
    with pytest.raises(CorpusError, match=r"less than one optimizer step .*1000"):
        tokenizer.require_tokens(TOKENIZER, frames("unique", "unique"), 1000)
