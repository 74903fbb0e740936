"""`sbp prune` where there is nothing to prune; what it removes is in operations/test_prune.py."""

from pathlib import Path

import pytest

from sbp_assets_tests.cli.conftest import Sbp


def test_without_an_instance_it_says_where_it_looked_and_creates_none(sbp: Sbp, tmp_path: Path) -> None:
    result = sbp("prune", "-p", "tiny")
    instance = tmp_path / ".sbp/tiny/instance"
    assert result.exit_code == 2 and f"no run and event storage in {instance}" in result.stderr
    assert not instance.exists()


def test_an_empty_instance_has_nothing_to_remove(sbp: Sbp, tmp_path: Path) -> None:
    (tmp_path / ".sbp/tiny/instance").mkdir(parents=True)
    (tmp_path / ".sbp/tiny/artifacts").mkdir()
    (tmp_path / ".sbp/tiny/artifacts/notes.txt").write_text("mine")
    result = sbp("prune", "-p", "tiny", "--days", "0")
    assert result.exit_code == 0, result.output
    assert "removed" in result.stdout and "0 bytes" in result.stdout and "notes.txt" in result.stdout
    assert (tmp_path / ".sbp/tiny/artifacts/notes.txt").read_text() == "mine"


@pytest.mark.parametrize("days", ["-1", "many"])
def test_days_are_a_number(sbp: Sbp, days: str) -> None:
    assert sbp("prune", "-p", "tiny", "--days", days).exit_code == 2
