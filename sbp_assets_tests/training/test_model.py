import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from sbp_assets.corpus.tokenizer import encode_documents, load_tokenizer
from sbp_assets.training.loop import train
from sbp_assets.training.model import build_model, load_training_tokenizer, model_config, save_model
from sbp_assets.training.parallel import World
from sbp_assets.training.spec import TrainingSpec
from sbp_assets_tests.training.conftest import MODEL, texts


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def saved(request: pytest.FixtureRequest, tmp_path: Path, tokenizer_dir: Path) -> Path:
    settings = MODEL.model_copy(update={"tie_embeddings": request.param})
    tokenizer = load_training_tokenizer(tokenizer_dir)
    model = build_model(settings, tokenizer, seed=1)
    assert sum(p.numel() for p in model.parameters()) == settings.parameters(len(tokenizer))
    save_model(tmp_path / "model", model_config(settings, tokenizer), model.state_dict(), tokenizer)
    return tmp_path / "model"


def test_same_seed_same_weights(tokenizer_dir: Path):
    tokenizer = load_training_tokenizer(tokenizer_dir)
    first, second, other = (build_model(MODEL, tokenizer, seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["model.embed_tokens.weight"], other["model.embed_tokens.weight"])


def test_saved_directory_loads_unchanged(saved: Path, tokenizer_dir: Path):
    loaded = AutoModelForCausalLM.from_pretrained(saved)
    tied = json.loads((saved / "config.json").read_text())["tie_word_embeddings"]
    built = build_model(MODEL.model_copy(update={"tie_embeddings": tied}), load_training_tokenizer(tokenizer_dir), 1)
    ids = torch.arange(4, 40)[None]
    assert torch.equal(loaded(ids).logits, built(ids).logits)
    # transformers must not take the tokenizer for that of the architecture's namesake.
    original, copy = AutoTokenizer.from_pretrained(tokenizer_dir), AutoTokenizer.from_pretrained(saved)
    for text in ["The colour of Arlo is red.", "naïve 12345  \n\tend", "<|bos|>x<|related|>"]:
        # The name of a special token is text to it, as to `encode_texts`.
        ids = original(text, split_special_tokens=True).input_ids
        assert copy(text).input_ids == ids and copy.decode(ids) == original.decode(ids) == text
    assert (copy.bos_token_id, copy.eos_token_id, copy.pad_token_id) == (0, 1, 2)


VLLM = """
import json, sys
from vllm import LLM, SamplingParams
llm = LLM(sys.argv[1], dtype="float32", enforce_eager=True, max_num_seqs=8, enable_chunked_prefill=False,
          max_num_batched_tokens=512, disable_log_stats=True)
prompts = [{"prompt_token_ids": ids} for ids in json.loads(sys.argv[2])]
outputs = llm.generate(prompts, SamplingParams(max_tokens=1, prompt_logprobs=0), use_tqdm=False)
rows = [[entry[token].logprob for token, entry in zip(o.prompt_token_ids[1:], o.prompt_logprobs[1:])] for o in outputs]
print("RESULT" + json.dumps(rows))
"""


@pytest.mark.processes
@pytest.mark.parametrize("saved", [True], ids=["tied"], indirect=True)
def test_vllm_log_probabilities_agree_with_transformers(saved: Path, tokenizer_dir: Path):
    pytest.importorskip("vllm")
    encoded = [ids[:40].tolist() for ids in encode_documents(load_tokenizer(tokenizer_dir), texts(3))]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", VLLM, str(saved), json.dumps(encoded)],
        env={**os.environ, **environment}, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    rows = json.loads(done.stdout.split("RESULT")[1].splitlines()[0])
    model = AutoModelForCausalLM.from_pretrained(saved, dtype=torch.float32)
    for ids, found in zip(encoded, rows, strict=True):
        scores = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        expected = scores.gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
        assert (expected - torch.tensor(found)).abs().max() < 1e-4


def empty(model: Path) -> None:
    for file in model.iterdir():
        file.unlink()


def cut_short(model: Path) -> None:
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def overwritten(model: Path) -> None:
    (model / "model.safetensors").write_bytes(b"\xff" * 4096)


def of_another_architecture(model: Path) -> None:
    config = model / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"model_type": "llama"}))


def lacking_a_weight(model: Path) -> None:
    weights = load_file(model / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, model / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (shutil.rmtree, r"model: there is no such directory"),
        (empty, r"model: it has no config\.json"),
        (lambda model: (model / "config.json").write_text("[]"), r"config\.json is no model's config"),
        (of_another_architecture, r"config\.json is of a llama model, not qwen3"),
        (lambda model: (model / "model.safetensors").unlink(), r"model: it has no model\.safetensors"),
        (cut_short, r"model\.safetensors is corrupted or cut short"),
        (overwritten, r"model\.safetensors is corrupted or cut short"),
        (lacking_a_weight, r"lacks 1 of its weights, such as model\.norm\.weight"),
    ],
    ids=["missing", "empty", "config", "architecture", "weights", "cut", "overwritten", "incomplete"],
)
@pytest.mark.parametrize("saved", [True], ids=["tied"], indirect=True)
def test_a_directory_that_is_no_model_is_one_line(
    saved: Path, damage: Callable[[Path], object], says: str, spec: TrainingSpec
):
    damage(saved)
    with pytest.raises(ValueError, match=says) as error:
        train(spec.model_copy(update={"initial_model": saved}), World(torch.device("cpu")))
    assert "\n" not in str(error.value)
    assert str(saved) in str(error.value) and "re-materialise that model" in str(error.value)
