"""Where a document, a synthesis, a pair or a score comes from, and what it went into: the walk behind `sbp trace`.

A trace is a JSON-ready dict whose `kind` says which of the functions below made it. Times read are counted along the
training order itself, over the whole token budget. No dagster.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from sbp_assets.corpus.split import HELDOUT, ORACLE, UNIQUE
from sbp_assets.pretraining.budget import ARMS, Arm, ArmPlan, BudgetError, plan_arm
from sbp_assets.provenance.store import NotMaterialisedError, Store
from sbp_assets.settings import Settings
from sbp_assets.storage.token_arrays import TokenArrays
from sbp_assets.synthesizer.examples import TRAIN
from sbp_assets.training.order import ExamplesOrder, StreamOrder
from sbp_assets.training.spec import ExamplesData, Source

EXCERPT_CHARS = 400
SUGGESTIONS = 3
PAIR = "->"
RAW, DOCUMENTS, DUPLICATES = "corpus/raw_documents", "corpus/documents", "corpus/duplicates"
MANIFEST, TOKENS = "corpus/source_manifest", "corpus/tokens"
CANDIDATES, PAIRS = "pairing/neighbor_candidates", "pairing/neighbor_pairs"
EXAMPLES, SYNTHESES, SYNTHETIC_TOKENS = (
    "synthesizer/tuning_examples", "synthesis/synthetic_documents", "synthesis/synthetic_tokens",
)  # fmt: skip
BUDGET, COMPARISON = "pretraining/token_budget", "evaluation/comparison"
EARLY_STOPPED = "early_stopped"

Trace = dict[str, Any]
# State of an artifact by asset and partition, as Dagster's instance has it.
RecordOf = Callable[[str, str | None], dict[str, Any]]


class UnknownIdError(LookupError):
    """Nothing has this id; the message says where it was looked for and which ids are near."""


def trace(identifier: str, settings: Settings, store: Store, record: RecordOf) -> list[Trace]:
    """Traces of everything that has this id: nearly always one.

    An id is a document's, a synthetic document's, a pair's ('d1->d2'), a score's ('task/metric/arm/seed') or an asset's
    ('sbp_scores', 'pretraining/sbp_model/0'). Raises UnknownIdError where nothing has it.
    """
    walk = _Walk(settings, store, record)
    found: list[Trace] = [*walk.documents(identifier), *walk.syntheses(identifier)]
    if PAIR in identifier:
        found += walk.pairs(identifier)
    found += walk.artifacts(identifier)
    if not found:
        raise UnknownIdError(walk.unknown(identifier))
    return found


@dataclass
class _Walk:
    settings: Settings
    store: Store
    record: RecordOf

    # What has an id.

    def documents(self, name: str) -> Iterator[Trace]:
        """A source document by its id; shards may share an id, of which de-duplication keeps one document."""
        for row in self._raw(name):
            shard = row["partition"]
            kept = self._rows(DOCUMENTS, "select split from rows where id = ?", [name], shard)
            split = kept[0]["split"] if kept else None
            dropped = self._rows(
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
                "duplicates": self._rows(
                    DUPLICATES,
                    "select id, shard, jaccard, kind from rows where kept_id = ? and kept_shard = ? order by shard, id",
                    [name, int(shard)],
                ),
                "pairs_as_seed": self._pairs("d1", name, shard),
                "pairs_as_related": self._pairs("d2", name),
                "syntheses": self._rows(
                    SYNTHESES,
                    "select id, rollout, n_tokens, finish_reason from rows where seed_id = ? order by rollout",
                    [name],
                    shard,
                ),
                "scored_for_perplexity": self._scored(name) if split == HELDOUT else None,
                "readers": (readers := self._readers(TOKENS, split, shard, name) if split in (UNIQUE, ORACLE) else []),
                **self._passed(
                    [MANIFEST, RAW, DUPLICATES, DOCUMENTS]
                    + ([TOKENS] if split else [])
                    + ([PAIRS, EXAMPLES, SYNTHESES] if split == UNIQUE else []),
                    [shard],
                    readers,
                ),
            }

    def syntheses(self, name: str) -> Iterator[Trace]:
        """A synthetic document by its id."""
        query = f"select * replace (text[:{EXCERPT_CHARS}] as text) from rows where id = ?"
        for row in self._rows(SYNTHESES, query, [name]):
            shard = row.pop("partition")
            model, partition = self._sampled_model()
            now = self.record(model, partition)["data_version"]
            yield {
                "kind": "synthesis",
                "engine": None,  # of a shard from before it was recorded
                **row,
                "shard": shard,
                "synthesizer": model,
                # The row's version is the content of the model that it was sampled from, as is the record's.
                "synthesizer_is_current": None if now is None else now == row["synthesizer_version"],
                "seed": self._summary(row["seed_id"], shard),
                "seed_pairs": self._pairs("d1", row["seed_id"], shard),
                "readers": (readers := self._readers(SYNTHETIC_TOKENS, None, shard, name)),
                **self._passed(
                    [MANIFEST, DOCUMENTS, TOKENS, PAIRS, EXAMPLES, model, SYNTHESES, SYNTHETIC_TOKENS, BUDGET],
                    [shard],
                    readers,
                ),
            }

    def pairs(self, name: str) -> Iterator[Trace]:
        """A pair 'd1->d2', kept or not, wherever both are documents: ids may hold '->' themselves."""
        parts = name.split(PAIR)
        for cut in range(1, len(parts)):
            d1, d2 = PAIR.join(parts[:cut]), PAIR.join(parts[cut:])
            seeds, related = self._summary(d1), self._summary(d2)
            if not seeds or not related:
                continue
            shard = seeds["shard"]
            kept = self._rows(
                PAIRS, "select similarity, shared_shingles from rows where d1 = ? and d2 = ?", [d1, d2], shard
            )
            yield {
                "kind": "pair",
                "id": name,
                "d1": seeds,
                "d2": related,
                "kept": bool(kept),
                **(kept[0] if kept else {"similarity": None, "shared_shingles": None}),
                # Of either document among the other's nearest: what the pair was made of.
                "candidates": self._rows(
                    CANDIDATES,
                    "select query_id, neighbor_id, rank, similarity from rows where (query_id = ? and neighbor_id = ?) "
                    "or (query_id = ? and neighbor_id = ?) order by rank",
                    [d1, d2, d2, d1],
                ),
                "tuning": self._example(name),
                "syntheses_of_d1": self._count(SYNTHESES, "seed_id = ?", [d1], shard),
                **self._passed(
                    [MANIFEST, DOCUMENTS, CANDIDATES, PAIRS, EXAMPLES, self._sampled_model()[0]],
                    [shard, related["shard"]],
                ),
            }

    def artifacts(self, name: str) -> Iterator[Trace]:
        """An asset, a partition of it, or a score in its table."""
        for asset, partition, task, metric in self._addressed(name):
            partitions = [partition] if partition else self.store.present(asset)
            if not partitions or (partition and partition not in self.store.present(asset)):
                raise NotMaterialisedError(self.store.missing(asset))
            if asset.endswith("_scores"):
                yield from self._scores(asset, partitions, task, metric)
            else:
                yield {
                    "kind": "artifact",
                    "id": asset,
                    "records": [self.record(asset, key) for key in partitions],
                    **self._closures(asset),
                }

    def unknown(self, name: str) -> str:
        """The message for an id that nothing has."""
        lines = [f"nothing has the id {name!r}. Looked for it"]
        for asset in (RAW, SYNTHESES):
            lines.append(f"  in {asset}, {self._count(asset):,} rows in {self.store.looked_in[asset]}")
            if missing := self.store.missing(asset):
                lines.append(f"    {missing}")
        lines.append("  as a pair d1->d2 of two documents, a score task/metric/arm/seed, or an asset's name")
        near = [
            (row["distance"], row["id"])
            for asset in (RAW, SYNTHESES)
            for row in self._rows(
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

    def _scores(self, asset: str, partitions: list[Any], task: str | None, metric: str | None) -> Iterator[Trace]:
        model = next(parent for parent in self.store.assets[asset].parents if parent.endswith("_model"))
        arm = model.rpartition("/")[2].removesuffix("_model")
        scored = asset.rpartition("/")[2].removesuffix("_scores")
        for seed in partitions:
            where = "where (? is null or task = ?) and (? is null or metric = ?)"
            columns = "task, metric, value, stderr, samples, higher_is_better"
            rows = self._rows(asset, f"select {columns} from rows {where}", [task, task, metric, metric], seed)
            if not rows:
                known = self._rows(asset, "select task || '/' || metric as score from rows", partition=seed)
                raise UnknownIdError(
                    f"{asset}, seed {seed}, has no score {task}/{metric}; it has "
                    + ", ".join(row["score"] for row in known)
                )
            run = self._run_record(model, seed, best=scored == EARLY_STOPPED)
            data = self._rows(
                BUDGET,
                "select source, unique_documents, unique_tokens, passes, tokens_read from rows where arm = ?",
                [arm],
            )
            if scored == EARLY_STOPPED and (tokens := run.get("tokens")) is not None:
                # The budget is that of the whole training; the baseline reads D alone.
                data = [row | {"passes": tokens / row["unique_tokens"], "tokens_read": tokens} for row in data]
            yield {
                "kind": "score",
                "id": f"{asset}/{seed}",
                "scored": scored,
                "arm": arm,
                "seed": seed,
                "scores": rows,
                "model": {"asset": model, "partition": seed, "record": self.record(model, seed), **run},
                "data": data,
                "synthesizer_versions": self._rows(
                    SYNTHESES, "select synthesizer_version, count(*) as documents from rows group by all order by all"
                )
                if arm == "sbp"
                else [],
                "pairs": self._count(PAIRS) if arm == "sbp" else None,
                "documents": {
                    row["split"]: row["documents"]
                    for row in self._rows(
                        DOCUMENTS, "select split, count(*) as documents from rows group by split order by split"
                    )
                },
                "source": next(
                    iter(self._rows(MANIFEST, "select count(*) as files, sum(bytes)::bigint as bytes from rows")), None
                ),
                "comparison": self._rows(
                    COMPARISON, "select * exclude (partition) from rows where (? is null or task = ?)", [task, task]
                ),
                **self._closures(asset),
            }

    def _addressed(self, name: str) -> Iterator[tuple[str, str | None, str | None, str | None]]:
        """Asset, partition, task and metric that a name may mean."""
        for key, asset in self.store.assets.items():
            for known in (key, key.rpartition("/")[2]):
                if name == known:
                    yield key, None, None, None
                    break
                partition = name.removeprefix(f"{known}/")
                if partition in (asset.partitions or ()):
                    yield key, partition, None, None
                    break
        parts = name.split("/")
        if len(parts) in (3, 4) and (key := f"evaluation/{parts[2]}_scores") in self.store.assets:
            seed = parts[3] if len(parts) == 4 else None
            if seed is not None and seed not in (seeds := self.store.assets[key].partitions or ()):
                raise UnknownIdError(f"{name!r}: no training seed {seed!r}; seeds are {', '.join(seeds)}")
            yield key, seed, parts[0], parts[1]

    def _raw(self, name: str) -> list[dict[str, Any]]:
        columns = f"text[:{EXCERPT_CHARS}] as text, length(text) as characters, url, source, file, line, partition"
        return self._rows(RAW, f"select {columns} from rows where id = ?", [name])

    def _source(self, row: dict[str, Any]) -> dict[str, Any]:
        """File, line and the file's pinned digest of a row of raw_documents."""
        manifest = self._rows(
            MANIFEST, "select bytes, sha256, modified from rows where file = ? and shard = ?",
            [row["file"], int(row["partition"])],
        )  # fmt: skip
        path = getattr(self.settings.experiment.corpus.source, "path", None)
        facts = manifest[0] if manifest else {"bytes": None, "sha256": None, "modified": None}
        return {"root": path, "name": row["source"], **{key: row[key] for key in ("file", "line", "url")}, **facts}

    def _summary(self, name: str, shard: str | None = None) -> dict[str, Any] | None:
        """The document of the corpus that has this id: the one that de-duplication kept."""
        columns = f"id, partition as shard, split, file, line, text[:{EXCERPT_CHARS}] as text"
        rows = self._rows(DOCUMENTS, f"select {columns} from rows where id = ?", [name], shard)
        return rows[0] if rows else None

    def _pairs(self, side: str, name: str, shard: str | None = None) -> list[dict[str, Any]]:
        other = "d2" if side == "d1" else "d1"
        rows = self._rows(
            PAIRS,
            f"select {other} as document, similarity, shared_shingles from rows where {side} = ? order by similarity "
            "desc, document",
            [name],
            shard,
        )
        return [
            row | {"tuning": self._example(PAIR.join((name, row["document"])[:: 1 if side == "d1" else -1]))}
            for row in rows
        ]

    def _example(self, name: str) -> dict[str, Any] | None:
        """The tuning example of a pair: its split, and how often synthesizer-tuning reads it."""
        if (example := self._examples.get(name)) is None:
            return None
        split, prompt_tokens, cut, number = example
        reads = self._examples_order.reads(number) if split == TRAIN else 0
        return {"split": split, "prompt_tokens": prompt_tokens, "d2_cut": cut, "reads": reads}

    @cached_property
    def _examples(self) -> dict[str, tuple[str, int, bool, int]]:
        """Tuning examples by id: split, prompt tokens, cut, number among those of its split."""
        if not self.store.present(EXAMPLES):
            return {}
        columns = ["id", "split", "prompt_tokens", "cut"]
        frame = pl.read_parquet(self.store.directory(EXAMPLES, None) / "documents.parquet", columns=columns)
        numbered = frame.with_columns(number=pl.int_range(pl.len()).over("split"))
        return {name: tuple(rest) for name, *rest in numbered.iter_rows()}  # type: ignore[misc]

    @cached_property
    def _examples_order(self) -> ExamplesOrder:
        experiment = self.settings.experiment
        source = Source(directory=self.store.directory(EXAMPLES, None), split=TRAIN)
        data = ExamplesData(source=source, epochs=experiment.synthesizer.epochs)
        return ExamplesOrder(data, experiment.model.context_length, experiment.first_seed, pad=0)

    def _scored(self, name: str) -> bool:
        """Whether a held-out document is among those scored: task_files.sample_heldout takes the lowest digests."""
        before = self._rows(
            DOCUMENTS, "select count(*) as n from rows where split = ? and sha256(id) < sha256(?)", [HELDOUT, name]
        )[0]["n"]
        return before < self.settings.experiment.evaluation.heldout_documents

    def _readers(self, asset: str, split: str | None, shard: str, name: str) -> list[dict[str, Any]]:
        """Per arm and training seed: how often a document is read, how many of its tokens, and at which steps."""
        if shard not in self.store.present(asset):
            return []
        readers = []
        for arm in ARMS:
            if (plan := self._plan(arm)) is None:
                continue
            document, length = _number(plan, self.store.directory(asset, shard), split, name)
            for seed in self.settings.experiment.seed_keys:
                starts: list[int] = []
                tokens = 0
                order = StreamOrder(plan.data, self.settings.experiment.model.context_length, int(seed))
                for documents, begins, counts in order.reading(plan.tokens) if document is not None else ():
                    here = documents == document
                    starts += begins[here].tolist()
                    tokens += int(counts[here].sum())
                model = f"pretraining/{arm}_model"
                step = self.settings.experiment.pretraining.tokens_per_step
                readers.append({
                    "arm": arm,
                    "seed": seed,
                    "reads": len(starts),
                    "tokens": tokens,
                    "document_tokens": length,
                    "steps": [start // step for start in starts],
                    "of_steps": plan.steps,
                    "trained": seed in self.store.present(model),
                })  # fmt: skip
        return readers

    def _plan(self, arm: Arm) -> ArmPlan | None:
        """What an arm reads; None where what it reads is not all there, or is no budget."""
        if arm not in self._plans:
            plan = None
            needed = (TOKENS, SYNTHETIC_TOKENS) if arm == "sbp" else (TOKENS,)
            if not any(self.store.missing(asset) for asset in needed):
                try:
                    plan = plan_arm(arm, self.settings.experiment.pretraining, *(self._shards(a) for a in needed))
                except BudgetError:
                    plan = None
            self._plans[arm] = plan
        return self._plans[arm]

    @cached_property
    def _plans(self) -> dict[Arm, ArmPlan | None]:
        return {}

    def _shards(self, asset: str) -> dict[str, Path]:
        return {str(shard): self.store.directory(asset, shard) for shard in self.store.present(asset)}

    def _sampled_model(self) -> tuple[str, str | None]:
        """The model that synthesis samples from, and its partition."""
        parents = self.store.assets[SYNTHESES].parents
        model = next(key for key in parents if key.endswith(("checkpoint", "_model")))
        return model, self.settings.experiment.seed_keys[0] if self.store.assets[model].partitions else None

    def _run_record(self, model: str, seed: str, best: bool) -> dict[str, Any]:
        """What the model's records say of its training, up to its last weights or those of its lowest held-out loss."""
        if seed not in self.store.present(model):
            return {}
        directory = self.store.directory(model, seed)
        record = json.loads((directory / "run.json").read_text())
        run: dict[str, Any] = {
            "step": None,
            "tokens": record.get("tokens"),
            "train_loss": record.get("final_train_loss"),
            "heldout_loss": record.get("final_heldout_loss"),
            **{key: record.get(key) for key in ("seconds", "host")},
        }
        # Null where none was kept: then the last weights are scored.
        if best and (step := record.get("best_step")) is not None:
            metrics = pl.read_parquet(
                directory / "metrics.parquet", columns=["step", "tokens", "train_loss", "heldout_loss"]
            )
            run |= metrics.row(by_predicate=pl.col("step") == step, named=True)
        return run

    def _rows(
        self, asset: str, query: str, parameters: list[Any] | None = None, partition: str | None = None
    ) -> list[dict[str, Any]]:
        return self.store.rows(asset, query, parameters or [], partition)

    def _count(
        self, asset: str, where: str = "true", parameters: list[Any] | None = None, partition: str | None = None
    ) -> int:
        rows = self._rows(asset, f"select count(*) as n from rows where {where}", parameters, partition)
        return rows[0]["n"] if rows else 0

    def _passed(
        self, assets: list[str], shards: list[str] | None = None, readers: list[dict[str, Any]] | None = None
    ) -> dict[str, Any]:
        """Records of the artifacts that a trace passes through, and what of them is not in the store.

        `shards` are those passed of a sharded asset (None: all). `readers` adds the models that read the document, and
        their scores.
        """
        first_seed = self.settings.experiment.seed_keys[0]
        passed: list[tuple[str, str | None]] = []
        for asset in assets:
            wanted = {None, *shards, first_seed} if shards is not None else set(self.store.present(asset))
            passed += [(asset, key) for key in self.store.present(asset) if key in wanted]
        for reader in readers or []:
            scored = [reader["arm"], *([EARLY_STOPPED] if reader["arm"] == "baseline" else [])]
            for asset in (f"pretraining/{reader['arm']}_model", *(f"evaluation/{name}_scores" for name in scored)):
                if reader["reads"] and reader["seed"] in self.store.present(asset):
                    passed.append((asset, reader["seed"]))
        return {
            "artifacts": [self.record(asset, key) for asset, key in passed],
            "missing": [found for asset in self.store.looked_in if (found := self.store.missing(asset))],
        }

    def _closures(self, asset: str) -> dict[str, Any]:
        """Records of everything that an asset is made from, and the assets made from it."""
        assets = self.store.assets
        above, below, order = {asset}, {asset}, list(assets)  # in topological order
        for key in reversed(order):
            if key in above:
                above.update(assets[key].parents)
        for key in order:
            if below.intersection(assets[key].parents):
                below.add(key)
        rests_on = [key for key in order if key in above - {asset}]
        return {"used_by": [key for key in order if key in below - {asset}], **self._passed(rests_on)}


def _number(plan: ArmPlan, directory: Path, split: str | None, name: str) -> tuple[int | None, int | None]:
    """A document's number in the arm's reading order, and its tokens; None where the arm does not read its source."""
    before = 0
    for source in [*plan.data.repeated, *plan.data.once]:
        arrays = TokenArrays.load(source.directory)
        chosen = np.ones(len(arrays.documents), bool)
        if source.split is not None:
            chosen = (arrays.documents["split"] == source.split).to_numpy()
        if source.directory == directory and source.split == split:
            found = np.flatnonzero(chosen & (arrays.documents["id"] == name).to_numpy())
            if len(found):
                return before + int(chosen[: found[0]].sum()), int(arrays.lengths[found[0]])
        before += int(chosen.sum())
    return None, None
