"""`sbp verify` where there is nothing to verify; what it finds is in operations/test_corruption.py."""

from pathlib import Path

import pytest

from sbp_assets_tests.cli.conftest import Sbp


@pytest.mark.parametrize("empty_instance", [False, True])
def test_nothing_materialised_is_an_error_that_names_where_it_looked(
    sbp: Sbp, tmp_path: Path, empty_instance: bool
) -> None:
    instance = tmp_path / ".sbp/tiny/instance"
    if empty_instance:
        instance.mkdir(parents=True)
    result = sbp("verify", "-p", "tiny")
    assert result.exit_code == 2
    assert f"the instance {instance} has no materialisations of any step" in result.stderr
    assert str(tmp_path / ".sbp/tiny/artifacts") in result.stderr
    assert "`sbp run -p tiny` materialises" in result.stderr
    assert instance.exists() == empty_instance
