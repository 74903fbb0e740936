"""Speed and memory of training and embedding on a GPU: python -m benchmarks.gpu, or with --device cpu.

On CUDA it takes the 3B model of the profile paper_200b and rows of 4,096 tokens, on a CPU a tiny model: to see that
every part runs. Weights and tokens are random. With one GPU the paper's step of 8.4M tokens is cut to one of 32,768,
and as many rows are computed at a time as fit (`microbatch_tokens`). Parts, in this order (--parts names others):

- training with activation checkpointing: tokens/s, the share of the GPU's peak FLOP/s (MFU, by PaLM's formula, and
  without its term for attention, which counts all pairs of a row's tokens), and peak memory
- the same without activation checkpointing
- documents/s of the bundled embedding model (where its package is not installed: of random weights of its geometry),
  and of a random one of Qwen3-Embedding-0.6B's geometry
- training with activation checkpointing and compiled layers, and with attention under a mask
- FSDP2 against none, with one process per GPU, where there are several
- a checkpoint's size and the time to write it and to load it; the loss of a run that resumes from it, less the
  undisturbed run's

Each part's result is printed as it comes. After --minutes the benchmark ends, whatever is under way. A part that is cut
off so, does not fit, or fails is named under "skipped", with the reason. The last line printed is one JSON object. A
checkpoint of the 3B model takes 39 GB in the temporary folder ($TMPDIR).
"""

from __future__ import annotations

import functools
import gc
import json
import os
import shutil
import socket
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from transformers import BertConfig, BertModel, PretrainedConfig, Qwen3Config, Qwen3Model

from benchmarks.arguments import parser
from benchmarks.deadline import ending_after
from benchmarks.gpu_sizes import SIZES, Size, microbatch_tokens
from benchmarks.machine import describe
from benchmarks.random_corpus import SPECIAL, random_documents, write_documents, write_tokenizer
from sbp_assets.pairing.embed import BUNDLED_MODEL, Embedder, embed, model_path
from sbp_assets.settings import Optimizer
from sbp_assets.storage.progress import Progress
from sbp_assets.training import layer_execution, loop
from sbp_assets.training.device import Device, peak_flops
from sbp_assets.training.model import build_model
from sbp_assets.training.parallel import World, open_world
from sbp_assets.training.spec import Source, StreamData, TrainingSpec
from sbp_assets.training.varlen import varlen_works

PARTS = (
    "activation_checkpointing", "activations_kept", "embedding_bundled", "embedding_qwen3", "compiled", "under_a_mask",
    "sharding", "checkpoint",
)  # fmt: skip
NO_TIME = "the time was over"
WARM_UP = 2  # steps whose time does not count: layers are compiled, and memory is allocated
STEPS, CHECKPOINT_AFTER, SHORT = 8, 5, 5  # of the run that is resumed, its checkpoint, and the other runs


class Skipped(Exception):
    """A part that cannot be measured here; the message says why."""


def main(device: Device, size_name: str, minutes: float, names: Sequence[str] = PARTS) -> None:
    started = time.monotonic()
    size = SIZES[size_name]()
    heads = size.model.heads, size.model.kv_heads, size.model.head_dim
    result = {
        **describe(),
        "size": size_name,
        "parameters": size.model.parameters(size.vocabulary),
        "context_length": size.model.context_length,
        "tokens_per_step": size.tokens_per_step,
        "variable_length_attention": device == "cuda" and varlen_works(torch.device(device), *heads),
        "measured": {},
        "skipped": dict.fromkeys(names, NO_TIME),
    }

    def report() -> None:
        print(json.dumps({**result, "seconds": round(time.monotonic() - started, 1)}), flush=True)

    with tempfile.TemporaryDirectory(prefix="sbp-benchmark-") as name:
        folder = Path(name)

        def end() -> None:
            report()
            shutil.rmtree(folder, ignore_errors=True)

        if minutes > 0:
            with ending_after(minutes, end):
                _measure(_parts(size, device, folder, names), result["measured"], result["skipped"])
    report()


def _parts(size: Size, device: Device, folder: Path, names: Sequence[str]) -> dict[str, Callable[[], dict[str, Any]]]:
    processes = torch.cuda.device_count() if device == "cuda" else 2
    encoded = random_documents(size.vocabulary, size.document_tokens, size.documents)
    documents = write_documents(folder / "documents", encoded, size.vocabulary)
    spec = _spec(size, device, write_tokenizer(folder / "tokenizer", size.vocabulary), documents)
    texts = [" ".join(f"word{token - len(SPECIAL)}" for token in ids) for ids in encoded]
    plain = spec.model_copy(
        update={"activation_checkpointing": False, "microbatch_tokens": microbatch_tokens(size, device, False)}
    )
    parts = {
        "activation_checkpointing": lambda: _alone(spec),
        "compiled": lambda: _alone(spec.model_copy(update={"compile": True})),
        "activations_kept": lambda: _alone(plain),
        "embedding_bundled": lambda: _bundled_embedding(texts, size, device, folder),
        "embedding_qwen3": lambda: _random_embedding(size.embedder, size.embedded_tokens, texts, size, device, folder),
        "under_a_mask": lambda: _under_a_mask(spec),
        "sharding": lambda: _sharding(spec, processes, folder),
        "checkpoint": lambda: _resumed(spec, folder, size),
    }
    return {name: parts[name] for name in names}


