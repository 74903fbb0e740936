"""The pretrained model: a Llama-3-style decoder with QK-norm, as transformers' Qwen3ForCausalLM built from a config."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase, Qwen3Config, Qwen3ForCausalLM

from sbp_assets.settings import Model
from sbp_assets.training.spec import TrainingSpec

_REMEDY = "name the directory of a model that this project trained, or re-materialise that model"


def model_config(model: Model, tokenizer: PreTrainedTokenizerBase) -> Qwen3Config:
    """Return the config of `model` with the tokenizer's vocabulary; raise ValueError where it lacks a special token."""
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if getattr(tokenizer, name) is None:
            raise ValueError(f"the tokenizer {tokenizer.name_or_path} has no {name}: training needs bos, eos and pad")
    return Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=model.hidden_size,
        intermediate_size=model.intermediate_size,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        num_key_value_heads=model.kv_heads,
        head_dim=model.head_dim,
        max_position_embeddings=model.context_length,
        rope_parameters={"rope_type": "default", "rope_theta": model.rope_theta},
        tie_word_embeddings=model.tie_embeddings,
        use_sliding_window=False,
        attention_bias=False,
        attention_dropout=0.0,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )


def build_model(model: Model, tokenizer: PreTrainedTokenizerBase, seed: int) -> Qwen3ForCausalLM:
    """Return a randomly initialised float32 model on the CPU; the same seed gives the same weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen3ForCausalLM._from_config(model_config(model, tokenizer), attn_implementation="sdpa")


def load_model(directory: Path) -> Qwen3ForCausalLM:
    """Return the float32 model of a saved directory, on the CPU.

    Raises OSError where its weights are no safetensors, and ValueError where some are missing.
    """
    loaded: Any = Qwen3ForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="sdpa", use_safetensors=True, output_loading_info=True
    )
    model, loading = loaded
    if missing := sorted(loading["missing_keys"]):
        # transformers would continue with random ones.
        raise ValueError(f"model {directory} lacks {len(missing)} of its weights, such as {missing[0]}; {_REMEDY}")
    return cast(Qwen3ForCausalLM, model)


def require_model(directory: Path) -> None:
    """Raise ValueError, which names the file or directory, where `directory` holds no model to start from.

    It is checked before data are read and without loading the weights; a safetensors file says whether it is whole.
    """
    if not directory.is_dir():
        raise ValueError(f"initial model {directory}: there is no such directory; {_REMEDY}")
    config = directory / "config.json"
    if not config.is_file():
        raise ValueError(f"initial model {directory}: it has no config.json; {_REMEDY}")
    try:
        kind = json.loads(config.read_text(encoding="utf-8"))["model_type"]
    except (ValueError, LookupError, TypeError):
        raise ValueError(f"initial model: {config} is no model's config; {_REMEDY}") from None
    if kind != Qwen3Config.model_type:
        raise ValueError(f"initial model: {config} is of a {kind} model, not {Qwen3Config.model_type}; {_REMEDY}")
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise ValueError(f"initial model {directory}: it has no model.safetensors; {_REMEDY}")
    for file in files:
        try:
            with safe_open(file, "pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ValueError(f"initial model: {file} is corrupted or cut short ({error}); {_REMEDY}") from None


def initial_weights(spec: TrainingSpec, tokenizer: PreTrainedTokenizerBase) -> Qwen3ForCausalLM:
    """Return the model to start from; raise ValueError where `initial_model` has another geometry or vocabulary."""
    if spec.initial_model is None:
        return build_model(spec.model, tokenizer, spec.seed)
    model = load_model(spec.initial_model)
    wanted, found = model_config(spec.model, tokenizer).to_dict(), model.config.to_dict()
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads", "head_dim", "rope_parameters", "tie_word_embeddings")  # fmt: skip
    if lines := [f"{name}: {found[name]} → {wanted[name]}" for name in names if found[name] != wanted[name]]:
        raise ValueError(f"initial model {spec.initial_model} is not the spec's model:\n  " + "\n  ".join(lines))
    return model


def load_training_tokenizer(directory: Path) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a directory; raise OSError where it holds none."""
    return cast(PreTrainedTokenizerBase, AutoTokenizer.from_pretrained(directory, trust_remote_code=False))


def save_model(
    directory: Path,
    config: Qwen3Config,
    state: dict[str, torch.Tensor],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Write a Hugging Face directory (safetensors, config, generation config, tokenizer) that vLLM and lm-eval load.

    `state` holds the full weights on the CPU, by the model's parameter names. The name of a special token in a text is
    text to the saved tokenizer, as it was in training; lm-eval's command line has no setting for that.
    """
    # On the meta device the shell takes no memory: the weights come from `state`.
    with torch.device("meta"):
        shell = Qwen3ForCausalLM(config)
    shell.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        pad_token_id=config.pad_token_id,
    )
    shell.save_pretrained(directory, state_dict=state)
    saved = copy.deepcopy(tokenizer)
    # Written only where it is both an attribute and one that the tokenizer was initialised with.
    saved.split_special_tokens = saved.init_kwargs["split_special_tokens"] = True
    saved.save_pretrained(directory)
