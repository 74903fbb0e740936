"""Speed of the pairing stage's embedding beside sentence-transformers: python -m benchmarks.embedding CORPUS.

CORPUS is a file of documents, a folder or a glob, as the corpus source `files` takes it. Documents spread evenly over
it are embedded by turns, each in a process of its own, on as many threads:

- ours: bfloat16, as the asset pairing/embeddings is materialised
- defaults: `SentenceTransformer.encode` with nothing set: float32, in batches of 32 that it sorts by characters
- best: `encode` in bfloat16 in batches of the size that is fastest on every fourth of the documents

All of them read as many tokens of a document. The last line printed is one JSON object: the median documents per second
of each, the ratio of ours to both others, and the cosine of each document's vector to that of `defaults`. The ratio by
seconds of processor time is the steadier one where the machine has other work.
"""

from __future__ import annotations

import json
import statistics
import time
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from functools import partial
from multiprocessing import get_context
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from benchmarks.arguments import parser
from benchmarks.machine import describe
from sbp_assets.corpus.errors import CorpusError
from sbp_assets.corpus.readers import read_rows
from sbp_assets.corpus.rows import Document, Fields, RowMaker
from sbp_assets.corpus.source_files import Root
from sbp_assets.pairing.embed import Embedder, embed, model_path
from sbp_assets.settings import Pairing
from sbp_assets.storage.progress import Progress

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

DEFAULT_BATCH = 32
BATCH_SIZES = (4, 8, 16, 32, 64)
MAX_ROW_BYTES = 2**24


class Timed(NamedTuple):
    """One embedding of all documents."""

    seconds: float
    cpu_seconds: float
    vectors: np.ndarray


# Of the process that computes for one of the peers.
_loaded: Embedder | SentenceTransformer


def main(texts: list[str], pairing: Pairing, batch_size: int, rounds: int, threads: int) -> None:
    with ExitStack() as stack:
        ours, defaults, best = (stack.enter_context(ProcessPoolExecutor(1, get_context("spawn"))) for _ in range(3))
        ours.submit(_load_ours, threads).result()
        defaults.submit(_load_encode, pairing, None, threads).result()
        best.submit(_load_encode, pairing, "bfloat16", threads).result()
        some = texts[::4]
        warm = texts[:64]
        for pool, run in ((ours, partial(_ours, pairing=pairing, batch_size=batch_size)), (defaults, _encode)):
            pool.submit(run, warm).result()
        best.submit(_encode, warm).result()
        tried = {size: len(some) / best.submit(_encode, some, size).result().seconds for size in BATCH_SIZES}
        size = max(tried, key=lambda size: tried[size])
        peers = {
            "ours": partial(ours.submit, _ours, texts, pairing, batch_size),
            "defaults": partial(defaults.submit, _encode, texts, DEFAULT_BATCH),
            "best": partial(best.submit, _encode, texts, size),
        }
        found: dict[str, list[Timed]] = {name: [] for name in peers}
        for _ in range(rounds):
            for name, run in peers.items():
                found[name].append(run().result())
            print(
                json.dumps({name: round(len(texts) / rows[-1].seconds, 2) for name, rows in found.items()}), flush=True
            )
    exact = found["defaults"][0].vectors
    seconds = {name: [row.seconds for row in rows] for name, rows in found.items()}
    cpu_seconds = {name: statistics.median(row.cpu_seconds for row in rows) for name, rows in found.items()}
    rates = {name: len(texts) / statistics.median(rows) for name, rows in seconds.items()}
    result = {
        **describe(),
        "threads": threads,
        "model": pairing.embedding_model,
        "documents": len(texts),
        "max_tokens": pairing.max_tokens,
        "documents_per_second": {name: round(rate, 2) for name, rate in rates.items()},
        **{
            f"over_{name}": {
                "ratio": round(rates["ours"] / rates[name], 3),
                "by_round": [round(b / a, 3) for a, b in zip(seconds["ours"], seconds[name], strict=True)],
                "ratio_by_cpu_seconds": round(cpu_seconds[name] / cpu_seconds["ours"], 3),
            }
            for name in ("defaults", "best")
        },
        "best_batch_size": size,
        "documents_per_second_by_batch_size": {size: round(rate, 2) for size, rate in tried.items()},
        "cosine_to_float32": {name: _cosines(found[name][0].vectors, exact) for name in ("ours", "best")},
        "same_bits_every_round": all(np.array_equal(row.vectors, found["ours"][0].vectors) for row in found["ours"]),
    }
    print(json.dumps(result))


