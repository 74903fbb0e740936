import pytest
import torch
import torch.nn.functional as F

from sbp_assets.training.packed_layers import causal_attention


@pytest.mark.parametrize("longest", [1, 7, 64, 600])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (3, 1)])
def test_attention_in_bfloat16_is_that_of_float32_to_its_rounding(longest: int, heads: int, kv_heads: int):
    """By matrix products, and beyond 512 tokens by torch's kernel."""
    generator = torch.Generator().manual_seed(longest)
    shapes = [(2, longest, n, 16) for n in (heads, kv_heads, kv_heads)]
    inputs = [torch.randn(shape, generator=generator).bfloat16().requires_grad_() for shape in shapes]
    gradient = torch.randn(2 * longest, heads * 16, generator=generator).bfloat16()
    found = causal_attention(*inputs)
    found.backward(gradient)
    exact = [x.detach().float().requires_grad_() for x in inputs]
    query, key, value = (x.transpose(1, 2) for x in exact)
    # A mask of its own, not is_causal: what no place may see is said here once more.
    mask = torch.ones(longest, longest).tril().bool()
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
    expected = expected.transpose(1, 2).reshape(2 * longest, -1)
    expected.backward(gradient.float())
    assert found.dtype == torch.bfloat16 and found.shape == expected.shape
    pairs = [(found, expected), *((a.grad, b.grad) for a, b in zip(inputs, exact, strict=True))]
    for ours, theirs in pairs:
        # Over one token nothing but the value has a gradient.
        assert (ours.float() - theirs).norm() <= 0.01 * theirs.norm() + 1e-6
