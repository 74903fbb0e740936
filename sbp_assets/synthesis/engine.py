"""vLLM offline engines in worker processes, started once and kept for every shard. No dagster.

Each engine is a process of its own with one GPU, or one CPU thread: a multi-threaded engine on busy cores is several
times slower than two single-threaded ones. Finished requests go to a ledger file line by line as they finish, and the
ledger is the only way results come back: whatever is killed, nothing finished is lost.
"""

from __future__ import annotations

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
from typing import Any, Literal

from sbp_assets.storage.artifacts import named_when_full

logger = logging.getLogger("sbp_assets.synthesis.engine")

POLL_SECONDS = 0.5
# Head sizes that vLLM's CPU attention kernels are compiled for (vLLM 0.32).
CPU_HEAD_SIZES = (32, 64, 80, 96, 112, 128, 160, 192, 224, 256, 512)
# vLLM's own choice of the cache size aborts on some virtual machines; 1 GiB holds 256 sequences of small models.
CPU_KV_CACHE_GIB = "1"
# A prompt is prefilled whole, so this is also the longest prompt; larger only lets more prompts start per step.
MIN_BATCHED_TOKENS = 8192


class EngineError(RuntimeError):
    """An engine that cannot start or has died; the message says what to do."""


@dataclass(frozen=True)
class EngineSpec:
    """What the engines run. Equal specs share the running engines."""

    checkpoint: Path
    version: str  # of the checkpoint's content: another model at the same path is another spec
    context_length: int
    dtype: Literal["float32", "bfloat16"]
    device: Literal["auto", "cpu", "cuda"]
    processes: int
    max_sequences: int
    gpu_memory_utilization: float


@dataclass(frozen=True)
class Request:
    """One synthesis to sample: token ids of the prompt and the seed of its random numbers (63 bits)."""

    seed_id: str
    rollout: int
    sampling_seed: int
    prompt: list[int]


@dataclass(frozen=True)
class Sampling:
    temperature: float
    top_p: float
    eos_id: int


class Engines:
    """`spec.processes` running engines. Get them through `get_engines`."""

    def __init__(self, spec: EngineSpec) -> None:
        began = time.monotonic()
        _require_vllm(spec)
        device = _device(spec.device)
        environments = [_environment(device, engine, spec.processes) for engine in range(spec.processes)]
        if device == "cpu":
            _check_head_size(spec.checkpoint)
        # One pool per engine, because a pool does not choose which of its processes takes a task.
        self._pools = [
            ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), _prepare, (environment,))
            for environment in environments
        ]
        self._pids: list[int] = []
        self.spec = spec
        logger.info("starting %d vLLM engine(s) on %s", spec.processes, device)
        try:
            # Told apart from the pool's initializer, whose exceptions would be swallowed.
            starts = [pool.submit(_start, spec, device) for pool in self._pools]
            self._pids = [start.result() for start in starts]
        except BrokenProcessPool as error:
            self.stop()
            raise EngineError(
                "a vLLM engine process died while starting; its last words are in this process's stderr. "
                "If memory ran out, lower deployment.engine_processes"
            ) from error
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
        tasks: list[Future[int]] = []
        try:
            for engine, (pool, ledger) in enumerate(zip(self._pools, ledgers, strict=True)):
                if share := list(requests[engine :: len(self._pools)]):
                    tasks.append(pool.submit(_generate, share, sampling, ledger))
            waiting: set[Future[int]] = set(tasks)
            while waiting:
                done, waiting = wait(waiting, timeout=POLL_SECONDS)
                for task in done:
                    task.result()
                poll()
        except BrokenProcessPool as error:
            self.stop()
            raise EngineError(
                "a vLLM engine process died (killed, or out of memory). Finished syntheses are kept in "
                f"{ledgers[0].parent}: run this partition again to continue with them. If memory ran out, lower "
                "deployment.engine_processes or deployment.engine_max_sequences first"
            ) from error
        except BaseException:
            # An engine left running would go on working for nobody.
            self.stop()
            raise

    @property
    def alive(self) -> bool:
        return bool(self._pools)

    @property
    def pids(self) -> list[int]:
        return list(self._pids)

    def stop(self) -> None:
        """End the processes at once, running requests included."""
        for pid in self._pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for pool in self._pools:
            pool.shutdown(cancel_futures=True)
        self._pools, self._pids = [], []


