"""What benchmarks.gpu trains and embeds, and how much of it fits a GPU at a time."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import Qwen3Config

from sbp_assets.settings import Model, load_settings
from sbp_assets.training.device import Device

_LOSS_BYTES = 1.5 * 4 * (1 << 28)  # of the logits that are computed at once, and their gradient


@dataclass(frozen=True)
class Size:
    """What is trained and embedded, and on what."""

    model: Model
    vocabulary: int
    document_tokens: int  # of the median document
    documents: int
    tokens_per_step: int
    embedder: Qwen3Config
    embedded_tokens: int  # of a document, at most
    embedding_batch: int


def paper() -> Size:
    """Return the sizes of the profile paper_200b: Llama 3's vocabulary, and DCLM's documents of 828 tokens on average.

    The embedding model has the geometry of Qwen3-Embedding-0.6B.
    """
    settings = load_settings("paper_200b", environ={})
    return Size(
        settings.experiment.model, vocabulary=128_256, document_tokens=700, documents=2048, tokens_per_step=32_768,
        embedder=Qwen3Config(
            vocab_size=151_669, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28,
            num_attention_heads=16, num_key_value_heads=8, head_dim=128, max_position_embeddings=32_768,
        ),
        embedded_tokens=settings.experiment.pairing.max_tokens,
        embedding_batch=settings.deployment.embedding_batch_size,
    )  # fmt: skip


def tiny() -> Size:
    """Return sizes with which every part runs on a CPU in seconds."""
    return Size(
        Model(hidden_size=64, layers=3, heads=4, kv_heads=2, head_dim=16, intermediate_size=128, context_length=64),
        vocabulary=256, document_tokens=20, documents=64, tokens_per_step=512,
        embedder=Qwen3Config(
            vocab_size=256, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=16, max_position_embeddings=64,
        ),
        embedded_tokens=32, embedding_batch=16,
    )  # fmt: skip


SIZES = {"paper": paper, "tiny": tiny}


def activation_bytes(model: Model) -> int:
    """Return the bytes that a layer keeps of a token for the backward pass under bfloat16 autocast, about.

    That is, per element, float32 inputs and outputs of norms (and their casts) over the hidden size, the same of
    queries, keys and values, and four bfloat16 tensors of the feed-forward layer.
    """
    heads = (model.heads + 2 * model.kv_heads) * model.head_dim
    return 26 * model.hidden_size + 20 * heads + 8 * model.intermediate_size


def microbatch_tokens(size: Size, device: Device, checkpointing: bool) -> int:
    """Return the tokens that fit a forward and backward pass on one device, in whole rows: one, two or four.

    Counted, not measured: 15% of the memory are left for what the count misses. 18 bytes per parameter are taken by
    weights, gradients, two moments, and the weights in bfloat16.
    """
    model = size.model
    if device == "cpu":
        return size.tokens_per_step // 2
    loss = _LOSS_BYTES + 12 * size.vocabulary * model.hidden_size
    free = 0.85 * torch.cuda.get_device_properties(0).total_memory - 18 * model.parameters(size.vocabulary) - loss
    layer = activation_bytes(model)
    # Checkpointing keeps each layer's float32 input, and one layer's activations and their gradients.
    token = model.layers * 4 * model.hidden_size + 2 * layer if checkpointing else (model.layers + 1) * layer
    rows = free / (token * model.context_length)
    fitting = [count for count in (1, 2, 4) if count <= rows]
    return max(fitting, default=1) * model.context_length
