"""Numbers, texts and settings as the page shows them to people."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any

EXCERPT_CHARS = 1200


def quantity(value: float | None) -> str:
    """Return a count or a cost in three digits: 1,234 · 12.3 K · 4.56 M · 1.2e18; a dash for None."""
    if value is None:
        return "–"
    if abs(value) >= 1e15:
        return f"{value:.2e}"
    for size, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "K")):
        if abs(value) >= size:
            return f"{value / (1e3 if suffix == 'K' else size):.3g} {suffix}"
    return f"{value:,.0f}"


def percent(fraction: float | None, digits: int = 1) -> str:
    """Return a fraction (1 is 100%) in percent with `digits` decimals; a dash for None."""
    return "–" if fraction is None else f"{fraction:.{digits}%}".replace("-", "−")


def decimal(value: float) -> str:
    """Return a score with three decimals, or one from 100 on."""
    return f"{value:.{3 if abs(value) < 100 else 1}f}".replace("-", "−")


def signed(value: float) -> str:
    """Return a difference of scores, as `decimal` shows it, with its sign."""
    return ("+" if value > 0 else "") + decimal(value)


def excerpt(text: str) -> str:
    """Return the first EXCERPT_CHARS characters of a document, cut between words, without control characters."""
    cleaned = "".join(character for character in text if character >= " " or character in "\n\t").strip()
    return cleaned if len(cleaned) <= EXCERPT_CHARS else cleaned[:EXCERPT_CHARS].rsplit(" ", 1)[0] + " …"


def publishable(value: Any) -> Any:
    """Return settings (any JSON value) with absolute paths and URLs cut to the last part: it names data, not a machine.

    Nothing remains of a URL without a path, nor of the query of any URL.
    """
    if isinstance(value, dict):
        return {key: publishable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [publishable(item) for item in value]
    if isinstance(value, str) and "://" in value:
        location = value.rpartition("://")[2].partition("?")[0]
        return f"…/{PurePosixPath(location).name if '/' in location else ''}"
    if isinstance(value, str) and (value.startswith(("/", "~", "\\")) or value[1:3] in (":\\", ":/")):
        return f"…/{PurePosixPath(value.replace(chr(92), '/')).name}"
    return value
