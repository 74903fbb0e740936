"""The stage's assets and checks in Dagster, on two shards of which one has no document of D, with real engines."""

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import dagster as dg
import numpy as np
import polars as pl
import pytest

from sbp_assets.corpus.tokenizer import encode_documents, load_tokenizer, related_id
from sbp_assets.dagster_support.partitions import shards
from sbp_assets.dagster_support.stage import load_assets, load_checks
from sbp_assets.definitions import build_resources
from sbp_assets.settings import Settings
from sbp_assets.storage.artifacts import content_version
from sbp_assets.storage.token_arrays import write_token_arrays
from sbp_assets.synthesis import assets, checks, quality_assets
from sbp_assets.synthesis.engine import Engines, EngineSpec, Generator, Request, Sampling
from sbp_assets.synthesis.quality import expected_rows
from sbp_assets.synthesizer.examples import write_examples
from sbp_assets_tests.synthesis.conftest import CONTEXT
from sbp_assets_tests.tiny import tiny_settings

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


def settings_of(spec: EngineSpec, root: Path, engine: str = "auto") -> Settings:
    """Settings that the running engines fit."""
    return tiny_settings(
        root,
        {
            "experiment.model.context_length": CONTEXT,
            "experiment.synthesis.dtype": spec.dtype,
            "deployment.device": spec.device,
            "deployment.generation_engine": engine,
            "deployment.engine_processes": spec.processes,
            "deployment.engine_max_sequences": spec.max_sequences,
            "deployment.gpu_memory_utilization": spec.gpu_memory_utilization,
        },
    )


def definitions_of(settings: Settings, upstream: InPlace, generator: Generator) -> dg.Definitions:
    """The stage's assets and checks over the upstream artifacts and the running engines."""
    partitions = shards(settings)
    sources = [
        dg.AssetSpec(["corpus", "documents"], partitions_def=partitions),
        dg.AssetSpec(["corpus", "tokens"], partitions_def=partitions),
        dg.AssetSpec(["corpus", "tokenizer"]),
        dg.AssetSpec(["synthesizer", "checkpoint"]),
        dg.AssetSpec(["synthesizer", "tuning_examples"]),
        dg.AssetSpec(["pairing", "embeddings"], partitions_def=partitions),
        dg.AssetSpec(["pairing", "quantizer"]),
    ]
    return dg.Definitions(
        assets=[
            *(source.with_io_manager_key("in_place") for source in sources),
            *load_assets(assets, settings),
            *load_assets(quality_assets, settings),
        ],
        asset_checks=load_checks(checks, settings),
        resources=build_resources(settings) | {"in_place": upstream, "generator": generator},
        jobs=[
            dg.define_asset_job(
                "shard",
                dg.AssetSelection.assets(
                    ["synthesis", "synthetic_documents"], ["synthesis", "synthetic_tokens"], ["synthesis", "quality"]
                ),
                partitions_def=partitions,
            ),
            dg.define_asset_job(
                "table", dg.AssetSelection.assets(["synthesis", "judgements"], ["synthesis", "quality_table"])
            ),
        ],
    )


@pytest.fixture
def instance(upstream: InPlace) -> Iterator[dg.DagsterInstance]:
    """Its event storage knows the version of the checkpoint, and nothing else."""
    with dg.DagsterInstance.ephemeral() as instance:
        model = upstream.values["checkpoint", None]
        made = {"dagster/data_version": content_version(model)}  # type: ignore[arg-type]
        instance.report_runless_asset_event(dg.AssetMaterialization(["synthesizer", "checkpoint"], tags=made))
        yield instance


class StubEngines:
    """Engines without processes that write the same words for every request; `starts` has an entry per start."""

    starts: list[EngineSpec]
    startup_seconds = 0.5
    alive = True

    def __init__(self, spec: EngineSpec) -> None:
        self.spec = spec
        self.starts.append(spec)

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, ledgers: Sequence[Path], poll: Callable[[], None]
    ) -> None:
        rows = [
            {"seed_id": request.seed_id, "rollout": request.rollout, "sampling_seed": request.sampling_seed}
            | {"text": "The same few words.", "finish_reason": "stop"}
            for request in requests
        ]
        with ledgers[0].open("a") as stream:
            stream.writelines(f"{json.dumps(row)}\n" for row in rows)
        poll()

    def stop(self) -> None:
        self.alive = False


