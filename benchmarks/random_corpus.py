"""A tokenizer and documents of random tokens, for benchmarks to train on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from sbp_assets.storage.token_arrays import write_token_arrays

SPECIAL = ["<pad>", "<bos>", "<eos>"]


def write_tokenizer(directory: Path, vocabulary: int) -> Path:
    """Write a tokenizer of so many tokens, the words word0, word1, … among them, and return `directory`."""
    words = [*SPECIAL, *(f"word{number}" for number in range(vocabulary - len(SPECIAL)))]
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>"
    ).save_pretrained(directory)
    return directory


def random_documents(vocabulary: int, median_tokens: int, documents: int) -> list[np.ndarray]:
    """Return the token ids of documents whose lengths have a log-normal distribution."""
    rng = np.random.default_rng(0)
    lengths = np.clip(median_tokens * rng.lognormal(0, 0.6, documents), 8, 8 * median_tokens).astype(int)
    return [rng.integers(len(SPECIAL), vocabulary, length) for length in lengths]


def write_documents(directory: Path, encoded: list[np.ndarray], vocabulary: int) -> Path:
    """Write documents as token arrays, and return `directory`."""
    documents = pl.DataFrame({"id": [str(number) for number in range(len(encoded))]})
    write_token_arrays(directory, documents, encoded, vocabulary)
    return directory
