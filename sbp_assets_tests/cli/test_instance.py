"""`sbp env`: the environment of a profile in a shell, and what other profiles are allowed to do there."""

import os
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

from sbp_assets.instance.branch import make_branch
from sbp_assets.settings import load_settings, profile_path
from sbp_assets_tests.cli.conftest import Sbp

DATA_DIR, TOP_P = "SBP_DEPLOYMENT__DATA_DIR", "SBP_EXPERIMENT__SYNTHESIS__TOP_P"


def exported(lines: str) -> dict[str, str]:
    """Return the variables that `lines` export."""
    names = [line.split("=")[0].removeprefix("export ") for line in lines.splitlines() if line.startswith("export")]
    return {name: value for name, value in evaluated(lines).items() if name in names}


def evaluated(lines: str, **before: str) -> dict[str, str]:
    """Return the environment of a shell that has evaluated `lines`."""
    done = subprocess.run(
        ["sh", "-c", 'eval "$1"; exec env -0', "sh", lines],
        env={"PATH": os.environ["PATH"], **before},
        capture_output=True,
        text=True,
        check=True,
    )
    return dict(pair.split("=", 1) for pair in done.stdout.split("\0") if pair)


@pytest.fixture
def shell(sbp: Sbp) -> dict[str, str]:
    """What `eval "$(sbp env -p tiny)"` leaves in a shell."""
    return exported(sbp("env", "-p", "tiny").stdout)


@pytest.fixture
def branch_shell(sbp: Sbp, tmp_path: Path, shell: dict[str, str]) -> dict[str, str]:
    """What `eval "$(sbp env -p tiny --branch narrow)"` leaves in a shell; the branch changes synthesis.top_p."""
    for folder in ("artifacts", "instance"):
        (tmp_path / ".sbp/tiny" / folder).mkdir(parents=True, exist_ok=True)
    make_branch(load_settings("tiny", {}), "narrow", {"synthesis.top_p": 0.5})
    return exported(sbp("env", "-p", "tiny", "--branch", "narrow").stdout)


@pytest.mark.parametrize("command", [["run"], ["verify"], ["plan"], ["trace", "x"], ["ui"], ["branch", "b", "x=1"]])
def test_a_shell_of_one_profile_refuses_another(sbp: Sbp, shell: dict[str, str], command: list[str]) -> None:
    result = sbp(*command, "-p", "five_tokens", **shell)
    assert result.exit_code == 2
    assert "environment of profile tiny" in result.stderr and "those of profile five_tokens" in result.stderr
    assert 'another shell, or first run: eval "$(sbp env -p five_tokens)"' in result.stderr


def test_a_shell_of_one_profile_serves_that_profile(sbp: Sbp, shell: dict[str, str]) -> None:
    assert shell["SBP_ENV_PROFILE"] == "tiny"
    for arguments in (["env"], ["env", "-p", "tiny"]):
        assert exported(sbp(*arguments, **shell).stdout) == shell


def test_a_profile_of_ones_own_is_the_same_by_whatever_path_it_is_named(sbp: Sbp, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(profile_path("tiny").read_text())
    shell = exported(sbp("env", "-p", "mine.yaml").stdout)
    assert sbp("env", "-p", str(tmp_path / "mine.yaml"), **shell).exit_code == 0
    assert sbp("env", "-p", "tiny", **shell).stdout.count("mine") == 0


def test_another_profile_takes_a_shell_over_with_its_own_directories(sbp: Sbp, shell: dict[str, str]) -> None:
    lines = sbp("env", "-p", "five_tokens", **shell).stdout
    after = evaluated(lines, **shell)
    assert after["SBP_ENV_PROFILE"] == after["SBP_PROFILE"] == "five_tokens"
    assert after[DATA_DIR].endswith("/.sbp/five_tokens/artifacts")
    assert sbp("env", "-p", "five_tokens", **exported(lines)).exit_code == 0


def test_a_shell_of_a_branch_serves_the_branch(sbp: Sbp, branch_shell: dict[str, str]) -> None:
    assert branch_shell["SBP_ENV_PROFILE"] == "tiny" and branch_shell[TOP_P] == "0.5"
    assert "/artifacts.branches/narrow/" in branch_shell[DATA_DIR]
    assert exported(sbp("env", **branch_shell).stdout) == branch_shell


def test_another_profile_takes_over_nothing_of_a_branch(sbp: Sbp, branch_shell: dict[str, str]) -> None:
    after = evaluated(sbp("env", "-p", "five_tokens", **branch_shell).stdout, **branch_shell)
    assert TOP_P not in after and after[DATA_DIR].endswith("/.sbp/five_tokens/artifacts")


def test_a_branch_runs_in_a_shell_of_its_profile(
    sbp: Sbp, shell: dict[str, str], branch_shell: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[dict[str, str]] = []

    def start(command: list[str], env: dict[str, str], **_: Any) -> None:
        assert shlex.join(command).endswith("-m sbp_assets.cli run")
        started.append(env)

    monkeypatch.setattr("sbp_assets.instance.branch.subprocess.run", start)
    assert sbp("branch", "narrow", "synthesis.top_p=0.5", **shell).exit_code == 0
    (environ,) = started
    assert environ[DATA_DIR] == branch_shell[DATA_DIR]
    of_run = {name: value for name, value in environ.items() if name.startswith("SBP_")}
    assert sbp("env", **of_run).exit_code == 0, "`sbp run` is not refused in it"
