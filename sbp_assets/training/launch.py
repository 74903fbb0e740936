"""The command line and the environment of a training run's processes."""

from __future__ import annotations

import os
import sys
from pathlib import Path

WORKER = "sbp_assets.training.worker"
LAUNCHER_PID = "SBP_LAUNCHER_PID"
# How long a training run that was asked to end may take for its step and its checkpoint.
ENDING_SECONDS = 240
_MALLOC = ":".join(
    f"glibc.malloc.{name}" for name in (f"mmap_threshold={1 << 30}", f"trim_threshold={1 << 30}", "hugetlb=1")
)


def training_command(spec_path: Path, processes: int = 1) -> list[str]:
    """Return the command that trains what the file `spec_path` describes.

    `processes` is how many processes of this host train together, one per GPU, or CPU processes.
    """
    if processes == 1:
        # Without torchrun a single process starts seconds earlier.
        return [sys.executable, "-m", WORKER, str(spec_path)]
    options = [f"--nproc-per-node={processes}", "--max-restarts=0", f"--shutdown-timeout={ENDING_SECONDS + 10}"]
    launcher = ["-m", "torch.distributed.run", "--standalone", *options]
    return [sys.executable, *launcher, "-m", WORKER, str(spec_path)]


def training_environment(threads: int = 1) -> dict[str, str]:
    """Return the environment variables that a training command needs beside the caller's; `threads` per process."""
    return {
        # One thread per process: more threads on busy cores are several times slower than one.
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        # glibc returns freed memory to the system at once and takes it again for the next tensor. Kept, and in large
        # pages, a step of the demo's models takes 111 ms instead of 137 (one core).
        "GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES", _MALLOC),
        "TOKENIZERS_PARALLELISM": "false",
        # A launcher that is killed cannot stop its workers; they leave when it is gone.
        LAUNCHER_PID: str(os.getpid()),
        # `python -m` looks in the current directory first: another checkout there would train with its code.
        "PYTHONSAFEPATH": "1",
        # The run reads local directories only.
        "HF_HUB_OFFLINE": "1",
    }
