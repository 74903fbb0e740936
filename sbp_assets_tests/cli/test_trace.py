"""`sbp trace` where nothing is materialised; what it finds is in provenance/."""

from pathlib import Path

import pytest

from sbp_assets_tests.cli.conftest import Sbp


def test_the_command_that_materialises_what_is_missing_is_of_the_same_profile(sbp: Sbp, tmp_path: Path) -> None:
    result = sbp("trace", "sbp_scores", "-p", "tiny")
    assert result.exit_code == 1
    assert "(sbp run -p tiny --until score_sbp)" in result.stderr
    assert str(tmp_path / ".sbp/tiny/artifacts") in result.stderr
    assert not (tmp_path / ".sbp/tiny/instance").exists()


@pytest.mark.parametrize(
    ("name", "code"), [("文書\u3000一", 1), ("می\u200cخواهم", 1), ("a\nb", 2), ("a\x1bb", 2), ("caf\udce9", 2)]
)
def test_an_id_is_any_line_of_utf8(sbp: Sbp, name: str, code: int) -> None:
    result = sbp("trace", name, "-p", "tiny")
    assert (result.exit_code, "ID is not UTF-8" in result.stderr) == (code, code == 2)
