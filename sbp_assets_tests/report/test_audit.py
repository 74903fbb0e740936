"""Pages that are incomplete, or that would run or load something, are found."""

import pytest

from sbp_assets.report.audit import page_problems
from sbp_assets.report.page import render
from sbp_assets_tests.report.example_report import report_inputs


@pytest.fixture(scope="module")
def page() -> str:
    return render(**report_inputs())


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("<p class=\"eyebrow\">", "<script>1</script><p>", "<script>"),
        ("<p class=\"eyebrow\">", '<p onclick="x()">', "event handler"),
        ("<p class=\"eyebrow\">", '<img src="https://example.org/a.png"><p>', "loads https"),
        ("--paper: #ffffff", "background: url(https://example.org)", "a style loads"),
        ('<section id="bayes">', "<section>", "'bayes' is missing"),
    ],
)  # fmt: skip
def test_problems_of_the_page_are_found(page: str, old: str, new: str, problem: str) -> None:
    assert old in page
    assert any(problem in found for found in page_problems(page.replace(old, new, 1)))
