"""A corpus of two shards as the stages before and after would leave it, kept by the real IO managers."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl
import pytest

import sbp_assets.pretraining.assets as pretraining
import sbp_assets.pretraining.checks as pretraining_checks
import sbp_assets.synthesizer.assets as synthesizer
import sbp_assets.synthesizer.checks as synthesizer_checks
from sbp_assets.corpus.tokenizer import encode_documents, load_tokenizer, train_tokenizer
from sbp_assets.partitions import DEPLOYMENT, SHARDS
from sbp_assets.storage.io_managers import DirectoryIOManager, ParquetIOManager
from sbp_assets.storage.token_arrays import write_token_arrays

WORDS = ["the", "river", "runs", "past", "an", "old", "mill", "and", "its", "keeper", "counts", "every", "turn"]


def texts(shard: str, count: int) -> list[str]:
    rng = random.Random(shard)
    return [" ".join(rng.choices(WORDS, weights=range(len(WORDS), 0, -1), k=30)) + f" {n}." for n in range(count)]


class World:
    """Runs assets on one instance; stubs stand in for the other stages."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.results: dict[str, dg.ExecuteInProcessResult] = {}
        self.instance = dg.DagsterInstance.ephemeral(tempdir=str(root))
        self.resources = {
            "parquet": ParquetIOManager(str(root / "data"), cache=str(root / "cache")),
            "directory": DirectoryIOManager(str(root / "data"), cache=str(root / "cache")),
            "pipes": dg.PipesSubprocessClient(),
        }
        modules = [pretraining, synthesizer], [pretraining_checks, synthesizer_checks]
        self.assets = [
            *self._stubs(),
            *dg.load_assets_from_modules(modules[0]),
            *dg.load_asset_checks_from_modules(modules[1]),
        ]

    def run(self, key: str, partition: str | None = None) -> dg.ExecuteInProcessResult:
        return dg.materialize(
            self.assets,
            instance=self.instance,
            resources=self.resources,
            selection=[key],
            partition_key=partition,
            raise_on_error=False,
        )

    def made(self, key: str, partition: str | None = None) -> Path:
        return self.root / "data" / key / (partition or "")

    def _stubs(self) -> list[Any]:
        root = self.root

        @dg.asset(key=["corpus", "tokenizer"], io_manager_key="directory")
        def tokenizer() -> Path:
            train_tokenizer(texts("all", 50), 400).save_pretrained(root / "tokenizer")
            return root / "tokenizer"

        @dg.asset(key=["corpus", "tokens"], io_manager_key="directory", partitions_def=SHARDS)
        def tokens(context: dg.AssetExecutionContext) -> Path:
            shard = context.partition_key
            splits = ["unique"] * 24 + ["oracle"] * 60 + ["heldout"] * 8
            frame = pl.DataFrame({"id": [f"{shard}-{n}" for n in range(len(splits))], "split": splits})
            encoded = encode_documents(load_tokenizer(root / "tokenizer"), texts(shard, len(splits)))
            write_token_arrays(root / shard, frame, encoded, 400)
            return root / shard

        @dg.asset(key=["pairing", "neighbor_pairs"], io_manager_key="parquet", partitions_def=SHARDS)
        def neighbor_pairs(context: dg.AssetExecutionContext) -> pl.DataFrame:
            shard = context.partition_key
            d1 = [f"{shard}-{n}" for n in range(24)]
            d2 = [f"{SHARDS.get_partition_keys()[-1]}-{(n + 1) % 24}" for n in range(24)]
            return pl.DataFrame({"d1": d1, "d2": d2, "d2_shard": SHARDS.get_partition_keys()[-1]})

        @dg.asset(key=["synthesis", "synthetic_tokens"], io_manager_key="directory", partitions_def=SHARDS)
        def synthetic_tokens(context: dg.AssetExecutionContext) -> Path:
            shard = context.partition_key
            seeds = [f"{shard}-{n}" for n in range(24)]
            frame = pl.DataFrame({"id": [f"syn-{seed}-0" for seed in seeds], "seed_id": seeds})
            encoded = encode_documents(load_tokenizer(root / "tokenizer"), texts(f"{shard}-syn", len(seeds)))
            write_token_arrays(root / f"{shard}-syn", frame, encoded, 400)
            return root / f"{shard}-syn"

        return [tokenizer, tokens, neighbor_pairs, synthetic_tokens]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """The stub corpus, and the two stages run once in order, all but the oracle; the baseline in two processes."""
    patch = pytest.MonkeyPatch()
    made = World(tmp_path_factory.mktemp("world"))
    work = DEPLOYMENT.model_copy(update={"work_dir": str(made.root / "work"), "device": "cpu"})
    for module in (pretraining, synthesizer):
        patch.setattr(module, "DEPLOYMENT", work)
    assert made.run("key:corpus/tokenizer").success
    for key in ("corpus/tokens", "pairing/neighbor_pairs", "synthesis/synthetic_tokens"):
        for shard in SHARDS.get_partition_keys():
            assert made.run(f"key:{key}", shard).success
    patch.setattr(pretraining, "DEPLOYMENT", work.model_copy(update={"training_processes": 2}))
    made.results["baseline"] = made.run("key:pretraining/baseline_model", "0")
    patch.setattr(pretraining, "DEPLOYMENT", work)
    steps = {
        "examples": ("synthesizer/tuning_examples", None),
        "checkpoint": ("synthesizer/checkpoint", None),
        "budget": ("pretraining/token_budget", None),
        "sbp": ("pretraining/sbp_model", "0"),
    }
    for name, (key, partition) in steps.items():
        made.results[name] = made.run(f"key:{key}", partition)
    yield made
    patch.undo()
