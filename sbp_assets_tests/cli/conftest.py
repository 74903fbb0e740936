"""Commands called in this process, as a user without any setting of this project calls them."""

import os
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pytest
from typer.testing import CliRunner, Result

from sbp_assets.cli import app

Sbp = Callable[..., Result]
"""`sbp("verify", "-p", "tiny", **variables)`: the result of the command under these environment variables."""


@pytest.fixture
def sbp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sbp:
    """Calls `sbp` in an empty directory; what it changes in the environment is forgotten after the call."""
    monkeypatch.chdir(tmp_path)
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("SBP_", "DAGSTER_"))}

    def call(*arguments: str, **variables: str) -> Result:
        with mock.patch.dict(os.environ, {**clean, **variables}, clear=True):
            return CliRunner().invoke(app, arguments)

    return call
