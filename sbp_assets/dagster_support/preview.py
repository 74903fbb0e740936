"""Untrusted text shown to people: in markdown for the Dagster UI nothing in a document can become markup."""

from __future__ import annotations

import html
import re
from typing import Any

import polars as pl

_MARKDOWN = re.compile(r"([\\`*_{}\[\]()#+!|~])")

_AUTOLINK = re.compile(r"(?i)(?:https?|ftp|mailto):|www(?=\.)|@")


def printable(text: str) -> str:
    """`text` without control characters, and without those that hide or reorder others; a space stands for each.

    So that a document neither steers a terminal nor shows other than it is. Line breaks go, too.
    """
    return "".join(character if character.isprintable() else " " for character in text)


def escape(text: str, max_chars: int = 300) -> str:
    """One line of plain text, safe inside a markdown table cell, cut to `max_chars` characters."""
    line = " ".join(printable(text).split())
    cut = line if len(line) <= max_chars else line[: max_chars - 1] + "…"
    # A zero-width space keeps GitHub-flavoured markdown from making links of bare addresses.
    inert = _AUTOLINK.sub("\\g<0>\u200b", cut)
    return _MARKDOWN.sub(r"\\\1", html.escape(inert, quote=False))


def table_preview(rows: pl.DataFrame, max_chars: int = 300) -> str:
    """Markdown table of `rows` (take a head or a sample first); text cells are escaped and cut, nulls left empty."""

    def cell(value: Any) -> str:
        if value is None:
            return ""
        if isinstance(value, float):
            return f"{value:.4g}"
        return escape(str(value), max_chars)

    header = "| " + " | ".join(rows.columns) + " |\n|" + "---|" * len(rows.columns)
    return "\n".join([header, *("| " + " | ".join(map(cell, row)) + " |" for row in rows.iter_rows())])
