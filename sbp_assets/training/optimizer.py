"""The optimizer of a training run, and its learning rate over the steps."""

from __future__ import annotations

import math

import torch
from torch import nn

from sbp_assets.settings import Optimizer


def learning_rate(step: int, steps: int, optimizer: Optimizer) -> float:
    """Return the rate of the 0-based `step`: linear warm-up to the peak, then a cosine that ends at the final rate."""
    warmup = max(1, round(optimizer.warmup * steps))
    if step < warmup:
        return optimizer.learning_rate * (step + 1) / warmup
    share = (step + 1 - warmup) / max(1, steps - warmup)
    final = optimizer.final_learning_rate
    return optimizer.learning_rate * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * share)))


def make_optimizer(module: nn.Module, settings: Optimizer) -> torch.optim.AdamW:
    """Return the AdamW of `settings` over the parameters of `module`; weight decay applies to matrices alone."""
    parameters = list(module.parameters())
    return torch.optim.AdamW(
        [
            # Norm weights are not decayed; embeddings are matrices and are.
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": settings.weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        # 0.7M parameters on one core, whole step: fused 117 ms, foreach 122 ms, neither 139 ms (busy machine).
        fused=True,
    )
