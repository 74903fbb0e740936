"""The stage under Dagster: two shards of the tiny profile, real engines, and every check passes."""

from pathlib import Path
from typing import Any

import dagster as dg
import polars as pl
import pytest

from sbp_assets.cli.run import REFIT
from sbp_assets.dagster_support.partitions import shards
from sbp_assets.dagster_support.stage import load_assets, load_checks
from sbp_assets.definitions import build_resources
from sbp_assets.pairing import assets, checks
from sbp_assets.settings import Settings
from sbp_assets_tests.pairing.conftest import make_documents
from sbp_assets_tests.tiny import tiny_settings


def stub_documents(settings: Settings) -> dg.AssetsDefinition:
    """Return an asset that takes the place of the corpus stage."""

    @dg.asset(key=["corpus", "documents"], partitions_def=shards(settings), io_manager_key="parquet")
    def documents(context: dg.AssetExecutionContext) -> dg.MaterializeResult:
        rows = make_documents().filter(pl.col("shard") == context.partition_key)
        return dg.MaterializeResult(value=rows.drop("shard"))

    return documents


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dg.ExecuteInProcessResult]]:
    settings = tiny_settings(tmp_path_factory.mktemp("pairing"), {"experiment.pairing.key_blocks": 2})
    resources = build_resources(settings)
    definitions = [stub_documents(settings), *load_assets(assets, settings), *load_checks(checks, settings)]
    of_all = {check for name in ("neighbor_candidates", "neighbor_pairs") for check in of_all_shards(definitions, name)}
    partitions = {"shards": settings.experiment.shard_keys, "blocks": settings.experiment.block_keys, "all": [None]}
    instance = dg.DagsterInstance.ephemeral()
    results: dict[str, list[dg.ExecuteInProcessResult]] = {}
    # By stage, as a backfill does: the search reads every shard's index.
    for of, names in (("shards", ["corpus/documents", "pairing/embeddings"]), ("all", ["pairing/quantizer"]),
                      ("shards", ["pairing/ann_index"]), ("blocks", ["pairing/partial_candidates"]),
                      ("shards", ["pairing/neighbor_candidates"]), ("blocks", ["pairing/neighbor_edges"]),
                      ("shards", ["pairing/neighbor_pairs"])):  # fmt: skip
        for partition in partitions[of]:
            selection = dg.AssetSelection.assets(*(name.split("/") for name in names))
            selection -= dg.AssetSelection.checks(*of_all)
            results.setdefault(names[-1], []).append(
                dg.materialize(
                    definitions, selection=selection, resources=resources, instance=instance, partition_key=partition
                )
            )
    results["all shards"] = [
        dg.materialize(definitions, selection=dg.AssetSelection.checks(*of_all), resources=resources, instance=instance)
    ]
    return results


def test_a_quantizer_stays_until_it_is_to_be_refitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sbp_assets.pairing.quantizer._LEAST_SAMPLE", 30)
    settings = tiny_settings(tmp_path)
    resources, instance = build_resources(settings), dg.DagsterInstance.ephemeral()
    definitions = [stub_documents(settings), *load_assets(assets, settings)]

    def made(of: Settings = settings, config: bool = False) -> tuple[bool, str]:
        definitions = [stub_documents(of), *load_assets(assets, of)]
        result = dg.materialize(
            definitions,
            selection=dg.AssetSelection.assets(["pairing", "quantizer"]),
            resources={**resources, "settings": of},
            instance=instance,
            run_config=REFIT if config else None,
        )
        version = instance.get_latest_materialization_event(dg.AssetKey(["pairing", "quantizer"]))
        assert version and version.asset_materialization and version.asset_materialization.tags
        return (
            metadata_of(result, "pairing/quantizer")["refitted"],
            version.asset_materialization.tags["dagster/data_version"],
        )

    def embed(shards: list[str]) -> None:
        for shard in shards:
            names = dg.AssetSelection.assets(["corpus", "documents"], ["pairing", "embeddings"])
            dg.materialize(definitions, selection=names, resources=resources, instance=instance, partition_key=shard)

    embed(["00000", "00001"])
    refitted, first = made()
    assert refitted
    table = tmp_path / "data_dir/pairing/embeddings/00001.parquet"
    pl.read_parquet(table).head(5).write_parquet(table)
    assert made() == (False, first), "other documents, the same settings"
    failed = dg.AssetCheckEvaluation(dg.AssetKey(["pairing", "quantizer"]), "codes_keep_directions", False, {})
    instance.report_runless_asset_event(failed)
    assert made()[0], "what has failed its check is not kept"
    passed = dg.AssetCheckEvaluation(dg.AssetKey(["pairing", "quantizer"]), "codes_keep_directions", True, {})
    instance.report_runless_asset_event(passed)
    refitted, second = made(config=True)
    assert refitted and second != first
    assert made(tiny_settings(tmp_path, {"experiment.pairing.centring": 0}))[0], "other settings"
    fit = tmp_path / "data_dir/pairing/quantizer/fit.json"
    fit.write_text(fit.read_text() + " ")
    assert made()[0], "what is corrupted is not kept"


