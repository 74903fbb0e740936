"""Find duplicate documents: MinHash-LSH proposes, the exact Jaccard similarity of word shingles decides.

MinHash bands (Broder, 1997; Leskovec et al., Mining of Massive Datasets, chapter 3) only name candidate pairs. A
document is dropped for one reason alone: a document that comes before it *and is itself kept* has the same text, a
Jaccard similarity of at least the threshold, or the same id; the first of these that holds is its kind. "Before" is the
order of (shard, position). So every dropped document points at a kept one, there are no chains, and the result depends
on nothing but the documents.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import duckdb
import numpy as np
import polars as pl
from rensa import RMinHash

from sbp_assets.corpus.errors import CorpusError
from sbp_assets.corpus.shingles import Words, batched, jaccard, segment, shingled
from sbp_assets.settings import Dedup
from sbp_assets.storage.columns import Column, table_schema
from sbp_assets.storage.paths import duckdb_table
from sbp_assets.storage.progress import Progress

_TEXT = "corpus/raw_documents.text"
SIGNATURE_COLUMNS = [
    Column("id", pl.String, "Document.", "corpus/raw_documents"),
    Column("bands", pl.List(pl.UInt64), "Hash of each LSH band of the document's MinHash values.", _TEXT),
    Column("text_sha256", pl.String, "Of the normalised text.", _TEXT),
]
SIGNATURE_SCHEMA = table_schema(SIGNATURE_COLUMNS)

_ID = "corpus/minhash_signatures.id"
_SIMILARITY = f"corpus/minhash_signatures.bands corpus/minhash_signatures.text_sha256 {_TEXT}"
_KINDS = "'exact': same normalised text; 'near': jaccard at the threshold or above; 'id': same id, another text."
DUPLICATE_COLUMNS = [
    Column("id", pl.String, "Document to drop.", _ID),
    Column("shard", pl.Int64, "Its shard."),
    Column("kept_id", pl.String, "The document kept in its place, itself never dropped.", _ID),
    Column("kept_shard", pl.Int64, "Shard of the kept document."),
    Column("jaccard", pl.Float64, "Exact similarity of the two; null for kind 'id'.", _TEXT),
    Column("kind", pl.String, _KINDS, _SIMILARITY),
]
DUPLICATE_SCHEMA = table_schema(DUPLICATE_COLUMNS)

# Templated text puts thousands of different documents into one LSH bucket; all pairs of a bucket would be quadratic.
# A text is therefore compared with the first BUCKET_REACH texts of its bucket and the BUCKET_REACH before it. Copies
# of one template's *same* filling share the first text, so true clusters of any size are still found; what can be
# missed is a pair deep inside a bucket of more than BUCKET_REACH texts that shares no smaller bucket.
BUCKET_REACH = 32

PAIRS_PER_BATCH = 2000  # Candidate pairs whose texts are in memory together.


def signatures(documents: pl.DataFrame, settings: Dedup, progress: Progress) -> pl.DataFrame:
    """Return the signatures (SIGNATURE_COLUMNS) of `documents` (id, text), in their order.

    A band is the 64-bit hash of its number and its permutations/bands MinHash values.
    """
    frames = [pl.DataFrame(schema=SIGNATURE_SCHEMA)]
    start = 0
    for texts in batched(documents["text"]):
        shingles, bounds = Words.of(segment(texts)).shingles(settings.shingle_words)
        matrix = RMinHash.digest_matrix_from_flat_token_hashes(
            shingles, bounds.tolist(), settings.permutations, settings.seed
        )
        bands = _band_hashes(np.array(matrix.to_rows(), dtype=np.uint64), settings.bands)
        frames.append(
            pl.DataFrame(
                {
                    "id": documents["id"].slice(start, len(texts)),
                    "bands": bands.tolist(),
                    "text_sha256": [hashlib.sha256(text.encode()).hexdigest() for text in texts],
                },
                schema=SIGNATURE_SCHEMA,
            )
        )
        start += len(texts)
        progress.advance(len(texts))
    return pl.concat(frames)


def find_duplicates(
    documents: Mapping[str, pl.LazyFrame],
    signatures: Mapping[str, pl.LazyFrame],
    settings: Dedup,
    scratch: Path,
    memory_limit: str,
    progress: Progress,
) -> tuple[pl.DataFrame, dict[str, int]]:
    """Return the documents to drop (DUPLICATE_COLUMNS, in (shard, position) order) and counts.

    `documents` (id, text) and `signatures` are keyed by shard ('00000'), row for row in the same order. `scratch` is an
    empty directory: signatures and candidate texts are staged there and DuckDB spills there; memory holds at most
    `memory_limit` in DuckDB, one shard's texts, and the identifiers of the documents that have a duplicate. `jaccard`
    is 1 for kind 'exact' and null for kind 'id' (the same id of another text, which is not near). Raises CorpusError
    where a shard's signatures are not those of its documents.
    """
    with duckdb.connect() as db:
        db.execute("SET memory_limit = ?", [memory_limit])
        db.execute("SET temp_directory = ?", [str(scratch / "spill")])
        db.execute("SET preserve_insertion_order = false")
        total = _stage(documents, signatures, scratch)
        db.execute(f"CREATE VIEW staged AS SELECT * FROM {duckdb_table(scratch, 'signatures-*.parquet')}")
        _candidates(db)
        candidates = _scalar(db, "SELECT count(*) FROM pairs")
        progress.total = candidates
        _stage_texts(db, documents, scratch)
        _verify(db, settings, progress)
        rows = list(_greedy(db))
        compared_in_large = _scalar(db, "SELECT count(*) FROM buckets WHERE size > ?", [BUCKET_REACH])
    return pl.DataFrame(rows, schema=DUPLICATE_SCHEMA, orient="row"), {
        "documents": total,
        "candidate_pairs": candidates,
        "kept": total - len(rows),
        "large_buckets": compared_in_large,
    }


def require_enough(counts: Mapping[str, int], source: str) -> None:
    """Raise CorpusError for a corpus of fewer than two different documents, which gives no pair."""
    if counts["kept"] < 2:
        raise CorpusError(
            f"the corpus ({source}) holds {counts['documents']} usable documents and {counts['kept']} after "
            "de-duplication; at least 2 different documents are needed (see corpus/rejected_rows for rows not used)"
        )


def _band_hashes(digests: np.ndarray, bands: int) -> np.ndarray:
    """Return (documents, bands) uint64 hashes of (documents, permutations) MinHash values."""
    digests = digests.reshape(len(digests), bands, -1)
    mixed = np.broadcast_to(np.arange(1, bands + 1, dtype=np.uint64), digests.shape[:2]).copy()
    for column in range(digests.shape[2]):
        # SplitMix64's finalizer (Steele et al., 2014); uint64 arithmetic wraps around on purpose.
        mixed = mixed * np.uint64(0x9E3779B97F4A7C15) + digests[:, :, column]
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed ^= mixed >> np.uint64(31)
    return mixed


def _stage(documents: Mapping[str, pl.LazyFrame], signatures: Mapping[str, pl.LazyFrame], scratch: Path) -> int:
    """Write signatures with each document's place `n` in (shard, position) order; return the number of documents."""
    if documents.keys() != signatures.keys():
        raise CorpusError(f"documents of shards {sorted(documents)} but signatures of {sorted(signatures)}")
    start = 0
    for key in sorted(documents):
        ids = documents[key].select("id").collect()["id"]
        frame = signatures[key].collect()
        if not ids.equals(frame["id"]):
            raise CorpusError(
                f"shard {key}: the signatures are not of these documents; re-materialise corpus/minhash_signatures"
            )
        frame.with_columns(
            shard=pl.lit(int(key), pl.Int64), n=pl.int_range(start, start + len(frame), dtype=pl.Int64)
        ).write_parquet(scratch / f"signatures-{key}.parquet")
        start += len(frame)
    return start


