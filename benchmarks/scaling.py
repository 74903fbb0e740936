"""Growth with documents and with shards, from reading files to pairs: python -m benchmarks.scaling [--times 1 2 4 8].

`sbp run --until pair` of generated documents, twice: --times the base of 1,000 documents in 4 shards, and those 1,000
documents in --times 4 shards. Told are seconds of the processor of all processes:

- plain: what the assets record as their own work, but the search (`pairing/partial_candidates`, which compares each
  document with a number of others that grows with the corpus);
- search: that asset's;
- overhead: the rest (storage, checks, runs), but for the start of `sbp run`, measured on a second one that has nothing
  to do.

The exponents are those of a power of the documents or shards, fitted on a logarithmic scale: of plain work, of plain
work and overhead together, and of the search. The last line is one JSON object.
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.arguments import parser
from benchmarks.machine import describe
from benchmarks.shards import HOURS, UNTIL, ProcessorSeconds, recorded
from sbp_assets_tests.operations.deployment import Deployment

DOCUMENTS, SHARDS, TARGET = 1000, 4, 1.05
SEARCH = "pairing/partial_candidates"


def measure(documents: int, shards: int) -> dict[str, Any]:
    """Return the seconds of one corpus, and those of each asset."""
    settings = {
        "SBP_EXPERIMENT__CORPUS__SHARDS": str(shards),
        "SBP_EXPERIMENT__CORPUS__SOURCE__DOCUMENTS": str(documents),
        # Of D, which is what is embedded and searched, there is as much as of the rest.
        "SBP_EXPERIMENT__CORPUS__SPLIT": json.dumps({"unique": 0.5, "oracle": 0.4, "heldout": 0.1}),
    }
    with tempfile.TemporaryDirectory() as home, Deployment(Path(home), settings) as deployment:
        used = []
        for _ in ("work", "nothing to do"):
            with ProcessorSeconds() as seconds:
                deployment.sbp("run", "--until", UNTIL, seconds=HOURS, fresh=True)
            used.append(seconds.seconds)
        own, runs, _ = recorded(deployment)
    plain = sum(own.values()) - own[SEARCH]
    return {
        "documents": documents,
        "shards": shards,
        "plain": round(plain, 2),
        "search": round(own[SEARCH], 2),
        "overhead": round(used[0] - used[1] - sum(own.values()), 2),
        "start": round(used[1], 2),
        "runs": runs,
        "assets": {name: round(seconds, 2) for name, seconds in own.items()},
    }


def exponents(rows: list[dict[str, Any]], along: str) -> dict[str, float]:
    """Return the exponents of the growth of rows along documents or shards."""
    sizes = np.log([row[along] for row in rows])
    of = {
        "plain": [row["plain"] for row in rows],
        "plain_and_overhead": [row["plain"] + row["overhead"] for row in rows],
        "search": [row["search"] for row in rows],
    }
    return {name: round(float(np.polyfit(sizes, np.log(seconds), 1)[0]), 2) for name, seconds in of.items()}


def main() -> None:
    taking = parser(__doc__)
    taking.add_argument("--times", type=int, nargs="+", default=[1, 2, 4, 8])
    taking.add_argument("--documents", type=int, default=DOCUMENTS, help="documents of the base")
    given = taking.parse_args()
    if len(given.times) < 2:
        taking.error("give two sizes or more")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    measured: dict[tuple[int, int], dict[str, Any]] = {}
    found: dict[str, Any] = {"machine": describe(), "target": TARGET}
    for along in ("documents", "shards"):
        rows = []
        for factor in given.times:
            documents = given.documents * (factor if along == "documents" else 1)
            shards = SHARDS * (factor if along == "shards" else 1)
            if (documents, shards) not in measured:
                measured[documents, shards] = measure(documents, shards)
                print(json.dumps(measured[documents, shards]), flush=True)
            rows.append(measured[documents, shards])
        found[along] = {"rows": rows, "exponents": exponents(rows, along)}
        print(f"{along}: {json.dumps(found[along]['exponents'])}", flush=True)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
