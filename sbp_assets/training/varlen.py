"""Attention of packed rows on a CUDA device by torch's variable-length kernels (FlashAttention), without a mask.

Under a mask, attention of a row of 4,096 tokens computes all pairs of its tokens, those of two documents too, and the
mask keeps torch from its fast kernels. The variable-length kernels take documents end to end and their boundaries.

What was run of this module: everything but the kernels, which need a GPU; none was at hand. Tests compare `attend` on
the CPU, where it computes document by document, with attention under a mask, and call the kernels on torch's meta
device, which checks arguments and shapes alone. `varlen_works` therefore compares the kernels' numbers, forward and
backward, on the device itself, before a run relies on them.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, Qwen3ForCausalLM

_NAME = "sbp_varlen"  # among transformers' implementations of attention
# torch 2.11 takes as many heads of keys as of queries, and has no such argument.
_GROUPED: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen_attn).parameters else {}
_PROBE_LENGTHS = (70, 1, 200, 33)
_TOLERANCE = 0.05  # of the largest number; bfloat16 has a relative precision of 0.004


def use_varlen(causal: Qwen3ForCausalLM) -> None:
    """Let `causal` compute attention by `attend`; its forward pass then takes `boundaries` and `longest`, and no mask.

    All tokens must be in one row, (1, tokens).
    """
    AttentionInterface.register(_NAME, _attention)
    causal.set_attn_implementation(_NAME)


def document_boundaries(positions: torch.Tensor) -> torch.Tensor:
    """Return where documents begin, and the end of the last, (documents + 1,) int32.

    `positions`, (tokens,), are those of the tokens in their documents: 0 where one begins.
    """
    starts = torch.nonzero(positions == 0).flatten()
    boundaries = F.pad(starts, (0, 1), value=len(positions)).to(torch.int32)
    # Compiled layers are then not compiled a second time when the number of documents changes.
    torch._dynamo.mark_dynamic(boundaries, 0)
    return boundaries


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, boundaries: torch.Tensor, longest: int
) -> torch.Tensor:
    """Return causal attention within each document, (tokens, heads, width).

    `query` is (tokens, heads, width), `key` and `value` (tokens, kv_heads, width); no document has more tokens than
    `longest`. On a CPU the documents are computed one by one.
    """
    if query.device.type == "cpu":
        return _one_by_one(query, key, value, boundaries)
    if not _GROUPED:
        key, value = (part.repeat_interleave(query.shape[1] // part.shape[1], 1) for part in (key, value))
    return varlen_attn(query, key, value, boundaries, boundaries, longest, longest, window_size=(-1, 0), **_GROUPED)  # type: ignore[return-value]


def varlen_works(device: torch.device, heads: int, kv_heads: int, width: int) -> bool:
    """Return whether `attend` in bfloat16 runs on `device` and gives the numbers of attention one by one in float32.

    Compared are the result and the gradients of query, key and value, for heads of this geometry.
    """
    generator = torch.Generator().manual_seed(0)
    tokens = sum(_PROBE_LENGTHS)
    inputs = [
        torch.randn(tokens, count, width, generator=generator).bfloat16() for count in (heads, kv_heads, kv_heads)
    ]
    back = torch.randn(tokens, heads, width, generator=generator)
    boundaries = torch.tensor([0, *itertools.accumulate(_PROBE_LENGTHS)], dtype=torch.int32, device=device)
    try:
        kernels = functools.partial(attend, boundaries=boundaries, longest=tokens)
        found = _with_gradients(kernels, [part.to(device) for part in inputs], back)
    except (RuntimeError, TypeError):  # the second: another version of torch, with other arguments
        return False
    exact = functools.partial(_one_by_one, boundaries=boundaries)
    wanted = _with_gradients(exact, [part.float() for part in inputs], back)
    return all(bool((a - b).abs().max() <= _TOLERANCE * b.abs().max()) for a, b in zip(found, wanted, strict=True))


def _with_gradients(
    function: Callable[..., torch.Tensor], inputs: list[torch.Tensor], back: torch.Tensor
) -> list[torch.Tensor]:
    """Return the function's result and its inputs' gradients for `back`, all in float32 on the CPU."""
    inputs = [part.detach().requires_grad_() for part in inputs]
    result = function(*inputs)
    gradients = torch.autograd.grad(result, inputs, back.to(result.device, result.dtype))
    return [part.detach().float().cpu() for part in (result, *gradients)]


def _one_by_one(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, boundaries: torch.Tensor) -> torch.Tensor:
    found = []
    for start, stop in itertools.pairwise(boundaries.tolist()):
        q, k, v = (part[None, start:stop].transpose(1, 2) for part in (query, key, value))
        found.append(F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)[0].transpose(0, 1))
    return torch.cat(found)


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: None,
    *,
    boundaries: torch.Tensor,
    longest: int,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Be one of transformers' implementations of attention: of (1, heads, tokens, width) return (1, tokens, …)."""
    # Under autocast the norms of queries and keys give float32, which the kernels do not take.
    query, key, value = (part[0].transpose(0, 1).to(value.dtype) for part in (query, key, value))
    return attend(query, key, value, boundaries, longest)[None], None
