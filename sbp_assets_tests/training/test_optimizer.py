import math
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from sbp_assets.training.model import build_model, load_training_tokenizer
from sbp_assets.training.optimizer import learning_rate, make_optimizers
from sbp_assets.training.packed_loss import PackedLoss
from sbp_assets.training.spec import TrainingSpec
from sbp_assets_tests.training.conftest import OPTIMIZER


def test_learning_rate_warms_up_peaks_and_ends_at_the_final_share():
    settings = OPTIMIZER.model_copy(update={"warmup": 0.1, "final_learning_rate": 0.2, "learning_rate": 1.0})
    rates = [learning_rate(step, 100, settings) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert max(rates) == rates[9] and rates[-1] == pytest.approx(0.2)
    assert all(a > b for a, b in pairwise(rates[9:]))
    assert learning_rate(0, 1, settings) == 1.0


def test_muon_moves_the_layers_matrices_and_adamw_all_else(spec: TrainingSpec, tokenizer_dir: Path):
    module = PackedLoss(build_model(spec.model, load_training_tokenizer(tokenizer_dir), seed=0))
    settings = OPTIMIZER.model_copy(update={"method": "muon", "weight_decay": 0.0})
    optimizers = make_optimizers(module, settings)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    for p in module.parameters():
        p.grad = torch.randn(p.shape, generator=generator)
    for optimizer in optimizers:
        optimizer.step()
    for name, p in module.named_parameters():
        step = p.detach() - before[name]
        root_mean_square = step.norm() / math.sqrt(step.numel())
        if p.ndim == 2 and ".layers." in name:
            # All singular values are about equal, and the step is as long as AdamW's usually are: 0.2 of the rate.
            values = torch.linalg.svdvals(step)
            assert values.max() / values.min() < 2.5, name
            assert root_mean_square == pytest.approx(0.2 * settings.learning_rate, rel=0.3), name
        else:
            # AdamW's first step: the learning rate, by the sign of the gradient.
            assert torch.allclose(step, -settings.learning_rate * p.grad.sign(), atol=1e-4), name
