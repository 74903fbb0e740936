"""`sbp ui` serves or says why it does not; that it serves is in operations/test_instance.py."""

import os
import re
import signal
import socket
from pathlib import Path

import pytest

from sbp_assets_tests.cli.conftest import Sbp


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that would have taken the place of this process."""
    commands: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda _, command: commands.append(command))
    return commands


@pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0"])
def test_a_port_in_use_ends_it_at_once_with_one_that_is_free(sbp: Sbp, served: list[list[str]], address: str) -> None:
    with socket.socket() as listener:
        listener.bind((address, 0))
        listener.listen()
        port = listener.getsockname()[1]
        result = sbp("ui", "-p", "tiny", "--port", str(port))
    assert result.exit_code == 2 and not served
    assert result.stderr.startswith(
        f"port {port} of this machine cannot be used: Address already in use. Choose another"
    )
    other = re.search(r"as in: sbp ui --port (\d+) -p tiny\n$", result.stderr)
    assert other and sbp("ui", "-p", "tiny", "--port", other[1]).exit_code == 0
    assert served[0][-2:] == ["-p", other[1]]


def test_a_background_job_of_a_script_can_be_ended(sbp: Sbp, served: list[list[str]]) -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell starts it
    try:
        assert sbp("ui", "-p", "tiny").exit_code == 0 and served
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("port", ["0", "65536", "-1", "http"])
def test_a_port_that_is_none_is_refused(sbp: Sbp, served: list[list[str]], port: str) -> None:
    assert sbp("ui", "-p", "tiny", f"--port={port}").exit_code == 2 and not served


@pytest.mark.parametrize("command", [["ui"], ["run"], ["copy-artifacts", "elsewhere"]])
@pytest.mark.parametrize("key", ["data_dir", "work_dir", "instance_dir", "tensorboard_dir"])
def test_a_folder_that_cannot_be_written_is_named(
    sbp: Sbp, served: list[list[str]], tmp_path: Path, command: list[str], key: str
) -> None:
    (tmp_path / "file").touch()
    folder, variable = f"{tmp_path}/file/folder", f"SBP_DEPLOYMENT__{key.upper()}"
    result = sbp(*command, "-p", "tiny", **{variable: folder})
    if command == ["ui"] and key != "instance_dir":  # a finished store on a read-only disk can be looked at
        assert result.exit_code == 0 and served
        return
    assert result.exit_code == 2 and not served
    assert re.fullmatch(rf"deployment\.{key} {folder} cannot be (written|created): Not a directory.*\n", result.stderr)