_running: Engines | None = None
_lock = threading.Lock()


def get_engines(spec: EngineSpec) -> tuple[Engines, bool]:
    """Running engines of `spec`, and whether they were running already. Engines of another spec are stopped first."""
    global _running
    with _lock:
        if _running is not None and _running.alive and _running.spec == spec:
            return _running, True
        if _running is not None:
            _running.stop()
            _running = None
        _running = Engines(spec)
        return _running, False


def shutdown() -> None:
    """Stop the engines of this process, if any run, and free their memory."""
    global _running
    with _lock:
        if _running is not None:
            _running.stop()
        _running = None


def _require_vllm(spec: EngineSpec) -> None:
    if importlib.util.find_spec("vllm") is None:
        extra = "gpu" if _device(spec.device) == "cuda" else "cpu"
        raise EngineError(f"vLLM is not installed, and synthesis samples with it: pip install 'sbp-assets[{extra}]'")


def _device(device: Literal["auto", "cpu", "cuda"]) -> Literal["cpu", "cuda"]:
    if device != "auto":
        return device
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _environment(device: str, engine: int, engines: int) -> dict[str, str]:
    """Environment of one engine's process; vLLM reads it when it is imported."""
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


def _check_head_size(checkpoint: Path) -> None:
    size = json.loads((checkpoint / "config.json").read_text()).get("head_dim")
    if size is not None and size not in CPU_HEAD_SIZES:
        raise EngineError(
            f"{checkpoint}: vLLM has no CPU attention for model.head_dim {size}; choose one of "
            f"{', '.join(map(str, CPU_HEAD_SIZES))}"
        )


# The functions below run in the engine's process.

_llm: Any = None


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
    global _llm
    import torch
    from vllm import LLM

    if device == "cpu":
        # The environment comes too late where the parent's main module has imported torch here.
        torch.set_num_threads(1)
    memory: dict[str, Any] = {} if device == "cpu" else {"gpu_memory_utilization": spec.gpu_memory_utilization}
    _llm = LLM(
        str(spec.checkpoint),
        load_format="safetensors",  # never a pickle
        trust_remote_code=False,
        dtype=spec.dtype,
        seed=0,
        max_model_len=spec.context_length,
        max_num_seqs=spec.max_sequences,
        # A prompt prefilled in chunks breaks per-request seeds on CPU, so prompts are prefilled whole.
        enable_chunked_prefill=False,
        max_num_batched_tokens=max(spec.context_length, MIN_BATCHED_TOKENS),
        enforce_eager=device == "cpu",
        **memory,
    )
    return os.getpid()


def _generate(requests: list[Request], sampling: Sampling, ledger: Path) -> int:
    """Sample `requests`, appending each to `ledger` the moment it finishes; returns how many."""
    from vllm import SamplingParams
    from vllm.inputs import tokens_input
    from vllm.sampling_params import RequestOutputKind

    engine, tokenizer = _llm.llm_engine, _llm.get_tokenizer()
    context = engine.model_config.max_model_len
    for number, request in enumerate(requests):
        params = SamplingParams(
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=request.sampling_seed,
            max_tokens=context - len(request.prompt),
            stop_token_ids=[sampling.eos_id],
            detokenize=False,  # decoded whole at the end, which is exact where a character spans tokens
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        engine.add_request(str(number), tokens_input(request.prompt), params)
    with named_when_full(ledger), ledger.open("a", encoding="utf-8") as stream:
        while engine.has_unfinished_requests():
            for output in engine.step():
                if not output.finished:
                    continue
                request, completion = requests[int(output.request_id)], output.outputs[0]
                if completion.finish_reason not in ("stop", "length"):
                    raise RuntimeError(
                        f"vLLM ended {request.seed_id}-{request.rollout} with {completion.finish_reason!r}"
                    )
                row = {
                    "seed_id": request.seed_id,
                    "rollout": request.rollout,
                    "sampling_seed": request.sampling_seed,
                    "text": tokenizer.decode(
                        list(completion.token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
                    ),
                    "finish_reason": completion.finish_reason,
                }
                stream.write(json.dumps(row, ensure_ascii=False) + "\n")
                stream.flush()
    return len(requests)
