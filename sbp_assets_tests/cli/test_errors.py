"""Which error ends a command with which exit code and message."""

import os
import sqlite3
import subprocess
import sys

import pytest
import typer
from sqlalchemy.exc import OperationalError
from typer.testing import CliRunner, Result

from sbp_assets.cli.errors import CommandError, ReportingGroup
from sbp_assets.instance.storage import InstanceInUseError
from sbp_assets.orchestration.runner import PipelineError
from sbp_assets.settings import SettingsError


def ended_with(error: BaseException) -> Result:
    """Return how a command ends that raises `error`."""
    app = typer.Typer(cls=ReportingGroup, pretty_exceptions_enable=False)

    @app.command()
    def fail() -> None:
        raise error

    app.command()(lambda: None)  # with a single command, typer has no group
    return CliRunner().invoke(app, ["fail"])


@pytest.mark.parametrize(
    ("error", "exit_code", "message"),
    [
        (SettingsError("profile x cannot be used"), 2, "profile x cannot be used"),
        (CommandError("nothing to verify"), 2, "nothing to verify"),
        (CommandError("no such document", 1), 1, "no such document"),
        (PipelineError("Tokenise failed"), 1, "Tokenise failed"),
        (InstanceInUseError("another process is running `sbp run`"), 2, "another process is running `sbp run`"),
        (RuntimeError("the bucket does not exist"), 1, "the bucket does not exist"),
        (KeyboardInterrupt(), 130, "the same command resumes from there"),
        (OperationalError("insert", {}, sqlite3.Error("disk is full")), 1, "storage cannot be used: disk is full. Fix"),
        (subprocess.CalledProcessError(3, "sbp run"), 3, ""),
        (typer.Exit(4), 4, ""),
        (PermissionError(13, "Permission denied", "/data/x"), 1, "/data/x cannot be used: Permission denied"),
        (OSError(28, "No space left on device", "/data/x"), 1, "/data/x cannot be used: No space left on device"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else None,
)
def test_an_error_that_its_user_can_act_on_is_a_line_and_an_exit_code(
    error: BaseException, exit_code: int, message: str
) -> None:
    result = ended_with(error)
    assert result.exit_code == exit_code and message in result.stderr
    assert "Traceback" not in result.output


def test_a_fault_of_the_project_keeps_its_traceback() -> None:
    assert isinstance(ended_with(KeyError("shard")).exception, KeyError)
    assert isinstance(ended_with(FileNotFoundError(2, "No such file", "x")).exception, FileNotFoundError)


def test_a_character_that_the_locale_lacks_is_no_error() -> None:
    environ = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0"}
    command = [sys.executable, "-m", "sbp_assets.cli", "--help"]
    plan = [*command[:-1], "trace", "caf\u00e9"]
    for arguments in (command, plan):
        done = subprocess.run(arguments, env=environ, capture_output=True)
        assert b"Traceback" not in done.stderr, done.stderr
