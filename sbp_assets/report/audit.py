"""Finds out whether a finished page is complete and self-contained, from its HTML alone."""

from __future__ import annotations

from html.parser import HTMLParser

SECTIONS = ("found", "results", "dynamics", "quality", "bayes", "pairs", "samples", "cost", "settings")


def page_problems(page: str) -> list[str]:
    """Return a sentence for each section that is missing or empty, and for each way to run a script or load anything.

    The list is empty for a page that is complete and self-contained.
    """
    reader = _PageReader()
    reader.feed(page)
    reader.close()
    problems = [
        f"section {name!r} is missing or empty" for name in SECTIONS if not reader.section_text.get(name, "").strip()
    ]
    return problems + reader.problems


class _PageReader(HTMLParser):
    """Collects the text of each section and every way in which a page could run or load something."""

    def __init__(self) -> None:
        super().__init__()
        self.section_text: dict[str, str] = {}
        self.problems: list[str] = []
        self._section: str | None = None
        self._style = False

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("script", "iframe", "object", "embed", "link", "base", "form", "foreignobject"):
            self.problems.append(f"<{tag}> in the page")
        if tag == "section":
            self._section = dict(attrs).get("id")
        self._style = tag == "style"
        for name, value in attrs:
            value = (value or "").strip()
            if name.startswith("on"):
                self.problems.append(f"event handler {name} on <{tag}>")
            if name in ("src", "srcset", "href", "xlink:href", "poster", "data", "action", "background") and not (
                value.startswith("#") or value.lower().startswith("data:image/")
            ):
                self.problems.append(f"<{tag}> loads {value[:80]}")
            if name == "style":
                self._styles(value)

    def handle_endtag(self, tag: str) -> None:
        if tag == "section":
            self._section = None
        self._style = False

    def handle_data(self, data: str) -> None:
        if self._style:
            self._styles(data)
        elif self._section:
            self.section_text[self._section] = self.section_text.get(self._section, "") + data

    def _styles(self, css: str) -> None:
        if "@import" in css:
            self.problems.append("a style imports another")
        for part in css.split("url(")[1:]:
            if not part.lstrip("\"' ").startswith(("#", "data:")):
                self.problems.append(f"a style loads {part[:80]}")
