"""Print the nearest neighbour of some documents, with and without centring: python -m benchmarks.pairs_to_read STORE.

STORE is the folder of a finished store: its `corpus/documents` and `pairing/embeddings` are read. Of `--pairs` random
documents of D each is printed beside the nearest other one that is no near-copy (at most a fifth of the shorter one's
five-word shingles is shared), by exact search of the vectors as they are, and of the vectors without their mean and
`--components` leading components. Whether they are about one subject is for a reader to say: docs/pairs.md has the
result of one reading. The last line is a JSON object.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl

from benchmarks.arguments import parser
from sbp_assets.pairing.embed import vectors_of
from sbp_assets.pairing.quantizer import Centring
from sbp_assets.storage.paths import read_table

MAX_SHARED, SHINGLE = 0.2, 5


def shingles(text: str) -> set[tuple[str, ...]]:
    words = text.split()
    return {tuple(words[start : start + SHINGLE]) for start in range(len(words) - SHINGLE + 1)}


def nearest(vectors: np.ndarray, row: int, copy: Callable[[int], bool]) -> tuple[int, float]:
    """Return the row and the similarity of the nearest vector to that of `row` which is no `copy`."""
    similarity = vectors @ vectors[row]
    other = next(int(found) for found in np.argsort(-similarity) if found != row and not copy(int(found)))
    return other, float(similarity[other])


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("store", type=Path)
    arguments.add_argument("--pairs", type=int, default=30)
    arguments.add_argument("--components", type=int, default=16, help="of the centring")
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--characters", type=int, default=200, help="printed of a document")
    given = arguments.parse_args()
    embedded = pl.concat([read_table(file) for file in sorted((given.store / "pairing/embeddings").glob("*.parquet"))])
    files = sorted((given.store / "corpus/documents").glob("*.parquet"))
    texts = pl.concat([read_table(file, ["id", "url", "text"]) for file in files])
    rows = embedded.select("id").join(texts, on="id", how="left", maintain_order="left")
    vectors = vectors_of(embedded)
    centred = Centring.fit(vectors, given.components)(vectors)
    same = 0
    for row in np.random.default_rng(given.seed).permutation(len(rows))[: given.pairs].tolist():
        mine = shingles(rows["text"][row])

        def copy(other: int, mine: set[tuple[str, ...]] = mine) -> bool:
            theirs = shingles(rows["text"][other])
            return len(mine & theirs) > MAX_SHARED * max(1, min(len(mine), len(theirs)))

        plain, without = nearest(vectors, row, copy), nearest(centred, row, copy)
        same += plain[0] == without[0]
        print()
        for name, other, similarity in (("document", row, 1.0), ("as it is", *plain), ("centred", *without)):
            text = " ".join(rows["text"][other].split())[: given.characters]
            print(f"{name:<9}{similarity:5.2f} {rows['url'][other]}: {text}")
    print(json.dumps({"documents": len(rows), "pairs": given.pairs, "same_with_and_without_centring": same}))


if __name__ == "__main__":
    main()
