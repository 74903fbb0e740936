"""The loss of packed rows under a causal language model."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint as recompute
from transformers import Qwen3ForCausalLM

from sbp_assets.training.rows import IGNORED

_LOGITS_AT_ONCE = 1 << 28  # Above this many, logits are computed in chunks and recomputed in the backward pass.


class PackedLoss(nn.Module):
    """Summed next-token loss of packed rows.

    transformers builds the mask that keeps documents apart from restarting `position_ids`, once per forward pass, if
    and only if no attention mask is given and no cache is used (measured otherwise: logits differ by 0.30).
    """

    def __init__(self, causal: Qwen3ForCausalLM) -> None:
        super().__init__()
        self.causal = causal

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the scalar sum of -log p(label), in nats, over labels that are not IGNORED.

        All arguments are (rows, context) int64.
        """
        hidden = self.causal.model(input_ids=input_ids, position_ids=position_ids, use_cache=False).last_hidden_state
        # Logits only where there is a label: a third to a half of a tuning example has none.
        supervised = labels != IGNORED
        hidden, labels = hidden[supervised], labels[supervised]
        chunk = max(1, _LOGITS_AT_ONCE // self.causal.config.vocab_size)
        if len(labels) <= chunk:
            return self._loss(hidden, labels)
        parts = [
            recompute(self._loss, h, y, use_reentrant=False)
            for h, y in zip(hidden.split(chunk), labels.split(chunk), strict=True)
        ]
        return torch.stack(parts).sum()

    def _loss(self, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.causal.lm_head(hidden).float(), labels, reduction="sum")
