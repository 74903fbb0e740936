"""The two training stages end to end: real workers, real IO managers, real checks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import dagster as dg
import polars as pl
import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sbp_assets.pretraining.assets import execution_fields
from sbp_assets.pretraining.model_files import model_problems, weight_problems
from sbp_assets.settings import Deployment
from sbp_assets.training.spec import TrainingSpec
from sbp_assets_tests.pretraining.conftest import World

pytestmark = pytest.mark.processes

MODELS = ("baseline", "sbp", "checkpoint")


def metadata(result: dg.ExecuteInProcessResult) -> dict[str, object]:
    (event,) = result.get_asset_materialization_events()
    return {key: value.value for key, value in event.materialization.metadata.items()}


@pytest.mark.parametrize("step", [*MODELS, "examples", "budget"])
def test_step_succeeds_with_all_its_checks(world: World, step: str) -> None:
    result = world.results[step]
    assert result.success, [str(event.step_failure_data) for event in result.get_step_failure_events()]
    evaluations = result.get_asset_check_evaluations()
    assert len(evaluations) == {"examples": 1, "checkpoint": 3, "budget": 3}.get(step, 4)
    assert all(evaluation.passed for evaluation in evaluations)


def test_every_arm_trained_on_the_same_tokens(world: World) -> None:
    table = pl.read_parquet(world.root / "data_dir/pretraining/token_budget.parquet")
    trained = {metadata(world.results[arm])["tokens"] for arm in ("baseline", "sbp")}
    assert trained == {metadata(world.results["budget"])["tokens_per_arm"]}
    assert table["arm"].to_list() == ["baseline", "sbp", "sbp", "oracle", "oracle", "synthesizer", "synthesizer"]


@pytest.mark.parametrize("step", MODELS)
def test_models_report_what_a_person_asks_for(world: World, step: str) -> None:
    values = metadata(world.results[step])
    for name in ("steps", "tokens", "parameters", "train_loss", "heldout_loss", "best_heldout_loss",
                 "best_heldout_tokens", "tokens_per_second", "flops", "wall_seconds", "peak_memory_mb"):  # fmt: skip
        assert float(values[name]) > 0, name  # type: ignore[arg-type]
    assert str(values["loss_curve"]).startswith("![")


def test_a_model_loads_and_counts_its_parameters(world: World) -> None:
    model = AutoModelForCausalLM.from_pretrained(world.made("pretraining/sbp_model", "0"))
    assert model.num_parameters() == metadata(world.results["sbp"])["parameters"]


def test_trackers_get_a_folder_for_each_model() -> None:
    fields = execution_fields(Deployment(tensorboard_dir="/curves", wandb_project="sbp"), "baseline_model", "0")
    assert fields["tensorboard_dir"] == "/curves/baseline_model/0" and fields["wandb_project"] == "sbp"
    assert execution_fields(Deployment(), "baseline_model", "0")["tensorboard_dir"] is None


def test_the_baseline_ran_in_two_processes(world: World) -> None:
    record = json.loads((world.made("pretraining/baseline_model", "0") / "run.json").read_text())
    assert record["processes"] == 2


def test_an_arm_refuses_a_budget_of_other_tokens(world: World) -> None:
    path = world.root / "data_dir/pretraining/token_budget.parquet"
    table = pl.read_parquet(path)
    table.with_columns(tokens_read=pl.col("tokens_read") + 1).write_parquet(path)
    try:
        result = world.run("key:pretraining/sbp_model", "0")
    finally:
        table.write_parquet(path)
    assert not result.success
    (failure,) = result.get_step_failure_events()
    assert "re-materialise pretraining/token_budget" in str(failure.step_failure_data.error)


@pytest.mark.parametrize("folder", ["", "best"])
def test_check_sees_weights_that_are_not_numbers(world: World, tmp_path: Path, folder: str) -> None:
    broken = tmp_path / "model"
    shutil.copytree(world.made("pretraining/sbp_model", "0"), broken)
    shutil.copytree(world.made("pretraining/sbp_model", "0"), broken / folder, dirs_exist_ok=True)
    assert weight_problems(broken) == []
    weights = load_file(broken / folder / "model.safetensors")
    weights["model.norm.weight"][3] = float("inf")
    save_file(weights, broken / folder / "model.safetensors", metadata={"format": "pt"})
    (problem,) = weight_problems(broken)
    assert problem == f"tensor model.norm.weight of {Path(folder) / 'model.safetensors'} is not finite"
    (broken / folder / "model.safetensors").write_bytes(b"cut")
    assert "does not open" in weight_problems(broken)[0]


def test_check_sees_a_broken_model_directory(world: World, tmp_path: Path) -> None:
    tokenizer = world.made("corpus/tokenizer")
    broken = tmp_path / "model"
    shutil.copytree(world.made("pretraining/sbp_model", "0"), broken)
    assert model_problems(broken, tokenizer) == []
    config = json.loads((broken / "config.json").read_text())
    (broken / "config.json").write_text(json.dumps(config | {"vocab_size": config["vocab_size"] + 1}))
    assert any("config.vocab_size" in problem for problem in model_problems(broken, tokenizer))
    assert any("embed_tokens" in problem for problem in model_problems(broken, tokenizer))
    (broken / "config.json").write_text(json.dumps(config))
    (broken / "model.safetensors").write_bytes(b"\x00")
    assert len(model_problems(broken, tokenizer)) > world.settings.experiment.model.layers
    (broken / "config.json").unlink()
    assert "does not load" in model_problems(broken, tokenizer)[0]


def test_deployment_settings_reach_the_training_run() -> None:
    chosen = {"activation_checkpointing": True, "compile": True, "microbatch_tokens": 99, "device": "cpu"}
    fields = execution_fields(Deployment(**chosen), "baseline_model", "0")
    assert fields.items() >= chosen.items() and fields.keys() <= TrainingSpec.model_fields.keys()
