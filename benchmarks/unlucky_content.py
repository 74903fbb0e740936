"""Seconds and memory of the neighbour search and of tokenizer training on content that once made them unbounded.

Search: 10,000 documents in one shard, of which a share has one and the same vector (a licence at the beginning), each
with its 20 neighbours. Training: ordinary text and one word of some megabytes: a run of one character, random letters.

    python -m benchmarks.unlucky_content

Each case is a process of its own, whose peak resident set is told beside that of a process that only imports what it
needs. The last line is a JSON object.
"""

from __future__ import annotations

import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import polars as pl

from benchmarks import machine
from benchmarks.arguments import parser
from sbp_assets.corpus.tokenizer import train_tokenizer
from sbp_assets.pairing.embed import embeddings_frame
from sbp_assets_tests.pairing.searches import find

SEARCHES = [f"search {kind} {share}" for kind in ("flat", "ivf") for share in (0, 0.5, 1)]
TRAININGS = [f"train {word} {megabytes}" for word in ("run", "letters") for megabytes in (0.2, 2)]


def searched(kind: str, share: float, documents: int = 10_000) -> None:
    """Index one shard, in which `share` of the documents have the same vector, and search it for their neighbours."""
    vectors = np.random.default_rng(0).normal(size=(documents, 384)).astype(np.float32)
    vectors[: int(share * documents)] = vectors[0]
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    table = embeddings_frame(pl.Series([f"d{number:07d}" for number in range(documents)]), vectors)
    with tempfile.TemporaryDirectory() as folder:
        found = find(Path(folder), {"00000": table}, index=kind)
    assert len(found["00000"]) == 20 * documents


def trained(word: str, megabytes: float) -> None:
    """Train a tokenizer of 4096 tokens on a text in which one word has so many megabytes."""
    size = int(megabytes * 1e6)
    long = "=" * size if word == "run" else "".join(random.Random(0).choices("abcdefghijklmnopqrstuvwxyz", k=size))
    train_tokenizer(["some ordinary words"] * 200 + [long], 4096)


def measure(case: str) -> dict[str, object]:
    """Return what a case takes, measured in this process: seconds, and MB of the peak resident set."""
    started = time.perf_counter()
    match case.split():
        case "search", kind, share:
            searched(kind, float(share))
        case "train", word, megabytes:
            trained(word, float(megabytes))
    seconds = round(time.perf_counter() - started, 2)
    # The peak is of kilobytes on Linux.
    return {"case": case, "seconds": seconds, "mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024}


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--case", help="measure this one alone, in this process")
    if case := arguments.parse_args().case:
        print(json.dumps(measure(case)))
        return
    rows = []
    for case in ["imports", *SEARCHES, *TRAININGS]:
        command = [sys.executable, "-m", "benchmarks.unlucky_content", "--case", case]
        rows.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
        print(f"{rows[-1]['case']:<20}{rows[-1]['seconds']:>8} s{rows[-1]['mb']:>7} MB", flush=True)
    print(json.dumps({"machine": machine.describe(), "cases": rows}))


if __name__ == "__main__":
    main()
