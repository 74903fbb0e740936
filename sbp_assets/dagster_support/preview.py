"""Untrusted text shown to people: in markdown for the Dagster UI nothing in a document can become markup."""

from __future__ import annotations

import html
import re
from typing import Any

import polars as pl

_MARKDOWN = re.compile(r"([\\`*_{}\[\]()#+!|~])")

_AUTOLINK = re.compile(r"(?i)(?:https?|ftp|mailto):|www(?=\.)|@")


def printable(text: str) -> str:
    """Return `text` with a space for each control character and each that hides or reorders others.

    A document then neither steers a terminal nor shows other than it is. Line breaks become spaces, too.
    """
    return "".join(character if character.isprintable() else " " for character in text)


def escape(text: str, max_chars: int = 300) -> str:
    """Return `text` as one line that is safe inside a markdown table cell, cut to `max_chars` characters."""
    line = " ".join(printable(text).split())
    cut = line if len(line) <= max_chars else line[: max_chars - 1] + "…"
    # A zero-width space keeps GitHub-flavoured markdown from making links of bare addresses.
    inert = _AUTOLINK.sub("\\g<0>\u200b", cut)
    return _MARKDOWN.sub(r"\\\1", html.escape(inert, quote=False))


def unescape(line: str) -> str:
    """Return the text that `escape` made `line` of, but for what it cut: for a terminal, where nothing is markup."""
    return html.unescape(re.sub(rf"\\{_MARKDOWN.pattern}", r"\1", line.replace("\u200b", "")))


def table_preview(rows: pl.DataFrame, max_chars: int = 300) -> str:
    """Return `rows`, a head or a sample of a table, in markdown; text is escaped and cut, nulls are left empty."""

    def cell(value: Any) -> str:
        if value is None:
            return ""
        if isinstance(value, float):
            return f"{value:.4g}"
        return escape(str(value), max_chars)

    header = "| " + " | ".join(rows.columns) + " |\n|" + "---|" * len(rows.columns)
    return "\n".join([header, *("| " + " | ".join(map(cell, row)) + " |" for row in rows.iter_rows())])
