"""A small artifact store with every artifact that a trace reads, written by the modules that write the real ones."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from sbp_assets.corpus.ingest import RAW_DOCUMENT_SCHEMA
from sbp_assets.definitions import build_definitions
from sbp_assets.pretraining.budget import ARMS, arm_rows, plan_arm
from sbp_assets.provenance.lookup import RecordsOf
from sbp_assets.provenance.records import graph_of
from sbp_assets.provenance.store import Asset, Store
from sbp_assets.settings import Settings, load_settings
from sbp_assets.storage.token_arrays import write_token_arrays
from sbp_assets.synthesizer.examples import write_examples

SHARDS = ("00000", "00001")
SPLITS = ["unique"] * 6 + ["oracle"] * 4 + ["heldout"] * 3
RELATED = 3
BEST_STEP = 2


@pytest.fixture(scope="session")
def settings() -> Settings:
    """Profile tiny with rows of 32 tokens, three readings of D and two training seeds."""
    overrides = {
        "MODEL__CONTEXT_LENGTH": "32",
        "PRETRAINING__TOKENS_PER_STEP": "64",
        "PRETRAINING__REPETITIONS": "3",
        "PRETRAINING__SEEDS": "[0, 1]",
        "SYNTHESIZER__EPOCHS": "1.5",
        "EVALUATION__HELDOUT_DOCUMENTS": "3",
    }
    return load_settings("tiny", {f"SBP_EXPERIMENT__{key}": value for key, value in overrides.items()})


@pytest.fixture(scope="session")
def assets(settings: Settings) -> dict[str, Asset]:
    return graph_of(build_definitions(settings))


def ids(shard: str) -> list[str]:
    """The first document of the first shard has an id that looks like a pair."""
    return [f"d{shard[-1]}->{n}" if shard == SHARDS[0] and n == 0 else f"d{shard[-1]}-{n}" for n in range(len(SPLITS))]


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory, settings: Settings) -> Path:
    root = tmp_path_factory.mktemp("store")

    def write(name: str, rows: Any, schema: dict[str, Any] | None = None) -> None:
        path = root / f"{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pl.DataFrame(rows, schema=schema, orient="row").write_parquet(path)

    manifest = {"file": ["a.jsonl", "b.jsonl"], "shard": [0, 1], "bytes": [700, 800], "sha256": ["aa" * 32, "bb" * 32]}
    write("corpus/source_manifest", manifest | {"modified": [None, None]})
    tokens, synthetic, pairs, special = {}, {}, {}, 4
    for index, (shard, file) in enumerate(zip(SHARDS, ("a.jsonl", "b.jsonl"), strict=True)):
        names = ids(shard)
        rows = [(name, f"Text of {name}\x1b[31m", None, "shelf", file, n + 1) for n, name in enumerate(names)]
        copy = (f"copy-{index}", "A copy", None, "shelf", file, len(names) + 1)
        write(f"corpus/raw_documents/{shard}", [*rows, copy], RAW_DOCUMENT_SCHEMA)
        kept = pl.DataFrame(rows, schema=RAW_DOCUMENT_SCHEMA, orient="row").with_columns(split=pl.Series(SPLITS))
        write(f"corpus/documents/{shard}", kept)
        # Every document is made of a token of its own, so that a reader of the stream knows whose it is.
        numbers = range(special + index * 100, special + index * 100 + len(names))
        lengths = [8 + 3 * (n % 5) for n in range(len(names))]
        encoded = [np.array([0, *[token] * (n - 2), 1]) for token, n in zip(numbers, lengths, strict=True)]
        tokens[shard] = root / "corpus/tokens" / shard
        write_token_arrays(tokens[shard], kept.select("id", "split"), encoded, 5000)
        other = SHARDS[1 - index]
        partners = [(names[n], ids(other)[(n + 1) % 6], other, 0.9 - n / 100, 0.05) for n in range(6)]
        columns = {"d1": pl.String, "d2": pl.String, "d2_shard": pl.String, "similarity": pl.Float32,
                   "shared_shingles": pl.Float32}  # fmt: skip
        write(f"pairing/neighbor_pairs/{shard}", partners, columns)
        pairs[shard] = pl.scan_parquet(root / f"pairing/neighbor_pairs/{shard}.parquet")
        candidates = [(d1, d2, other, similarity, 1) for d1, d2, _, similarity, _ in partners]
        candidates += [(names[0], ids(other)[3], other, 0.2, 2)]
        write(
            f"pairing/neighbor_candidates/{shard}", candidates,
            dict(zip(("query_id", "neighbor_id", "neighbor_shard", "similarity", "rank"),
                     (pl.String, pl.String, pl.String, pl.Float32, pl.Int64), strict=True)),
        )  # fmt: skip
        made = [(f"syn-{name}-{rollout}", name, rollout) for rollout in range(2) for name in names[:6]]
        write(
            f"synthesis/synthetic_documents/{shard}",
            [(*row, 7 * n, f"Synthesis {n}", 9, "stop", "version-1", "vllm") for n, row in enumerate(made)],
            dict(zip(("id", "seed_id", "rollout", "sampling_seed", "text", "n_tokens", "finish_reason",
                      "synthesizer_version", "engine"),
                     (pl.String, pl.String, pl.Int64, pl.Int64, pl.String, pl.Int64, *3 * (pl.String,)),
                     strict=True)),
        )  # fmt: skip
        synthetic[shard] = root / "synthesis/synthetic_tokens" / shard
        frame = pl.DataFrame(made, schema=["id", "seed_id", "rollout"], orient="row").select("id", "seed_id")
        write_token_arrays(
            synthetic[shard], frame, [np.full(9, 1000 + index * 100 + n) for n in range(len(made))], 5000
        )
    duplicate = {"id": ["copy-1"], "shard": [1], "kept_id": [ids(SHARDS[0])[2]], "kept_shard": [0], "jaccard": [0.9]}
    write("corpus/duplicates", duplicate | {"kind": ["near"]})
    scratch = tmp_path_factory.mktemp("joined")
    write_examples(root / "synthesizer/tuning_examples", pairs, tokens, RELATED, 14, 5000, scratch, "100MB")
    experiment = settings.experiment
    budget = []
    for arm in ARMS:
        plan = plan_arm(arm, experiment.pretraining, tokens, synthetic if arm == "sbp" else None)
        budget.append(arm_rows(plan, 32, 0, 1.0))
        model = root / f"pretraining/{arm}_model/0"
        model.mkdir(parents=True)
        record = {"tokens": plan.tokens, "final_heldout_loss": 3.5, "best_step": BEST_STEP}
        (model / "run.json").write_text(json.dumps(record))
        steps = [0, BEST_STEP, plan.steps]
        measured = {"tokens": [64 * step for step in steps], "train_loss": [None, 3.2, 2.0]}
        write(f"pretraining/{arm}_model/0/metrics", {"step": steps, **measured, "heldout_loss": [6.0, 3.1, 3.5]})
        scores = {"task": ["heldout", "mmlu"], "metric": ["perplexity", "acc"], "value": [9.5, 0.25],
                  "stderr": [0.1, 0.02], "samples": [3, 40], "higher_is_better": [False, True]}  # fmt: skip
        for name in (arm, *(["early_stopped"] if arm == "baseline" else [])):
            write(f"evaluation/{name}_scores/0", scores)
    write("pretraining/token_budget", pl.concat(budget))
    write("evaluation/comparison", {"task": ["heldout"], "metric": ["perplexity"], "delta_sbp": [-0.5]})
    return root


@pytest.fixture
def store(folder: Path, assets: dict[str, Asset], tmp_path: Path) -> Store:
    return Store(str(folder), str(tmp_path), assets, "1GB")


@pytest.fixture
def records() -> RecordsOf:
    """Records of an instance in which the checkpoint is at version-1."""

    def found(artifacts: Sequence[tuple[str, str | None]]) -> list[dict[str, Any]]:
        return [
            {"asset": asset, "partition": partition, "run_id": "r", "materialised": None, "state": "fresh"}
            | {"data_version": "version-1" if asset == "synthesizer/checkpoint" else "other", "reasons": []}
            for asset, partition in artifacts
        ]

    return found
