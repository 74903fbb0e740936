from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from sentence_transformers import SentenceTransformer
from torch import nn

from sbp_assets.pairing import embed_layers
from sbp_assets.pairing.embed_layers import PackedLinear, attend, use_fast_layers
from sbp_assets_tests.pairing.tiny_embedders import write_bert, write_qwen3


@settings(deadline=None, max_examples=40)
@given(
    documents=st.integers(1, 4),
    groups=st.sampled_from([(4, 4), (4, 2), (3, 1)]),
    tokens=st.integers(1, 20),
    kind=st.sampled_from(["none", "padding", "left padding", "causal"]),
    scores=st.sampled_from([1, 500, 1000, 10**6]),
    seed=st.integers(0, 99),
)
def test_attention_is_that_of_torch_however_it_is_cut(
    documents: int, groups: tuple[int, int], tokens: int, kind: str, scores: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    heads, kv_heads = groups
    shapes = ((documents, tokens, n, 8) for n in (heads, kv_heads, kv_heads))
    query, key, value = (torch.randn(shape, generator=generator).transpose(1, 2) for shape in shapes)
    lengths = torch.randint(1, tokens + 1, (documents,), generator=generator)
    places = torch.arange(tokens)
    mask = {
        "none": None,
        "padding": (places < lengths[:, None])[:, None, None, :],
        "left padding": (places >= tokens - lengths[:, None])[:, None, None, :],
        "causal": (places[:, None] >= places)[None, None],
    }[kind]
    if mask is not None:
        mask = mask.expand(-1, 1, tokens, tokens)
    before, embed_layers._SCORES = embed_layers._SCORES, scores
    try:
        found = attend(query, key, value, mask, 0.3)
    finally:
        embed_layers._SCORES = before
    wanted = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(found, wanted)


def test_a_place_that_sees_nothing_gives_no_nan() -> None:
    query, key, value = torch.randn(3, 1, 2, 4, 8).unbind()
    mask = torch.ones(4, 4, dtype=torch.bool).tril()
    mask[:, :2] = False
    assert attend(query, key, value, mask[None, None], 1.0).isfinite().all()


@pytest.mark.parametrize("bias", [True, False])
def test_a_packed_layer_is_the_layer(bias: bool) -> None:
    linear, x = nn.Linear(48, 32, bias, dtype=torch.bfloat16), torch.randn(2, 5, 48, dtype=torch.bfloat16)
    with torch.inference_mode():
        torch.testing.assert_close(PackedLinear(linear)(x), linear(x), atol=0.01, rtol=0.01)


@pytest.mark.parametrize("write", [write_bert, write_qwen3])
def test_a_model_takes_the_layers_and_computes_the_same(tmp_path: Path, write) -> None:  # type: ignore[no-untyped-def]
    directory = str(write(tmp_path))
    kwargs = {"dtype": torch.bfloat16}
    plain, fast = (SentenceTransformer(directory, device="cpu", model_kwargs=kwargs) for _ in range(2))
    use_fast_layers(fast)
    packed = [module for module in fast.modules() if isinstance(module, PackedLinear)]
    assert (
        not any(type(module) is nn.Linear for module in fast[0].modules()) if packed else not embed_layers._can_pack()
    )
    texts = ["river sea", "flood star oven chess bread bishop", "water"]
    wanted, found = (model.encode(texts, convert_to_tensor=True).float() for model in (plain, fast))
    assert (F.cosine_similarity(wanted, found) > 0.999).all()


def test_a_float32_model_stays_as_it_is(tmp_path: Path) -> None:
    model = SentenceTransformer(str(write_bert(tmp_path)), device="cpu")
    use_fast_layers(model)
    assert model[0].config._attn_implementation == "sdpa"
    assert not any(isinstance(module, PackedLinear) for module in model.modules())
