"""A small real corpus: sentences about a few subjects, some of them near-copies, in shards of unequal size."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest

from sbp_assets.pairing.embed import Embedder, embed, embeddings_frame
from sbp_assets.storage.progress import Progress

_SUBJECTS = {
    "bread": ["Sourdough {} in a hot oven until the crust is dark.", "A {} loaf needs flour, water, salt and time."],
    "rivers": ["The river {} through the valley to the northern sea.", "Floods {} the low meadows beside the river."],
    "chess": ["The bishop {} the long diagonal against the king.", "An endgame with rooks {} patience and counting."],
    "stars": ["The telescope {} a faint star near the galaxy.", "Astronomers {} the distance to a red giant star."],
}
_WORDS = ["bakes", "slow", "rests", "bends", "covers", "cuts", "holds", "asks for", "shows", "measured", "reached"]


def make_documents() -> pl.DataFrame:
    """Documents of three shards, with splits; shard '00002' has none in D."""
    rows = []
    for subject, sentences in _SUBJECTS.items():
        for n, word in enumerate(_WORDS):
            text = " ".join(sentence.format(word) for sentence in sentences)
            split = "heldout" if n == len(_WORDS) - 1 else "unique"
            rows.append({"id": f"{subject}-{n:02d}", "text": text, "split": split, "shard": f"{n % 2:05d}"})
    rows.append({"id": "oracle-0", "text": "Only the oracle reads this.", "split": "oracle", "shard": "00002"})
    return pl.DataFrame(rows)


@pytest.fixture(scope="session")
def documents() -> dict[str, pl.DataFrame]:
    parts = make_documents().partition_by("shard", as_dict=True)
    return {str(key): part.drop("shard") for (key,), part in parts.items()}


@pytest.fixture(scope="session")
def embedder() -> Embedder:
    return Embedder()


@pytest.fixture(scope="session")
def embeddings(documents: dict[str, pl.DataFrame], embedder: Embedder) -> dict[str, pl.DataFrame]:
    engine = embedder.load("all-MiniLM-L6-v2", "bfloat16", "cpu")
    tables = {}
    for shard, rows in documents.items():
        chosen = rows.filter(pl.col("split") == "unique").sort("id")
        with Progress("embed", "documents") as progress:
            vectors = embed(engine, chosen["text"].to_list(), 256, 16, progress)
        tables[shard] = embeddings_frame(chosen["id"], vectors)
    return tables


@pytest.fixture
def store(tmp_path: Path) -> Path:
    return tmp_path
