"""Real engines, of vLLM and of transformers: results, reuse, a kill in the middle."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import polars as pl
import psutil
import pytest

from sbp_assets.settings import Synthesis
from sbp_assets.storage.progress import Progress
from sbp_assets.synthesis import engine as engine_module
from sbp_assets.synthesis.engine import (
    EngineError,
    Engines,
    EngineSpec,
    Generator,
    Request,
    Sampling,
    default_engine,
    head_size_problem,
)
from sbp_assets.synthesis.generate import Outcome, generate_shard
from sbp_assets.synthesis.ledger import Ledger
from sbp_assets_tests.synthesis.conftest import BOS, CONTEXT, EOS, RELATED
from sbp_assets_tests.synthesis.test_generate import NeverStarted

BOTH = pytest.mark.parametrize("kind", ["vllm", "transformers"])

SETTINGS = Synthesis(dtype="float32")
PROMPTS = {f"d{number:02d}": [BOS, *range(10 + number, 20 + number), RELATED] for number in range(12)}


def byte_tokens(texts: list[str]) -> list[int]:
    """The test tokenizer has one token per byte."""
    return [len(text.encode()) + 2 for text in texts]


def shard(generator: Generator, directory: Path, spec: EngineSpec, budget: int) -> tuple[Outcome, Ledger]:
    ledger = Ledger(directory, byte_tokens)
    with Progress("test", "tokens", budget) as progress:
        outcome = generate_shard(PROMPTS, budget, 40, generator, spec, SETTINGS, EOS, ledger, progress)
    return outcome, ledger


def test_two_engines_share_the_work_and_seeds_fix_the_text(
    engines: Engines, generator: Generator, spec: EngineSpec, tmp_path: Path
) -> None:
    first, _ = shard(generator, tmp_path / "a" / "f", spec, 1500)
    again, _ = shard(generator, tmp_path / "b" / "f", spec, 1500)
    assert len(set(engines.pids)) == 2
    assert again.engine_reused and again.startup_seconds == 0
    written = [path for path in (tmp_path / "a" / "f").iterdir() if path.stat().st_size]
    assert len(written) == 2, "each engine keeps a ledger of its own"
    assert first.rows.equals(again.rows)
    assert first.rows["n_tokens"].sum() >= 1500 > first.rows["n_tokens"][:-1].sum()
    assert set(first.rows["finish_reason"]) <= {"stop", "length"}
    assert first.rows["text"].n_unique() > len(first.rows) * 0.9, "rollouts of one seed differ"
    prompt = len(PROMPTS["d00"])
    full = first.rows.filter(pl.col("finish_reason") == "length")
    assert len(full) and full["n_tokens"].max() >= (CONTEXT - prompt) // 2


@pytest.fixture
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def either(kind: str, request: pytest.FixtureRequest) -> Engines:
    return request.getfixturevalue("engines" if kind == "vllm" else "transformers_engines")


@BOTH
def test_context_is_filled_and_eos_stops(either: Engines, tmp_path: Path) -> None:
    ledger = tmp_path / "ledger.jsonl"
    other = tmp_path / "other.jsonl"
    long = Request("long", 0, 1, [BOS] + [50] * (CONTEXT - 2))
    either.generate([long], Sampling(1.0, 1.0, EOS), [ledger, other], lambda: None)
    row = json.loads(ledger.read_text())
    assert row["seed_id"] == "long" and len(row["text"]) <= 1, "one token of room is left"
    assert not other.exists()


def test_both_engines_write_the_likeliest_text_alike(
    engines: Engines, transformers_engines: Engines, tmp_path: Path
) -> None:
    """Where nothing is left to chance: the same prompts, weights, ends and decoding.

    To vLLM a temperature below 0.01 is 0.01, and 0 means the likeliest token; the other engine takes what it is given.
    """
    requests = [Request(f"{n}", 0, n, [BOS, *range(40, 44 + n), 70 + n]) for n in range(12)]
    requests += [Request("bos", 0, 1, [BOS]), Request("long", 0, 1, [BOS] + [50] * (CONTEXT - 3))]
    written = []
    for running, temperature in ((engines, 0.0), (transformers_engines, 1e-6)):
        ledgers = [tmp_path / f"{running.spec.engine}{number}.jsonl" for number in range(2)]
        running.generate(requests, Sampling(temperature, 1.0, EOS), ledgers, lambda: None)
        rows = [json.loads(line) for path in ledgers for line in path.read_text().splitlines()]
        written.append({row["seed_id"]: row for row in rows})
    assert written[0] == written[1] and len(written[0]) == len(requests)
    assert len({row["text"] for row in written[0].values()}) > 5


@pytest.mark.processes
@pytest.mark.parametrize("kind", [pytest.param("vllm", marks=pytest.mark.faults), "transformers"])
def test_killed_worker_loses_and_repeats_nothing(
    kind: str, either: Engines, generator: Generator, tmp_path: Path
) -> None:
    """Kill -9 one engine in the middle: a clear error, then the rest is sampled and the rows are the same."""
    budget, spec = 6000, either.spec
    whole, _ = shard(generator, tmp_path / "whole" / "f", spec, budget)
    directory = tmp_path / "killed" / "f"
    victim = either.pids[1]

    def kill_once_some_are_done() -> None:
        while sum(path.read_bytes().count(b"\n") for path in directory.glob("*.jsonl")) < 20:
            time.sleep(0.005)
        os.kill(victim, signal.SIGKILL)

    killer = threading.Thread(target=kill_once_some_are_done)
    killer.start()
    with pytest.raises(EngineError, match=rf"engine process \({kind}\) died.*re-materialise this partition"):
        shard(generator, directory, spec, budget)
    killer.join()
    before = {}
    for path in directory.glob("*.jsonl"):
        for line in path.read_bytes().split(b"\n")[:-1]:
            row = json.loads(line)
            before[row["seed_id"], row["rollout"]] = row["text"]
    assert 20 <= len(before) < whole.requests
    # As a kill of the machine would leave it.
    torn = next(path for path in directory.glob("*.jsonl") if path.stat().st_size)
    with torn.open("a") as stream:
        stream.write('{"seed_id": "d00", "rol')

    # On another number of engines, which is deployment and changes nothing.
    outcome, _ = shard(generator, directory, dataclasses.replace(spec, processes=1), budget)
    assert outcome.resumed == len(before)
    assert outcome.engine_reused is False, "a dead engine is started again"
    recorded = [
        (row["seed_id"], row["rollout"])
        for path in directory.glob("*.jsonl")
        for line in path.read_text().splitlines()
        if line.endswith("}") and (row := json.loads(line))
    ]
    assert len(recorded) == len(set(recorded)), "nothing is sampled twice"
    kept = {
        (seed_id, rollout): text for seed_id, rollout, text in outcome.rows.select("seed_id", "rollout", "text").rows()
    }
    assert all(before[key] == text for key, text in kept.items() if key in before)
    assert outcome.rows.equals(whole.rows)


def test_finished_ledger_needs_no_engine(spec: EngineSpec, tmp_path: Path) -> None:
    ledger = tmp_path / "f" / "000000-x-engine0.jsonl"
    ledger.parent.mkdir()
    rows = [
        {"seed_id": seed_id, "rollout": 0, "sampling_seed": 0, "text": "four", "finish_reason": "stop"}
        for seed_id in sorted(PROMPTS)
    ]
    ledger.write_text("".join(json.dumps(row) + "\n" for row in rows))
    outcome, _ = shard(NeverStarted(), ledger.parent, spec, 60)
    assert outcome.rows["n_tokens"].to_list() == [6] * 10
    assert outcome.discarded == 2 and outcome.startup_seconds is None


def test_errors_say_what_to_do(spec: EngineSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "config.json").write_text('{"head_dim": 16}')
    # Here or not: what cannot run is told before vLLM is loaded.
    monkeypatch.setattr(engine_module.importlib.util, "find_spec", lambda name: name)
    with pytest.raises(EngineError, match=r"head_dim 16.*GENERATION_ENGINE=transformers"):
        Engines(dataclasses.replace(spec, checkpoint=tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(EngineError, match="engine_processes is 2 and there are 1 GPUs"):
        Engines(dataclasses.replace(spec, device="cuda"))
    monkeypatch.setattr(engine_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EngineError, match=r"VLLM=auto.*GENERATION_ENGINE=transformers"):
        Engines(spec)


def test_auto_takes_vllm_where_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module.importlib.util, "find_spec", lambda name: name)
    assert default_engine() == "vllm"
    monkeypatch.setattr(engine_module.importlib.util, "find_spec", lambda name: None if name == "vllm" else name)
    assert default_engine() == "transformers"


def test_killed_parent_takes_its_workers_along(tmp_path: Path) -> None:
    """An engine without a parent would hold its memory for ever. No engine is needed to see it leave."""
    script = tmp_path / "parent.py"
    script.write_text(
        "import multiprocessing, os, time\n"
        "from concurrent.futures import ProcessPoolExecutor\n"
        "from sbp_assets.synthesis.engine import _prepare\n"
        "if __name__ == '__main__':\n"
        "    pool = ProcessPoolExecutor(1, multiprocessing.get_context('spawn'), _prepare, ({},))\n"
        "    print(pool.submit(os.getpid).result(), flush=True)\n"
        "    time.sleep(60)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(engine_module.__file__).parents[2])}
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True, env=environment) as parent:
        assert parent.stdout is not None
        worker = psutil.Process(int(parent.stdout.readline()))
        parent.kill()
    psutil.wait_procs([worker], timeout=10)
    assert not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE


def test_head_sizes_that_vllm_lacks_are_named_for_vllm_on_a_cpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = head_size_problem(48, "vllm", "cpu")
    assert problem and "model.head_dim 48" in problem and "32, 64, 80" in problem
    assert head_size_problem(64, "vllm", "cpu") is None
    assert head_size_problem(48, "transformers", "cpu") is None
    assert head_size_problem(48, "vllm", "cuda") is None
    for engine, refused in (("vllm", True), ("transformers", False)):
        monkeypatch.setattr(engine_module, "default_engine", lambda engine=engine: engine)
        assert bool(head_size_problem(48, "auto", "cpu")) is refused
