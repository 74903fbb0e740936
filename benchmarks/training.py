"""Speed of the training loop beside transformers.Trainer: python -m benchmarks.training [SIZE ...].

Both train the same model on the same packed rows, whose documents do not see one another, in one process on as many
threads, in float32 and in bfloat16, by turns: ours in the environment that training runs get, the Trainer in the
shell's. Documents have the lengths of a log-normal distribution and random tokens. The last line printed is one JSON
object: per size and precision the median tokens per second of both, their ratio, and what share of our time this
machine's matrix products of the model's own shapes take by themselves.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from transformers import Trainer, TrainingArguments

from benchmarks.arguments import parser
from benchmarks.machine import describe
from benchmarks.random_corpus import random_documents, write_documents, write_tokenizer
from sbp_assets.settings import Model, Optimizer
from sbp_assets.training.launch import training_environment
from sbp_assets.training.loop import train
from sbp_assets.training.model import build_model, load_training_tokenizer
from sbp_assets.training.order import StreamOrder
from sbp_assets.training.parallel import World
from sbp_assets.training.rows import IGNORED
from sbp_assets.training.spec import Source, StreamData, TrainingSpec

Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True)
class Size:
    """A model, what it reads, and how much of it a measurement takes."""

    model: Model
    vocabulary: int
    document_tokens: int  # of the median document
    tokens_per_step: int
    steps: int


SIZES = {
    # The model, rows and documents of the profile demo.
    "1M": Size(
        Model(hidden_size=128, layers=4, heads=4, kv_heads=2, head_dim=32, intermediate_size=256, context_length=384),
        vocabulary=1024, document_tokens=100, tokens_per_step=1152, steps=24,
    ),
    "10M": Size(
        Model(hidden_size=320, layers=6, heads=5, kv_heads=5, head_dim=64, intermediate_size=960, context_length=1024),
        vocabulary=4096, document_tokens=300, tokens_per_step=4096, steps=3,
    ),
    "50M": Size(
        Model(
            hidden_size=640, layers=10, heads=10, kv_heads=5, head_dim=64, intermediate_size=1792, context_length=1024
        ),
        vocabulary=8192, document_tokens=300, tokens_per_step=4096, steps=2,
    ),
}  # fmt: skip


def main(names: list[str], precisions: list[Precision], rounds: int, threads: int) -> None:
    torch.set_num_threads(threads)
    measured = []
    for name in names:
        for precision in precisions:
            with tempfile.TemporaryDirectory(prefix="sbp-benchmark-") as folder:
                measured.append({"size": name, **_measure(SIZES[name], precision, rounds, threads, Path(folder))})
            print(json.dumps(measured[-1]), flush=True)
    print(json.dumps({**describe(), "threads": threads, "measured": measured}))


def _measure(size: Size, precision: Precision, rounds: int, threads: int, folder: Path) -> dict[str, Any]:
    spec = _spec(size, precision, threads, folder)
    with ExitStack() as stack:
        peers = {
            "ours": partial(stack.enter_context(_process(training_environment(threads))).submit, _ours),
            "trainer": partial(stack.enter_context(_process({})).submit, _trainer),
        }
        for run in peers.values():
            run(spec.model_copy(update={"steps": 1}), folder / "warm-up").result()
        seconds: dict[str, list[float]] = {name: [] for name in peers}
        for number in range(rounds):
            for name, run in peers.items():
                seconds[name].append(run(spec, folder / f"{name}-{number}").result())
    tokens = size.tokens_per_step * size.steps
    rates = {name: tokens / statistics.median(found) for name, found in seconds.items()}
    products = _product_seconds(size, precision) / statistics.median(seconds["ours"]) * size.steps
    return {
        "parameters": size.model.parameters(size.vocabulary),
        "precision": precision,
        "tokens_per_second": {name: round(rate, 1) for name, rate in rates.items()},
        "ratio": round(rates["ours"] / rates["trainer"], 3),
        "ratios_by_round": [round(b / a, 3) for a, b in zip(seconds["ours"], seconds["trainer"], strict=True)],
        "share_in_matrix_products": round(products, 3),
    }


def _spec(size: Size, precision: Precision, threads: int, folder: Path) -> TrainingSpec:
    """Return the run to measure; its documents, vocabulary and tokenizer are written to `folder`."""
    encoded = random_documents(size.vocabulary, size.document_tokens, 4000)
    documents = write_documents(folder / "documents", encoded, size.vocabulary)
    return TrainingSpec(
        name="benchmark",
        model=size.model,
        optimizer=Optimizer(learning_rate=1e-3, tokens_per_step=size.tokens_per_step, dtype=precision),
        tokenizer_dir=write_tokenizer(folder / "tokenizer", size.vocabulary),
        data=StreamData(repeated=[Source(directory=documents)]),
        steps=size.steps,
        device="cpu",
        threads=threads,
        microbatch_tokens=size.tokens_per_step,
        work_dir=folder,
        output_dir=folder / "none",
    )


def _process(environment: dict[str, str]) -> ProcessPoolExecutor:
    """Return a process of its own, started with `environment` beside this one's."""
    before = dict(os.environ)
    os.environ.update(environment)
    try:
        pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
        pool.submit(os.getpid).result()  # it starts with the first call
        return pool
    finally:
        os.environ.clear()
        os.environ.update(before)