def _measure(
    parts: dict[str, Callable[[], dict[str, Any]]],
    measured: dict[str, dict[str, Any]],
    skipped: dict[str, str],
) -> None:
    """Fill in what each part measured, and why those without a result have none."""
    for name, measure in parts.items():
        try:
            measured[name] = measure()
            del skipped[name]
        except Skipped as reason:
            skipped[name] = str(reason)
        except torch.OutOfMemoryError:
            skipped[name] = "it does not fit the device's memory"
        except Exception as error:  # the other parts are worth their time all the same
            traceback.print_exc()
            skipped[name] = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        # Only now that the exception, and with it what its frames hold, is gone.
        torch.compiler.reset()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        print(json.dumps({name: measured.get(name, skipped.get(name))}), flush=True)


def _spec(size: Size, device: Device, tokenizer: Path, documents: Path) -> TrainingSpec:
    return TrainingSpec(
        name="benchmark",
        model=size.model,
        optimizer=Optimizer(learning_rate=1e-4, tokens_per_step=size.tokens_per_step, dtype="bfloat16"),
        tokenizer_dir=tokenizer,
        data=StreamData(repeated=[Source(directory=documents)]),
        steps=SHORT,
        device=device,
        microbatch_tokens=microbatch_tokens(size, device, True),
        activation_checkpointing=True,
        checkpoint_minutes=1e6,
        work_dir=documents.parent / "work",
        output_dir=documents.parent / "none",
    )


def _resumed(spec: TrainingSpec, folder: Path, size: Size) -> dict[str, Any]:
    """Train, with a checkpoint under way; train again from that checkpoint, and compare."""
    needed = 13 * size.model.parameters(size.vocabulary)
    if (free := shutil.disk_usage(folder).free) < needed:
        raise Skipped(f"a checkpoint takes {needed / 1e9:.0f} GB, and {folder} has {free / 1e9:.0f} GB free")
    spec = spec.model_copy(
        update={"steps": STEPS, "checkpoint_every_steps": CHECKPOINT_AFTER, "work_dir": spec.work_dir / "resumed"}
    )
    with open_world(spec) as world:
        _, seconds, losses = _train(spec, world)
        (checkpoint,) = spec.work_dir.glob("*.pt")
        written = checkpoint.stat().st_size
        _, resumed_seconds, resumed_losses = _train(spec, world)
        checkpoint.unlink()
    if len(resumed_seconds["_optimize"]) != STEPS - CHECKPOINT_AFTER:
        raise RuntimeError("the second run did not resume from the checkpoint of the first")
    differences = [abs(a - b) for a, b in zip(losses, resumed_losses, strict=True)]
    return {
        "gigabytes": round(written / 1e9, 6),
        "seconds_to_write": round(sum(seconds["_save"]), 3),
        "seconds_to_load": round(sum(resumed_seconds["_restore"]), 3),
        "resumed": {
            "steps": STEPS - CHECKPOINT_AFTER,
            "largest_loss_difference": max(differences),
            "exact": max(differences) == 0,
        },
    }


def _alone(spec: TrainingSpec) -> dict[str, Any]:
    with open_world(spec) as world:
        return _train(spec, world)[0]


def _under_a_mask(spec: TrainingSpec) -> dict[str, Any]:
    if spec.device == "cpu":
        raise Skipped("on a CPU, activation_checkpointing is under a mask already")
    with patch.object(layer_execution, "varlen_works", return_value=False):
        return _alone(spec)


def _train(spec: TrainingSpec, world: World) -> tuple[dict[str, Any], dict[str, list[float]], list[float]]:
    """Return what a run measured, the seconds of its parts, and the loss of each step."""
    cuda = world.device.type == "cuda"
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    weights = functools.partial(_random_weights, device=world.device)
    with _stopwatch(cuda) as seconds, patch.object(loop, "initial_weights", weights):
        trained = loop.train(spec, world)
    assert trained is not None
    step = statistics.median(seconds["_optimize"][WARM_UP:])
    rate = spec.optimizer.tokens_per_step / step
    vocabulary = len(loop.load_training_tokenizer(spec.tokenizer_dir))
    peak = peak_flops(torch.cuda.get_device_name()) if cuda else None
    flops = {
        "mfu": spec.model.flops_per_token(vocabulary),
        "mfu_without_attention": 6 * spec.model.parameters(vocabulary),
    }
    measured = {
        "tokens_per_second": round(rate, 1),
        **{name: round(rate * of / (peak * world.size), 4) if peak else None for name, of in flops.items()},
        "peak_memory_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2) if cuda else None,
        "seconds_per_step": [round(found, 4) for found in seconds["_optimize"]],
        "microbatch_tokens": spec.microbatch_tokens,
    }
    return measured, seconds, trained.metrics["train_loss"].drop_nulls().to_list()


