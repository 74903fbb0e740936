"""The tokenizer: a byte-level BPE trained on D, or a named one, with the special tokens that the other stages use."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from sbp_assets.corpus.errors import CorpusError
from sbp_assets.corpus.split import HELDOUT, ORACLE, UNIQUE
from sbp_assets.settings import Split
from sbp_assets.storage.columns import Column

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

BOS = "<|bos|>"
EOS = "<|eos|>"
PAD = "<|pad|>"
RELATED = "<|related|>"  # Stands between d1 and d2.
SPECIALS = (BOS, EOS, PAD, RELATED)

# Bytes. Training takes the square of a word's length, and a word is whatever has no space, digit or punctuation inside:
# 17 s for a line of 200,000 equals signs, 0.3 s for ten times as many in pieces.
LONGEST_WORD = 1000

TOKEN_COLUMNS = [
    Column("id", pl.String, "Document; of documents.parquet.", "corpus/documents"),
    Column("split", pl.String, "As in corpus/documents; of documents.parquet.", "corpus/documents"),
    Column("tokens", "array[uint]", "Of tokens.npy: the document's `<bos>` ids `<eos>`.", "corpus/documents.text"),
]


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE of at most `vocab_size` entries, specials included, trained on `texts` (streamed).

    All 256 bytes are in the vocabulary, so every text is encoded without loss. Training reads longer words than
    LONGEST_WORD in pieces.
    """
    # Imported where it is used: it loads torch, which few of the processes that load the definitions need.
    from transformers import PreTrainedTokenizerFast

    raw = RawTokenizer(models.BPE())
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.FixedLength(length=LONGEST_WORD)])
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIALS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    raw.train_from_iterator(texts, trainer)
    raw.pre_tokenizer = words
    return PreTrainedTokenizerFast(
        tokenizer_object=raw,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=[RELATED],
        clean_up_tokenization_spaces=False,
    )


def named_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """Return the tokenizer `name` (hub name or path), with special tokens added where it has none of its own.

    Raises CorpusError where it cannot be loaded, or has no fast version.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise CorpusError(f"corpus.tokenizer.name {name!r} cannot be loaded: {error}") from error
    if not tokenizer.is_fast:
        raise CorpusError(f"corpus.tokenizer.name {name!r} has no fast (tokenizers) version, which is needed")
    for key, token in (("bos_token", BOS), ("eos_token", EOS), ("pad_token", PAD)):
        if getattr(tokenizer, key) is None:
            tokenizer.add_special_tokens({key: token})
    tokenizer.add_tokens([RELATED], special_tokens=True)
    tokenizer.clean_up_tokenization_spaces = False
    return tokenizer


def load_tokenizer(directory: Path) -> PreTrainedTokenizerFast:
    """Return the tokenizer saved in `directory`; raises ValueError where it lacks a special token."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    ids = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    if None in ids or RELATED not in tokenizer.get_added_vocab():
        raise ValueError(
            f"{directory}: the tokenizer lacks bos, eos, pad or {RELATED}; re-materialise corpus/tokenizer"
        )
    return tokenizer


def related_id(tokenizer: PreTrainedTokenizerFast) -> int:
    """Return the token id of RELATED."""
    return int(tokenizer.get_added_vocab()[RELATED])


def encode_texts(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[np.ndarray]:
    """Return the token ids (int64) of each text, without special tokens; the name of one in a text is ordinary text."""
    if not len(texts):
        return []
    encoded = tokenizer(
        list(texts), add_special_tokens=False, split_special_tokens=True, return_attention_mask=False,
        return_token_type_ids=False, verbose=False,
    )  # fmt: skip
    return [np.asarray(ids, dtype=np.int64) for ids in encoded["input_ids"]]


def encode_documents(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str]) -> list[np.ndarray]:
    """Return [bos] + ids + [eos] of each text, int64."""
    return [np.array([tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]) for ids in encode_texts(tokenizer, texts)]


def decode(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int] | np.ndarray) -> str:
    """Return the text of token ids: the inverse of `encode_texts`. Special tokens appear as their names."""
    return str(tokenizer.decode([int(i) for i in ids], skip_special_tokens=False, clean_up_tokenization_spaces=False))


def stream_texts(documents: Mapping[str, pl.LazyFrame], split: str, batch: int = 1000) -> Iterator[list[str]]:
    """Yield batches of texts of `split` over all shards in order; one shard's texts are in memory at a time."""
    for key in sorted(documents):
        for rows in documents[key].filter(pl.col("split") == split).select("text").collect().iter_slices(batch):
            yield rows["text"].to_list()


def require_splits(documents: Mapping[str, pl.LazyFrame], split: Split) -> dict[str, int]:
    """Return the documents per split over all shards; raises CorpusError where a split of the settings is too small."""
    counts = dict.fromkeys((UNIQUE, ORACLE, HELDOUT), 0)
    for frame in documents.values():
        counts |= {name: counts[name] + n for name, n in frame.group_by("split").len().collect().iter_rows()}
    needed = {UNIQUE: 2, HELDOUT: 1, ORACLE: int(split.oracle > 0)}
    for name, least in needed.items():
        if counts[name] < least:
            raise CorpusError(
                f"split {name!r} holds {counts[name]} of {sum(counts.values())} documents but needs at least {least}; "
                f"give more documents or raise corpus.split.{name} ({getattr(split, name):g})"
            )
    return counts


def require_tokens(
    tokenizer: PreTrainedTokenizerFast, documents: Mapping[str, pl.LazyFrame], tokens_per_step: int
) -> None:
    """Raise CorpusError for a D of less than one optimizer step; reading stops as soon as there are enough tokens."""
    tokens = 0
    for texts in stream_texts(documents, UNIQUE, batch=100):
        tokens += sum(map(len, encode_documents(tokenizer, texts)))
        if tokens >= tokens_per_step:
            return
    raise CorpusError(
        f"D (split 'unique') holds {tokens} tokens, less than one optimizer step of pretraining.tokens_per_step "
        f"({tokens_per_step}); give more documents, raise corpus.split.unique, or lower tokens_per_step"
    )
