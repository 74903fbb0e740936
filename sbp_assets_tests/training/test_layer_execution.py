from pathlib import Path

import polars as pl
import pytest
import torch

from sbp_assets.training import layer_execution
from sbp_assets.training.loop import train
from sbp_assets.training.parallel import World
from sbp_assets.training.spec import TrainingSpec
from sbp_assets_tests.training.conftest import Launch

CPU = World(torch.device("cpu"))


def curve(spec: TrainingSpec) -> pl.DataFrame:
    trained = train(spec, CPU)
    assert trained is not None
    return trained.metrics


@pytest.mark.parametrize(
    "chosen",
    [
        {"activation_checkpointing": True},
        pytest.param({"compile": True}, marks=pytest.mark.processes),
        pytest.param({"activation_checkpointing": True, "compile": True}, marks=pytest.mark.processes),
    ],
    ids=lambda chosen: " and ".join(chosen),
)
def test_execution_settings_do_not_change_the_curve(spec: TrainingSpec, chosen: dict[str, bool]):
    usual, other = curve(spec), curve(spec.model_copy(update=chosen))
    for column in ("train_loss", "heldout_loss", "gradient_norm"):
        assert (usual[column] - other[column]).drop_nulls().abs().max() < 1e-4, column


def test_activation_checkpointing_computes_layers_again(spec: TrainingSpec, monkeypatch: pytest.MonkeyPatch):
    layers: list[torch.nn.Module] = []
    original = layer_execution.prepare_layers

    def counting(module, *arguments):  # type: ignore[no-untyped-def]
        original(module, *arguments)
        module.causal.model.layers[0].self_attn.register_forward_hook(lambda *_: layers.append(module))

    monkeypatch.setattr("sbp_assets.training.loop.prepare_layers", counting)
    spec = spec.model_copy(update={"heldout": [], "microbatch_tokens": 256, "steps": 2})
    curve(spec.model_copy(update={"activation_checkpointing": True}))
    assert len(layers) == 2 * 2


def test_a_missing_compiler_is_one_line(spec: TrainingSpec, monkeypatch: pytest.MonkeyPatch):
    def missing(function):  # type: ignore[no-untyped-def]
        raise OSError(
            "No working C++ compiler found in torch._inductor.config.cpp.cxx: (None, 'g++')\nand a long trace"
        )

    monkeypatch.setattr(torch, "compile", missing)
    with pytest.raises(RuntimeError) as caught:
        curve(spec.model_copy(update={"compile": True}))
    assert "No working C++ compiler" in str(caught.value) and "deployment.compile to false" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.processes
def test_shards_of_checkpointed_and_compiled_layers_draw_the_curve_of_one_process(
    spec: TrainingSpec, launch: Launch, tmp_path: Path
):
    usual = curve(spec)
    chosen = spec.model_copy(
        update={
            "sharding": "full", "activation_checkpointing": True, "compile": True, "work_dir": tmp_path / "sharded",
        }
    )  # fmt: skip
    process = launch(chosen, 2)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    found = pl.read_parquet(chosen.output_dir / "metrics.parquet")
    for column in ("train_loss", "heldout_loss", "gradient_norm"):
        assert (usual[column] - found[column]).drop_nulls().abs().max() < 1e-4, column
