"""Threads of the numerical libraries, so that a task computes on the cores that it asks for and gives the same bits."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from threadpoolctl import threadpool_limits

# Read by a library that the task is the first to load: OpenMP's (FAISS, torch), BLAS's, and those of Rust.
_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "POLARS_MAX_THREADS", "RAYON_NUM_THREADS")


@contextmanager
def limited_threads(count: int) -> Iterator[None]:
    """Let NumPy, FAISS and torch compute on `count` threads in the block, also where the block loads them.

    A library that the block loads keeps that number afterwards; the others get theirs back.
    """
    before = {name: os.environ.get(name) for name in _VARIABLES}
    torch = sys.modules.get("torch")
    torch_threads = torch and torch.get_num_threads()
    os.environ.update(dict.fromkeys(_VARIABLES, str(count)))
    try:
        with threadpool_limits(count):
            if torch:
                torch.set_num_threads(count)
            yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
        if torch:
            torch.set_num_threads(torch_threads)
