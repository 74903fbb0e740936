from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import LayerNorm

from sbp_assets.pairing.embed import Embedder, embed, embeddings_frame, model_path, vectors_of
from sbp_assets.pairing.embed_batches import is_plain
from sbp_assets.storage.progress import Progress
from sbp_assets_tests.pairing.tiny_embedders import WORDS, write_bert

MODEL = "all-MiniLM-L6-v2"


def _embed(
    embedder: Embedder,
    texts: list[str],
    dtype: str = "bfloat16",
    max_tokens: int = 256,
    batch_size: int = 16,
    model: str = MODEL,
    prompt: str | None = None,
) -> np.ndarray:
    with Progress("embed", "documents") as progress:
        vectors = embed(embedder.load(model, dtype, "cpu"), texts, max_tokens, batch_size, progress, prompt)  # type: ignore[arg-type]
    assert progress.done == len(texts)
    return vectors


def test_the_default_model_is_the_bundled_directory_and_other_names_pass_through() -> None:
    assert (Path(model_path("all-MiniLM-L6-v2")) / "modules.json").is_file()
    assert model_path("Qwen/Qwen3-Embedding-0.6B") == "Qwen/Qwen3-Embedding-0.6B"


def test_vectors_are_unit_length_and_in_the_order_of_the_texts(embedder: Embedder) -> None:
    texts = ["short", "a much longer text about rivers and the sea " * 5, "a cat", "the cat sat on the mat"]
    together = _embed(embedder, texts, batch_size=2)
    assert np.allclose(np.linalg.norm(together, axis=1), 1, atol=1e-6)
    for row, text in zip(together, texts, strict=True):
        assert row @ _embed(embedder, [text])[0] > 0.999
    assert together[2] @ together[3] > together[2] @ together[1]


def test_bfloat16_agrees_with_float32(embedder: Embedder) -> None:
    texts = ["The bishop cuts the long diagonal.", "Floods cover the low meadows beside the river."]
    assert (np.einsum("ij,ij->i", _embed(embedder, texts), _embed(embedder, texts, "float32")) > 0.999).all()


def test_only_the_first_tokens_count_and_the_limit_is_put_back(embedder: Embedder) -> None:
    one, other = _embed(embedder, ["river sea flood star oven", "river sea flood chess bread"], max_tokens=5)
    assert one @ other > 0.999
    one, other = _embed(embedder, ["river sea flood star oven", "river sea flood chess bread"])
    assert one @ other < 0.99


def test_no_documents_give_an_empty_table_of_the_right_width(embedder: Embedder) -> None:
    table = embeddings_frame(pl.Series("id", [], dtype=pl.String), _embed(embedder, []))
    assert table.schema == {"id": pl.String, "vector": pl.Array(pl.Float32, 384)}
    assert vectors_of(table).shape == (0, 384)


def test_the_model_is_loaded_once_until_the_embedder_is_closed() -> None:
    embedder = Embedder()
    first = embedder.load(MODEL, "bfloat16", "cpu")
    again = embedder.load(MODEL, "bfloat16", "cpu")
    assert not first.reused and first.startup_seconds > 0
    assert again.reused and again.startup_seconds == 0 and again.model is first.model
    embedder.close()
    assert not embedder.load(MODEL, "bfloat16", "cpu").reused


def test_a_model_that_gives_no_direction_is_refused(tmp_path: Path) -> None:
    directory = write_bert(tmp_path)
    weights = load_file(directory / "model.safetensors")
    weights["encoder.layer.1.output.LayerNorm.weight"][3] = torch.nan
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"no direction for rows \[0, 1\] \(2 in all\)"):
        _embed(Embedder(), ["river", "sea"], model=str(directory))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_neither_a_second_run_nor_the_number_of_threads_changes_a_bit(embedder: Embedder, dtype: str) -> None:
    texts = [" ".join(WORDS[(7 * i + j * j) % len(WORDS)] for j in range(3 + 13 * i % 120)) for i in range(60)]
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 3, 3):
            torch.set_num_threads(threads)
            found.append(_embed(embedder, texts, dtype, batch_size=4))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert np.array_equal(found[0], found[1]) and np.array_equal(found[1], found[2])


def test_what_shares_a_batch_changes_no_more_than_rounding(embedder: Embedder) -> None:
    texts = [" ".join(WORDS[(i + j * j) % len(WORDS)] for j in range(3 + i)) for i in range(40)]
    together = _embed(embedder, texts, "float32")
    np.testing.assert_allclose(_embed(embedder, texts[::7], "float32"), together[::7], atol=1e-6)
    bfloat16 = _embed(embedder, texts), _embed(embedder, texts[::7])
    assert (np.einsum("ij,ij->i", bfloat16[0][::7], bfloat16[1]) > 0.9999).all()


def test_vectors_are_those_of_encode(embedder: Embedder) -> None:
    texts = [" ".join(WORDS[(i + j * j) % len(WORDS)] for j in range(3 + 19 * i)) for i in range(16)]
    wanted = SentenceTransformer(model_path(MODEL), device="cpu", model_kwargs={"dtype": torch.float32}).encode(texts)
    np.testing.assert_allclose(_embed(embedder, texts, "float32"), wanted, atol=1e-5)
    assert (np.einsum("ij,ij->i", _embed(embedder, texts), wanted) > 0.999).all()


def test_a_model_with_a_module_of_another_kind_is_encoded_by_its_library(tmp_path: Path) -> None:
    directory = str(write_bert(tmp_path, LayerNorm(64)))
    texts = ["river sea", "flood star oven chess bread", "water"]
    wanted = SentenceTransformer(directory, device="cpu").encode(texts, prompt="salt ")
    assert not is_plain(Embedder().load(directory, "float32", "cpu").model)
    found = _embed(Embedder(), texts, "float32", model=directory, prompt="salt ")
    np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_a_processor_without_bfloat16_computes_in_float32_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    directory, embedder = str(write_bert(tmp_path)), Embedder()
    exact = _embed(embedder, ["river sea", "flood"], "float32", model=directory)
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict)
    embedder = Embedder()
    for _ in range(2):
        assert np.array_equal(_embed(embedder, ["river sea", "flood"], "bfloat16", model=directory), exact)
    assert [record.message for record in caplog.records if "bfloat16" in record.message] == [
        "pairing.embedding_dtype: this CPU has no bfloat16 products; embedding in float32 instead"
    ]


@pytest.mark.parametrize("damage", ["empty", "file", "weights", "modules", "missing"])
def test_a_directory_that_is_no_model_is_one_line(tmp_path: Path, damage: str) -> None:
    directory = tmp_path / "nothing"
    if damage == "empty":
        directory.mkdir()
    elif damage == "file":
        directory.write_text("not a model")
    elif damage != "missing":
        directory = write_bert(tmp_path)
        if damage == "weights":
            (directory / "model.safetensors").write_bytes(b"cut")
        else:
            (directory / "modules.json").write_text('[{"idx": 0}]')
    with pytest.raises(ValueError, match=f"pairing.embedding_model '{directory}' cannot be loaded: .") as raised:
        Embedder().load(str(directory), "float32", "cpu")
    assert "\n" not in str(raised.value)
