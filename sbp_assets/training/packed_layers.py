"""Layers of a Qwen3 model that compute packed documents on the CPU with few passes over memory.

They take the place of transformers' layers and hold the same parameters under the same names: a state dictionary fits
either. Attention is computed within each document instead of over whole rows under a mask, projections of one input
are one matrix product, and the norms, the rotary embedding and the gated activation have backward passes of their
own, which read and write their tensors once where autograd's composition of small operations does so several times.
`python -m benchmarks.training` prints what that saves. Liger-Kernel does the like on GPUs; it has no CPU code.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from transformers import Qwen3ForCausalLM
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3MLP, Qwen3RMSNorm

# A document at least so long as this share of the longest is computed in one grid with it: fewer grids are fewer calls,
# more of them less padding.
_SHORTEST = 0.7

# Attention in bfloat16 over documents of at most so many tokens is computed by plain matrix products: torch's kernel
# for CPUs takes 3.5 times as long at 120 tokens, 2.0 times at 300 and 512, 1.1 times at 1,000 (forward and backward,
# AVX-512 with bfloat16). Its memory grows with the square of the length. In float32 torch's kernel is the faster one.
_LONGEST_BY_PRODUCTS = 512


@dataclass(frozen=True)
class _Grid:
    """Documents of similar length, padded to the longest."""

    tokens: torch.Tensor  # (documents * longest,) the token of the sequence at each place; at padding, any
    filled: torch.Tensor  # (tokens of the documents,) the places that are no padding
    documents: int
    longest: int


@dataclass(frozen=True)
class Packing:
    """Where the documents of a packed sequence are."""

    grids: list[_Grid]
    order: torch.Tensor  # (tokens,) for each token, its place among the filled ones of all grids

    @classmethod
    def of(cls, positions: torch.Tensor) -> Packing:
        """Return the packing of a sequence by the position of each token in its document, (tokens,); starts are 0."""
        starts = torch.nonzero(positions == 0).flatten()
        lengths = torch.diff(starts, append=starts.new_tensor([len(positions)]))
        lengths, by_length = torch.sort(lengths, descending=True, stable=True)
        starts = starts[by_length]
        sizes, grids, first = lengths.tolist(), [], 0
        while first < len(sizes):
            longest, last = sizes[first], first + 1
            while last < len(sizes) and sizes[last] >= _SHORTEST * longest:
                last += 1
            places = torch.arange(longest)
            tokens = (starts[first:last, None] + places).clamp_(max=len(positions) - 1).flatten()
            filled = torch.nonzero((places < lengths[first:last, None]).flatten()).flatten()
            grids.append(_Grid(tokens, filled, last - first, longest))
            first = last
        read = torch.cat([grid.tokens[grid.filled] for grid in grids])
        order = torch.empty_like(read)
        order[read] = torch.arange(len(read))
        return cls(grids, order)


def use_packed_layers(causal: Qwen3ForCausalLM) -> None:
    """Put the layers of this module into `causal`, whose forward pass then takes a `packing` and no mask."""
    model = causal.model
    for layer in model.layers:
        layer.self_attn = PackedAttention(layer.self_attn)
        layer.mlp = FusedMLP(layer.mlp)
        layer.input_layernorm = FusedRMSNorm(layer.input_layernorm)
        layer.post_attention_layernorm = FusedRMSNorm(layer.post_attention_layernorm)
    model.norm = FusedRMSNorm(model.norm)


class FusedRMSNorm(nn.Module):
    """A root mean square norm, computed in float32."""

    def __init__(self, norm: Qwen3RMSNorm) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = norm.weight, norm.variance_epsilon

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return the normalised last dimension, in the type in which matrix products are computed."""
        return _Norm.apply(hidden_states, self.weight, self.variance_epsilon)