def _ours(spec: TrainingSpec, folder: Path) -> float:
    """Return the seconds of the steps of our loop."""
    torch.set_num_threads(spec.threads)
    trained = train(spec.model_copy(update={"work_dir": folder}), World(torch.device("cpu")))
    assert trained is not None
    return trained.seconds


def _trainer(spec: TrainingSpec, folder: Path) -> float:
    """Return the seconds of the same steps under transformers.Trainer, as it reports them."""
    assert isinstance(spec.data, StreamData) and spec.steps is not None
    torch.set_num_threads(spec.threads)
    causal = build_model(spec.model, load_training_tokenizer(spec.tokenizer_dir), seed=0)
    # With a cache transformers takes packed rows for one document each.
    causal.config.use_cache = False
    count = spec.steps * spec.rows_per_step
    rows = StreamOrder(spec.data, spec.model.context_length, seed=0).rows(0, count)
    # It shifts labels itself.
    labels = np.full_like(rows.labels, IGNORED)
    labels[:, 1:] = rows.labels[:, :-1]
    examples = [
        {"input_ids": ids, "position_ids": positions, "labels": label}
        for ids, positions, label in zip(rows.input_ids, rows.position_ids, labels, strict=True)
    ]
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=spec.steps,
        per_device_train_batch_size=spec.rows_per_step,
        learning_rate=spec.optimizer.learning_rate,
        weight_decay=spec.optimizer.weight_decay,
        bf16=spec.optimizer.dtype == "bfloat16",
        optim="adamw_torch_fused",
        use_cpu=True,
        save_strategy="no",
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    done = Trainer(model=causal, args=arguments, train_dataset=examples).train()  # type: ignore[arg-type]
    return float(done.metrics["train_runtime"])


def _product_seconds(size: Size, precision: Precision) -> float:
    """Return the seconds that a step's matrix products take by themselves: of every weight, forward and backward."""
    model, tokens = size.model, size.tokens_per_step
    queries, keys = model.heads * model.head_dim, model.kv_heads * model.head_dim
    layer = [
        (model.hidden_size, queries),
        *2 * [(model.hidden_size, keys)],
        (queries, model.hidden_size),
        *2 * [(model.hidden_size, model.intermediate_size)],
        (model.intermediate_size, model.hidden_size),
    ]
    seconds = sum(_products(tokens, *shape, precision) for shape in layer) * model.layers
    return seconds + _products(tokens, model.hidden_size, size.vocabulary, precision)


def _products(tokens: int, inputs: int, outputs: int, precision: Precision) -> float:
    dtype = getattr(torch, precision)
    x, weight, gradient = (
        torch.randn(shape, dtype=dtype) for shape in ((tokens, inputs), (outputs, inputs), (tokens, outputs))
    )
    found = []
    for _ in range(7):
        started = time.perf_counter()
        x @ weight.T
        gradient @ weight
        gradient.T @ x
        found.append(time.perf_counter() - started)
    return statistics.median(found)


if __name__ == "__main__":
    taking = parser(__doc__)
    taking.add_argument("sizes", nargs="*", metavar="SIZE", default=list(SIZES), help=f"of {', '.join(SIZES)}")
    taking.add_argument("--precisions", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    taking.add_argument("--rounds", type=int, default=5)
    taking.add_argument("--threads", type=int, default=1)
    given = taking.parse_args()
    if wrong := [name for name in given.sizes if name not in SIZES]:
        taking.error(f"no size {', '.join(wrong)}; there are {', '.join(SIZES)}")
    main(given.sizes, given.precisions, given.rounds, given.threads)
