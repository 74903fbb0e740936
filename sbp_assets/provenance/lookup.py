"""What the parts of a trace share: the names of artifacts, queries on them, and the records that a trace passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sbp_assets.provenance.store import Store
from sbp_assets.settings import Settings

RAW, DOCUMENTS, DUPLICATES = "corpus/raw_documents", "corpus/documents", "corpus/duplicates"
MANIFEST, TOKENIZER, TOKENS = "corpus/source_manifest", "corpus/tokenizer", "corpus/tokens"
CANDIDATES, PAIRS = "pairing/neighbor_candidates", "pairing/neighbor_pairs"
EXAMPLES, SYNTHETIC_DOCUMENTS, SYNTHETIC_TOKENS = (
    "synthesizer/tuning_examples", "synthesis/synthetic_documents", "synthesis/synthetic_tokens",
)  # fmt: skip
EARLIER_PAIRS = "synthesizer/earlier_pairs"
BUDGET, COMPARISON = "pretraining/token_budget", "evaluation/comparison"
EARLY_STOPPED = "early_stopped"

Trace = dict[str, Any]
# Returns the latest materialisations of artifacts, each given as asset and partition (`records.Records`).
RecordsOf = Callable[[Sequence[tuple[str, str | None]]], list[dict[str, Any]]]


class UnknownIdError(LookupError):
    """Nothing has this id; the message says where it was looked for and which ids are near."""


@dataclass
class Lookup:
    """Rows of the store's artifacts, and the records of those that a trace passes through."""

    settings: Settings
    store: Store
    records: RecordsOf

    def record(self, asset: str, partition: str | None) -> dict[str, Any]:
        """Return the latest materialisation of one artifact."""
        return self.records([(asset, partition)])[0]

    def rows(
        self, asset: str, query: str, parameters: list[Any] | None = None, partition: str | None = None
    ) -> list[dict[str, Any]]:
        """Return what `query` finds in the asset's `rows`, of one partition or of all; [] where none is stored."""
        return self.store.rows(asset, query, parameters or [], partition)

    def count(
        self, asset: str, where: str = "true", parameters: list[Any] | None = None, partition: str | None = None
    ) -> int:
        """Return the number of the asset's rows for which `where` holds."""
        rows = self.rows(asset, f"select count(*) as n from rows where {where}", parameters, partition)
        return rows[0]["n"] if rows else 0

    def sampled_model(self) -> tuple[str, str | None]:
        """Return the model that synthesis samples from, or where it samples none the pairs; and the partition."""
        parents = self.store.assets[SYNTHETIC_DOCUMENTS].parents
        model = next(key for key in parents if key.endswith(("checkpoint", "_model", "tuning_examples")))
        return model, self.settings.experiment.seed_keys[0] if self.store.assets[model].partitions else None

    def passed(
        self, assets: list[str], shards: list[str] | None = None, readers: list[dict[str, Any]] | None = None
    ) -> dict[str, Any]:
        """Return the records of the artifacts that a trace passes through, and what of them is not in the store.

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
            "artifacts": self.records(passed),
            "missing": [found for asset in self.store.looked_in if (found := self.store.missing(asset))],
        }

    def closures(self, asset: str) -> dict[str, Any]:
        """Return the records of everything upstream of an asset, and the names of the assets downstream of it."""
        assets = self.store.assets
        upstream, downstream, order = {asset}, {asset}, list(assets)  # in topological order
        for key in reversed(order):
            if key in upstream:
                upstream.update(assets[key].parents)
        for key in order:
            if downstream.intersection(assets[key].parents):
                downstream.add(key)
        rests_on = [key for key in order if key in upstream - {asset}]
        return {"used_by": [key for key in order if key in downstream - {asset}], **self.passed(rests_on)}
