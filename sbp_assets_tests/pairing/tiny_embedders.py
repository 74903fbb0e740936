"""Embedding models of random weights, saved as sentence-transformers saves them."""

from __future__ import annotations

from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.modules import Module, Normalize, Transformer
from sentence_transformers.sentence_transformer.modules import Pooling
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast, Qwen3Config, Qwen3Model

_LINE = "river sea flood star oven chess bread bishop water salt time valley north crust dark"
WORDS = _LINE.split()
END, PAD, PREFIX = "<|end|>", "<|pad|>", "Instruct:"
LIMIT = 40


def write_qwen3(folder: Path, ends: bool = True) -> Path:
    """Write a model of Qwen3-Embedding's architecture: causal, last token pooled, END appended by the tokenizer."""
    torch.manual_seed(0)
    model = Qwen3Model(
        Qwen3Config(
            vocab_size=32, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            head_dim=16, intermediate_size=96, max_position_embeddings=64, initializer_range=0.2,
        )
    )  # fmt: skip
    return _write(folder, model, "lasttoken", ends)


def write_bert(folder: Path, *others: Module) -> Path:
    """Write a BERT that pools the mean; `others` follow its pooling."""
    torch.manual_seed(0)
    model = BertModel(
        BertConfig(
            vocab_size=32, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96,
            max_position_embeddings=64, initializer_range=0.2,
        )
    )  # fmt: skip
    return _write(folder, model, "mean", True, *others)


def _write(folder: Path, model: torch.nn.Module, pooling: str, ends: bool, *others: Module) -> Path:
    vocabulary = {word: i for i, word in enumerate([PAD, END, "<|unknown|>", PREFIX, *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unknown|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if ends:
        tokenizer.post_processor = processors.TemplateProcessing(f"$A {END}", special_tokens=[(END, vocabulary[END])])
    model.eval().save_pretrained(folder / "layers")  # type: ignore[operator]
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, model_input_names=["input_ids", "attention_mask"]
    )
    fast.save_pretrained(folder / "layers")
    transformer = Transformer(str(folder / "layers"), max_seq_length=LIMIT)
    modules = [transformer, Pooling(transformer.get_embedding_dimension(), pooling), *others, Normalize()]  # type: ignore[arg-type]
    SentenceTransformer(modules=modules, device="cpu").save(str(folder / "embedder"), create_model_card=False)
    return folder / "embedder"
