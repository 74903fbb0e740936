"""The optimizers of a training run, and their learning rate over the steps."""

from __future__ import annotations

import math

import torch

from sbp_assets.settings import Optimizer
from sbp_assets.training.packed_loss import PackedLoss


def learning_rate(step: int, steps: int, optimizer: Optimizer) -> float:
    """Return the rate of the 0-based `step`: linear warm-up to the peak, then a cosine that ends at the final rate."""
    warmup = max(1, round(optimizer.warmup * steps))
    if step < warmup:
        return optimizer.learning_rate * (step + 1) / warmup
    share = (step + 1 - warmup) / max(1, steps - warmup)
    final = optimizer.final_learning_rate
    return optimizer.learning_rate * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * share)))


def make_optimizers(module: PackedLoss, settings: Optimizer) -> list[torch.optim.Optimizer]:
    """Return the optimizers of `settings` over the parameters of `module`: AdamW, and before it Muon where chosen.

    All of them take one learning rate. Muon (Jordan et al., 2024) orthogonalises the updates of the layers' matrices
    and scales them to the root mean square of AdamW's (Liu et al., "Muon is scalable for LLM training", 2025, section
    2.2). Weight decay applies to matrices alone.
    """
    chosen = {p for p in module.causal.model.layers.parameters() if p.ndim >= 2} if settings.method == "muon" else set()
    others = [p for p in module.parameters() if p not in chosen]
    adamw = torch.optim.AdamW(
        [
            # Norm weights are not decayed; embeddings are matrices and are.
            {"params": [p for p in others if p.ndim >= 2], "weight_decay": settings.weight_decay},
            {"params": [p for p in others if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        # 0.7M parameters on one core, whole step: fused 117 ms, foreach 122 ms, neither 139 ms (busy machine).
        fused=True,
    )
    if not chosen:
        return [adamw]
    muon = torch.optim.Muon(
        [p for p in module.parameters() if p in chosen],
        lr=settings.learning_rate,
        weight_decay=settings.weight_decay,
        momentum=settings.momentum,
        adjust_lr_fn="match_rms_adamw",
    )
    return [muon, adamw]
