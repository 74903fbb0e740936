"""Recall, speed and memory of the neighbour search beside FAISS's own indexes: python -m benchmarks.pairing.

Vectors are those of `--embeddings`, a folder of Parquet files as `pairing/embeddings` is, or generated ones: subjects
of Zipf popularity. For more vectors than there are, copies are jittered until their ten nearest neighbours are as
similar, in the median, as those of the originals. For each number of vectors, `--queries` of them are searched for
their 10 nearest others, one thread:

- ours: quantisers, indexes of 8 shards, `--blocks` blocks of keys, merged and re-scored, with the least `nprobe` of
  `--nprobe` that reaches a recall of 0.98, or the largest;
- flat: IndexFlatIP, whose result is the truth, in one matrix product;
- ivf: IndexIVFFlat of as many cells, `nprobe` raised until its recall is ours;
- hnsw: IndexHNSWFlat of 32 links, `efSearch` raised likewise, up to 300,000 vectors.

Queries are timed in turn, the median of `--rounds`; our time is that of choosing the cells, searching in blocks and
merging, and not of loading. `balance` is the work of the fullest block over the mean, measured over all keys and
sampled queries, with salting and without. Bytes per vector are those of the index in memory. In a process of its own
one block is searched for all shards, with a `deployment.memory_per_worker` that it just fits: how much memory it takes
at most, over that. The last line is a JSON object.
"""

from __future__ import annotations

import json
import multiprocessing
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import polars as pl

from benchmarks.arguments import parser
from benchmarks.machine import describe, looking
from sbp_assets.pairing.embed import embeddings_frame, vectors_of
from sbp_assets.pairing.index import KeyBlock, ShardIndex, write_index
from sbp_assets.pairing.quantizer import Quantizer, fit, salt
from sbp_assets.pairing.search import CODED_PER_NEIGHBOR, merge, nearest
from sbp_assets.settings import Pairing
from sbp_assets.storage.paths import read_table
from sbp_assets.storage.progress import Progress

K, SHARDS, HNSW_MOST, WANTED = 10, 8, 300_000, 0.98


