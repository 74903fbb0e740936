"""How the layers of an embedding model compute in bfloat16 on a CPU, with little moved through memory.

What is computed stays the same, up to rounding: `python -m benchmarks.embedding` prints what is saved, and the cosine
of each vector to that of float32. Everything else of a model, its pooling among it, stays as its directory says.
"""

from __future__ import annotations

from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Transformer
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

_NAME = "sbp_embedding"  # among transformers' implementations of attention

# Scores that are computed at a time, so that they stay in a core's cache from the first product to the second: 2**18 to
# 2**20 are about equally fast, 2**16 is slower.
_SCORES = 2**19
# Of longer documents one head's scores would take too much memory.
_LONGEST = 2048

# Families of models whose layers read nothing of a linear layer but its result.
_PLAIN_LINEAR = ("bert", "roberta", "xlm-roberta", "qwen3")


def use_fast_layers(model: SentenceTransformer) -> None:
    """Let the transformer of `model`, where it is in bfloat16 on a CPU, compute attention and projections as here.

    A model of another precision or device, or of a kind that cannot take these, stays as it is.
    """
    transformer = model[0]
    if not isinstance(transformer, Transformer):
        return
    layers = transformer.model
    if layers.device.type != "cpu" or layers.dtype != torch.bfloat16:
        return
    # torch's own kernel is fast in bfloat16 where there is AMX, which it needs.
    if transformer.config._attn_implementation == "sdpa" and not torch.cpu.get_capabilities().get("amx_bf16"):
        AttentionInterface.register(_NAME, _attention)
        AttentionMaskInterface.register(_NAME, sdpa_mask)
        layers.set_attn_implementation(_NAME)
    if transformer.config.model_type in _PLAIN_LINEAR and _can_pack():
        _pack(layers)


class PackedLinear(nn.Module):
    """A linear layer whose weight is kept in the order in which oneDNN reads it: 1.1 times as fast.

    torch has this operator for the code that its compiler writes; it needs no compiler.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None)
        self.bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x, (…, inputs), times the weight, plus the bias: (…, outputs)."""
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, scaling: float
) -> torch.Tensor:
    """Return attention as two products with a softmax between them, a few heads at a time.

    `query` is (documents, heads, tokens, width), so are the result and, but for fewer heads, `key` and `value`. `mask`
    is true where a query may see a key; it is (documents or 1, 1, tokens, tokens), None where all see all.
    In bfloat16 without AMX this is 1.3 to 2 times as fast as scaled_dot_product_attention; in float32 it is slower.
    """
    documents, heads, tokens, _ = query.shape
    groups = heads // key.shape[1]
    if groups > 1:
        key, value = (part.repeat_interleave(groups, 1) for part in (key, value))
    query, key, value = (query * scaling).contiguous(), key.contiguous(), value.contiguous()
    hidden = None if mask is None else (~mask).expand(documents, 1, tokens, tokens)
    result = torch.empty_like(query)
    # Chunks are of whole documents, or of heads of one document.
    some_documents = max(1, _SCORES // (heads * tokens**2))
    some_heads = max(1, _SCORES // tokens**2) if some_documents == 1 else heads
    for first in range(0, documents, some_documents):
        for head in range(0, heads, some_heads):
            chunk = slice(first, first + some_documents), slice(head, head + some_heads)
            q, k, v, out = (part[chunk].flatten(0, 1) for part in (query, key, value, result))
            scores = torch.bmm(q, k.transpose(1, 2))
            if hidden is not None:
                # The least number and not infinity: a place of padding on the left sees no key, and must not be NaN.
                least = torch.finfo(scores.dtype).min
                scores.unflatten(0, result[chunk].shape[:2]).masked_fill_(hidden[chunk[0]], least)
            torch.bmm(torch.softmax(scores, -1, out=scores), v, out=out)
    return result


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Be one of transformers' implementations of attention: of (documents, heads, …) return (documents, tokens, …)."""
    tokens = query.shape[2]
    known = attention_mask is None or attention_mask.dtype == torch.bool
    if tokens > _LONGEST or key.shape[2] != tokens or not known or others.get("position_bias") is not None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, is_causal=is_causal, **others
        )
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if attention_mask is None and causal:
        attention_mask = torch.ones(1, 1, tokens, tokens, dtype=torch.bool).tril_()
    found = attend(query, key, value, attention_mask, query.shape[-1] ** -0.5 if scaling is None else scaling)
    return found.transpose(1, 2), None


def _pack(layers: nn.Module) -> None:
    for name, layer in layers.named_children():
        if type(layer) is nn.Linear:
            setattr(layers, name, PackedLinear(layer))
        else:
            _pack(layer)


def _can_pack() -> bool:
    """Return whether oneDNN multiplies in bfloat16 here, by way of an operator that torch does not document."""
    linear, x = nn.Linear(64, 32, dtype=torch.bfloat16), torch.ones(3, 64, dtype=torch.bfloat16)
    try:
        if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return False
        with torch.inference_mode():
            return torch.allclose(PackedLinear(linear)(x), linear(x), atol=0.05)
    except (AttributeError, RuntimeError):
        return False