class FusedMLP(nn.Module):
    """The gated feed-forward layer, whose two first projections are one matrix product."""

    def __init__(self, mlp: Qwen3MLP) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Return down(silu(gate(x)) * up(x)), of the input's shape."""
        both = F.linear(hidden_states, torch.cat([self.gate_proj.weight, self.up_proj.weight]))
        return self.down_proj(_GatedSilu.apply(both))


class PackedAttention(nn.Module):
    """Causal attention of grouped queries within each document of a packed sequence."""

    def __init__(self, attention: Qwen3Attention) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = attention.q_proj, attention.k_proj, attention.v_proj
        self.o_proj, self.q_norm, self.k_norm = attention.o_proj, attention.q_norm, attention.k_norm
        self.head_dim = attention.head_dim
        self.heads = attention.q_proj.out_features // attention.head_dim
        self.kv_heads = attention.k_proj.out_features // attention.head_dim

    def forward(
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        packing: Packing,
        **_: object,
    ) -> tuple[torch.Tensor, None]:
        """Return the attention's output, (1, tokens, hidden), and None for the weights, which are not kept."""
        tokens, heads, kv_heads, width = hidden_states.shape[1], self.heads, self.kv_heads, self.head_dim
        weight = torch.cat([self.q_proj.weight, self.k_proj.weight, self.v_proj.weight])
        projected = F.linear(hidden_states[0], weight).view(tokens, heads + 2 * kv_heads, width)
        unrotated, value = projected.split([heads + kv_heads, kv_heads], 1)
        scale = torch.cat([self.q_norm.weight.expand(heads, -1), self.k_norm.weight.expand(kv_heads, -1)])
        cosine, sine = (part.transpose(0, 1) for part in position_embeddings)
        rotated = _NormAndRotation.apply(unrotated, scale, cosine, sine, self.q_norm.variance_epsilon)
        together = torch.cat([rotated, value], 1)
        found = []
        for grid in packing.grids:
            query, key, of = (
                together.index_select(0, grid.tokens)
                .view(grid.documents, grid.longest, -1, width)
                .split([heads, kv_heads, kv_heads], 2)
            )
            found.append(causal_attention(query, key, of).index_select(0, grid.filled))
        return self.o_proj(torch.cat(found).index_select(0, packing.order))[None], None


def causal_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Return the attention of grouped queries to their own and earlier places, (documents * longest, heads * width).

    `query` is (documents, longest, heads, width), `key` and `value` the same with fewer heads.
    """
    documents, longest, heads, width = query.shape
    if query.dtype != torch.bfloat16 or longest > _LONGEST_BY_PRODUCTS:
        query, key, value = (x.transpose(1, 2) for x in (query, key, value))
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return mixed.transpose(1, 2).reshape(-1, heads * width)
    # Queries of one key follow one another: (documents * key's heads, queries per key * longest, width).
    kv_heads, group = key.shape[2], heads // key.shape[2]
    queries = query.view(documents, longest, kv_heads, group, width).permute(0, 2, 3, 1, 4)
    keys, values = (x.transpose(1, 2).reshape(-1, longest, width) for x in (key, value))
    later = query.new_full((longest, longest), -torch.inf).triu_(1).repeat(group, 1)
    mixed = _AttentionByProducts.apply(queries.reshape(-1, group * longest, width), keys, values, later)
    return mixed.view(documents, kv_heads, group, longest, width).permute(0, 3, 1, 2, 4).reshape(-1, heads * width)


class _AttentionByProducts(torch.autograd.Function):
    """softmax(mask + query @ key.T / sqrt(width)) @ value, over batches of matrices, with all weights in memory."""

    @staticmethod
    def forward(ctx, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor):  # type: ignore[no-untyped-def, override]
        weights = torch.softmax(torch.baddbmm(mask, query, key.mT, alpha=query.shape[-1] ** -0.5), -1)
        ctx.save_for_backward(query, key, value, weights)
        return torch.bmm(weights, value)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):  # type: ignore[no-untyped-def, override]
        query, key, value, weights = ctx.saved_tensors
        scale = query.shape[-1] ** -0.5
        of_scores = torch._softmax_backward_data(torch.bmm(gradient, value.mT), weights, -1, weights.dtype)
        of_query, of_key = torch.bmm(of_scores, key), torch.bmm(of_scores.mT, query)
        return of_query.mul_(scale), of_key.mul_(scale), torch.bmm(weights.mT, gradient), None


class _Norm(torch.autograd.Function):
    """weight * x / sqrt(mean(x**2) + eps) over the last dimension."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:  # type: ignore[no-untyped-def, override]
        normal, inverse = _normalised(x.float(), eps)
        ctx.save_for_backward(normal, inverse, weight)
        # What follows is a matrix product: under autocast in its type, without a pass of its own to cast.
        return torch.mul(normal, weight, out=torch.empty_like(normal, dtype=product_dtype(x)))

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):  # type: ignore[no-untyped-def, override]
        normal, inverse, weight = ctx.saved_tensors
        wide = gradient.float()
        of_weight = (wide * normal).flatten(0, -2).sum(0)
        return _through_normalised(wide * weight, normal, inverse), of_weight, None