def vectors(source: Path | None, count: int, dim: int) -> np.ndarray:
    """Return `count` unit vectors, (count, dim) float32: of `source`, projected and copied as needed, or generated."""
    rng = np.random.default_rng(0)
    if source is None:
        subjects = max(count // 50, 1)
        weights = 1 / np.arange(1, subjects + 1)
        centres = rng.standard_normal((subjects, dim)).astype(np.float32)
        found = centres[rng.choice(subjects, count, p=weights / weights.sum())]
        return unit(found + 0.9 * rng.standard_normal((count, dim)).astype(np.float32))
    base = np.concatenate([vectors_of(read_table(file)) for file in sorted(source.glob("*.parquet"))])
    if base.shape[1] != dim:
        base = unit(base @ rng.standard_normal((base.shape[1], dim)).astype(np.float32))
    if count <= len(base):
        return base[rng.permutation(len(base))[:count]]
    wanted, scale = typical(base[rng.permutation(len(base))[:300]], base), np.float32(1 / np.sqrt(dim))
    low, high = 0.0, 2.0
    rows = base[rng.integers(0, len(base), count - len(base))]
    noise = rng.standard_normal(rows.shape).astype(np.float32)
    for _ in range(7):
        jitter = (low + high) / 2
        found = unit(np.concatenate([base, rows + jitter * scale * noise]))
        low, high = (jitter, high) if typical(found[rng.permutation(count)[:300]], found) > wanted else (low, jitter)
    return found


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def typical(queries: np.ndarray, keys: np.ndarray) -> float:
    """Return the median similarity of `queries`, which are among the keys, to their ten nearest others."""
    similarity = queries @ keys.T
    return float(np.median(np.sort(np.partition(similarity, -K - 1, axis=1)[:, -K - 1 :], axis=1)[:, :-1]))


def recall(found: list[list[int]], exact: np.ndarray) -> float:
    return float(np.mean([len(set(mine) & set(truth)) / K for mine, truth in zip(found, exact.tolist(), strict=True)]))


def others(rows: np.ndarray, queries: np.ndarray) -> list[list[int]]:
    """Return the K first of each query's rows that are not itself."""
    return [[row for row in mine if row != query][:K] for mine, query in zip(rows.tolist(), queries, strict=True)]


def raised(search: Callable[[int], np.ndarray], queries: np.ndarray, exact: np.ndarray, wanted: float) -> int:
    """Return the smallest power of two that `search` reaches the wanted recall with."""
    effort = 1
    while recall(others(search(effort), queries), exact) < wanted and effort < 4096:
        effort *= 2
    return effort


def measure(keys: np.ndarray, queries: np.ndarray, blocks: int, nprobes: list[int], rounds: int) -> dict[str, Any]:
    count, dim = keys.shape
    ids = pl.Series([f"{row:08d}" for row in range(count)])
    pairing = Pairing(index="ivf", nprobe=nprobes[-1], neighbors=K, key_blocks=blocks)
    with tempfile.TemporaryDirectory() as folder, Progress("benchmark", "steps") as progress:
        store = Path(folder)
        tables = {f"{s:05d}": embeddings_frame(ids[s::SHARDS], keys[s::SHARDS]) for s in range(SHARDS)}
        started = time.perf_counter()
        quantizer = fit({shard: table.lazy() for shard, table in tables.items()}, pairing, progress)
        fitted = time.perf_counter() - started
        for shard, table in tables.items():
            (store / shard).mkdir()
            write_index(store / shard, shard, table["id"], vectors_of(table), quantizer, nprobes[-1])
        built = time.perf_counter() - started - fitted
        del tables
        (store / "quantizer").mkdir()
        quantizer.save(store / "quantizer", "benchmark")
        peak = measured_memory(store, blocks)
        pieces, held = quantizer.pieces(blocks), []
        for block in range(blocks):
            (scratch := store / f"block {block}").mkdir()
            paths = {f"{s:05d}": store / f"{s:05d}" for s in range(SHARDS)}
            held.append(KeyBlock.load(paths, quantizer, pieces, block, CODED_PER_NEIGHBOR * K, scratch))
        mine, asked = ids.gather(queries), keys[queries]

        def ours(nprobe: int) -> pl.DataFrame:
            _, probes = quantizer.nearest_cells(asked, nprobe)
            partials = [nearest(block, mine, asked, probes, CODED_PER_NEIGHBOR * K).lazy() for block in held]
            return merge(partials, mine, K)

        flat = faiss.IndexFlatIP(dim)
        flat.add(keys)
        exact = np.array(others(flat.search(asked, K + 1)[1], queries))
        ours_at = {}
        for nprobe in nprobes:
            rows = ours(nprobe).group_by("query_id", maintain_order=True).agg("neighbor_id")["neighbor_id"]
            ours_at[nprobe] = recall([[int(name) for name in names] for names in rows], exact)
        chosen = next((nprobe for nprobe in nprobes if ours_at[nprobe] >= WANTED), nprobes[-1])
        reached = ours_at[chosen]
        peers: dict[str, Callable[[], Any]] = {"flat": lambda: flat.search(asked, K + 1)}
        efforts = {"ours": chosen}
        ivf = faiss.IndexIVFFlat(faiss.IndexFlatIP(dim), dim, quantizer.cells, faiss.METRIC_INNER_PRODUCT)
        ivf.train(keys[np.random.default_rng(1).permutation(count)[: 64 * quantizer.cells]])
        ivf.add(keys)

        def with_nprobe(effort: int) -> np.ndarray:
            ivf.nprobe = effort
            return ivf.search(asked, K + 1)[1]  # type: ignore[no-any-return]

        efforts["ivf"] = raised(with_nprobe, queries, exact, reached)
        peers["ivf"] = lambda: with_nprobe(efforts["ivf"])
        if count <= HNSW_MOST:
            hnsw = faiss.IndexHNSWFlat(dim, 32, faiss.METRIC_INNER_PRODUCT)
            hnsw.add(keys)

            def with_search(effort: int) -> np.ndarray:
                hnsw.hnsw.efSearch = effort
                return hnsw.search(asked, K + 1)[1]  # type: ignore[no-any-return]

            efforts["hnsw"] = raised(with_search, queries, exact, reached)
            peers["hnsw"] = lambda: with_search(efforts["hnsw"])
        seconds: dict[str, list[float]] = {name: [] for name in ("ours", *peers)}
        for _ in range(rounds):
            for name, search in (("ours", lambda: ours(chosen)), *peers.items()):
                started = time.perf_counter()
                search()
                seconds[name].append(time.perf_counter() - started)
        speed = {name: round(len(queries) / statistics.median(times), 1) for name, times in seconds.items()}
        recalls = {"ours": round(reached, 4), "ivf": round(recall(others(peers["ivf"](), queries), exact), 4)}
        return {
            "vectors": count,
            "dimensions": dim,
            "cells": quantizer.cells,
            "recall_at_10": recalls,
            "recall_at_10_by_nprobe": {str(nprobe): round(found, 4) for nprobe, found in ours_at.items()},
            "queries_per_second": speed,
            "times_flat": round(speed["ours"] / speed["flat"], 2),
            "efforts": efforts,
            "fit_seconds": round(fitted, 1),
            "index_vectors_per_second": round(count / built),
            "bytes_per_vector": {"ours": int(quantizer.index.code_size) + 8, "flat": 4 * dim, "ivf": 4 * dim + 8},
            **peak,
            "balance": balance(quantizer, keys, queries, blocks, chosen),
        }


def measured_memory(store: Path, blocks: int) -> dict[str, Any]:
    """Return what `search_first_block` of the indexes in `store` measures in a process of its own."""
    context = multiprocessing.get_context("spawn")
    with context.Pool(1) as pool:
        return pool.apply(search_first_block, (store, blocks))


def search_first_block(store: Path, blocks: int) -> dict[str, Any]:
    """Search block 0 for every shard, with `memory_per_worker` at what the block says that it takes.

    Returns that size and the peak of the process's own memory over what it had before; the vectors that it reads are
    pages of files, which the system takes back as it needs them.
    """
    faiss.omp_set_num_threads(1)
    quantizer = Quantizer.load(store / "quantizer")
    paths = {f"{s:05d}": store / f"{s:05d}" for s in range(SHARDS)}
    pieces, setting = quantizer.pieces(blocks), 1.0
    (scratch := store / "memory").mkdir()
    before, seen = own_memory(), [0]
    with looking(lambda: seen.append(own_memory() - before), 0.01):
        for _ in range(2):
            try:
                keys = KeyBlock.load(paths, quantizer, pieces, 0, CODED_PER_NEIGHBOR * K, scratch, setting)
            except ValueError as refused:  # says how much the block takes, which is then the setting
                setting = 1e6 * float(re.findall(r"takes ([\d,.]+) MB", str(refused))[0].replace(",", "")) + 1e5
        for path in paths.values():
            rows = ShardIndex.open(path)
            for start in range(0, len(rows.keys), 2048):
                some = slice(start, start + 2048)
                nearest(keys, rows.keys["id"][some], rows.vectors[some], rows.probes[some], CODED_PER_NEIGHBOR * K)
    return {"memory_setting_mb": round(setting / 1e6, 1), "peak_memory_over_setting": round(max(seen) / setting, 2)}


def own_memory() -> int:
    """Return the bytes of this process's anonymous memory."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.findall(r"RssAnon:\s+(\d+) kB", status)[0])


def balance(quantizer: Quantizer, keys: np.ndarray, queries: np.ndarray, blocks: int, nprobe: int) -> dict[str, float]:
    """Return the distances that the fullest block computes over the mean, salted and with whole cells in turn."""
    cells = quantizer.nearest_cells(keys, 1)[1][:, 0]
    asked = np.bincount(quantizer.nearest_cells(keys[queries], nprobe)[1].ravel(), minlength=quantizer.cells)
    pieces, salts = quantizer.pieces(blocks), salt(f"{row:08d}" for row in range(len(keys)))
    work = np.bincount(pieces.blocks(cells, salts), asked[cells], minlength=blocks)
    whole = np.bincount(cells % blocks, asked[cells], minlength=blocks)
    return {"salted": round(float(work.max() / work.mean()), 3), "cells": round(float(whole.max() / whole.mean()), 3)}


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("vectors", nargs="*", type=int, default=[100_000], help="numbers of vectors")
    arguments.add_argument("--embeddings", type=Path, help="folder of Parquet files with a column vector")
    arguments.add_argument("--dimensions", type=int, default=384)
    arguments.add_argument("--queries", type=int, default=1000)
    arguments.add_argument("--blocks", type=int, default=4)
    arguments.add_argument("--nprobe", type=int, nargs="+", default=[8, 16, 32, 64])
    arguments.add_argument("--rounds", type=int, default=3)
    given = arguments.parse_args()
    faiss.omp_set_num_threads(1)
    rows = []
    for count in given.vectors:
        keys = vectors(given.embeddings, count, given.dimensions)
        queries = np.sort(np.random.default_rng(2).permutation(count)[: given.queries])
        rows.append(measure(keys, queries, given.blocks, sorted(given.nprobe), given.rounds))
        print(json.dumps(rows[-1]), flush=True)
    print(json.dumps({"machine": describe(), "searches": rows}))


if __name__ == "__main__":
    main()
