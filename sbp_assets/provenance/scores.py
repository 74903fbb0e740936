"""Traces of assets, of their partitions, and of scores."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import polars as pl

from sbp_assets.provenance.lookup import (
    BUDGET,
    COMPARISON,
    DOCUMENTS,
    EARLY_STOPPED,
    MANIFEST,
    PAIRS,
    SYNTHETIC_DOCUMENTS,
    Lookup,
    Trace,
    UnknownIdError,
)
from sbp_assets.provenance.store import NotMaterialisedError, Store
from sbp_assets.storage.paths import read_table


def artifact_traces(lookup: Lookup, name: str) -> Iterator[Trace]:
    """Yield the traces of what `name` may mean: an asset, a partition of it, or a score in its table.

    Raises NotMaterialisedError when that is not in the store, and UnknownIdError when its table has no such score.
    """
    for asset, partition, task, metric in _addressed(lookup.store, name):
        partitions = [partition] if partition else lookup.store.present(asset)
        if not partitions or (partition and partition not in lookup.store.present(asset)):
            raise NotMaterialisedError(lookup.store.missing(asset))
        if asset.endswith("_scores"):
            yield from _score_traces(lookup, asset, partitions, task, metric)
        else:
            yield {
                "kind": "artifact",
                "id": asset,
                "records": [lookup.record(asset, key) for key in partitions],
                **lookup.closures(asset),
            }


def _score_traces(
    lookup: Lookup, asset: str, partitions: list[Any], task: str | None, metric: str | None
) -> Iterator[Trace]:
    model = next(parent for parent in lookup.store.assets[asset].parents if parent.endswith("_model"))
    arm = model.rpartition("/")[2].removesuffix("_model")
    scored = asset.rpartition("/")[2].removesuffix("_scores")
    for seed in partitions:
        where = "where (? is null or task = ?) and (? is null or metric = ?)"
        columns = "task, metric, value, stderr, samples, higher_is_better"
        rows = lookup.rows(asset, f"select {columns} from rows {where}", [task, task, metric, metric], seed)
        if not rows:
            known = lookup.rows(asset, "select task || '/' || metric as score from rows", partition=seed)
            raise UnknownIdError(
                f"{asset}, seed {seed}, has no score {task}/{metric}; it has "
                + ", ".join(row["score"] for row in known)
            )
        run = _run_record(lookup.store, model, seed, best=scored == EARLY_STOPPED)
        data = lookup.rows(
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
            "model": {"asset": model, "partition": seed, "record": lookup.record(model, seed), **run},
            "data": data,
            "synthesizer_versions": lookup.rows(
                SYNTHETIC_DOCUMENTS,
                "select synthesizer_version, count(*) as documents from rows group by all order by all",
            )
            if arm == "sbp"
            else [],
            "pairs": lookup.count(PAIRS) if arm == "sbp" else None,
            "documents": {
                row["split"]: row["documents"]
                for row in lookup.rows(
                    DOCUMENTS, "select split, count(*) as documents from rows group by split order by split"
                )
            },
            "source": next(
                iter(lookup.rows(MANIFEST, "select count(*) as files, sum(bytes)::bigint as bytes from rows")), None
            ),
            "comparison": lookup.rows(
                COMPARISON, "select * exclude (partition) from rows where (? is null or task = ?)", [task, task]
            ),
            **lookup.closures(asset),
        }


def _addressed(store: Store, name: str) -> Iterator[tuple[str, str | None, str | None, str | None]]:
    """Yield the asset, partition, task and metric that a name may mean."""
    for key, asset in store.assets.items():
        for known in (key, key.rpartition("/")[2]):
            if name == known:
                yield key, None, None, None
                break
            partition = name.removeprefix(f"{known}/")
            if partition in (asset.partitions or ()):
                yield key, partition, None, None
                break
    parts = name.split("/")
    if len(parts) in (3, 4) and (key := f"evaluation/{parts[2]}_scores") in store.assets:
        seed = parts[3] if len(parts) == 4 else None
        if seed is not None and seed not in (seeds := store.assets[key].partitions or ()):
            raise UnknownIdError(f"{name!r}: no training seed {seed!r}; seeds are {', '.join(seeds)}")
        yield key, seed, parts[0], parts[1]


def _run_record(store: Store, model: str, seed: str, best: bool) -> dict[str, Any]:
    """Return what the model's files record of its training, up to its last weights or to its lowest held-out loss."""
    if seed not in store.present(model):
        return {}
    directory = store.directory(model, seed)
    record = json.loads((directory / "run.json").read_text(encoding="utf-8"))
    run: dict[str, Any] = {
        "step": None,
        "tokens": record.get("tokens"),
        "train_loss": record.get("final_train_loss"),
        "heldout_loss": record.get("final_heldout_loss"),
        **{key: record.get(key) for key in ("seconds", "host")},
    }
    # Null where none was kept: then the last weights are scored.
    if best and (step := record.get("best_step")) is not None:
        metrics = read_table(directory / "metrics.parquet", columns=["step", "tokens", "train_loss", "heldout_loss"])
        run |= metrics.row(by_predicate=pl.col("step") == step, named=True)
    return run