def _candidates(db: duckdb.DuckDBPyConnection) -> None:
    """Create table `pairs` (a < b: the first documents of two different texts) of the texts that share a bucket."""
    db.execute("CREATE TABLE texts AS SELECT text_sha256, min(n) AS n FROM staged GROUP BY text_sha256")
    db.execute(
        """
        CREATE TABLE buckets AS
        SELECT n, band, rank, size FROM (
            SELECT n, band, row_number() OVER (PARTITION BY band ORDER BY n) - 1 AS rank,
                   count(*) OVER (PARTITION BY band) AS size
            FROM (SELECT n, unnest(bands) AS band FROM staged SEMI JOIN texts USING (text_sha256, n))
        ) WHERE size > 1
        """
    )
    # Joins on (band, rank) are equalities, so a giant bucket costs 2 * BUCKET_REACH rows per member, not its square.
    db.execute(
        f"""
        CREATE TABLE pairs AS
        SELECT DISTINCT a.n AS a, b.n AS b FROM (
            SELECT n, band, unnest(range(greatest(rank - {BUCKET_REACH}, 0), rank)) AS other FROM buckets
            UNION ALL
            SELECT n, band, unnest(range(0, least(rank - {BUCKET_REACH}, {BUCKET_REACH}))) AS other FROM buckets
            WHERE rank > {BUCKET_REACH}
        ) b JOIN buckets a ON a.band = b.band AND a.rank = b.other
        """
    )