def test_engines_are_started_once_for_the_runs_of_all_shards(
    spec: EngineSpec,
    upstream: InPlace,
    instance: dg.DagsterInstance,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sbp_assets.synthesis.engine.Engines", StubEngines)
    monkeypatch.setattr(StubEngines, "starts", [], raising=False)
    for name in ("documents", "tokens"):
        upstream.values[name, EMPTY] = upstream.values[name, FULL]
    generator = Generator()
    job = definitions_of(settings_of(spec, tmp_path, "transformers"), upstream, generator).resolve_job_def("shard")
    reused = []
    for shard in (FULL, EMPTY):
        result = job.execute_in_process(instance=instance, partition_key=shard)
        assert all(evaluation.passed for evaluation in result.get_asset_check_evaluations())
        [event] = result.asset_materializations_for_node("synthesis__synthetic_documents")
        reused.append(event.metadata["engine_reused"].value)
    assert len(StubEngines.starts) == 1 and reused == [False, True]
    engines, running = generator.engines(StubEngines.starts[0])
    assert running and engines.alive
    generator.close()
    assert not engines.alive


def test_real_pairs_take_the_place_of_synthetic_documents(
    upstream: InPlace, instance: dg.DagsterInstance, tmp_path: Path
) -> None:
    """Without an engine; the checks of both shards pass, also of the one that has no document of D."""
    tokenizer = load_tokenizer(upstream.values["tokenizer", None])  # type: ignore[arg-type]
    pairs = pl.DataFrame({"d1": [f"{FULL}-0", f"{FULL}-0", f"{FULL}-3"], "d2": [f"{FULL}-{i}" for i in (1, 2, 0)]})
    (tmp_path / "scratch").mkdir()
    tokens: dict[str, Path] = {shard: upstream.values["tokens", shard] for shard in (FULL, EMPTY)}  # type: ignore[misc]
    frames = {FULL: pairs.lazy(), EMPTY: pairs.clear().lazy()}
    examples, related = tmp_path / "examples", related_id(tokenizer)
    write_examples(examples, frames, tokens, related, 100, len(tokenizer), tmp_path / "scratch", "200MB")
    upstream.values["tuning_examples", None] = examples
    made = {"dagster/data_version": content_version(examples)}
    instance.report_runless_asset_event(dg.AssetMaterialization(["synthesizer", "tuning_examples"], tags=made))
    changes = {"experiment.synthesis.condition": "pairs"}
    settings, generator = tiny_settings(tmp_path, changes), Generator()
    job = definitions_of(settings, upstream, generator).resolve_job_def("shard")
    for shard in (FULL, EMPTY):
        result = job.execute_in_process(instance=instance, partition_key=shard)
        evaluations = result.get_asset_check_evaluations()
        assert len(evaluations) == 8 and all(evaluation.passed for evaluation in evaluations)
    rows = pl.read_parquet(tmp_path / f"data_dir/synthesis/synthetic_documents/{FULL}.parquet")
    joined = {f"{TEXTS[i]}\n\n{TEXTS[j]}" for i, j in ((0, 1), (0, 2), (3, 0))}
    assert set(rows["text"]) == joined and set(rows["seed_id"]) == {f"{FULL}-0", f"{FULL}-3"}


@pytest.mark.processes
def test_two_shards_through_dagster(
    engines: Engines,
    generator: Generator,
    spec: EngineSpec,
    upstream: InPlace,
    instance: dg.DagsterInstance,
    tmp_path: Path,
) -> None:
    definitions = definitions_of(settings_of(spec, tmp_path), upstream, generator)
    results = {
        shard: definitions.resolve_job_def("shard").execute_in_process(instance=instance, partition_key=shard)
        for shard in (FULL, EMPTY)
    }
    table = definitions.resolve_job_def("table").execute_in_process(instance=instance)
    for result in (*results.values(), table):
        evaluations = {e.check_name: e.passed for e in result.get_asset_check_evaluations()}
        evaluations.pop("synthetic_documents_are_not_truncated", None)  # random weights do not
        assert all(evaluations.values()), evaluations
    assert len(results[FULL].get_asset_check_evaluations()) == 8

    rows = pl.read_parquet(tmp_path / "data_dir" / "synthesis" / "synthetic_documents" / f"{FULL}.parquet")
    assert set(rows["seed_id"]) == {f"{FULL}-{i}" for i in range(4)} and rows["rollout"].max() > 0
    assert set(rows["engine"]) == {"vllm"}
    [materialization] = results[FULL].asset_materializations_for_node("synthesis__synthetic_documents")
    metadata = {key: value.value for key, value in materialization.metadata.items()}
    # Reused where another test of this process has started the same engine.
    assert metadata["engine_reused"] == (metadata["engine_startup_seconds"] == 0)
    assert metadata["tokens"] >= metadata["token_budget"] > 0
    assert metadata["engine"].startswith("vllm 0.")
    assert metadata["share_stop"] + metadata["share_length"] == pytest.approx(1)
    assert "Document number 0" in metadata["preview"] and "synthetic document 2" in metadata["preview"]
    tokens = np.load(tmp_path / "data_dir" / "synthesis" / "synthetic_tokens" / FULL / "tokens.npy")
    assert len(tokens) == rows["n_tokens"].sum()

    empty = pl.read_parquet(tmp_path / "data_dir" / "synthesis" / "synthetic_documents" / f"{EMPTY}.parquet")
    assert empty.is_empty() and empty.schema == rows.schema
    overall = pl.read_parquet(tmp_path / "data_dir" / "synthesis" / "quality_table.parquet")
    assert overall.select("metric", "corpus", "method").rows() == expected_rows(True, judged=False)
    assert overall.filter(metric="repetition", corpus="real")["documents"].item() == 4
    assert overall.filter(metric="duplicates", corpus="synthetic")["sample"].item() == len(rows)


@pytest.mark.processes
def test_a_shard_is_finished_by_the_engine_that_began_it(
    engines: Engines,
    transformers_engines: Engines,
    generator: Generator,
    spec: EngineSpec,
    upstream: InPlace,
    instance: dg.DagsterInstance,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With `auto`, whatever is installed; an engine that is named samples the shard from the beginning."""

    def materialise(engine: str, raises: bool = True) -> tuple[pl.DataFrame, dict[str, Any], dg.ExecuteInProcessResult]:
        definitions = definitions_of(settings_of(spec, tmp_path, engine), upstream, generator)
        result = definitions.resolve_job_def("shard").execute_in_process(
            instance=instance, partition_key=FULL, raise_on_error=raises
        )
        failed = {e.check_name for e in result.get_asset_check_evaluations() if not e.passed}
        assert failed <= {"synthetic_documents_are_not_truncated"}, "random weights seldom end a text"
        events = result.asset_materializations_for_node("synthesis__synthetic_documents") if result.success else []
        metadata = {key: value.value for event in events for key, value in event.metadata.items()}
        return pl.read_parquet(tmp_path / f"data_dir/synthesis/synthetic_documents/{FULL}.parquet"), metadata, result

    begun, metadata, _ = materialise("transformers")
    assert set(begun["engine"]) == {"transformers"} and metadata["engine"].startswith("transformers 5.")
    # As a kill leaves it: vLLM, though it is installed here, does not resume the shard.
    [ledgers] = (tmp_path / "work_dir" / "synthesis" / FULL).iterdir()
    for path in ledgers.glob("*.jsonl"):
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:2]))
    again, metadata, _ = materialise("auto")
    assert again.equals(begun) and metadata["engine"].startswith("transformers")
    assert 0 < metadata["resumed"] <= 4 and "engine_reused" in metadata

    other, metadata, _ = materialise("vllm")
    assert set(other["engine"]) == {"vllm"} and metadata["resumed"] == 0
    assert other["sampling_seed"].head(3).to_list() == begun["sampling_seed"].head(3).to_list()
    assert not other["text"].equals(begun["text"])
    [ledgers] = (tmp_path / "work_dir" / "synthesis" / FULL).iterdir()
    for path in ledgers.glob("*.jsonl"):
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:2]))
    monkeypatch.setattr("sbp_assets.synthesis.generate.installed", lambda engine: engine != "vllm")
    kept, _, result = materialise("auto", raises=False)
    assert not result.success and kept.equals(other)
    [failed] = [event for event in result.all_events if event.is_step_failure]
    assert f"shard {FULL} was begun by vllm" in str(failed.event_specific_data.error.cause)  # type: ignore[union-attr]
