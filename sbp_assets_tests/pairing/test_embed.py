from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from sbp_assets.pairing.embed import Embedder, embed, embeddings_frame, model_path, vectors_of
from sbp_assets.storage.progress import Progress

MODEL = "all-MiniLM-L6-v2"


def _embed(
    embedder: Embedder, texts: list[str], dtype: str = "bfloat16", max_tokens: int = 256, batch_size: int = 16
) -> np.ndarray:
    with Progress("embed", "documents") as progress:
        vectors = embed(embedder.load(MODEL, dtype, "cpu"), texts, max_tokens, batch_size, progress)  # type: ignore[arg-type]
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


def test_a_model_that_gives_no_direction_is_refused(embedder: Embedder, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = embedder.load(MODEL, "bfloat16", "cpu")
    monkeypatch.setattr(engine.model, "encode", lambda texts, **_: np.full((len(texts), 384), np.nan))
    with pytest.raises(ValueError, match="no direction for rows"):
        _embed(embedder, ["text"])
