from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformer

from sbp_assets.pairing.embed_batches import _batches, _features, _in_order, _Window, vectors_in_batches
from sbp_assets_tests.pairing.tiny_embedders import LIMIT, WORDS, write_bert


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> SentenceTransformer:
    return SentenceTransformer(str(write_bert(tmp_path_factory.mktemp("bert"))), device="cpu")


@pytest.mark.parametrize("side", ["left", "right"])
@given(lengths=st.lists(st.integers(0, LIMIT + 9), min_size=1, max_size=30), tokens=st.integers(1, 300))
def test_batches_hold_every_text_once_within_their_tokens_and_padded_to_their_longest(
    model: SentenceTransformer, side: str, lengths: list[int], tokens: int
) -> None:
    model.tokenizer.padding_side = side
    texts = [" ".join(WORDS[(i + j) % len(WORDS)] for j in range(n)) for i, n in enumerate(lengths)]
    window = _Window([10 + i for i in range(len(texts))], texts)
    batches = list(_batches(model, window, _features(model, window, None), tokens))
    assert sorted(row for batch in batches for row in batch.rows) == window.rows
    for batch in batches:
        ids, mask = batch.features["input_ids"], batch.features["attention_mask"]
        assert ids.shape == mask.shape and (mask.numel() <= tokens or len(batch.rows) == 1)
        assert mask.sum(1).max() == mask.shape[1], "no column is padding alone"
        for row, i, m in zip(batch.rows, ids, mask, strict=True):
            assert i[m.bool()].tolist() == model.tokenizer(texts[row - 10], truncation=True)["input_ids"]
    longest = [int(batch.features["attention_mask"].sum(1).max()) for batch in batches]
    assert longest == sorted(longest, reverse=True)


def test_no_more_is_begun_ahead_than_asked_for_and_the_rest_not_at_all() -> None:
    begun: list[int] = []
    taken: list[int] = []
    with ThreadPoolExecutor(2) as pool:
        for number in _in_order(pool, lambda i: begun.append(i) or i, iter(range(20)), ahead=3):
            taken.append(number)
            assert len(begun) <= len(taken) + 3
            if number == 9:
                break
    assert taken == list(range(10)) and len(begun) <= 13


def test_work_that_is_given_up_ends_and_puts_the_threads_back(model: SentenceTransformer) -> None:
    model.tokenizer.padding_side = "right"
    threads, alive = torch.get_num_threads(), threading.active_count()
    texts = ["river sea"] * 40
    rows = vectors_in_batches(model, texts, None, 2, LIMIT)
    next(rows)
    rows.close()
    assert torch.get_num_threads() == threads and threading.active_count() == alive
    assert sorted(row for rows, _ in vectors_in_batches(model, texts, None, 2, LIMIT) for row in rows) == list(
        range(40)
    )
