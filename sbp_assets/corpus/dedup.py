"""Find duplicate documents: MinHash-LSH proposes, the exact Jaccard similarity of word shingles decides.

MinHash bands (Broder, 1997; Leskovec et al., Mining of Massive Datasets, chapter 3) only name candidate pairs. A
document is dropped for one reason alone: a document that comes before it *and is itself kept* has the same text, a
Jaccard similarity of at least the threshold, or the same id; the first of these that holds is its kind. "Before" is the
order of (shard, position). So every dropped document points at a kept one, there are no chains, and the result depends
on nothing but the documents.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import duckdb
import numpy as np
import polars as pl
from rensa import RMinHash

from sbp_assets.corpus.errors import CorpusError
from sbp_assets.corpus.shingles import Words, batched, segment
from sbp_assets.corpus.similarity import Runs, compare
from sbp_assets.settings import Dedup
from sbp_assets.storage.columns import Column, table_schema
from sbp_assets.storage.database import batches, database, scalar
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
    store: Path | None = None,
) -> tuple[pl.DataFrame, dict[str, int]]:
    """Return the documents to drop (DUPLICATE_COLUMNS, in (shard, position) order) and counts.

    `documents` (id, text) and `signatures` are keyed by shard ('00000'), row for row in the same order. `store` is a
    file of similarities that an earlier call has left (`similarity.compare`): the result is the same with it, without
    it and with that of other documents, but pairs that are in it are not compared again. Its name has to say by which
    `shingle_words` and by which version of the shingles they were computed.

    `scratch` is an empty directory: signatures and shingles of candidates are staged there and DuckDB spills there.
    Memory holds at most `memory_limit` in DuckDB, one shard's signatures or texts, and the result. `jaccard` is 1 for
    kind 'exact' and null for kind 'id' (the same id of another text, which is not near). Raises CorpusError where a
    shard's signatures are not those of its documents or `store` cannot be read.
    """
    with database(scratch, memory_limit) as db:
        places = _stage(documents, signatures, scratch)
        total = max((place.stop for place in places.values()), default=0)
        db.execute(f"CREATE VIEW staged AS SELECT * FROM {duckdb_table(scratch, 'signatures-*.parquet')}")
        _candidates(db)
        candidates = scalar(db, "SELECT count(*) FROM pairs")
        compared = compare(db, documents, places, settings.shingle_words, scratch, store, progress)
        _decide(db, settings.threshold, total, scratch)
        dropped = _dropped(db, scratch)
        large = scalar(db, f"SELECT count(*) FROM buckets WHERE size > {BUCKET_REACH}")
    return dropped, {
        "documents": total,
        "candidate_pairs": candidates,
        "compared_pairs": compared,
        "kept": total - len(dropped),
        "large_buckets": large,
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


def _stage(
    documents: Mapping[str, pl.LazyFrame], signatures: Mapping[str, pl.LazyFrame], scratch: Path
) -> dict[str, range]:
    """Write signatures with each document's place `n` in (shard, position) order; return the places of each shard."""
    if documents.keys() != signatures.keys():
        raise CorpusError(f"documents of shards {sorted(documents)} but signatures of {sorted(signatures)}")
    places, start = {}, 0
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
        places[key] = range(start, start + len(frame))
        start += len(frame)
    return places


def _candidates(db: duckdb.DuckDBPyConnection) -> None:
    """Create table `pairs` (a < b: the first documents of two different texts) of the texts that share a bucket."""
    db.execute(
        "CREATE TABLE texts AS SELECT text_sha256, min(n) AS n, count(*) AS copies FROM staged GROUP BY text_sha256"
    )
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