class _NormAndRotation(torch.autograd.Function):
    """The norm over each head's width, its weight, and the rotary embedding; x is (tokens, heads, width)."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, weight: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, eps: float):  # type: ignore[no-untyped-def, override]
        normal, inverse = _normalised(x.float(), eps)
        ctx.save_for_backward(normal, inverse, weight, cosine, sine)
        return _rotated(normal * weight, cosine, sine, 1).to(x.dtype)

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):  # type: ignore[no-untyped-def, override]
        normal, inverse, weight, cosine, sine = ctx.saved_tensors
        back = _rotated(gradient.float(), cosine, sine, -1)
        of_weight = (back * normal).sum(0)
        return _through_normalised(back.mul_(weight), normal, inverse).to(gradient.dtype), of_weight, None, None, None


class _GatedSilu(torch.autograd.Function):
    """silu(gate) * up, where the last dimension of the input is gate and up in turn."""

    @staticmethod
    def forward(ctx, both: torch.Tensor) -> torch.Tensor:  # type: ignore[no-untyped-def, override]
        gate, up = both.chunk(2, -1)
        share = torch.sigmoid(gate)
        active = gate * share
        ctx.save_for_backward(both, share, active)
        return active * up

    @staticmethod
    def backward(ctx, gradient: torch.Tensor) -> torch.Tensor:  # type: ignore[no-untyped-def, override]
        both, share, active = ctx.saved_tensors
        result = torch.empty_like(both)
        of_gate, of_up = result.chunk(2, -1)
        torch.mul(gradient, active, out=of_up)
        # The derivative of silu: share + active * (1 - share).
        torch.mul(active, share, out=of_gate)
        of_gate.neg_().add_(active).add_(share).mul_(both.chunk(2, -1)[1]).mul_(gradient)
        return result


def product_dtype(x: torch.Tensor) -> torch.dtype:
    """Return the type in which matrix products of `x` are computed: autocast's where it is enabled."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _normalised(x: torch.Tensor, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return x over the root mean square of its last dimension, and the inverse of the latter, (…, 1)."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    inverse = norm.square_().mul_(1 / x.shape[-1]).add_(eps).rsqrt_()
    return x * inverse, inverse


def _through_normalised(gradient: torch.Tensor, normal: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """Return the gradient by x, of that by x's normalised values; the latter is overwritten."""
    along = (gradient * normal).mean(-1, keepdim=True)
    return gradient.addcmul_(normal, along, value=-1).mul_(inverse)


def _rotated(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, direction: int) -> torch.Tensor:
    """Return x (tokens, heads, width) rotated by its positions' angles, (tokens, 1, width); -1 rotates back."""
    half = x.shape[-1] // 2
    turned = x * cosine
    turned[..., :half].addcmul_(x[..., half:], sine[..., :half], value=-direction)
    turned[..., half:].addcmul_(x[..., :half], sine[..., :half], value=direction)
    return turned
