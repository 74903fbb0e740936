"""Texts through an embedding model in batches of a number of tokens, tokenised ahead and computed on all cores."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Dense, Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

# Tokens in a batch on a CPU, at most: what one core computes at a time. More do not stay in its caches.
CPU_BATCH_TOKENS = 2048

# Texts that are tokenised, and sorted by their tokens, at a time, in batches of the longest.
_BATCHES_PER_WINDOW = 16


@dataclass(frozen=True)
class _Window:
    rows: Sequence[int]
    texts: list[str]


@dataclass(frozen=True)
class _Batch:
    rows: list[int]
    features: dict[str, torch.Tensor]


def is_plain(model: SentenceTransformer) -> bool:
    """Return whether `model` reads text and its modules are of kinds that this module knows what to do with."""
    first, *others = model.children()
    return (
        isinstance(first, Transformer)
        and type(first) is Transformer
        and first.module_output_name == "token_embeddings"
        and list(first.modality_config) == ["text"]
        and all(type(module) in (Pooling, Dense, Normalize) for module in others)
    )


def pool_in_float32(model: SentenceTransformer) -> None:
    """Let what follows the transformer of a plain `model` compute in float32, whatever the transformer computes in."""
    for module in list(model.children())[1:]:
        module.float()


def vectors_in_batches(
    model: SentenceTransformer, texts: Sequence[str], prompt: str | None, batch_size: int, max_tokens: int
) -> Iterator[tuple[list[int], np.ndarray]]:
    """Yield rows of `texts` and their vectors, (rows, dim) float32, until all are computed; `model` is a plain one.

    A batch has as many tokens, padding included, as `batch_size` texts of `max_tokens` tokens, to which `model` cuts
    them; on a CPU not more than CPU_BATCH_TOKENS. There, each batch is computed by one core, so that the number of
    cores, which is torch's number of threads, does not change a bit. Raises ValueError where a text has no tokens.
    """
    on_cpu = model.device.type == "cpu"
    tokens = batch_size * max_tokens
    if on_cpu:
        tokens = min(tokens, CPU_BATCH_TOKENS)
    # By characters first, so that a window has texts of like length.
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
    size = batch_size * _BATCHES_PER_WINDOW
    windows = (
        _Window(rows, [texts[i] for i in rows]) for rows in (order[s : s + size] for s in range(0, len(order), size))
    )
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(1) as tokenizing, _cores(threads if on_cpu else None) as computing:
            tokenised = _in_order(tokenizing, lambda window: (window, _features(model, window, prompt)), windows, 1)
            batches = (batch for window, features in tokenised for batch in _batches(model, window, features, tokens))
            yield from _in_order(
                computing, lambda batch: (batch.rows, _vectors(model, batch.features)), batches, 2 * threads
            )
    finally:
        torch.set_num_threads(threads)


def _cores(count: int | None) -> ThreadPoolExecutor:
    """Return threads that compute on a core each; None: one thread, which hands the work to a GPU.

    On busy cores the threads of one operation spin while they wait for each other; those of different batches never
    wait.
    """
    if count is None:
        return ThreadPoolExecutor(1)
    return ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,))


def _in_order(
    pool: Executor, function: Callable[[_Item], _Result], items: Iterable[_Item], ahead: int
) -> Iterator[_Result]:
    """Yield the results for `items` in order; at most `ahead` are computed before they are asked for."""
    waiting: deque[Future[_Result]] = deque()
    try:
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    finally:
        for future in waiting:
            future.cancel()


def _features(model: SentenceTransformer, window: _Window, prompt: str | None) -> dict[str, torch.Tensor]:
    features = model.preprocess(window.texts, prompt=prompt)
    empty = torch.nonzero(features["attention_mask"].sum(1) == 0).flatten().tolist()
    if empty:
        rows = sorted(window.rows[i] for i in empty)
        raise ValueError(f"the embedding model's tokenizer finds no token in rows {rows[:5]} ({len(rows)} in all)")
    return features


def _batches(
    model: SentenceTransformer, window: _Window, features: dict[str, torch.Tensor], tokens: int
) -> Iterator[_Batch]:
    """Yield the texts of a window, longest first, in batches of at most `tokens` tokens, or of one text."""
    mask = features["attention_mask"]
    lengths, by_length = torch.sort(mask.sum(1), descending=True, stable=True)
    start = 0
    while start < len(lengths):
        longest = int(lengths[start])
        chosen = by_length[start : start + max(1, tokens // longest)]
        kept = slice(-longest, None) if model.tokenizer.padding_side == "left" else slice(longest)
        yield _Batch(
            [window.rows[i] for i in chosen.tolist()],
            {
                name: value[chosen, kept] if isinstance(value, torch.Tensor) and value.shape == mask.shape else value
                for name, value in features.items()
            },
        )
        start += len(chosen)


def _vectors(model: SentenceTransformer, features: dict[str, torch.Tensor]) -> np.ndarray:
    with torch.inference_mode():
        first, *others = model.children()
        on_device = {
            name: value.to(model.device) if isinstance(value, torch.Tensor) else value
            for name, value in features.items()
        }
        found = first(on_device)
        found["token_embeddings"] = found["token_embeddings"].float()
        for module in others:
            found = module(found)
        vectors: np.ndarray = found["sentence_embedding"].cpu().numpy()
    return vectors[:, : model.get_embedding_dimension()]
