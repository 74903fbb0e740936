"""The negative control's documents are what its theory assumes: uniform, independent, of memoryless length, one token
a letter."""

import math
from collections import Counter
from itertools import pairwise

import polars as pl
import pytest

from sbp_assets.corpus.dedup import find_duplicates, signatures
from sbp_assets.corpus.five_tokens import LETTERS, MIN_LETTERS, document, end_probability, surprisal
from sbp_assets.corpus.ingest import read_shard, source_manifest
from sbp_assets.corpus.tokenizer import encode_texts, train_tokenizer
from sbp_assets.settings import Dedup, FiveTokensSource, load_settings
from sbp_assets.storage.progress import Progress

SOURCE = FiveTokensSource(documents=2000, tokens_per_document=48)
TEXTS = [document(SOURCE, number)["text"] for number in range(SOURCE.documents)]


def test_letters_are_uniform_and_say_nothing_about_the_next() -> None:
    letters = Counter(letter for text in TEXTS for letter in text.split())
    pairs = Counter(pair for text in TEXTS for pair in pairwise(text.split()))
    assert set(letters) == set(LETTERS)
    for counts, cells in ((letters, 5), (pairs, 25)):
        expected = counts.total() / cells
        # Chi-squared over its degrees of freedom: mean 1, standard deviation sqrt(2 / degrees).
        statistic = sum((n - expected) ** 2 / expected for n in counts.values()) / (cells - 1)
        assert statistic < 1 + 5 * math.sqrt(2 / (cells - 1))


def test_lengths_have_the_asked_mean_and_no_memory() -> None:
    lengths = [len(text.split()) for text in TEXTS]
    assert min(lengths) >= MIN_LETTERS
    assert sum(lengths) / len(lengths) == pytest.approx(48, rel=0.1)
    for start in (MIN_LETTERS, 40):
        left = [length - start for length in lengths if length >= start]
        assert sum(left) / len(left) == pytest.approx(1 / end_probability(SOURCE) - 1, rel=0.15)


def test_a_letter_is_one_token_of_the_trained_tokenizer() -> None:
    tokenizer = train_tokenizer(TEXTS, vocab_size=300)
    assert [len(ids) for ids in encode_texts(tokenizer, TEXTS)] == [len(text.split()) for text in TEXTS]


def test_surprisal_is_that_of_the_world() -> None:
    # Summed over the lengths, the probabilities of all documents are one.
    shortest = math.exp(-surprisal(SOURCE, MIN_LETTERS)) * 5**MIN_LETTERS
    assert shortest == pytest.approx(end_probability(SOURCE))
    lengths = range(MIN_LETTERS, 2000)
    assert sum(math.exp(n * math.log(5) - surprisal(SOURCE, n)) for n in lengths) == pytest.approx(1)
    assert surprisal(SOURCE, MIN_LETTERS, ended=False) == pytest.approx(MIN_LETTERS * math.log(5))


def test_any_sharding_reads_the_same_documents_and_deduplication_drops_none(tmp_path) -> None:
    source = load_settings("five_tokens", {}).experiment.corpus.source
    assert isinstance(source, FiveTokensSource)
    frames = {}
    with Progress("test", "docs") as progress:
        for shards in (1, 2):
            manifest, ignored = source_manifest(source, shards, progress)
            parts = [read_shard(source, manifest, shard, shards, None, progress, 2**24) for shard in range(shards)]
            assert not ignored and all(rejects.is_empty() for _, rejects, _ in parts)
            frames[shards] = pl.concat([documents for documents, _, _ in parts]).sort("id")
        assert frames[1].drop("file").equals(frames[2].drop("file"))
        raw = {"00000": frames[1].lazy()}
        signed = {"00000": signatures(frames[1], Dedup(), progress).lazy()}
        dropped, counts = find_duplicates(raw, signed, Dedup(), tmp_path, "1GB", progress)
    assert dropped.is_empty() and counts["kept"] == source.documents
    assert document(source.model_copy(update={"seed": 1}), 0)["text"] != document(source, 0)["text"]
