"""How `sbp copy-artifacts` ends; what it copies is tested in storage/."""

import pytest

from sbp_assets_tests.cli.conftest import Sbp


@pytest.mark.parametrize("error", [OSError("the disk is full"), RuntimeError("the bucket does not exist")])
def test_a_copy_that_fails_midway_is_no_refusal(sbp: Sbp, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr("sbp_assets.storage.copy.copy_artifacts", fail)
    result = sbp("copy-artifacts", "elsewhere", "-p", "tiny")
    assert result.exit_code == 1 and str(error) in result.stderr


def test_the_own_store_is_refused_as_a_destination(sbp: Sbp) -> None:
    result = sbp("copy-artifacts", ".sbp/tiny/artifacts", "-p", "tiny")
    assert result.exit_code == 2 and "name another store" in result.stderr
