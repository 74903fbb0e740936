"""The benchmark of a GPU, with every part at a tiny size on the CPU."""

import json
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu

TRAINED = {"tokens_per_second", "mfu", "mfu_without_attention", "peak_memory_gb", "seconds_per_step"}


@pytest.mark.faults
@pytest.mark.processes
def test_every_part_runs_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    gpu.main("cpu", "tiny", minutes=10)
    done = capsys.readouterr()
    result = json.loads(done.out.splitlines()[-1])
    measured = result["measured"]
    assert set(measured) == {
        "activation_checkpointing", "compiled", "embedding_bundled", "embedding_qwen3", "activations_kept", "sharding",
        "checkpoint",
    }, done.err  # fmt: skip
    assert set(result["skipped"]) == {"under_a_mask"}
    for training in (
        *(measured[name] for name in ("activation_checkpointing", "compiled", "activations_kept")),
        *(measured["sharding"][kind] for kind in ("none", "full")),
    ):
        assert set(training) >= TRAINED and training["tokens_per_second"] > 0
    checkpoint = measured["checkpoint"]
    # Weights and two moments in float32.
    assert checkpoint["gigabytes"] * 1e9 == pytest.approx(12 * result["parameters"], rel=0.1)
    assert checkpoint["seconds_to_write"] > 0 and checkpoint["seconds_to_load"] > 0
    assert checkpoint["resumed"] == {"steps": 3, "largest_loss_difference": 0, "exact": True}
    assert all(measured[f"embedding_{name}"]["documents_per_second"] > 0 for name in ("bundled", "qwen3"))
    assert not list(tmp_path.glob("sbp-benchmark-*"))


def test_no_part_begins_when_the_time_is_over(capsys: pytest.CaptureFixture[str]):
    gpu.main("cpu", "tiny", minutes=0)
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["measured"] == {} and set(result["skipped"].values()) == {"the time was over"}
    assert set(result["skipped"]) == set(gpu.PARTS) and result["parameters"] > 0


def test_without_a_gpu_one_line_says_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.argv", ["gpu"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delitem(sys.modules, "benchmarks.gpu")
    with pytest.raises(SystemExit, match=r"^benchmarks\.gpu: torch finds no CUDA device; --device cpu runs every part"):
        runpy.run_module("benchmarks.gpu", run_name="__main__")


def test_what_is_under_way_when_the_time_is_over_is_cut_off():
    program = """
import time
from benchmarks.deadline import ending_after
with ending_after(1, lambda: print("of a block that has ended")):
    pass
with ending_after(0.01, lambda: print("what was measured")):
    time.sleep(600)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "what was measured\n"), done.stderr
