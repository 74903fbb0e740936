"""`sbp trace` where nothing is materialised; what it finds is in provenance/."""

from pathlib import Path

from sbp_assets_tests.cli.conftest import Sbp


def test_the_command_that_materialises_what_is_missing_is_of_the_same_profile(sbp: Sbp, tmp_path: Path) -> None:
    result = sbp("trace", "sbp_scores", "-p", "tiny")
    assert result.exit_code == 1
    assert "(sbp run -p tiny --until score_sbp)" in result.stderr
    assert str(tmp_path / ".sbp/tiny/artifacts") in result.stderr
    assert not (tmp_path / ".sbp/tiny/instance").exists()
