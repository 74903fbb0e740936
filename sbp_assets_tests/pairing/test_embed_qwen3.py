"""Embedding by a model of Qwen3-Embedding's architecture, beside the steps that its model card describes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModel, AutoTokenizer

from sbp_assets.pairing.embed import Embedder, embed
from sbp_assets.storage.progress import Progress
from sbp_assets_tests.pairing.tiny_embedders import END, LIMIT, PREFIX, WORDS, write_qwen3

LENGTHS = (3, 17, 1, 8, 60, 17, 39)
TEXTS = [" ".join(WORDS[(i * j) % len(WORDS)] for j in range(1, 1 + n)) for i, n in enumerate(LENGTHS)]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_qwen3(tmp_path_factory.mktemp("qwen3"))


def reference(directory: Path, texts: list[str], max_tokens: int) -> np.ndarray:
    """Pad on the left, take the last token's state, normalise: in one batch, in float32."""
    tokenizer = AutoTokenizer.from_pretrained(directory, padding_side="left")
    model = AutoModel.from_pretrained(directory, dtype=torch.float32).eval()
    batch = tokenizer(texts, padding=True, truncation=True, max_length=max_tokens, return_tensors="pt")
    assert (batch["input_ids"][:, -1] == tokenizer.convert_tokens_to_ids(END)).all()
    with torch.no_grad():
        states = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    return np.asarray(F.normalize(states[:, -1], dim=1))


def ours(directory: Path, texts: list[str], dtype: str = "float32", max_tokens: int = 256, **given: str) -> np.ndarray:
    with Progress("embed", "documents") as progress:
        return embed(Embedder().load(str(directory), dtype, "cpu"), texts, max_tokens, 2, progress, **given)  # type: ignore[arg-type]


@pytest.mark.parametrize("max_tokens", [9, 256])
def test_vectors_are_those_of_the_model_card(directory: Path, max_tokens: int) -> None:
    """The model's own limit, and that of pairing below it, cut documents before the end that the tokenizer appends."""
    wanted = reference(directory, TEXTS, min(max_tokens, LIMIT))
    np.testing.assert_allclose(ours(directory, TEXTS, max_tokens=max_tokens), wanted, atol=1e-5)
    assert (np.einsum("ij,ij->i", ours(directory, TEXTS, "bfloat16", max_tokens), wanted) > 0.999).all()
    assert (wanted @ wanted.T)[0, 1] < 0.9, "the vectors are of different directions"


def test_padding_on_the_left_gives_the_same_vectors(directory: Path, tmp_path: Path) -> None:
    left = tmp_path / "left"
    left.mkdir()
    for file in directory.rglob("*"):
        if file.is_file():
            (left / file.relative_to(directory)).parent.mkdir(exist_ok=True)
            (left / file.relative_to(directory)).write_bytes(file.read_bytes())
    config = json.loads((left / "tokenizer_config.json").read_text())
    (left / "tokenizer_config.json").write_text(json.dumps({**config, "padding_side": "left"}))
    wanted = reference(directory, TEXTS, LIMIT)
    np.testing.assert_allclose(ours(left, TEXTS), wanted, atol=1e-5)
    assert (np.einsum("ij,ij->i", ours(left, TEXTS, "bfloat16"), wanted) > 0.999).all()


def test_documents_get_a_prompt_where_one_is_given_and_else_that_of_the_model(directory: Path, tmp_path: Path) -> None:
    plain, prompted = ours(directory, TEXTS[:4]), ours(directory, TEXTS[:4], prompt=f"{PREFIX} ")
    wanted = reference(directory, [f"{PREFIX} {text}" for text in TEXTS[:4]], LIMIT)
    np.testing.assert_allclose(prompted, wanted, atol=1e-5)
    assert (np.einsum("ij,ij->i", plain, prompted) < 0.999).all()
    config = directory / "config_sentence_transformers.json"
    before = config.read_text()
    try:
        prompts = {"prompts": {"query": "flood ", "document": f"{PREFIX} "}, "default_prompt_name": "document"}
        config.write_text(json.dumps({**json.loads(before), **prompts}))
        assert np.array_equal(ours(directory, TEXTS[:4]), prompted)
        assert np.array_equal(ours(directory, TEXTS[:4], prompt=""), plain)
    finally:
        config.write_text(before)


def test_a_document_without_a_token_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no token in rows \[1\] \(1 in all\)"):
        ours(write_qwen3(tmp_path, ends=False), ["river", "", "sea"])
