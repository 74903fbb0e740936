import polars as pl
import pytest

from sbp_assets.dagster_support.preview import escape, printable, table_preview


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


def test_what_steers_a_terminal_or_hides_is_not_shown():
    assert escape("a\x1b[31mb\x9b\u202ec\u200bd\x00e") == "a \\[31mb c d e"
    assert printable("two\nlines\x07") == "two lines "


def test_a_row_is_a_line():
    preview = table_preview(pl.DataFrame({"text": ["two\nlines | and a bar"], "value": [0.123456]}))
    assert len(preview.splitlines()) == 3
    assert preview.endswith("| 0.1235 |")


def test_a_null_is_an_empty_cell():
    assert table_preview(pl.DataFrame({"loss": [None, 1.5]})).splitlines()[2:] == ["|  |", "| 1.5 |"]
