"""What the parts of the pairing stage cost per document on one core: python -m benchmarks.pairing_rates.

Generated documents (`--documents` of `--words` random words, one in four about the subject of another) with generated
vectors of `--dimensions` components go through index, search, merge, filter and pair as the assets call them, once per
round, in `--blocks` blocks of keys and 8 shards. Seconds are of the processor. `sbp plan` takes its rates from here
(sbp_assets/cli/pairing_plan.py). The last line is a JSON object.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import faiss
import numpy as np
import polars as pl

from benchmarks.arguments import parser
from benchmarks.machine import describe
from benchmarks.pairing import vectors
from sbp_assets.corpus.split import UNIQUE
from sbp_assets.pairing.embed import embeddings_frame, vectors_of
from sbp_assets.pairing.filter import bucket_edges, bucket_shards, shard_pairs
from sbp_assets.pairing.index import KeyBlock, write_index
from sbp_assets.pairing.quantizer import fit
from sbp_assets.pairing.search import CODED_PER_NEIGHBOR, merge, nearest
from sbp_assets.settings import Pairing
from sbp_assets.storage.progress import Progress

SHARDS = 8


def texts(count: int, words: int) -> list[str]:
    """Return texts of random words of a vocabulary of 50,000, which share hardly a shingle."""
    rng = np.random.default_rng(0)
    return [" ".join(f"word{number}" for number in rng.integers(0, 50_000, words)) for _ in range(count)]


def measure(folder: Path, tables: dict[str, pl.DataFrame], pairing: Pairing) -> dict[str, float]:
    """Return the rates of one round, all per second of the processor."""
    seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def timed(name: str) -> Iterator[None]:
        started = time.process_time()
        yield
        seconds[name] += time.process_time() - started

    coded, count = CODED_PER_NEIGHBOR * pairing.neighbors, sum(map(len, tables.values()))
    documents = {shard: folder / "documents" / f"{shard}.parquet" for shard in tables}
    with Progress("benchmark", "pairs") as progress:
        quantizer = fit({shard: table.lazy() for shard, table in tables.items()}, pairing, progress)
        indexes = {shard: folder / "index" / shard for shard in tables}
        for shard, table in tables.items():
            indexes[shard].mkdir(parents=True)
            rows = vectors_of(table)
            with timed("cells"):
                _, probes = quantizer.nearest_cells(rows, pairing.nprobe)
            with timed("index"):
                write_index(indexes[shard], shard, table["id"], rows, quantizer, pairing.nprobe)
        partials: dict[str, list[pl.LazyFrame]] = defaultdict(list)
        distances, sizes = 0, np.zeros(quantizer.cells, np.int64)
        for table in tables.values():
            sizes += np.bincount(quantizer.nearest_cells(vectors_of(table), 1)[1][:, 0], minlength=len(sizes))
        for block in range(pairing.key_blocks):
            (scratch := folder / f"block-{block}").mkdir()
            keys = KeyBlock.load(indexes, quantizer, quantizer.pieces(pairing.key_blocks), block, coded, scratch)
            for shard, table in tables.items():
                rows = vectors_of(table)
                _, probes = quantizer.nearest_cells(rows, pairing.nprobe)
                distances += int(sizes[probes].sum()) if block == 0 else 0
                with timed("search"):
                    partials[shard].append(nearest(keys, table["id"], rows, probes, coded).lazy())
                with timed("scan"):
                    keys.search(rows, probes, coded + 2)
        candidates = {shard: folder / "candidates" / f"{shard}.parquet" for shard in tables}
        candidates["00000"].parent.mkdir()
        merged = 0
        for shard, table in tables.items():
            with timed("merge"):
                found = merge(partials[shard], table["id"], pairing.neighbors)
            merged += len(pl.concat(partials[shard]).collect())
            found.write_parquet(candidates[shard])
        edges, compared = {}, 0
        for bucket in range(pairing.key_blocks):
            edges[str(bucket)] = folder / "edges" / str(bucket)
            edges[str(bucket)].mkdir(parents=True)
            chosen = bucket_shards(sorted(tables), bucket, pairing.key_blocks)
            with timed("filter"):
                counts = bucket_edges(candidates, documents, chosen, pairing, edges[str(bucket)], "1GB", progress)
            compared += counts["candidates"] + counts["reversed"]
        pairs = 0
        for shard in tables:
            with timed("pair"):
                pairs += len(shard_pairs(edges, shard, pairing)[0])
    components = count * quantizer.cells * quantizer.dimensions
    even = count * min(pairing.nprobe, quantizer.cells) * count / quantizer.cells
    return {
        "cell_components_per_second": components / seconds["cells"],
        "indexed_documents_per_second_beside_cells": count / max(seconds["index"] - seconds["cells"], 1e-9),
        "key_components_per_second": distances * quantizer.dimensions / seconds["scan"],
        "queries_per_second_and_block_beside": count * pairing.key_blocks / (seconds["search"] - seconds["scan"]),
        "keys_searched_over_even_cells": distances / even,
        "merged_rows_per_second": merged / seconds["merge"],
        "filtered_candidates_per_second": compared / seconds["filter"],
        "pairs_per_second": pairs / seconds["pair"],
    }


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--documents", type=int, default=16_000)
    arguments.add_argument("--words", type=int, default=600, help="of a document: DCLM's 828 tokens (default: 600)")
    arguments.add_argument("--dimensions", type=int, default=1024)
    arguments.add_argument("--blocks", type=int, default=4)
    arguments.add_argument("--rounds", type=int, default=3)
    given = arguments.parse_args()
    faiss.omp_set_num_threads(1)
    pairing = Pairing(index="ivf", neighbors=20, key_blocks=given.blocks, min_similarity=0.5, nprobe=32)
    ids = pl.Series([f"{row:08d}" for row in range(given.documents)])
    rows = vectors(None, given.documents, given.dimensions)
    tables = {f"{s:05d}": embeddings_frame(ids[s::SHARDS], rows[s::SHARDS]) for s in range(SHARDS)}
    written = pl.DataFrame({"id": ids, "text": texts(given.documents, given.words)}).with_columns(split=pl.lit(UNIQUE))
    found = []
    for _ in range(given.rounds):
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "documents").mkdir()
            for number, shard in enumerate(tables):
                written[number::SHARDS].write_parquet(Path(folder) / "documents" / f"{shard}.parquet")
            found.append(measure(Path(folder), tables, pairing))
        print(json.dumps(found[-1]), flush=True)
    medians = {name: float(f"{statistics.median(row[name] for row in found):.4g}") for name in found[0]}
    print(json.dumps({"machine": describe(), "documents": given.documents, "words": given.words, **medians}))


if __name__ == "__main__":
    main()
