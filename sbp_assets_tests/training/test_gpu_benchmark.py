import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).resolve().parents[2]
TRAINED = {"tokens_per_second", "mfu", "mfu_without_attention", "peak_memory_gb", "seconds_per_step"}


def benchmark(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", *arguments],
        cwd=CHECKOUT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )


@pytest.mark.processes
def test_every_part_runs_on_a_cpu(tmp_path: Path):
    done = benchmark("--device", "cpu", TMPDIR=str(tmp_path))
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    measured = result["measured"]
    assert set(measured) == {
        "activation_checkpointing", "compiled", "embedding_bundled", "embedding_qwen3", "activations_kept", "sharding",
    }, done.stderr  # fmt: skip
    assert set(result["skipped"]) == {"under_a_mask"}
    for training in (
        *(measured[name] for name in ("activation_checkpointing", "compiled", "activations_kept")),
        *(measured["sharding"][kind] for kind in ("none", "full")),
    ):
        assert set(training) >= TRAINED and training["tokens_per_second"] > 0
    checkpoint = measured["activation_checkpointing"]["checkpoint"]
    # Weights and two moments in float32.
    assert checkpoint["gigabytes"] * 1e9 == pytest.approx(12 * result["parameters"], rel=0.1)
    assert checkpoint["seconds_to_write"] > 0 and checkpoint["seconds_to_load"] > 0
    resumed = measured["activation_checkpointing"]["resumed"]
    assert resumed == {"steps": 3, "largest_loss_difference": 0, "exact": True}
    assert all(measured[f"embedding_{name}"]["documents_per_second"] > 0 for name in ("bundled", "qwen3"))
    assert not list(tmp_path.glob("sbp-benchmark-*"))


@pytest.mark.processes
def test_without_a_gpu_one_line_says_so():
    done = benchmark(CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 1
    assert done.stderr.strip().splitlines()[-1].startswith("benchmarks.gpu: torch finds no CUDA device; --device cpu")
    assert "Traceback" not in done.stderr
