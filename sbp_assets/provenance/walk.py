"""Where a document, a synthetic document, a pair or a score comes from, and what it went into: behind `sbp trace`.

A trace is a JSON-ready dict whose `kind` names what it is about: traces of documents, synthetic documents and pairs are
built here, those of assets and scores in `provenance.scores`.
"""

from __future__ import annotations

from collections.abc import Iterator
from difflib import get_close_matches
from typing import Any

from sbp_assets.corpus.split import HELDOUT, ORACLE, UNIQUE
from sbp_assets.corpus.tokenizer import decode, load_tokenizer
from sbp_assets.provenance.lookup import (
    BUDGET,
    CANDIDATES,
    DOCUMENTS,
    DUPLICATES,
    EARLIER_PAIRS,
    EXAMPLES,
    MANIFEST,
    PAIRS,
    RAW,
    SYNTHETIC_DOCUMENTS,
    SYNTHETIC_TOKENS,
    TOKENIZER,
    TOKENS,
    Lookup,
    RecordsOf,
    Trace,
    UnknownIdError,
)
from sbp_assets.provenance.scores import artifact_traces
from sbp_assets.provenance.store import Store
from sbp_assets.provenance.training_reads import TrainingReads
from sbp_assets.settings import Settings
from sbp_assets.storage.paths import read_table
from sbp_assets.storage.token_arrays import TokenArrays
from sbp_assets.synthesizer.earlier_round import PAIRS as EARLIER_TABLE
from sbp_assets.synthesizer.earlier_round import PREFIX

EXCERPT_CHARS = 400
SUGGESTIONS = 3
PAIR = "->"


def trace(identifier: str, settings: Settings, store: Store, records: RecordsOf) -> list[Trace]:
    """Return the traces of everything that has this id: nearly always one.

    An id is a document's, a synthetic document's, a pair's ('d1->d2', of an earlier round, too), a score's
    ('task/metric/arm/seed') or an asset's ('sbp_scores', 'pretraining/sbp_model/0'). Raises UnknownIdError when nothing
    has it.
    """
    walk = _Walk(Lookup(settings, store, records))
    found: list[Trace] = [*walk.documents(identifier), *walk.synthetic_documents(identifier)]
    if PAIR in identifier:
        found += [*walk.pairs(identifier), *walk.earlier_pairs(identifier)]
    found += artifact_traces(walk.lookup, identifier)
    if not found:
        raise UnknownIdError(walk.unknown(identifier))
    return found


