"""The loss of packed rows under a causal language model."""

from __future__ import annotations

import torch
from torch import nn
from transformers import Qwen3ForCausalLM

from sbp_assets.training.packed_layers import Packing, product_dtype, use_packed_layers
from sbp_assets.training.rows import IGNORED
from sbp_assets.training.varlen import document_boundaries, use_varlen

_LOGITS_AT_ONCE = 1 << 28  # positions times vocabulary; what is more is computed part by part, to bound the memory


class PackedLoss(nn.Module):
    """Summed next-token loss of packed rows.

    With `by_document`, attention is computed document by document (sbp_assets.training.packed_layers): on the CPU.
    After `use_varlen` it is computed by torch's variable-length kernels (sbp_assets.training.varlen): on CUDA.
    Otherwise transformers builds the mask that keeps documents apart from restarting `position_ids`, once per forward
    pass, if and only if no attention mask is given and no cache is used (measured otherwise: logits differ by 0.30).
    """

    def __init__(self, causal: Qwen3ForCausalLM, by_document: bool = True) -> None:
        super().__init__()
        self.causal, self.by_document, self.varlen = causal, by_document, False
        if by_document:
            use_packed_layers(causal)

    def use_varlen(self) -> None:
        """Compute attention by torch's variable-length kernels from now on, not under a mask."""
        use_varlen(self.causal)
        self.varlen = True

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the scalar sum of -log p(label) over labels that are not IGNORED; all arguments (rows, tokens)."""
        hidden = self.hidden_states(input_ids, position_ids)
        labels = labels.reshape(hidden.shape[:-1])
        # Logits only where there is a label: a third to a half of a tuning example has none.
        supervised = labels != IGNORED
        return self._loss(hidden[supervised], labels[supervised])

    def hidden_states(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        """Return the last layer's states of packed rows, (rows, tokens, hidden); without a mask, in one row."""
        if not self.by_document and not self.varlen:
            return self.causal.model(input_ids=input_ids, position_ids=position_ids, use_cache=False).last_hidden_state
        positions = position_ids.reshape(1, -1)
        kept_apart = (
            {"packing": Packing.of(positions[0])}
            if self.by_document
            # A bound that is the same in every batch: the kernels take it, and compiled code is not compiled again.
            else {"boundaries": document_boundaries(positions[0]), "longest": position_ids.shape[1]}
        )
        return self.causal.model(
            input_ids=input_ids.reshape(1, -1),
            position_ids=positions,
            # A mask in a mapping is taken for prepared; there is none.
            attention_mask={"full_attention": None},
            use_cache=False,
            **kept_apart,
        ).last_hidden_state

    def _loss(self, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        rows = max(1, _LOGITS_AT_ONCE // self.causal.config.vocab_size)
        return _SummedCrossEntropy.apply(hidden, self.causal.lm_head.weight, labels, rows)


class _SummedCrossEntropy(torch.autograd.Function):
    """The summed cross-entropy of labels under the logits hidden @ weight.T, `rows` positions at a time.

    The gradients are computed beside the loss, so that no logits are kept or computed twice (as in Liger-Kernel's fused
    linear cross-entropy, for GPUs).
    """

    @staticmethod
    def forward(ctx, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, rows: int) -> torch.Tensor:  # type: ignore[no-untyped-def, override]
        dtype = product_dtype(weight)
        inputs, table = hidden.to(dtype), weight.to(dtype)
        backward = any(ctx.needs_input_grad)
        total = torch.zeros((), device=hidden.device)
        if backward:
            of_hidden, of_weight = torch.empty_like(hidden), torch.zeros_like(weight, dtype=torch.float32)
        for start in range(0, len(labels), rows):
            part, wanted = inputs[start : start + rows], labels[start : start + rows, None]
            logits = (part @ table.T).float()
            norms = logits.logsumexp(-1, keepdim=True)
            total += (norms - logits.gather(1, wanted)).sum()
            if backward:
                # The gradient by the logits: their probabilities, less 1 at the label.
                error = logits.sub_(norms).exp_()
                error.scatter_add_(1, wanted, error.new_full(wanted.shape, -1))
                error = error.to(dtype)
                of_hidden[start : start + rows] = error @ table
                of_weight += error.T @ part
        if backward:
            ctx.save_for_backward(of_hidden, of_weight.to(weight.dtype))
        return total

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):  # type: ignore[no-untyped-def, override]
        of_hidden, of_weight = ctx.saved_tensors
        # A scalar does not change the type of what it multiplies.
        return of_hidden * gradient, of_weight * gradient, None, None
