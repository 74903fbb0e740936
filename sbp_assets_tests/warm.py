"""`sbp` in a process that need not import anything first: three of the four seconds that most commands take.

multiprocessing's fork server has imported what the commands import, and nothing else has happened in it; each command
is a child of its own. What a library reads of the environment as it is imported (fsspec its $FSSPEC_…) is that of the
tests: where it matters, a test starts `python -m sbp_assets.cli`.
"""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
from pathlib import Path

_MODULES = [
    "sbp_assets.definitions", "sbp_assets.orchestration.runner", "sbp_assets.orchestration.failed_checks",
    "sbp_assets.orchestration.verification", "sbp_assets.provenance.walk", "s3fs", __name__,
    "pytest",  # its children import the main module, as those of any process
]  # fmt: skip
_SERVER = multiprocessing.get_context("forkserver")


def call(
    arguments: tuple[str, ...], environ: dict[str, str], folder: Path, seconds: float
) -> subprocess.CompletedProcess[str]:
    """Run `sbp ARGUMENTS` in `folder`, as subprocess.run would; TimeoutExpired after `seconds`."""
    _SERVER.set_forkserver_preload(_MODULES)
    with tempfile.TemporaryDirectory() as said:
        out, err = Path(said, "out"), Path(said, "err")
        process = _SERVER.Process(target=_sbp, args=(arguments, environ, folder, out, err))
        process.start()
        process.join(seconds)
        if process.is_alive():
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(arguments, seconds)
        assert process.exitcode is not None
        return subprocess.CompletedProcess(arguments, process.exitcode, out.read_text(), err.read_text())


def _sbp(arguments: tuple[str, ...], environ: dict[str, str], folder: Path, out: Path, err: Path) -> None:
    from sbp_assets.cli import app

    for descriptor, path in ((1, out), (2, err)):
        with path.open("wb") as file:
            os.dup2(file.fileno(), descriptor)
    os.environ.clear()
    os.environ.update(environ)
    os.chdir(folder)
    sys.argv[:] = ["sbp", *arguments]
    app()
