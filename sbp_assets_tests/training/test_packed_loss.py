from pathlib import Path

import pytest
import torch

from sbp_assets.training import packed_loss
from sbp_assets.training.model import build_model, load_training_tokenizer
from sbp_assets.training.packed_loss import PackedLoss
from sbp_assets.training.rows import IGNORED
from sbp_assets_tests.training.conftest import MODEL


@pytest.fixture
def module(tokenizer_dir: Path) -> PackedLoss:
    return PackedLoss(build_model(MODEL, load_training_tokenizer(tokenizer_dir), seed=0))


def test_packed_documents_give_the_logits_of_separate_ones(module: PackedLoss):
    # One-token documents, a row that is one document, and boundaries that differ from row to row.
    rows = [[20, 1, 1, 30, 12], [64], [1, 63], [32, 32]]
    ids = torch.randint(4, 300, (len(rows), 64), generator=torch.Generator().manual_seed(0))
    positions = torch.stack([torch.cat([torch.arange(n) for n in lengths]) for lengths in rows])
    with torch.no_grad():
        packed = module.causal(input_ids=ids, position_ids=positions, use_cache=False).logits
        for row, lengths in enumerate(rows):
            for part, expected in zip(ids[row].split(lengths), packed[row].split(lengths), strict=True):
                alone = module.causal(input_ids=part[None]).logits[0]
                assert (alone - expected).abs().max() < 1e-5


def test_packed_loss_is_the_sum_over_separate_documents(module: PackedLoss, monkeypatch: pytest.MonkeyPatch):
    ids = torch.randint(4, 300, (2, 64), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(64).remainder(16).expand(2, -1)
    labels = torch.where(positions == 15, IGNORED, ids.roll(-1, 1))
    whole = module(ids, positions, labels)
    scores = [module.causal(input_ids=part[None]).logits[0, :-1].log_softmax(-1) for part in ids.reshape(-1, 16)]
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
