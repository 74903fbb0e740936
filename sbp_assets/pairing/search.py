"""The neighbour search by blocks of keys, in bounded memory (paper section 2.1).

Sides are asymmetric: a query keeps its float vector, a key is 8-bit codes. A task holds one block of keys and streams
the queries of all corpus shards past it (`BlockSearch`); what it finds of a query shard is one small table. A shard's
candidates are then merged of as many tables as there are blocks (`merge`). So the indexes are read once and the queries
once per block, however many shards there are.

Nearest by codes are `CODED_PER_NEIGHBOR` times the wanted neighbours, of which the nearest in full precision stay. Both
similarities are computed pair by pair, and ties go to the smaller id: results are the same, bit for bit, whatever the
number of shards and of blocks.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from sbp_assets.fan_out import LazyMapping, PublishedFiles
from sbp_assets.pairing.embed import vectors_of
from sbp_assets.pairing.index import VECTORS_FILE, KeyBlock, ShardIndex
from sbp_assets.pairing.quantizer import Quantizer
from sbp_assets.settings import Pairing
from sbp_assets.storage.columns import Column, table_schema
from sbp_assets.storage.paths import read_table, scan_table
from sbp_assets.storage.progress import Progress

_CODES = "pairing/ann_index.code pairing/ann_index.vector"
PARTIAL_COLUMNS = [
    Column("query_id", pl.String, "Document of a shard; a table per shard.", "pairing/ann_index.id"),
    Column(
        "neighbor_id", pl.String, "One of its nearest documents in the block, never itself.", "pairing/ann_index.id"
    ),
    Column("neighbor_shard", pl.String, "Shard of that document."),
    Column("code_similarity", pl.Float32, "Inner product of the query and the neighbour's code.", _CODES),
    Column("similarity", pl.Float32, "Cosine, -1 to 1, in full precision.", _CODES),
]
PARTIAL_SCHEMA = table_schema(PARTIAL_COLUMNS)

_PARTIAL = "pairing/partial_candidates"
CANDIDATE_COLUMNS = [
    Column("query_id", pl.String, "Document of this shard.", _PARTIAL),
    Column("neighbor_id", pl.String, "One of its nearest documents in the whole of D, never itself.", _PARTIAL),
    Column("neighbor_shard", pl.String, "Shard of that document.", _PARTIAL),
    Column("similarity", pl.Float32, "Cosine, -1 to 1.", _PARTIAL),
    Column("rank", pl.Int64, "1 is the nearest.", f"{_PARTIAL}.similarity"),
]
CANDIDATE_SCHEMA = table_schema(CANDIDATE_COLUMNS)

# Nearest neighbours by codes for each wanted one; `benchmarks.pairing` prints the recall.
CODED_PER_NEIGHBOR = 2

# Queries per call: bounds the hits held beside what is found to block x 2 (k + 1) rows.
_BLOCK = 2048

# Pairs that are compared in full precision at a time: their vectors are copied.
_PAIRS = 4096

COVERAGE_FILE = "coverage.json"


@dataclass(frozen=True)
class Coverage:
    """What the tables of a block were made of: `search` is a digest of how, `queries` and `keys` versions by shard."""

    search: str
    queries: dict[str, str]
    keys: dict[str, str]

    @classmethod
    def of(cls, directory: Path | None) -> Coverage:
        """Read that of a finished artifact; it is empty where there is none."""
        file = directory / COVERAGE_FILE if directory else None
        return cls.read(file) if file and file.exists() else cls("", {}, {})

    @classmethod
    def read(cls, file: Path) -> Coverage:
        """Read what `write` wrote."""
        return cls(**json.loads(file.read_text(encoding="utf-8")))

    def extends(self, old: Coverage, query_shard: str) -> bool:
        """Return whether the table of a query shard is that of `old` and what is found in the keys that are new."""
        return (
            old.search == self.search
            and old.queries.get(query_shard) == self.queries[query_shard]
            and old.keys.items() <= self.keys.items()
        )

    def write(self, file: Path) -> None:
        """Write it to `file`: COVERAGE_FILE of an artifact."""
        file.write_text(json.dumps(vars(self), sort_keys=True), encoding="utf-8")

    @property
    def digest(self) -> str:
        """Return what tells the tables that are made of this from all others."""
        return hashlib.sha256(json.dumps(vars(self), sort_keys=True).encode()).hexdigest()


def search_fingerprint(code: str, quantizer_version: str, settings: Pairing) -> str:
    """Return the digest of how blocks are searched, for `Coverage`: by which code, and quantisers of which content."""
    coded = CODED_PER_NEIGHBOR * settings.neighbors
    return f"{code} {quantizer_version} {coded} {settings.key_blocks}"


@dataclass(frozen=True)
class BlockSearch:
    """A search of one block of keys, which may take `memory` bytes; None: any number."""

    block: int
    settings: Pairing
    memory: float | None = None

    def run(
        self,
        quantizer: Quantizer,
        indexes: Mapping[str, Path],
        made_of: Coverage,
        earlier: Path | None,
        tables: PublishedFiles,
        scratch: Path,
        progress: Progress,
    ) -> Counter[str]:
        """Publish a table (PARTIAL_COLUMNS) per query shard among `tables`, under the shard's name (`table_name`).

        indexes: of all shards, and `made_of` says of which versions; each is asked for when it is read. `earlier` is
        the artifact of an earlier time: what it covers is not searched again, so that a new corpus shard costs its
        queries against all keys and all queries against its keys. `tables` are this block's alone, staged for an
        artifact that is `made_of` this: what a stopped or lost search has published there is taken. `scratch` is empty,
        a directory. Advances `progress` by queries. Returns how many shards were resumed, unchanged, extended (searched
        in new keys alone), and searched, and how many keys and queries were read for that.
        """
        old = Coverage.of(earlier)
        if old == made_of:
            # What is re-materialised from the same keys is searched again, whatever was wrong with it.
            earlier, old = None, Coverage.of(None)
            for shard in made_of.queries:
                tables.discard(table_name(shard))
        counts = Counter(dict.fromkeys(("resumed", "unchanged", "extended", "searched", "keys", "queries"), 0))
        missing: dict[tuple[str, ...], list[str]] = defaultdict(list)
        for shard in sorted(made_of.queries):
            if tables.exists(table_name(shard)):
                counts["resumed"] += 1
                continue
            known = old.keys if made_of.extends(old, shard) else {}
            new = tuple(sorted(made_of.keys.keys() - known.keys()))
            counts["searched" if not known else "extended" if new else "unchanged"] += 1
            missing[new].append(shard)
        left, done = sum(map(len, missing.values())), 0
        for new, shards in missing.items():
            keys, queries = LazyMapping(new, indexes.__getitem__), LazyMapping(shards, indexes.__getitem__)
            try:
                for shard, found in self._searched(quantizer, keys, queries, scratch, counts, progress):
                    parts = [found]
                    if earlier and len(new) < len(made_of.keys):
                        parts.append(read_table(earlier / table_name(shard)))
                    with tables.publish(table_name(shard)) as temporary:
                        _nearest_by_code(pl.concat(parts), self._coded).write_parquet(temporary, compression="zstd")
                    done += 1
                    progress.total = progress.done * left // done
            finally:
                (scratch / VECTORS_FILE).unlink(missing_ok=True)
        return counts

    @property
    def _coded(self) -> int:
        return CODED_PER_NEIGHBOR * self.settings.neighbors

    def _searched(
        self,
        quantizer: Quantizer,
        indexes: Mapping[str, Path],
        queries: Mapping[str, Path],
        scratch: Path,
        counts: Counter[str],
        progress: Progress,
    ) -> Iterator[tuple[str, pl.DataFrame]]:
        """Yield what the `queries` of each shard find in the keys of the block in `indexes`; count both."""
        pieces = quantizer.pieces(self.settings.key_blocks)
        keys = KeyBlock.load(indexes, quantizer, pieces, self.block, self._coded, scratch, self.memory)
        counts["keys"] += len(keys.ids)
        for shard, directory in queries.items():
            rows = ShardIndex.open(directory)
            counts["queries"] += len(rows.keys)
            found = [pl.DataFrame(schema=PARTIAL_SCHEMA)]
            for start in range(0, len(rows.keys), _BLOCK):
                some = slice(start, start + _BLOCK)
                ids = rows.keys["id"][some]
                found.append(nearest(keys, ids, rows.vectors[some], rows.probes[some], self._coded))
                progress.advance(len(ids))
            yield shard, pl.concat(found)


def table_name(query_shard: str) -> str:
    """Return the name of the table of a query shard, in an artifact and among what is staged for one."""
    return f"{query_shard}.parquet"


def assemble(tables: PublishedFiles, directory: Path) -> None:
    """Put the `tables` of a block, and the COVERAGE_FILE among them, into the empty `directory`: the artifact."""
    try:
        coverage = Coverage.read(tables.fetch(COVERAGE_FILE))
        names = [COVERAGE_FILE, *map(table_name, coverage.queries)]
        found = {name: tables.fetch(name) for name in names}
    except FileNotFoundError as error:
        raise RuntimeError(f"another run has materialised this meanwhile ({error}): run it again") from error
    for name, published in found.items():
        try:
            os.link(published, directory / name)
        except OSError:  # on another file system
            shutil.copyfile(published, directory / name)


def merge(partials: Sequence[pl.LazyFrame], ids: pl.Series, k: int) -> pl.DataFrame:
    """Return the candidates (CANDIDATE_COLUMNS) of a query shard: the k nearest of what each block has found.

    ids: the shard's documents, in whose order the rows are. Of all blocks together the nearest by code are taken, as if
    one block had held all keys, and of these the nearest in full precision; ties go to the smaller neighbor_id.
    """
    coded = _nearest_by_code(pl.concat(partials).collect(), CODED_PER_NEIGHBOR * k)
    place = pl.DataFrame({"query_id": ids}, schema={"query_id": pl.String}).with_row_index("place")
    rows = coded.join(place, on="query_id", how="left")
    if rows["place"].null_count():
        unknown = rows.filter(pl.col("place").is_null())["query_id"].unique().sort().head(5)
        raise ValueError(
            f"partial candidates of documents that are not of the shard ({', '.join(unknown)}); re-materialise "
            "pairing/partial_candidates"
        )
    rows = rows.sort(["place", "similarity", "neighbor_id"], descending=[False, True, False])
    rows = rows.group_by("place", maintain_order=True).head(k)
    return rows.with_columns(rank=pl.int_range(1, pl.len() + 1).over("place").cast(pl.Int64)).select(
        list(CANDIDATE_SCHEMA)
    )


def partial_tables(blocks: Mapping[str, Path], shard: str) -> list[pl.LazyFrame]:
    """Return what each of the `blocks`, directories of partial candidates, has found of the documents of `shard`."""
    return [scan_table(blocks[block] / table_name(shard)) for block in sorted(blocks)]


def exact_neighbors(
    query_ids: list[str], queries: np.ndarray, embeddings: Mapping[str, pl.LazyFrame], k: int, quantizer: Quantizer
) -> dict[str, pl.DataFrame]:
    """Return the ground truth of a few queries: by id the exact k nearest (neighbor_id, similarity) of float vectors.

    queries: (n, dim) prepared by the `quantizer`, which prepares the keys, too. Reads one shard's vectors at a time.
    """
    empty = pl.DataFrame(schema={"neighbor_id": pl.String, "similarity": pl.Float32})
    best = dict.fromkeys(query_ids, empty)
    for frame in embeddings.values():
        shard = frame.collect()
        scores = queries @ quantizer.prepared(vectors_of(shard)).T
        for row, query in enumerate(query_ids):
            found = pl.DataFrame({"neighbor_id": shard["id"], "similarity": pl.Series(scores[row], dtype=pl.Float32)})
            rows = pl.concat([best[query], found.filter(pl.col("neighbor_id") != query)])
            best[query] = rows.sort(["similarity", "neighbor_id"], descending=[True, False]).head(k)
    return best


def recall(candidates: pl.DataFrame, exact: Mapping[str, pl.DataFrame], k: int, tolerance: float = 0.0) -> float:
    """Return the mean recall@k of the queries of `exact`, which may cover some key shards; 1 without neighbours.

    An exact neighbour counts as relevant when it is nearer than the last of the query's k candidates, by more than
    `tolerance` where it is missing: with every key shard in `exact` these are the true k nearest.
    """
    shares = []
    for query, near in exact.items():
        mine = candidates.filter(pl.col("query_id") == query)
        farthest = mine["similarity"].min() if len(mine) >= k else -2.0
        found = pl.col("neighbor_id").is_in(mine["neighbor_id"].implode())
        relevant = near.filter(found | (pl.col("similarity") - tolerance > farthest))
        if len(relevant):
            shares.append(relevant.filter(found).height / len(relevant))
    return float(np.mean(shares)) if shares else 1.0


def _nearest_by_code(rows: pl.DataFrame, k: int) -> pl.DataFrame:
    ranked = rows.sort(["query_id", "code_similarity", "neighbor_id"], descending=[False, True, False])
    return ranked.group_by("query_id", maintain_order=True).head(k)


def nearest(keys: KeyBlock, ids: pl.Series, queries: np.ndarray, probes: np.ndarray, k: int) -> pl.DataFrame:
    """Return the k keys (PARTIAL_COLUMNS) nearest by code to each of the documents `ids`, of those in its cells.

    queries: (n, dim) prepared; probes: (n, cells), those that are searched for each.
    """
    total = int(keys.index.ntotal)
    # One more for the query itself. A tie across the cut would leave the choice to FAISS's heap: then look further, for
    # that query alone, as in a block of many some query has a tie at any cut.
    left, fetch = np.arange(len(queries)), min(k + 1, total)
    found = [(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros(0, np.float32))]
    while fetch and len(left):
        similarity, row = keys.search(queries[left], probes[left], min(fetch + 1, total))
        if fetch < total:
            tied = (row[:, fetch] >= 0) & (similarity[:, fetch - 1] == similarity[:, fetch])
        else:
            tied = np.zeros(len(left), dtype=bool)
        query, rank = np.nonzero((row >= 0) & ~tied[:, None])
        found.append((left[query], row[query, rank], similarity[query, rank]))
        left, fetch = left[tied], min(2 * fetch, total)
    query, row, coded = (np.concatenate(parts) for parts in zip(*found, strict=True))
    rows = pl.DataFrame(
        {
            "query": query.astype(np.uint32),
            "row": row,
            "query_id": ids.gather(query),
            "neighbor_id": keys.ids.gather(row),
            "code_similarity": coded.astype(np.float32),
        },
        schema_overrides={"neighbor_id": pl.String, "query_id": pl.String},
    )
    rows = _nearest_by_code(rows.filter(pl.col("query_id") != pl.col("neighbor_id")), k)
    query, row = rows["query"].to_numpy(), rows["row"].to_numpy()
    # Not a matrix product, whose bits depend on the pairs that are beside. Into the same two arrays each time: the
    # memory of new ones was given back to the system and faulted in again, 40% of a search on a Ray node.
    similarity = np.zeros(len(rows), np.float32)
    queried, found_keys = np.empty((2, min(_PAIRS, len(rows)), queries.shape[1]), np.float32)
    for start in range(0, len(rows), _PAIRS):
        some = slice(start, start + _PAIRS)
        ours, theirs = queried[: len(query[some])], found_keys[: len(query[some])]
        # In this mode numpy writes into `out` itself; places are FAISS's own numbers, never out of bounds.
        np.take(queries, query[some], axis=0, out=ours, mode="clip")
        np.take(keys.vectors, row[some], axis=0, out=theirs, mode="clip")
        similarity[some] = np.multiply(ours, theirs, out=ours).sum(axis=1)
    shards = pl.Series(keys.shard_names, dtype=pl.String).gather(keys.shards[row])
    return rows.with_columns(
        neighbor_shard=shards, similarity=pl.Series(np.clip(similarity, -1, 1).astype(np.float32))
    ).select(list(PARTIAL_SCHEMA))
