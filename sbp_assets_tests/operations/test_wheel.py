"""The project installed from its wheel, away from the checkout: it works, and writes nothing where it is installed."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import venv
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from sbp_assets_tests.operations.deployment import CHECKOUT, FOLDERS, Deployment, free_port

TOP_LEVEL = ("dagster.yaml", "workspace.yaml", "deploy/postgres/dagster.yaml")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the sdist, as the gate does."""
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(CHECKOUT)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def programs(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of `sbp` and `python` in an environment that has the wheel, and sees the other packages of this one."""
    home = tmp_path_factory.mktemp("installed") / "environment"
    venv.create(home, with_pip=True)
    subprocess.run(
        [home / "bin/python", "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel],
        check=True,
    )
    # The folders alone: what their own .pth files lead to, such as this checkout, is not seen.
    others = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    (site,) = home.glob("lib/python*/site-packages")
    (site / "others.pth").write_text("".join(f"{path}\n" for path in sorted(others)))
    return home / "bin"


@pytest.fixture
def deployment(programs: Path, tmp_path: Path) -> Iterator[Deployment]:
    with Deployment(tmp_path) as deployment:
        yield deployment


def environ(deployment: Deployment, programs: Path) -> dict[str, str]:
    """As a user has it: nothing of Dagster's, the commands on the path, a home of its own."""
    (deployment.home / "user").mkdir(exist_ok=True)
    kept = {
        name: value
        for name, value in deployment.environ.items()
        if not name.startswith("DAGSTER_") and name not in ("SBP_INSTANCE_DIR", "PYTHONPATH")
    }
    return {**kept, "HOME": str(deployment.home / "user"), "PATH": f"{programs}:/usr/bin:/bin"}


def say(deployment: Deployment, programs: Path, command: str) -> str:
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        env=environ(deployment, programs),
        cwd=deployment.home,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout + done.stderr


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    found = {}
    for path in folder.rglob("*"):
        state = path.lstat()
        found[str(path)] = (state.st_mtime_ns, state.st_size)
    return found


def test_the_wheel_holds_the_whole_package_and_nothing_else(wheel: Path):
    package = {
        path.relative_to(CHECKOUT).as_posix(): path.read_bytes()
        for path in (CHECKOUT / "sbp_assets").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert {Path(name).suffix for name in package} >= {".py", ".yaml", ".j2", ".md"}
    top_level = {f"sbp_assets/_project/{name}": (CHECKOUT / name).read_bytes() for name in TOP_LEVEL}
    with zipfile.ZipFile(wheel) as archive:
        held = {name: archive.read(name) for name in archive.namelist() if ".dist-info/" not in name}
    assert sorted(held) == sorted(package | top_level)
    assert held == package | top_level


def test_commands_find_what_they_need_from_any_directory(deployment: Deployment, programs: Path):
    where = say(deployment, programs, "python -c 'import sbp_assets; print(sbp_assets.__file__)'")
    assert where.startswith(str(programs.parent))
    before = tree(programs.parent)
    assert "[   done] Read" in say(deployment, programs, "sbp run -p tiny --until ingest")
    assert "corpus/source_manifest" in say(deployment, programs, "python -m sbp_assets.cli plan -p paper_1t")
    listed = say(deployment, programs, 'eval "$(sbp env)"; python -m dagster job list -w "$SBP_WORKSPACE"')
    assert "Job: synthesise" in listed
    assert tree(programs.parent) == before


def test_the_ui_runs_what_is_launched_in_it_and_leaves_the_installation_alone(deployment: Deployment, programs: Path):
    before = tree(programs.parent)
    deployment.port = free_port()
    command = (str(programs / "sbp"), "ui", "--port", str(deployment.port))
    ui = deployment.start(*command, log="ui.log", environ=environ(deployment, programs))
    deployment.wait_served(ui, "ui.log")
    assert deployment.graphql("{ shouldShowNux }") == {"shouldShowNux": False}
    assert deployment.wait_run(deployment.launch("manifest")) == "SUCCESS"
    deployment.stop(ui)
    assert tree(programs.parent) == before
    made = {path.name for path in deployment.home.iterdir()}
    assert made <= {*FOLDERS.values(), "user", "ui.log"}, "nor does it write where it was started"
