import polars as pl
import pytest

from sbp_assets.storage.preview import escape, table_preview


@pytest.mark.parametrize(
    "text",
    ["<script>alert(1)</script>", "[a](javascript:alert(1))", "![x](//evil)", "`code`", "a | b", "# title", "*bold*"],
)
def test_no_markup_survives(text: str):
    shown = escape(text)
    assert "<" not in shown
    for mark in "`*[]()!#|":
        assert shown.replace(f"\\{mark}", "").count(mark) == 0


@pytest.mark.parametrize(
    "address", ["https://evil.example/x", "HTTP://evil.example", "www.evil.example", "a@evil.example"]
)
def test_bare_addresses_become_no_links(address: str):
    assert address not in escape(address).replace("\\", "")
    assert escape(address).replace("\u200b", "") == address


def test_a_row_is_a_line():
    preview = table_preview(pl.DataFrame({"text": ["two\nlines | and a bar"], "value": [0.123456]}))
    assert len(preview.splitlines()) == 3
    assert preview.endswith("| 0.1235 |")
