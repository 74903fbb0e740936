"""The speed of the measures that compare texts by their words, beside that of another tree.

python -m benchmarks.word_measures CORPUS [--documents N] [--rounds N] [--before TREE]

CORPUS is a file or a folder of JSON lines (.jsonl, .jsonl.zst) with a field `text`, or `unspaced` for made documents of
Chinese, Japanese, Thai and Khmer letters. Measured are signatures (corpus/minhash_signatures), filter
(pairing/neighbor_pairs: each document with the next one), quality (synthesis/quality, each document being both a
synthetic one and the seed of the one before) and contamination (every tenth document is an evaluation item).
Speeds are documents per second of processor time, of all threads. Each round is a process of its own; with --before, of
a checkout at TREE and of this one by turns. Prints medians over rounds, and as the last line a JSON object.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import polars as pl
import zstandard

from benchmarks.arguments import parser
from benchmarks.machine import describe
from sbp_assets.corpus.dedup import signatures
from sbp_assets.evaluation.contamination import compare
from sbp_assets.pairing.filter import bucket_edges
from sbp_assets.pairing.search import CANDIDATE_SCHEMA
from sbp_assets.settings import Contamination, Dedup, Pairing
from sbp_assets.storage.progress import Progress
from sbp_assets.synthesis.quality import quality_rows

ALPHABETS = (range(0x4E00, 0x5200), range(0x3041, 0x3097), range(0x0E01, 0x0E2F), range(0x1780, 0x17A3))


def texts(corpus: str, count: int) -> list[str]:
    """Return the first `count` texts of a corpus, files in the order of their names."""
    if corpus == "unspaced":
        rng = random.Random(0)
        return ["".join(map(chr, rng.choices(rng.choice(ALPHABETS), k=2000))) for _ in range(count)]
    path, found = Path(corpus), []
    for file in sorted(path.glob("*.jsonl*")) if path.is_dir() else [path]:
        opened = zstandard.open(file, "rt", encoding="utf-8") if file.suffix == ".zst" else file.open(encoding="utf-8")
        with opened as lines:
            for line in lines:
                found.append(json.loads(line)["text"])
                if len(found) == count:
                    return found
    return found


def measure(corpus: str, count: int) -> dict[str, float]:
    """Return documents per second of processor time, of all threads, by measure, each timed once."""
    documents = pl.DataFrame({"text": texts(corpus, count)}).with_row_index("id").cast({"id": pl.String})
    following = documents["id"].shift(-1, fill_value=documents["id"][0])
    candidates = pl.select(
        query_id=documents["id"], neighbor_id=following, neighbor_shard=pl.lit("0"), similarity=pl.lit(0.9), rank=1
    ).cast(dict(CANDIDATE_SCHEMA))
    seeds = pl.select(text=documents["text"], seed_text=documents["text"].shift(-1, fill_value=documents["text"][0]))
    items = documents.gather_every(10).select(evaluation_set=pl.lit("test"), item="id", text="text")
    with Progress("benchmark", "documents") as progress, tempfile.TemporaryDirectory() as scratch:
        found, corpus_file, edges = (Path(scratch) / name for name in ("candidates", "documents", "edges"))
        edges.mkdir()
        candidates.write_parquet(found)
        documents.with_columns(split=pl.lit("unique")).write_parquet(corpus_file)
        measures: dict[str, Callable[[], object]] = {
            "signatures": lambda: signatures(documents, Dedup(), progress),
            "filter": lambda: bucket_edges(
                {"0": found}, {"0": corpus_file}, ["0"], Pairing(both_directions=False), edges, "2GB", progress
            ),
            "quality": lambda: quality_rows(
                seeds, documents.select("text"), Dedup(), 13, None, Path(scratch), memory_limit="2GB"
            ),
            "contamination": lambda: compare(items, [("unique", documents)], Contamination(), progress),
        }
        speeds = {}
        for name, run in measures.items():
            started = time.process_time()
            run()
            speeds[name] = len(documents) / (time.process_time() - started)
    return speeds


def in_process(tree: Path, corpus: str, count: int) -> dict[str, float]:
    """Return `measure` of the package at `tree`, in a process of its own."""
    # This file, whichever the tree: another one may not have it.
    command = [sys.executable, __file__, corpus, "--documents", str(count), "--once"]
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    speeds: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return speeds


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("corpus")
    arguments.add_argument("--documents", type=int, default=2000)
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--before", type=Path)
    arguments.add_argument("--once", action="store_true", help="one round in this process, which prints JSON alone")
    chosen = arguments.parse_args()
    corpus = chosen.corpus if chosen.corpus == "unspaced" else str(Path(chosen.corpus).resolve())
    if chosen.once:
        print(json.dumps(measure(corpus, chosen.documents)))
        return
    trees = {"before": chosen.before.resolve()} if chosen.before else {}
    trees["now"] = Path(__file__).resolve().parents[1]
    rounds = [
        {name: in_process(tree, corpus, chosen.documents) for name, tree in trees.items()} for _ in range(chosen.rounds)
    ]
    result: dict[str, object] = {}
    for name in rounds[0]["now"]:
        speeds = {tree: median(found[tree][name] for found in rounds) for tree in trees}
        ratio = median(found["now"][name] / found["before"][name] for found in rounds) if chosen.before else None
        print(f"{name:14}", *(f"{tree} {speed:8,.0f} documents/s" for tree, speed in speeds.items()), ratio or "")
        result[name] = {tree: round(speed, 1) for tree, speed in speeds.items()} | ({"ratio": ratio} if ratio else {})
    print(json.dumps({**result, "documents": chosen.documents, "rounds": chosen.rounds, **describe()}))


if __name__ == "__main__":
    main()
