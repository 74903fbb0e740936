"""Model directories: what is in them, and whether transformers, vLLM and lm-eval load them."""

from __future__ import annotations

from pathlib import Path

from sbp_assets.storage.columns import Column
from sbp_assets.training.metrics import METRIC_COLUMNS

MODEL_COLUMNS = [Column("weights", "tensors", "Of model.safetensors."), *METRIC_COLUMNS]


def model_problems(directory: Path, tokenizer_dir: Path) -> list[str]:
    """Return what is wrong with a Hugging Face model directory; empty where nothing is.

    The config, the tokenizer and the safetensors headers are read, never the weights: every tensor of the architecture
    must be there in its shape, and the vocabulary must be that of `tokenizer_dir`.
    """
    import torch
    from safetensors import safe_open
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    problems = []
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
        tokenizer = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError) as error:
        return [f"{directory} does not load: {error}"]
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        # A tied output head is stored once, as the embedding.
        expected.pop("lm_head.weight", None)

    found: dict[str, tuple[int, ...]] = {}
    for file in sorted(directory.glob("*.safetensors")):
        try:
            with safe_open(file, framework="numpy") as tensors:
                found |= {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
        except Exception as error:  # safetensors raises its own type, built in Rust.
            problems.append(f"{file.name} does not open: {error}")
    for name, shape in expected.items():
        if found.get(name) != shape:
            problems.append(f"tensor {name} should have shape {shape}, and is {found.get(name, 'missing')}")

    vocabulary = AutoTokenizer.from_pretrained(tokenizer_dir, trust_remote_code=False).get_vocab()
    if tokenizer.get_vocab() != vocabulary:
        problems.append("the tokenizer beside the model is not corpus/tokenizer")
    if config.vocab_size != len(vocabulary):
        problems.append(f"config.vocab_size is {config.vocab_size}, the tokenizer has {len(vocabulary)} tokens")
    return problems


def weight_problems(directory: Path) -> list[str]:
    """Return the tensors of a model directory, and of the weights kept in it, that are not finite or do not open.

    One tensor is in memory at a time.
    """
    from safetensors import safe_open

    from sbp_assets.training.checkpoint import best_model

    problems = []
    for folder in dict.fromkeys((directory, best_model(directory))):
        for file in sorted(folder.glob("*.safetensors")):
            try:
                with safe_open(file, framework="pt") as tensors:
                    for name in tensors.keys():  # noqa: SIM118
                        if not tensors.get_tensor(name).isfinite().all():
                            problems.append(f"tensor {name} of {file.relative_to(directory)} is not finite")
            except Exception as error:  # safetensors raises its own type, built in Rust.
                problems.append(f"{file.relative_to(directory)} does not open: {error}")
    return problems
