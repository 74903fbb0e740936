"""A corpus of two shards as the stages before and after would leave it, kept by the real IO managers."""

import random
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
from sbp_assets.dagster_support.partitions import shards
from sbp_assets.dagster_support.stage import load_assets, load_checks
from sbp_assets.definitions import build_resources
from sbp_assets.storage.token_arrays import write_token_arrays
from sbp_assets_tests.tiny import tiny_settings

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
        self.settings = tiny_settings(root, {"deployment.device": "cpu"})
        self.shards = self.settings.experiment.shard_keys
        self.assets = [
            *self._stubs(),
            *(asset for stage in (pretraining, synthesizer) for asset in load_assets(stage, self.settings)),
            *(
                check
                for stage in (pretraining_checks, synthesizer_checks)
                for check in load_checks(stage, self.settings)
            ),
        ]

    def run(self, key: str, partition: str | None = None, processes: int = 1) -> dg.ExecuteInProcessResult:
        deployment = self.settings.deployment.model_copy(update={"training_processes": processes})
        settings = self.settings.model_copy(update={"deployment": deployment})
        return dg.materialize(
            self.assets,
            instance=self.instance,
            resources=build_resources(settings),
            selection=[key],
            partition_key=partition,
            raise_on_error=False,
        )

    def made(self, key: str, partition: str | None = None) -> Path:
        return self.root / "data_dir" / key / (partition or "")

    def _stubs(self) -> list[Any]:
        root, partitions = self.root, shards(self.settings)

        @dg.asset(key=["corpus", "tokenizer"], io_manager_key="directory")
        def tokenizer() -> Path:
            train_tokenizer(texts("all", 50), 400).save_pretrained(root / "tokenizer")
            return root / "tokenizer"

        @dg.asset(key=["corpus", "tokens"], io_manager_key="directory", partitions_def=partitions)
        def tokens(context: dg.AssetExecutionContext) -> Path:
            shard = context.partition_key
            splits = ["unique"] * 24 + ["oracle"] * 60 + ["heldout"] * 8
            frame = pl.DataFrame({"id": [f"{shard}-{n}" for n in range(len(splits))], "split": splits})
            encoded = encode_documents(load_tokenizer(root / "tokenizer"), texts(shard, len(splits)))
            write_token_arrays(root / shard, frame, encoded, 400)
            return root / shard

        @dg.asset(key=["pairing", "neighbor_pairs"], io_manager_key="parquet", partitions_def=partitions)
        def neighbor_pairs(context: dg.AssetExecutionContext) -> pl.DataFrame:
            shard = context.partition_key
            d1 = [f"{shard}-{n}" for n in range(24)]
            d2 = [f"{self.shards[-1]}-{(n + 1) % 24}" for n in range(24)]
            return pl.DataFrame({"d1": d1, "d2": d2, "d2_shard": self.shards[-1]})

        @dg.asset(key=["synthesis", "synthetic_tokens"], io_manager_key="directory", partitions_def=partitions)
        def synthetic_tokens(context: dg.AssetExecutionContext) -> Path:
            shard = context.partition_key
            seeds = [f"{shard}-{n}" for n in range(24)]
            frame = pl.DataFrame({"id": [f"syn-{seed}-0" for seed in seeds], "seed_id": seeds})
            encoded = encode_documents(load_tokenizer(root / "tokenizer"), texts(f"{shard}-syn", len(seeds)))
            write_token_arrays(root / f"{shard}-syn", frame, encoded, 400)
            return root / f"{shard}-syn"

        return [tokenizer, tokens, neighbor_pairs, synthetic_tokens]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """The stub corpus, and the two stages run once in order, all but the oracle; the baseline in two processes."""
    made = World(tmp_path_factory.mktemp("world"))
    assert made.run("key:corpus/tokenizer").success
    for key in ("corpus/tokens", "pairing/neighbor_pairs", "synthesis/synthetic_tokens"):
        for shard in made.shards:
            assert made.run(f"key:{key}", shard).success
    made.results["baseline"] = made.run("key:pretraining/baseline_model", "0", processes=2)
    steps = {
        "examples": ("synthesizer/tuning_examples", None),
        "checkpoint": ("synthesizer/checkpoint", None),
        "budget": ("pretraining/token_budget", None),
        "sbp": ("pretraining/sbp_model", "0"),
    }
    for name, (key, partition) in steps.items():
        made.results[name] = made.run(f"key:{key}", partition)
    return made