def _random_weights(spec: TrainingSpec, tokenizer: Any, device: torch.device) -> Any:
    """Return the model with weights that are drawn on the device: on a CPU 3B of them take longer than the steps."""
    with device:
        return build_model(spec.model, tokenizer, spec.seed)


@contextmanager
def _stopwatch(cuda: bool) -> Iterator[dict[str, list[float]]]:
    """Yield the seconds of each step, checkpoint and restoration of the training loop, while the block runs."""
    seconds: dict[str, list[float]] = {"_optimize": [], "_save": [], "_restore": []}

    def timed(function: Callable[..., Any], found: list[float]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            start = time.perf_counter()
            result = function(*arguments)
            if cuda:
                torch.cuda.synchronize()
            found.append(time.perf_counter() - start)
            return result

        return call

    with ExitStack() as stack:
        for name, found in seconds.items():
            stack.enter_context(patch.object(loop._Run, name, timed(getattr(loop._Run, name), found)))
        yield seconds


def _sharding(spec: TrainingSpec, processes: int, folder: Path) -> dict[str, Any]:
    """Train in several processes, each with the work of one, with everything on each of them and with FSDP2."""
    if processes == 1:
        raise Skipped("one GPU: FSDP2 over one process would shard nothing")
    optimizer = spec.optimizer.model_copy(update={"tokens_per_step": processes * spec.optimizer.tokens_per_step})
    path = spec.model_copy(update={"optimizer": optimizer}).write(folder / "spec.json")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    result = folder / "sharding.json"
    try:
        torch.multiprocessing.spawn(_rank, (processes, port, path, result), nprocs=processes)
    except torch.multiprocessing.ProcessRaisedException as error:
        raise RuntimeError(str(error).strip().splitlines()[-1]) from None
    return {"processes": processes, **json.loads(result.read_text())}


def _rank(rank: int, processes: int, port: int, path: Path, result: Path) -> None:
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    values = (rank, rank, processes, processes, "127.0.0.1", port)
    os.environ |= {name: str(value) for name, value in zip(names, values, strict=True)}
    spec = TrainingSpec.read(path)
    with open_world(spec) as world:
        kinds = {kind: spec.model_copy(update={"sharding": kind}) for kind in ("none", "full")}
        measured = {kind: _train(chosen, world)[0] for kind, chosen in kinds.items()}
        if world.leads:
            result.write_text(json.dumps(measured))


def _bundled_embedding(texts: list[str], size: Size, device: Device, folder: Path) -> dict[str, Any]:
    if model_path(BUNDLED_MODEL) != BUNDLED_MODEL:
        return {"weights": "bundled", **_embedding(BUNDLED_MODEL, 256, texts, size, device)}
    geometry = BertConfig(
        vocab_size=size.vocabulary, hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536
    )
    return {"weights": "random", **_random_embedding(geometry, 256, texts, size, device, folder)}


def _random_embedding(
    config: PretrainedConfig, max_tokens: int, texts: list[str], size: Size, device: Device, folder: Path
) -> dict[str, Any]:
    """Measure a model of random weights, which pools the last token as Qwen3-Embedding does, or the mean as BERT's."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    decoder = isinstance(config, Qwen3Config)
    folder = folder / str(config.model_type)
    with torch.device(device):
        model: Any = (Qwen3Model if decoder else BertModel)._from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder / "transformer")
    write_tokenizer(folder / "transformer", size.vocabulary)
    pooling = Pooling(config.hidden_size, "lasttoken" if decoder else "mean")
    modules = [Transformer(str(folder / "transformer"), max_seq_length=max_tokens), pooling, Normalize()]
    SentenceTransformer(modules=modules, device="cpu").save(str(folder / "embedder"), create_model_card=False)
    return _embedding(str(folder / "embedder"), max_tokens, texts, size, device)


def _embedding(model: str, max_tokens: int, texts: list[str], size: Size, device: Device) -> dict[str, Any]:
    """Return the documents per second of the pairing stage's embedding, after one warm-up batch."""
    embedder = Embedder()
    engine = embedder.load(model, "bfloat16", device)
    with Progress("embedding", "documents", len(texts)) as progress:
        embed(engine, texts[: size.embedding_batch], max_tokens, size.embedding_batch, progress)
        start = time.perf_counter()
        vectors = embed(engine, texts, max_tokens, size.embedding_batch, progress)
        seconds = time.perf_counter() - start
    embedder.close()
    return {
        "documents_per_second": round(len(texts) / seconds, 1),
        "documents": len(texts),
        "max_tokens": max_tokens,
        "dimension": vectors.shape[1],
        "batch_size": size.embedding_batch,
    }


if __name__ == "__main__":
    taking = parser(__doc__)
    taking.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    taking.add_argument("--size", choices=list(SIZES), help="default: paper on cuda, tiny on cpu")
    taking.add_argument("--minutes", type=float, default=5, help="after which it ends (default: 5)")
    taking.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="default: all")
    given = taking.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        sys.exit("benchmarks.gpu: torch finds no CUDA device; --device cpu runs every part at a tiny size")
    main(given.device, given.size or ("paper" if given.device == "cuda" else "tiny"), given.minutes, given.parts)