def _load_ours(threads: int) -> None:
    global _loaded
    torch.set_num_threads(threads)
    _loaded = Embedder()


def _load_encode(pairing: Pairing, dtype: str | None, threads: int) -> None:
    global _loaded
    from sentence_transformers import SentenceTransformer

    torch.set_num_threads(threads)
    kwargs = {} if dtype is None else {"dtype": getattr(torch, dtype)}
    _loaded = SentenceTransformer(model_path(pairing.embedding_model), device="cpu", model_kwargs=kwargs)
    _loaded.max_seq_length = min(pairing.max_tokens, _loaded.max_seq_length or pairing.max_tokens)


def _ours(texts: list[str], pairing: Pairing, batch_size: int) -> Timed:
    assert isinstance(_loaded, Embedder)
    engine = _loaded.load(pairing.embedding_model, "bfloat16", "cpu")
    start = time.perf_counter(), time.process_time()
    with Progress("embed", "documents", len(texts)) as progress:
        vectors = embed(engine, texts, pairing.max_tokens, batch_size, progress, pairing.embedding_prompt)
    return Timed(time.perf_counter() - start[0], time.process_time() - start[1], vectors)


def _encode(texts: list[str], batch_size: int = DEFAULT_BATCH) -> Timed:
    assert not isinstance(_loaded, Embedder)
    start = time.perf_counter(), time.process_time()
    vectors = _loaded.encode(texts, batch_size=batch_size, show_progress_bar=False)
    return Timed(time.perf_counter() - start[0], time.process_time() - start[1], vectors.astype(np.float32))


def _cosines(vectors: np.ndarray, exact: np.ndarray) -> dict[str, float]:
    cosines = np.einsum("ij,ij->i", vectors, exact) / np.linalg.norm(vectors, axis=1) / np.linalg.norm(exact, axis=1)
    return {"min": round(float(cosines.min()), 6), "mean": round(float(cosines.mean()), 6)}


def _read(corpus: str, count: int) -> list[str]:
    """Return the texts of `count` documents, spread evenly, in the order of the corpus; of all where it has fewer."""
    root = Root(corpus)
    fields = Fields("text", None, None)
    rows = (
        row
        for file in root.files()[0]
        for row in read_rows(
            root, file, RowMaker(file, root.name, fields, MAX_ROW_BYTES, Counter()), root.describe(file)[1]
        )
    )
    texts = [row.text for row in rows if isinstance(row, Document)]
    return [texts[i * len(texts) // count] for i in range(count)] if len(texts) > count else texts


def _arguments() -> dict[str, Any]:
    taking = parser(__doc__)
    taking.add_argument("corpus", help="file, folder or glob of documents")
    taking.add_argument("--documents", type=int, default=512)
    taking.add_argument("--model", default=Pairing().embedding_model)
    taking.add_argument("--max-tokens", type=int, default=Pairing().max_tokens)
    taking.add_argument("--batch-size", type=int, default=16, help="deployment.embedding_batch_size of ours")
    taking.add_argument("--rounds", type=int, default=5)
    taking.add_argument("--threads", type=int, default=torch.get_num_threads())
    given = taking.parse_args()
    try:
        texts = _read(given.corpus, given.documents)
    except CorpusError as error:
        taking.error(str(error))
    return {
        "texts": texts,
        "pairing": Pairing(embedding_model=given.model, max_tokens=given.max_tokens),
        "batch_size": given.batch_size,
        "rounds": given.rounds,
        "threads": given.threads,
    }


if __name__ == "__main__":
    main(**_arguments())
