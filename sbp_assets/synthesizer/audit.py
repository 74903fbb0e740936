"""What must hold of the tuning examples.

They are read some at a time, and ids are compared by DuckDB, within a memory limit and whatever their number.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path

import duckdb
import numpy as np
import polars as pl

from sbp_assets.corpus.split import UNIQUE
from sbp_assets.storage.database import create_view, database, scalar
from sbp_assets.storage.paths import duckdb_table
from sbp_assets.storage.token_arrays import TokenArrays
from sbp_assets.synthesizer.examples import BATCH, format_example, locations, split_of_seeds

SHOWN = 10


def check_examples(
    directory: Path,
    tokens: Mapping[str, Path],
    pairs: int,
    context_length: int,
    related_id: int,
    eos_id: int,
    scratch: Path,
    memory_limit: str,
) -> dict[str, list[str]]:
    """Return the ids (up to ten each) of examples in `directory` that break a rule, by rule; empty where all hold.

    The rules: as many examples as `pairs`, no example twice, within the context, prompt_tokens points just behind
    `<related>` with d2 to follow, `<eos>` at the end exactly where d2 was not cut, d1 and d2 in D, whose token arrays
    are `tokens` by shard. Memory holds BATCH examples and, in DuckDB, `memory_limit`, which spills into the folder
    `scratch`; so in `check_contents`.
    """
    found: dict[str, list[str]] = {"prompt_tokens": [], "longer than the context": [], "eos": []}
    count = 0
    for some in TokenArrays.batches(directory, BATCH, ["id", "prompt_tokens", "cut"]):
        documents, lengths, starts = some.documents, some.lengths, some.offsets[:-1]
        prompt = documents["prompt_tokens"].to_numpy()
        inside = (prompt >= 2) & (prompt < lengths)
        last_of_prompt = some.tokens[np.where(inside, starts + prompt - 1, starts)]
        ends = np.asarray(some.tokens[some.offsets[1:] - 1]) == eos_id
        broken = {
            "prompt_tokens": ~inside | (last_of_prompt != related_id),
            "longer than the context": lengths > context_length,
            "eos": ends == documents["cut"].to_numpy(),
        }
        for rule, mask in broken.items():
            found[rule] = (found[rule] + documents["id"].filter(pl.Series(mask)).head(SHOWN).to_list())[:SHOWN]
        count += len(documents)
    with database(scratch, memory_limit) as db:
        _open_examples(db, directory)
        create_view(db, "documents", {shard: path / "documents.parquet" for shard, path in tokens.items()})
        unique = f"SELECT id FROM documents WHERE split = '{UNIQUE}'"
        sides = "SELECT id, d1 AS one FROM examples UNION ALL SELECT id, d2 FROM examples"
        found["not in D"] = _first(
            db, f"SELECT DISTINCT id FROM ({sides}) ANTI JOIN ({unique}) known ON one = known.id"
        )
        found["repeated"] = _first(db, "SELECT id FROM examples GROUP BY id HAVING count(*) > 1")
    if count != pairs:
        found["count"] = [f"{count} examples for {pairs} pairs"]
    return {rule: ids for rule, ids in found.items() if ids}


def check_contents(
    directory: Path,
    pairs: Mapping[str, Path],
    tokens: Mapping[str, Path],
    related_id: int,
    max_document_tokens: int,
    shuffled: bool,
    scratch: Path,
    memory_limit: str,
    sample: int = 100,
) -> dict[str, list[str]]:
    """Return the ids (up to ten each) of examples in `directory` that are not of the pairs or documents, by rule.

    It is empty where all are. The rules: d1 and d2 are those of the tables `pairs` by shard (`shuffled`: each as often,
    with other partners), the id is "d1->d2", the split is that of d1's hash; of an evenly spaced `sample`, the tokens
    are those of d1 and d2.
    """
    with database(scratch, memory_limit) as db:
        _open_examples(db, directory)
        create_view(db, "pairs", pairs)
        split = split_of_seeds(db, "examples")
        found = {
            "not the pairs": _unlike_pairs(db, shuffled),
            "id": _first(db, "SELECT id FROM examples WHERE id IS DISTINCT FROM d1 || '->' || d2"),
            "split": _first(db, f"SELECT id FROM examples WHERE split IS DISTINCT FROM {split}"),
        }
        count = scalar(db, "SELECT count(*) FROM examples")
    found["other tokens"] = _other_tokens(directory, count, tokens, related_id, max_document_tokens, sample)[:SHOWN]
    return {rule: names for rule, names in found.items() if names}


def _open_examples(db: duckdb.DuckDBPyConnection, directory: Path) -> None:
    """Create the view `examples`."""
    db.execute(f"CREATE VIEW examples AS FROM {duckdb_table(directory, 'documents.parquet')}")


def _first(db: duckdb.DuckDBPyConnection, query: str) -> list[str]:
    """Return the SHOWN least ids of those that `query` gives."""
    return [name for (name,) in db.execute(f"SELECT id FROM ({query}) ORDER BY id LIMIT {SHOWN}").fetchall()]


def _unlike_pairs(db: duckdb.DuckDBPyConnection, shuffled: bool) -> list[str]:
    """Return examples that are of no pair, and pairs that have no example."""
    if not shuffled:
        # One join at a time: the limit is then for one hash table.
        sides = (("examples", "pairs"), ("pairs", "examples"))
        found = [_first(db, f"SELECT d1 || '->' || d2 AS id FROM {a} ANTI JOIN {b} USING (d1, d2)") for a, b in sides]
        return sorted(itertools.chain(*found))[:SHOWN]
    times = "SELECT {0} AS id, count(*) AS times FROM {1} GROUP BY {0}"
    for side in ("d1", "d2"):
        one, other = times.format(side, "examples"), times.format(side, "pairs")
        both = f"({one}) one FULL JOIN ({other}) other ON one.id = other.id AND one.times = other.times"
        if scalar(db, f"SELECT count(*) FROM {both} WHERE one.id IS NULL OR other.id IS NULL"):
            return ["(documents)"]
    return []


def _other_tokens(
    directory: Path, count: int, tokens: Mapping[str, Path], related_id: int, max_document_tokens: int, sample: int
) -> list[str]:
    """Return those of an evenly spaced `sample` of the `count` examples whose tokens are not those of d1 and d2."""
    places = np.unique(np.linspace(0, count - 1, min(sample, count)).astype(int))
    chosen, first = [], 0
    for some in TokenArrays.batches(directory, BATCH, ["id", "d1", "d2"]):
        for place in places[(places >= first) & (places < first + len(some.documents))] - first:
            held = some.tokens[some.offsets[place] : some.offsets[place + 1]].tolist()
            chosen.append((*some.documents.row(place), held))
        first += len(some.documents)
    ids = pl.Series(sorted({name for _, d1, d2, _ in chosen for name in (d1, d2)}), dtype=pl.String).implode()
    found: dict[str, np.ndarray] = {}
    for _, path in sorted(tokens.items()):
        located = locations(path).filter(pl.col("id").is_in(ids))
        source = np.load(path / "tokens.npy", mmap_mode="r", allow_pickle=False)
        # Copied: of every shard's file that stays mapped a process needs a descriptor.
        found |= {name: source[start:stop].copy() for name, start, stop in located.iter_rows()}
    return [
        name
        for name, d1, d2, held in chosen
        if d1 not in found
        or d2 not in found
        or format_example(found[d1], found[d2], related_id, max_document_tokens)[0] != held
    ]
