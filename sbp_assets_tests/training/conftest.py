"""A tiny corpus of real token arrays and specs over it."""

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import strategies as st

from sbp_assets.corpus.tokenizer import encode_documents, train_tokenizer
from sbp_assets.settings import Model, Optimizer
from sbp_assets.storage.token_arrays import write_token_arrays
from sbp_assets.training.launch import training_command, training_environment
from sbp_assets.training.spec import ExamplesData, Source, StreamData, TrainingSpec

VOCAB = 320
LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=12)
MODEL = Model(
    hidden_size=32, layers=2, heads=2, kv_heads=1, head_dim=32, intermediate_size=64, context_length=64,
)  # fmt: skip
OPTIMIZER = Optimizer(learning_rate=1e-2, tokens_per_step=256)


def write_documents(directory: Path, counts: list[int], first_id: int, **columns: list) -> Source:
    """Documents of `counts` tokens; every token of document i is first_id + i, so that a reader knows whose it is."""
    documents = pl.DataFrame({"id": [str(i) for i in range(len(counts))], **columns})
    write_token_arrays(directory, documents, [np.full(n, first_id + i) for i, n in enumerate(counts)], 60_000)
    return Source(directory=directory)


def texts(count: int, seed: int = 0) -> list[str]:
    """Sentences with a pattern that a model can learn."""
    rng = np.random.default_rng(seed)
    names, colours = ["Arlo", "Bexley", "Corin", "Dorset"], ["red", "green", "blue", "grey"]
    picks = rng.integers(4, size=(count, 3))
    return ["".join(f"The colour of {names[i]} is {colours[i]}. " for i in row) for row in picks]


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer(texts(50), VOCAB).save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory, tokenizer_dir: Path) -> Path:
    """Token arrays of 40 documents, 30 of split unique and 10 held out."""
    from sbp_assets.corpus.tokenizer import load_tokenizer

    directory = tmp_path_factory.mktemp("corpus")
    documents = pl.DataFrame({"id": [f"doc-{i}" for i in range(40)], "split": ["unique"] * 30 + ["heldout"] * 10})
    write_token_arrays(directory, documents, encode_documents(load_tokenizer(tokenizer_dir), texts(40)), VOCAB)
    return directory


@pytest.fixture(scope="session")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token arrays of 20 examples of 10 to 40 tokens with prompts of half their length."""
    directory = tmp_path_factory.mktemp("examples")
    rng = np.random.default_rng(1)
    encoded = [rng.integers(4, 260, size=length) for length in rng.integers(10, 40, size=20)]
    documents = pl.DataFrame(
        {"id": [f"example-{i}" for i in range(20)], "prompt_tokens": [len(ids) // 2 for ids in encoded]}
    )
    write_token_arrays(directory, documents, encoded, VOCAB)
    return directory


def make_spec(root: Path, corpus: Path, tokenizer_dir: Path) -> TrainingSpec:
    """Return a run of 12 steps on the CPU with its folders below `root`."""
    return TrainingSpec(
        name="test",
        model=MODEL,
        optimizer=OPTIMIZER,
        tokenizer_dir=tokenizer_dir,
        data=StreamData(repeated=[Source(directory=corpus, split="unique")]),
        steps=12,
        heldout=[Source(directory=corpus, split="heldout")],
        heldout_tokens=300,
        evaluations=3,
        device="cpu",
        microbatch_tokens=128,
        work_dir=root / "work",
        output_dir=root / "model",
    )


@pytest.fixture
def spec(tmp_path: Path, corpus: Path, tokenizer_dir: Path) -> TrainingSpec:
    return make_spec(tmp_path, corpus, tokenizer_dir)


def with_optimizer(spec: TrainingSpec, **changes: object) -> TrainingSpec:
    """Return `spec` with changed settings of its optimizer."""
    return spec.model_copy(update={"optimizer": spec.optimizer.model_copy(update=changes)})


@pytest.fixture
def tuning_spec(spec: TrainingSpec, examples: Path) -> TrainingSpec:
    return spec.model_copy(update={"data": ExamplesData(source=Source(directory=examples), epochs=2), "steps": None})


Launch = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def launch(tmp_path: Path) -> Launch:
    """Starts the real command of a spec in processes of its own."""

    def start(spec: TrainingSpec, processes: int = 1) -> subprocess.Popen[str]:
        path = spec.write(tmp_path / f"{spec.output_dir.name}.json")
        return subprocess.Popen(
            training_command(path, processes),
            env={**os.environ, **training_environment()},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return start
