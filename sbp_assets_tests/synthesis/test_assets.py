"""The stage's assets and checks in Dagster, on two shards of which one has no document of D, with real engines."""

from pathlib import Path

import dagster as dg
import numpy as np
import polars as pl
import pytest

from sbp_assets.corpus.tokenizer import encode_documents, load_tokenizer
from sbp_assets.partitions import DEPLOYMENT, EXPERIMENT, SHARDS
from sbp_assets.storage.artifacts import content_version
from sbp_assets.storage.io_managers import DirectoryIOManager, ParquetIOManager
from sbp_assets.storage.token_arrays import write_token_arrays
from sbp_assets.synthesis import assets, checks
from sbp_assets.synthesis.engine import Engines, EngineSpec
from sbp_assets.synthesis.quality import expected_rows
from sbp_assets_tests.synthesis.conftest import CONTEXT

FULL, EMPTY = "00000", "00001"
TEXTS = [f"Document number {number} of the <|eos|> little corpus." for number in range(6)]


class InPlace(dg.IOManager):
    """Hands an upstream value on as it is, by asset and partition."""

    def __init__(self) -> None:
        self.values: dict[tuple[str, str | None], object] = {}

    def handle_output(self, context: dg.OutputContext, obj: object) -> None:
        raise NotImplementedError

    def load_input(self, context: dg.InputContext) -> object:
        name = context.asset_key.path[-1]
        if not context.has_asset_partitions:
            return self.values[name, None]
        if context.has_partition_key:
            return self.values[name, context.partition_key]
        return {key: self.values[name, key] for key in context.asset_partition_keys}


@pytest.fixture
def upstream(checkpoint: Path, tmp_path: Path) -> InPlace:
    manager = InPlace()
    tokenizer = load_tokenizer(checkpoint)
    manager.values["tokenizer", None] = manager.values["checkpoint", None] = checkpoint
    for shard, splits in ((FULL, ["unique"] * 4 + ["oracle", "heldout"]), (EMPTY, ["oracle"] * 6)):
        documents = pl.DataFrame({"id": [f"{shard}-{i}" for i in range(6)], "text": TEXTS, "split": splits})
        write_token_arrays(
            tmp_path / shard, documents.select("id", "split"), encode_documents(tokenizer, TEXTS), len(tokenizer)
        )
        manager.values["documents", shard] = documents.lazy()
        manager.values["tokens", shard] = tmp_path / shard
    return manager


def test_two_shards_through_dagster(
    engines: Engines, spec: EngineSpec, upstream: InPlace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment = EXPERIMENT.model_copy(
        update={
            "model": EXPERIMENT.model.model_copy(update={"context_length": CONTEXT}),
            "synthesis": EXPERIMENT.synthesis.model_copy(update={"dtype": spec.dtype}),
        }
    )
    deployment = DEPLOYMENT.model_copy(
        update={
            "device": spec.device,
            "engine_processes": spec.processes,
            "engine_max_sequences": spec.max_sequences,
            "gpu_memory_utilization": spec.gpu_memory_utilization,
            "work_dir": str(tmp_path / "work"),
        }
    )
    monkeypatch.setattr(assets, "EXPERIMENT", experiment)
    monkeypatch.setattr(assets, "DEPLOYMENT", deployment)
    sources = [
        dg.AssetSpec(["corpus", "documents"], partitions_def=SHARDS),
        dg.AssetSpec(["corpus", "tokens"], partitions_def=SHARDS),
        dg.AssetSpec(["corpus", "tokenizer"]),
        dg.AssetSpec(["synthesizer", "checkpoint"]),
    ]
    definitions = dg.Definitions(
        assets=[
            *(source.with_io_manager_key("in_place") for source in sources),
            *dg.load_assets_from_modules([assets]),
        ],
        asset_checks=dg.load_asset_checks_from_modules([checks]),
        resources={
            "in_place": upstream,
            "parquet": ParquetIOManager(str(tmp_path / "data"), cache=str(tmp_path / "cache")),
            "directory": DirectoryIOManager(str(tmp_path / "data"), cache=str(tmp_path / "cache")),
        },
        jobs=[
            dg.define_asset_job(
                "shard",
                dg.AssetSelection.assets(
                    ["synthesis", "synthetic_documents"], ["synthesis", "synthetic_tokens"], ["synthesis", "quality"]
                ),
                partitions_def=SHARDS,
            ),
            dg.define_asset_job(
                "table", dg.AssetSelection.assets(["synthesis", "judgements"], ["synthesis", "quality_table"])
            ),
        ],
    )
    with dg.DagsterInstance.ephemeral() as instance:
        model = upstream.values["checkpoint", None]
        made = {"dagster/data_version": content_version(model)}  # type: ignore[arg-type]
        instance.report_runless_asset_event(dg.AssetMaterialization(["synthesizer", "checkpoint"], tags=made))
        results = {
            shard: definitions.resolve_job_def("shard").execute_in_process(instance=instance, partition_key=shard)
            for shard in (FULL, EMPTY)
        }
        table = definitions.resolve_job_def("table").execute_in_process(instance=instance)
    for result in (*results.values(), table):
        evaluations = {e.check_name: e.passed for e in result.get_asset_check_evaluations()}
        evaluations.pop("syntheses_end_by_themselves", None)  # random weights do not
        assert all(evaluations.values()), evaluations
    assert len(results[FULL].get_asset_check_evaluations()) == 8

    rows = pl.read_parquet(tmp_path / "data" / "synthesis" / "synthetic_documents" / f"{FULL}.parquet")
    assert set(rows["seed_id"]) == {f"{FULL}-{i}" for i in range(4)} and rows["rollout"].max() > 0
    [materialization] = results[FULL].asset_materializations_for_node("synthesis__synthetic_documents")
    metadata = {key: value.value for key, value in materialization.metadata.items()}
    # Reused where another test of this process has started the same engine.
    assert metadata["engine_reused"] == (metadata["engine_startup_seconds"] == 0)
    assert metadata["tokens"] >= metadata["token_budget"] > 0
    assert metadata["share_stop"] + metadata["share_length"] == pytest.approx(1)
    assert "Document number 0" in metadata["preview"] and "synthesis 2" in metadata["preview"]
    tokens = np.load(tmp_path / "data" / "synthesis" / "synthetic_tokens" / FULL / "tokens.npy")
    assert len(tokens) == rows["n_tokens"].sum()

    empty = pl.read_parquet(tmp_path / "data" / "synthesis" / "synthetic_documents" / f"{EMPTY}.parquet")
    assert empty.is_empty() and empty.schema == rows.schema
    overall = pl.read_parquet(tmp_path / "data" / "synthesis" / "quality_table.parquet")
    assert overall.select("metric", "corpus", "method").rows() == expected_rows(True, judged=False)
    assert overall.filter(metric="repetition", corpus="real")["documents"].item() == 4
    assert overall.filter(metric="duplicates", corpus="synthetic")["sample"].item() == len(rows)
