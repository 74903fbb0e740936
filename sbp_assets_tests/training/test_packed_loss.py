import copy
from pathlib import Path

import pytest
import torch
from transformers import Qwen3ForCausalLM

from sbp_assets.training import packed_loss
from sbp_assets.training.model import build_model, load_training_tokenizer
from sbp_assets.training.packed_loss import PackedLoss
from sbp_assets.training.rows import IGNORED
from sbp_assets_tests.training.conftest import MODEL

# One-token documents, a row that is one document, and boundaries that differ from row to row.
ROWS = [[20, 1, 1, 30, 12], [64], [1, 63], [32, 32]]


@pytest.fixture
def causal(tokenizer_dir: Path) -> Qwen3ForCausalLM:
    """A model in which no weight has the value that would hide that it is left out."""
    causal = build_model(MODEL, load_training_tokenizer(tokenizer_dir), seed=0)
    torch.manual_seed(0)
    for parameter in causal.parameters():
        if parameter.ndim == 1:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return causal


@pytest.fixture(params=["by document", "variable length", "under a mask"])
def module(causal: Qwen3ForCausalLM, request: pytest.FixtureRequest) -> PackedLoss:
    module = PackedLoss(copy.deepcopy(causal), by_document=request.param == "by document")
    if request.param == "variable length":
        module.use_varlen()
    return module


def packed_rows() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Token ids, positions and labels of ROWS, (rows, 64) each."""
    ids = torch.randint(4, 300, (len(ROWS), 64), generator=torch.Generator().manual_seed(0))
    positions = torch.stack([torch.cat([torch.arange(n) for n in lengths]) for lengths in ROWS])
    ends = torch.cat([positions[:, 1:] == 0, torch.ones(len(ROWS), 1, dtype=torch.bool)], 1)
    return ids, positions, torch.where(ends, IGNORED, ids.roll(-1, 1))


def test_packed_documents_give_the_hidden_states_of_separate_ones(causal: Qwen3ForCausalLM, module: PackedLoss):
    ids, positions, _ = packed_rows()
    with torch.no_grad():
        packed = module.hidden_states(ids, positions).reshape(*ids.shape, -1)
        for row, lengths in enumerate(ROWS):
            for part, found in zip(ids[row].split(lengths), packed[row].split(lengths), strict=True):
                alone = causal.model(input_ids=part[None], use_cache=False).last_hidden_state[0]
                assert (alone - found).abs().max() < 1e-5


@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-4), ("bfloat16", 0.1)])
def test_layers_without_a_mask_are_those_of_transformers(
    causal: Qwen3ForCausalLM, module: PackedLoss, precision: str, tolerance: float
):
    ours, theirs = module, PackedLoss(causal, by_document=False)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    losses = []
    for module in (ours, theirs):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16"):
            loss = module(*packed_rows())
        loss.backward()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=tolerance / 10)
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None
        assert (a.grad - b.grad).abs().max() <= tolerance * b.grad.abs().max(), name


def test_packed_loss_is_the_sum_over_separate_documents(
    causal: Qwen3ForCausalLM, module: PackedLoss, monkeypatch: pytest.MonkeyPatch
):
    ids = torch.randint(4, 300, (2, 64), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(64).remainder(16).expand(2, -1)
    labels = torch.where(positions == 15, IGNORED, ids.roll(-1, 1))
    whole = module(ids, positions, labels)
    scores = [causal(input_ids=part[None]).logits[0, :-1].log_softmax(-1) for part in ids.reshape(-1, 16)]
    parts = ids.reshape(-1, 16)
    separate = -sum(s.gather(1, p[1:, None]).sum() for s, p in zip(scores, parts, strict=True))
    assert whole.item() == pytest.approx(separate.item(), rel=1e-5)
    # The chunked form, which large vocabularies take, is the same function.
    whole.backward()
    gradients = [p.grad.clone() for p in module.parameters()]
    module.zero_grad()
    monkeypatch.setattr(packed_loss, "_LOGITS_AT_ONCE", 10 * module.causal.config.vocab_size)
    chunked = module(ids, positions, labels)
    chunked.backward()
    assert chunked.item() == pytest.approx(whole.item(), rel=1e-6)
    assert all(torch.allclose(p.grad, g, atol=1e-3) for p, g in zip(module.parameters(), gradients, strict=True))


def test_rows_without_labels_have_no_loss_and_a_zero_gradient(module: PackedLoss):
    ids = torch.zeros((1, 64), dtype=torch.int64)
    loss = module(ids, torch.arange(64)[None], torch.full((1, 64), IGNORED))
    loss.backward()
    assert loss.item() == 0 and all((p.grad == 0).all() for p in module.parameters() if p.grad is not None)