def _stage_texts(db: duckdb.DuckDBPyConnection, documents: Mapping[str, pl.LazyFrame], scratch: Path) -> None:
    """Create view `candidate_texts` (n, text) of the documents in `pairs`."""
    wanted = db.execute("SELECT DISTINCT unnest([a, b]) AS n FROM pairs ORDER BY n").fetchnumpy()["n"]
    start, written = 0, False
    for key in sorted(documents):
        length = documents[key].select(pl.len()).collect().item()
        local = wanted[np.searchsorted(wanted, start) : np.searchsorted(wanted, start + length)] - start
        if len(local):
            texts = documents[key].select("text").collect()["text"].gather(local)
            pl.DataFrame({"n": local + start, "text": texts}, schema={"n": pl.Int64, "text": pl.String}).write_parquet(
                scratch / f"texts-{key}.parquet", row_group_size=4096
            )
            written = True
        start += length
    if written:
        db.execute(f"CREATE VIEW candidate_texts AS SELECT * FROM {duckdb_table(scratch, 'texts-*.parquet')}")
    else:
        db.execute("CREATE TABLE candidate_texts (n BIGINT, text VARCHAR)")


def _verify(db: duckdb.DuckDBPyConnection, settings: Dedup, progress: Progress) -> None:
    """Create table `edges` (a, b, jaccard) of the pairs whose exact similarity reaches the threshold."""
    db.execute("CREATE TABLE edges (a BIGINT, b BIGINT, jaccard DOUBLE)")
    db.execute("CREATE TABLE ordered AS SELECT a, b, row_number() OVER (ORDER BY b, a) - 1 AS place FROM pairs")
    for first in range(0, _scalar(db, "SELECT count(*) FROM ordered"), PAIRS_PER_BATCH):
        batch = db.execute(
            "SELECT a, b FROM ordered WHERE place >= ? AND place < ? ORDER BY place", [first, first + PAIRS_PER_BATCH]
        ).fetchall()
        wanted = pl.DataFrame({"n": sorted({n for pair in batch for n in pair})}, schema={"n": pl.Int64})
        db.register("wanted", wanted.to_arrow())
        low, high = wanted["n"][0], wanted["n"][-1]
        rows = db.execute(
            "SELECT n, text FROM candidate_texts SEMI JOIN wanted USING (n) WHERE n BETWEEN ? AND ?", [low, high]
        ).fetchall()
        texts = shingled((text for _, text in rows), settings.shingle_words)
        sets = {n: text.shingles for (n, _), text in zip(rows, texts, strict=True)}
        near = [(a, b, similarity) for a, b in batch if (similarity := jaccard(sets[a], sets[b])) >= settings.threshold]
        if near:
            found = pl.DataFrame(
                near, schema={"a": pl.Int64, "b": pl.Int64, "jaccard": pl.Float64}, orient="row"
            ).to_arrow()
            db.register("found", found)
            db.execute("INSERT INTO edges SELECT * FROM found")
        progress.advance(len(batch))


def _greedy(db: duckdb.DuckDBPyConnection) -> Iterator[tuple[str, int, str, int, float | None, str]]:
    """Yield rows to drop: of the documents with an equal id, an equal text or an edge, in order, the first are kept."""
    neighbours: dict[int, list[tuple[int, float]]] = {}
    for a, b, similarity in db.execute("SELECT a, b, jaccard FROM edges ORDER BY a, b").fetchall():
        neighbours.setdefault(a, []).append((b, similarity))
        neighbours.setdefault(b, []).append((a, similarity))
    involved = db.execute(
        """
        WITH same_id AS (SELECT id FROM staged GROUP BY id HAVING count(*) > 1),
             same_text AS (SELECT text_sha256 FROM staged GROUP BY text_sha256 HAVING count(*) > 1),
             near AS (SELECT DISTINCT unnest([a, b]) AS text FROM edges)
        SELECT s.id, s.shard, t.n AS text FROM staged s JOIN texts t USING (text_sha256)
        WHERE s.id IN (FROM same_id) OR s.text_sha256 IN (FROM same_text) OR t.n IN (FROM near)
        ORDER BY s.n
        """
    )
    kept_ids: dict[str, tuple[str, int]] = {}
    kept_texts: dict[int, tuple[str, int]] = {}  # A text is identified by the place of its first document.
    while rows := involved.fetchmany(10_000):
        for name, shard, text in rows:
            near = [(n, similarity) for n, similarity in neighbours.get(text, ()) if n in kept_texts]
            if text in kept_texts:
                yield (name, shard, *kept_texts[text], 1.0, "exact")
            elif near:  # Before the id: a later version of a page keeps its URL, and is no other text.
                kept, similarity = min(near)
                yield (name, shard, *kept_texts[kept], similarity, "near")
            elif name in kept_ids:
                yield (name, shard, *kept_ids[name], None, "id")
            else:
                kept_ids[name] = kept_texts[text] = (name, shard)


def _scalar(db: duckdb.DuckDBPyConnection, query: str, parameters: list[int] | None = None) -> int:
    row = db.execute(query, parameters or []).fetchone()
    assert row is not None
    return int(row[0])
