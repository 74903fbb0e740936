import polars as pl
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from sbp_assets.training import layer_execution
from sbp_assets.training.loop import train
from sbp_assets.training.model import build_model, load_training_tokenizer
from sbp_assets.training.packed_loss import PackedLoss
from sbp_assets.training.parallel import World
from sbp_assets.training.spec import TrainingSpec
from sbp_assets.training.varlen import document_boundaries

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
        raise OSError("No working C++ compiler found in cpp.cxx: (None, 'g++')\nand a long trace")

    monkeypatch.setattr(torch, "compile", missing)
    with pytest.raises(RuntimeError) as caught:
        curve(spec.model_copy(update={"compile": True}))
    assert "No working C++ compiler" in str(caught.value) and "deployment.compile to false" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_one_compilation_serves_all_layers_and_any_number_of_documents(spec: TrainingSpec):
    """With variable-length attention, whose kernels only know shapes here."""
    counting = CompileCounterWithBackend("aot_eager")
    with torch.device("meta"):
        causal = build_model(spec.model, load_training_tokenizer(spec.tokenizer_dir), seed=0).bfloat16()
    module = PackedLoss(causal, by_document=False)
    module.use_varlen()
    for layer in causal.model.layers:
        layer.forward = torch.compile(layer.forward, backend=counting, fullgraph=True)
    ids = torch.zeros(1, 64, dtype=torch.int64, device="meta")
    for documents in (1, 3, 8):
        boundaries = document_boundaries(torch.arange(64) % (64 // documents)).to("meta")
        torch._dynamo.mark_dynamic(boundaries, 0)
        hidden = causal.model(
            input_ids=ids, position_ids=ids, attention_mask={"full_attention": None}, boundaries=boundaries, longest=64,
            use_cache=False,
        ).last_hidden_state  # fmt: skip
        hidden.float().sum().backward()
    assert counting.frame_count == 1
    torch.compiler.reset()
