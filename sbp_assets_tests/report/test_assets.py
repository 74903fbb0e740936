"""Evaluation and report in Dagster, on upstream artifacts written as the earlier stages write them."""

import shutil
from pathlib import Path

import dagster as dg
import polars as pl
import pytest

import sbp_assets.evaluation.assets as evaluation_assets
import sbp_assets.evaluation.checks as evaluation_checks
from sbp_assets.corpus.concepts import ConceptWorld
from sbp_assets.dagster_support.partitions import seeds, shards
from sbp_assets.dagster_support.stage import load_assets, load_checks
from sbp_assets.definitions import build_resources
from sbp_assets.evaluation.comparison import SCORED
from sbp_assets.evaluation.tasks import Tasks
from sbp_assets.pretraining.budget import ARMS
from sbp_assets.report import assets, checks
from sbp_assets.settings import Settings
from sbp_assets_tests.report.example_report import report_inputs
from sbp_assets_tests.tiny import tiny_settings
from sbp_assets_tests.tiny_model import save_tiny_model


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return tiny_settings(tmp_path)


@pytest.fixture
def data(settings: Settings, tmp_path: Path) -> Path:
    """An artifact store with every artifact that evaluation and report read."""
    store = Path(settings.deployment.data_dir)
    assert settings.experiment.ground_truth
    world = ConceptWorld(settings.experiment.ground_truth)
    rows = [{**world.document(n), "split": "heldout" if n % 2 else "unique"} for n in range(12)]
    documents = pl.DataFrame([{key: row[key] for key in ("id", "text", "split")} for row in rows])
    ids = documents["id"].to_list()
    keys = settings.experiment.shard_keys
    trained = save_tiny_model(tmp_path / "model")
    inputs = report_inputs()

    def write(key: str, frame: pl.DataFrame) -> None:
        path = store / f"{key}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        frame.write_parquet(path)

    for index, shard in enumerate(keys):
        write(f"corpus/documents/{shard}", documents[index :: len(keys)])
        write(f"pairing/neighbor_pairs/{shard}", pl.DataFrame({"d1": ids[:3], "d2": ids[3:6], "similarity": [0.8] * 3}))
        synthetic = {"id": ["syn-0"], "seed_id": ids[:1], "rollout": [0], "text": ["Hello"], "finish_reason": ["stop"]}
        write(f"synthesis/synthetic_documents/{shard}", pl.DataFrame(synthetic))
    write("synthesis/quality_table", inputs["quality"])
    write("synthesis/novelty", inputs["novelty"])
    write("synthesis/posterior_predictive", inputs["posterior"])
    write("pairing/pair_truth", inputs["pair_truth"])
    write("pretraining/token_budget", inputs["token_budget"])
    for arm in ARMS:
        model = store / "pretraining" / f"{arm}_model" / settings.experiment.seed_keys[0]
        shutil.copytree(trained, model)
        pl.DataFrame({"tokens": [0, 100], "heldout_loss": [6.0, 5.0]}).write_parquet(model / "metrics.parquet")
    return store


def test_models_become_scores_a_comparison_and_a_report(data: Path, settings: Settings) -> None:
    own = [*load_assets(evaluation_assets, settings), *load_assets(assets, settings)]
    own_keys = {key for definition in own for key in definition.keys}
    upstream = {spec for definition in own for spec in definition.keys_by_input_name.values()} - own_keys
    resources = build_resources(settings)
    partitions = {
        **dict.fromkeys(("documents", "neighbor_pairs", "synthetic_documents"), shards(settings)),
        **dict.fromkeys([f"{arm}_model" for arm in ARMS], seeds(settings)),
    }
    sources = [
        dg.AssetSpec(
            key,
            partitions_def=partitions.get(key.path[-1]),
            metadata={
                "dagster/io_manager_key": "directory" if key.path[-1].endswith("_model") else "parquet",
            },
        )
        for key in upstream
    ]
    defined = [*load_checks(evaluation_checks, settings), *load_checks(checks, settings)]
    definitions = [*own, *sources, *defined]
    with dg.DagsterInstance.ephemeral() as instance:
        tasks = dg.AssetKey(["evaluation", "tasks"])
        prepared = dg.materialize(
            definitions, resources=resources, instance=instance, selection=dg.AssetSelection.assets(tasks)
        )
        keys = [dg.AssetKey(["evaluation", f"{name}_scores"]) for name in SCORED]
        scored = dg.materialize(
            definitions, resources=resources, instance=instance, partition_key=settings.experiment.seed_keys[0],
            selection=dg.AssetSelection.assets(*keys),
        )  # fmt: skip
        rest = dg.materialize(
            definitions, resources=resources, instance=instance,
            selection=dg.AssetSelection.assets(*(own_keys - {tasks, *keys})),
        )  # fmt: skip
    evaluations = [
        *prepared.get_asset_check_evaluations(),
        *scored.get_asset_check_evaluations(),
        *rest.get_asset_check_evaluations(),
    ]
    assert {e.asset_check_key for e in evaluations} == {key for check in defined for key in check.check_keys}
    assert all(evaluation.passed for evaluation in evaluations), [e.metadata for e in evaluations if not e.passed]
    comparison = pl.read_parquet(data / "evaluation/comparison.parquet")
    assert {"heldout", "heldout_entries", "concept_questions", "reversed_questions"} <= set(comparison["task"])
    assert settings.experiment.ground_truth
    world = ConceptWorld(settings.experiment.ground_truth)
    for task in Tasks.load(data / "evaluation/tasks").tasks:
        asked = pl.read_parquet(data / f"evaluation/tasks/data/{task.lm_eval}.test.parquet")
        texts = asked["text"] if task.rolling else (f"{q} {c[a]}" for q, c, a in asked.rows())
        assert [world.concept_of(text) for text in texts] == list(task.clusters), "samples of a concept are a cluster"
    # One model under three names: no arm gains anything.
    assert comparison["delta_sbp"].to_list() == [0] * len(comparison)
    assert comparison["share_of_oracle_gain"].null_count() == len(comparison)
    page = (data / "evaluation/report/index.html").read_text()
    assert "reached the same held-out perplexity" in page
    (precision,) = pl.read_parquet(data / "pairing/pair_truth.parquet").filter(shard="all")["precision"]
    assert f"{precision:.1%}" in page, "the report shows what its upstream artifacts hold"
    (curves,) = rest.asset_materializations_for_node("evaluation__training_dynamics")
    assert curves.metadata["baseline_lowest_heldout_loss"].value == 5.0
    assert "| 100" in str(curves.metadata["mean_over_seeds"].value)
