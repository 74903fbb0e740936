"""Disks that run full under `sbp run`: file systems of a few megabytes, mounted for the test."""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from sbp_assets_tests.operations.deployment import FOLDERS, Deployment
from sbp_assets_tests.operations.faults import clear


class Disk:
    """A file system of `megabytes` at `path`, in memory; a context manager."""

    def __init__(self, path: Path, megabytes: int) -> None:
        self.path, self.megabytes = path, megabytes

    def __enter__(self) -> "Disk":
        self.path.mkdir(parents=True, exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", f"size={self.megabytes}m", "tmpfs", str(self.path)]
        mounted = subprocess.run(command, capture_output=True, text=True)
        if mounted.returncode:
            pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
        return self

    def __exit__(self, *_: object) -> None:
        subprocess.run(["umount", "--lazy", str(self.path)], check=True)

    def fill(self, spare: int = 0) -> None:
        """Leave `spare` bytes."""
        room = shutil.disk_usage(self.path).free - spare
        with (self.path / "ballast").open("wb") as ballast:
            os.posix_fallocate(ballast.fileno(), 0, room)

    def free(self) -> None:
        (self.path / "ballast").unlink()


@pytest.fixture
def disks(tmp_path: Path) -> Iterator[dict[str, Disk]]:
    """One for the artifacts and one for the work of a deployment in `tmp_path`."""
    with ExitStack() as stack:
        yield {name: stack.enter_context(Disk(tmp_path / FOLDERS[name], 24)) for name in ("data_dir", "work_dir")}


def refused(deployment: Deployment, until: str) -> str:
    """What `sbp run --until UNTIL` says when it fails."""
    done = deployment.sbp("run", "--until", until, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    return done.stderr


def test_a_full_disk_is_named_and_the_next_run_resumes(disks: dict[str, Disk], finished: Path, tmp_path: Path):
    often = {"SBP_DEPLOYMENT__CHECKPOINT_MINUTES": "0.005"}  # every 0.3 s
    store, work = disks["data_dir"], disks["work_dir"]
    with Deployment(tmp_path, often, finished) as deployment:
        undisturbed = deployment.versions()
        made = ("corpus/tokens", "pretraining/oracle_model", "synthesis/synthetic_documents")
        clear(deployment, *made)
        for left in ("oracle_model", "staging/oracle_model", "synthesis"):
            shutil.rmtree(work.path / left)
        there = deployment.versions()

        store.fill()
        said = refused(deployment, "tokenise")
        assert f"{deployment.artifacts}/corpus/tokens/00000: its disk is full" in said
        assert f"{deployment.artifacts}/corpus/tokens/00001: its disk is full" in said
        assert not list(deployment.artifacts.rglob("*.partial"))
        store.free()
        assert deployment.versions() == there

        work.fill(spare=2**18)
        assert f"{work.path}/oracle_model/0/checkpoint.pt: its disk is full" in refused(deployment, "pretrain_oracle")
        work.free()
        deployment.sbp("run", "--until", "tune_synthesizer")

        work.fill(spare=2**14)
        said = refused(deployment, "synthesise")
        assert f"{work.path}/synthesis/00000/" in said and "its disk is full" in said
        work.free()
        deployment.sbp("run")
        assert deployment.versions() == undisturbed


def test_a_disk_that_holds_everything_runs_full(finished: Path, tmp_path: Path):
    """Run and event storage are on it too, so that not even the failure can be recorded."""
    with Disk(tmp_path, 64) as disk, Deployment(tmp_path, finished=finished) as deployment:
        undisturbed = deployment.versions()
        clear(deployment, "corpus/tokens")
        disk.fill(spare=2**15)
        said = refused(deployment, "tokenise")
        assert "disk" in said and "full" in said
        disk.free()
        deployment.sbp("run", "--until", "tokenise")
        assert deployment.versions() == undisturbed