def of_all_shards(definitions: list[dg.AssetsDefinition], name: str) -> list[dg.AssetCheckKey]:
    """Return the checks of an asset that are of no shard."""
    specs = [spec for definition in definitions for spec in definition.check_specs]
    return [spec.key for spec in specs if spec.asset_key.path[-1] == name and spec.partitions_def is None]


def metadata_of(result: dg.ExecuteInProcessResult, name: str) -> dict[str, Any]:
    events = result.asset_materializations_for_node(name.replace("/", "__"))
    return {key: value.value for key, value in events[0].metadata.items()}


def test_every_shard_passes_its_checks(runs: dict[str, list[dg.ExecuteInProcessResult]]) -> None:
    for name, results in runs.items():
        for result in results:
            evaluations = result.get_asset_check_evaluations()
            if name != "all shards":
                assert {e.asset_key.to_user_string() for e in evaluations} == {name}
            assert all(e.passed for e in evaluations), evaluations


def test_checks_of_all_shards_are_of_no_partition(runs: dict[str, list[dg.ExecuteInProcessResult]]) -> None:
    (result,) = runs["all shards"]
    found = {e.check_name: e.partition for e in result.get_asset_check_evaluations()}
    assert found == {"candidates_are_known_over_all_shards": None, "pairs_are_distinct_over_all_shards": None}


def test_rows_and_figures_are_recorded(runs: dict[str, list[dg.ExecuteInProcessResult]]) -> None:
    first, second = (metadata_of(result, "pairing/embeddings") for result in runs["pairing/embeddings"])
    assert first["dagster/row_count"] + second["dagster/row_count"] == 40 and first["dimensions"] == 384
    assert second["engine_reused"] is True and second["engine_startup_seconds"] == 0
    assert first["documents_per_second"] > 0
    pairs = metadata_of(runs["pairing/neighbor_pairs"][0], "pairing/neighbor_pairs")
    assert pairs["dagster/row_count"] == pairs["pairs"] > 0
    assert pairs["pairs_across_shards"] > 0
    assert "nearest neighbours" in pairs["funnel"] and "█" in pairs["similarity"] and "seed" in pairs["preview"]


def test_artifacts_hold_the_contract(runs: dict[str, list[dg.ExecuteInProcessResult]]) -> None:
    path = Path(metadata_of(runs["pairing/neighbor_pairs"][0], "pairing/neighbor_pairs")["path"])
    assert pl.read_parquet(path).columns == ["d1", "d2", "d2_shard", "similarity", "shared_shingles"]
    index = Path(metadata_of(runs["pairing/ann_index"][0], "pairing/ann_index")["path"])
    assert sorted(p.name for p in index.iterdir()) == [
        "codes.npy",
        "digest.txt",
        "keys.parquet",
        "probes.npy",
        "vectors.npy",
    ]
    edges = metadata_of(runs["pairing/neighbor_edges"][1], "pairing/neighbor_edges")
    assert sorted(p.name for p in Path(edges["path"]).iterdir()) == ["counts.parquet", "edges.parquet"]
