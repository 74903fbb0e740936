"""A random-initialised model with a byte-level tokenizer, and one start of either engine for the whole folder."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest

from sbp_assets.storage.artifacts import content_version
from sbp_assets.synthesis.engine import Engines, EngineSpec, Generator

SPECIAL = ["<|bos|>", "<|eos|>", "<|pad|>", "<|related|>"]
BOS, EOS, PAD, RELATED = range(4)
CONTEXT = 96


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3 model of 30 thousand random weights: it writes noise and stops now and then."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

    directory = tmp_path_factory.mktemp("checkpoint")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(SPECIAL + alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token=SPECIAL[BOS], eos_token=SPECIAL[EOS], pad_token=SPECIAL[PAD]
    )
    tokenizer.add_special_tokens({"additional_special_tokens": [SPECIAL[RELATED]]})
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=320,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        intermediate_size=64,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    Qwen3ForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def spec(checkpoint: Path) -> EngineSpec:
    return EngineSpec(
        engine="vllm",
        checkpoint=checkpoint,
        version=content_version(checkpoint),
        context_length=CONTEXT,
        dtype="float32",
        device="cpu",
        processes=2,
        max_sequences=8,
        gpu_memory_utilization=0.5,
    )


class BothGenerators(Generator):
    """One generator per engine, so that a test of the one does not stop the other's, which takes seconds to start."""

    def __init__(self) -> None:
        self._generators = {"vllm": Generator(), "transformers": Generator()}

    def engines(self, spec: EngineSpec) -> tuple[Engines, bool]:
        return self._generators[spec.engine].engines(spec)

    def close(self) -> None:
        for generator in self._generators.values():
            generator.close()


@pytest.fixture(scope="session")
def generator() -> Iterator[Generator]:
    """Engines of both kinds, each started by the first test that needs it."""
    generator = BothGenerators()
    yield generator
    generator.close()


@pytest.fixture
def engines(spec: EngineSpec, generator: Generator) -> Engines:
    """Two running vLLM processes: the start, some 15 seconds, is paid once unless a test ends them."""
    pytest.importorskip("vllm", reason="vLLM is not installed")
    return generator.engines(spec)[0]


@pytest.fixture(scope="session")
def transformers_spec(spec: EngineSpec) -> EngineSpec:
    return dataclasses.replace(spec, engine="transformers")


@pytest.fixture
def transformers_engines(transformers_spec: EngineSpec, generator: Generator) -> Engines:
    """Two running processes of the transformers engine."""
    return generator.engines(transformers_spec)[0]