def _decide(db: duckdb.DuckDBPyConnection, threshold: float, total: int, scratch: Path) -> None:
    """Write the files `dropped-*.parquet` (n, kept, jaccard, kind) of the documents to drop, `kept` the places.

    Of the documents with an equal id, an equal text or a similarity of `threshold`, in order, the first are kept.
    """
    schema = {"n": pl.Int64, "kept": pl.Int64, "jaccard": pl.Float64, "kind": pl.String}
    pl.DataFrame(schema=schema).write_parquet(scratch / "dropped-.parquet")
    db.execute(f"CREATE VIEW edges AS SELECT a, b, jaccard FROM similarities WHERE jaccard >= {threshold!r}")
    # What is near each text, the earliest first; a text is identified by the place of its first document.
    others, similarities = Runs(scratch / "others", np.int64), Runs(scratch / "similarities", np.float64)
    both = "SELECT a AS text, b AS other, jaccard FROM edges UNION ALL SELECT b, a, jaccard FROM edges"
    for batch in batches(db, f"SELECT other, jaccard FROM ({both}) ORDER BY text, other"):
        others.append(batch["other"].to_numpy())
        similarities.append(batch["jaccard"].to_numpy())
    others.flush()
    similarities.flush()
    involved = f"""
        WITH near AS (
            SELECT text, length, sum(length) OVER (ORDER BY text) - length AS start
            FROM (SELECT text, count(*) AS length FROM ({both}) GROUP BY text)
        ), same AS (SELECT id, min(n) AS n FROM staged GROUP BY id HAVING count(*) > 1)
        SELECT s.n, t.n AS text, same.n AS named, near.start::BIGINT, coalesce(near.length, 0)
        FROM staged s JOIN texts t USING (text_sha256) LEFT JOIN same USING (id) LEFT JOIN near ON near.text = t.n
        WHERE t.copies > 1 OR same.n IS NOT NULL OR near.length IS NOT NULL ORDER BY s.n
    """
    # By the place of a text's and of an id's first document: 1 + the place of the document that is kept, 0 while none
    # is. Of these files only what is used is in memory, and the system may take that back.
    of_text, of_id = (_zeros(scratch / name, total) for name in ("of_text", "of_id"))
    for number, batch in enumerate(batches(db, involved)):
        dropped: list[tuple[int, int, float | None, str]] = []
        for n, text, named, start, length in batch.iter_rows():
            near = np.empty(0, np.int64)
            if length and not of_text[text]:
                near = np.flatnonzero(of_text[others.read(start, length)])
            if of_text[text]:
                dropped.append((n, int(of_text[text]) - 1, 1.0, "exact"))
            elif len(near):  # Before the id: a later version of a page keeps its URL, and is no other text.
                other, similarity = (runs.read(start + int(near[0]), 1)[0] for runs in (others, similarities))
                dropped.append((n, int(of_text[other]) - 1, float(similarity), "near"))
            elif named is not None and of_id[named]:
                dropped.append((n, int(of_id[named]) - 1, None, "id"))
            else:
                of_text[text] = n + 1
                if named is not None:
                    of_id[named] = n + 1
        pl.DataFrame(dropped, schema=schema, orient="row").write_parquet(scratch / f"dropped-{number:08d}.parquet")
    others.close()
    similarities.close()


def _zeros(path: Path, length: int) -> np.ndarray:
    """Return `length` zeros (int64) that are mapped from a new file."""
    with path.open("wb") as file:
        # Written, not left out: on a full disk this raises OSError, a mapped hole kills the process.
        for start in range(0, length, 2**20):
            file.write(bytes(8 * min(2**20, length - start)))
    return np.asarray(np.memmap(path, np.int64, "r+", shape=(length,))) if length else np.zeros(0, np.int64)


def _dropped(db: duckdb.DuckDBPyConnection, scratch: Path) -> pl.DataFrame:
    rows = db.execute(
        f"""
        SELECT s.id, s.shard, k.id AS kept_id, k.shard AS kept_shard, jaccard, kind
        FROM {duckdb_table(scratch, "dropped-*.parquet")} d JOIN staged s ON s.n = d.n JOIN staged k ON k.n = d.kept
        ORDER BY s.n
        """
    )
    return pl.DataFrame(rows.to_arrow_table(), schema=DUPLICATE_SCHEMA)