class _Walk:
    def __init__(self, lookup: Lookup) -> None:
        self.lookup, self.store, self.experiment = lookup, lookup.store, lookup.settings.experiment
        self.reads = TrainingReads(self.experiment, self.store)

    # What has an id.

    def documents(self, name: str) -> Iterator[Trace]:
        """Yield source documents by their id; shards may share an id, of which de-duplication keeps one document."""
        for row in self._raw(name):
            shard = row["partition"]
            kept = self.lookup.rows(DOCUMENTS, "select split from rows where id = ?", [name], shard)
            split = kept[0]["split"] if kept else None
            dropped = self.lookup.rows(
                DUPLICATES, "select kept_id, kept_shard, jaccard, kind from rows where id = ? and shard = ?",
                [name, int(shard)],
            )  # fmt: skip
            yield {
                "kind": "document",
                "id": name,
                "shard": shard,
                "split": split,
                "text": row["text"],
                "characters": row["characters"],
                "source": self._source(row),
                "duplicate_of": dropped[0] if dropped else None,
                "duplicates": self.lookup.rows(
                    DUPLICATES,
                    "select id, shard, jaccard, kind from rows where kept_id = ? and kept_shard = ? order by shard, id",
                    [name, int(shard)],
                ),
                "pairs_as_seed": self._pairs("d1", name, shard),
                "pairs_as_related": self._pairs("d2", name),
                "synthetic_documents": self.lookup.rows(
                    SYNTHETIC_DOCUMENTS,
                    "select id, rollout, n_tokens, finish_reason from rows where seed_id = ? order by rollout",
                    [name],
                    shard,
                ),
                "scored_for_perplexity": self._scored(name) if split == HELDOUT else None,
                "readers": (
                    readers := self.reads.readers(TOKENS, split, shard, name) if split in (UNIQUE, ORACLE) else []
                ),
                **self.lookup.passed(
                    [MANIFEST, RAW, DUPLICATES, DOCUMENTS]
                    + ([TOKENS] if split else [])
                    + ([PAIRS, EXAMPLES, SYNTHETIC_DOCUMENTS] if split == UNIQUE else []),
                    [shard],
                    readers,
                ),
            }

    def synthetic_documents(self, name: str) -> Iterator[Trace]:
        """Yield the synthetic document of this id."""
        query = f"select * replace (text[:{EXCERPT_CHARS}] as text) from rows where id = ?"
        for row in self.lookup.rows(SYNTHETIC_DOCUMENTS, query, [name]):
            shard = row.pop("partition")
            model, partition = self.lookup.sampled_model()
            now = self.lookup.record(model, partition)["data_version"]
            yield {
                "kind": "synthetic_document",
                "engine": None,  # of a shard from before it was recorded
                **row,
                "shard": shard,
                "synthesizer": model,
                # The row's version is the content of the model that it was sampled from, as is the record's.
                "synthesizer_is_current": None if now is None else now == row["synthesizer_version"],
                "seed": self._summary(row["seed_id"], shard),
                "seed_pairs": self._pairs("d1", row["seed_id"], shard),
                "readers": (readers := self.reads.readers(SYNTHETIC_TOKENS, None, shard, name)),
                **self.lookup.passed(
                    [
                        MANIFEST,
                        DOCUMENTS,
                        TOKENS,
                        PAIRS,
                        EXAMPLES,
                        model,
                        SYNTHETIC_DOCUMENTS,
                        SYNTHETIC_TOKENS,
                        BUDGET,
                    ],
                    [shard],
                    readers,
                ),
            }

    def pairs(self, name: str) -> Iterator[Trace]:
        """Yield the pairs 'd1->d2', kept or not, wherever both are documents."""
        for d1, d2 in _both(name):
            seeds, related = self._summary(d1), self._summary(d2)
            if not seeds or not related:
                continue
            shard = seeds["shard"]
            kept = self.lookup.rows(
                PAIRS, "select similarity, shared_shingles from rows where d1 = ? and d2 = ?", [d1, d2], shard
            )
            yield {
                "kind": "pair",
                "id": name,
                "d1": seeds,
                "d2": related,
                "kept": bool(kept),
                **(kept[0] if kept else {"similarity": None, "shared_shingles": None}),
                # Of either document among the other's nearest: where the pair comes from.
                "candidates": self.lookup.rows(
                    CANDIDATES,
                    "select query_id, neighbor_id, rank, similarity from rows where (query_id = ? and neighbor_id = ?) "
                    "or (query_id = ? and neighbor_id = ?) order by rank",
                    [d1, d2, d2, d1],
                ),
                "tuning": self.reads.example(name),
                "synthetic_documents_of_d1": self.lookup.count(SYNTHETIC_DOCUMENTS, "seed_id = ?", [d1], shard),
                **self.lookup.passed(
                    [MANIFEST, DOCUMENTS, CANDIDATES, PAIRS, EXAMPLES, self.lookup.sampled_model()[0]],
                    [shard, related["shard"]],
                ),
            }

    def earlier_pairs(self, name: str) -> Iterator[Trace]:
        """Yield the pair 'd1->d2' of a document of D and a synthetic document of synthesizer.earlier_round.

        The text is decoded from what the synthesizer is tuned on: the earlier run may have changed since.
        """
        earlier = self.experiment.synthesizer.earlier_round
        for d1, d2 in _both(name) if earlier else ():
            query = "select id, partition as shard from rows where id in (?, ?)"
            for row in self.lookup.rows(EARLIER_PAIRS, query, [d1, d2]):
                directory = self.store.directory(EARLIER_PAIRS, row["shard"])
                if read_table(directory / EARLIER_TABLE).filter(d1=d1, d2=d2).is_empty():
                    continue
                arrays = TokenArrays.load(directory)
                number = arrays.documents["id"].to_list().index(row["id"])
                tokens = arrays.tokens[arrays.offsets[number] + 1 : arrays.offsets[number + 1] - 1]
                tokenizer = load_tokenizer(self.store.directory(TOKENIZER, None))
                yield {
                    "kind": "earlier_pair",
                    "id": name,
                    "d1": d1,
                    "d2": d2,
                    "seed": self._summary(d2 if row["id"] == d1 else d1, row["shard"]),
                    "synthetic_document": {
                        "id": row["id"].removeprefix(PREFIX),
                        "run": str(earlier),
                        "text": decode(tokenizer, tokens)[:EXCERPT_CHARS],
                    },
                    "tuning": self.reads.example(name),
                    **self.lookup.passed(
                        [
                            MANIFEST,
                            DOCUMENTS,
                            TOKENIZER,
                            TOKENS,
                            EARLIER_PAIRS,
                            EXAMPLES,
                            self.lookup.sampled_model()[0],
                        ],
                        [row["shard"]],
                    ),
                }

    def unknown(self, name: str) -> str:
        """Return the message for an id that nothing has."""
        lines = [f"nothing has the id {name!r}. Looked for it"]
        searched = [RAW, SYNTHETIC_DOCUMENTS, *([EARLIER_PAIRS] if self.experiment.synthesizer.earlier_round else [])]
        for asset in searched:
            lines.append(f"  in {asset}, {self.lookup.count(asset):,} rows in {self.store.looked_in[asset]}")
            if missing := self.store.missing(asset):
                lines.append(f"    {missing}")
        lines.append("  as a pair d1->d2 of two documents, a score task/metric/arm/seed, or an asset's name")
        near = [
            (row["distance"], row["id"])
            for asset in searched
            for row in self.lookup.rows(
                asset,
                "select id, levenshtein(id, ?) as distance from rows where distance <= ? order by distance, id limit ?",
                [name, max(3, len(name) // 3), SUGGESTIONS],
            )
        ]
        close = [key for _, key in sorted(near)][:SUGGESTIONS]
        close += get_close_matches(name, [key.rpartition("/")[2] for key in self.store.assets], SUGGESTIONS)
        lines.append(f"Nearest: {', '.join(close)}" if close else "No id is near it.")
        return "\n".join(lines)

    # Parts of a trace.

    def _raw(self, name: str) -> list[dict[str, Any]]:
        columns = f"text[:{EXCERPT_CHARS}] as text, length(text) as characters, url, source, file, line, partition"
        return self.lookup.rows(RAW, f"select {columns} from rows where id = ?", [name])

    def _source(self, row: dict[str, Any]) -> dict[str, Any]:
        """Return file, line and the file's pinned digest of a row of raw_documents."""
        manifest = self.lookup.rows(
            MANIFEST, "select bytes, sha256, modified from rows where file = ? and shard = ?",
            [row["file"], int(row["partition"])],
        )  # fmt: skip
        path = getattr(self.experiment.corpus.source, "path", None)
        facts = manifest[0] if manifest else {"bytes": None, "sha256": None, "modified": None}
        return {"root": path, "name": row["source"], **{key: row[key] for key in ("file", "line", "url")}, **facts}

    def _summary(self, name: str, shard: str | None = None) -> dict[str, Any] | None:
        """Return the document of the corpus that has this id: the one that de-duplication kept."""
        columns = f"id, partition as shard, split, file, line, text[:{EXCERPT_CHARS}] as text"
        rows = self.lookup.rows(DOCUMENTS, f"select {columns} from rows where id = ?", [name], shard)
        return rows[0] if rows else None

    def _pairs(self, side: str, name: str, shard: str | None = None) -> list[dict[str, Any]]:
        other = "d2" if side == "d1" else "d1"
        rows = self.lookup.rows(
            PAIRS,
            f"select {other} as document, similarity, shared_shingles from rows where {side} = ? order by similarity "
            "desc, document",
            [name],
            shard,
        )
        return [
            row | {"tuning": self.reads.example(PAIR.join((name, row["document"])[:: 1 if side == "d1" else -1]))}
            for row in rows
        ]

    def _scored(self, name: str) -> bool:
        """Return whether a held-out document is among those scored: `sample_heldout` takes the lowest digests."""
        before = self.lookup.rows(
            DOCUMENTS, "select count(*) as n from rows where split = ? and sha256(id) < sha256(?)", [HELDOUT, name]
        )[0]["n"]
        return before < self.experiment.evaluation.heldout_documents


def _both(name: str) -> Iterator[tuple[str, str]]:
    """Yield what 'd1->d2' may name: ids may hold '->' themselves."""
    parts = name.split(PAIR)
    for cut in range(1, len(parts)):
        yield PAIR.join(parts[:cut]), PAIR.join(parts[cut:])
