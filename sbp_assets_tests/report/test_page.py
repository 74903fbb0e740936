"""The rendered page: complete, self-contained, and safe whatever its documents say."""

import re
from typing import Any

import polars as pl
import pytest

from sbp_assets.report.audit import page_problems
from sbp_assets.report.page import render
from sbp_assets.settings import FiveTokensSource
from sbp_assets_tests.report.example_report import SETTINGS, report_inputs

ATTACK = (
    """</pre><script>alert(1)</script><img src=x onerror="alert(1)"> {{ 7 * 7 }} <style>@import 'http://evil'</style>"""
)


def test_page_is_complete_and_self_contained() -> None:
    inputs = report_inputs()
    assert len(inputs["pairs"]) == 3 and len(inputs["synthetic"].documents) == 2
    page = render(**inputs)
    assert page_problems(page) == []
    assert "5.74" in page and inputs["pairs"][0].d1 in page
    assert "1.26 M parameters" in page and "with 3 seeds" in page and "no judge configured" in page
    for text in (inputs["synthetic"].seed_text, *(text for _, text in inputs["synthetic"].documents)):
        assert text[:30] in page


def test_text_of_documents_cannot_become_markup() -> None:
    page = render(**report_inputs(ATTACK))
    assert page_problems(page) == []
    assert "<script" not in page and "<img" not in page
    for name in ("found", "quality", "bayes", "pairs", "samples", "cost"):
        assert "&lt;script&gt;" in section(page, name) and "{{ 7 * 7 }}" in section(page, name), name


def test_an_empty_experiment_still_gives_a_complete_page() -> None:
    inputs = report_inputs()
    for name, value in inputs.items():
        if isinstance(value, pl.DataFrame):
            inputs[name] = value.clear()
    page = render(**{**inputs, "pairs": [], "synthetic": None})
    assert page_problems(page) == []
    assert "nothing can be said yet" in page and "No pairs were kept" in page and "No complete synthetic" in page
    assert "no precision and recall" in page and "nothing to hold the syntheses against" in page
    assert "were not looked for" in page


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({}, []),
        ({"synthesis": {"condition": "none"}, "synthesizer": {"start": "scratch"}}, ["placebo: unconditional"]),
        (
            {"synthesis": {"condition": "pairs"}, "synthesizer": {"start": "scratch"}},
            ["control: real pairs in one document"],
        ),
        (
            {"synthesizer": {"partners": "random", "start": "scratch"}},
            ["placebo: random partners", "ablation: synthesizer from random weights"],
        ),
        ({"corpus": {"source": FiveTokensSource(documents=9)}}, ["negative control: five-token world"]),
    ],
)
def test_title_names_controls_placebos_and_ablations(changed: dict[str, dict[str, Any]], named: list[str]) -> None:
    inputs = report_inputs()
    sections = {key: getattr(SETTINGS, key).model_copy(update=values) for key, values in changed.items()}
    page = render(**{**inputs, "experiment": SETTINGS.model_copy(update=sections)})
    title = page[page.index("<title>") : page.index("</title>")]
    heading = page[page.index("<h1>") : page.index("</h1>")]
    assert title.split(" · ")[1:] == named and re.findall("<span>(.*?)</span>", heading) == named


def test_unjudged_quality_is_not_shown_as_zero() -> None:
    quality = report_inputs()["quality"].filter(method="judge")
    inputs = report_inputs()
    page = section(render(**{**inputs, "quality": quality, "novelty": inputs["novelty"].clear()}), "quality")
    assert page.count("no judge configured") == 2 and "0.0%" not in page and "15.1%" in page


def test_a_leak_of_facts_outside_d_is_reported() -> None:
    inputs = report_inputs()
    unknown = pl.col("group") == "other_unknown"
    leaky = inputs["posterior"].with_columns(p_above_chance=pl.when(unknown).then(0.0001).otherwise("p_above_chance"))
    assert "text outside D has reached" in section(render(**{**inputs, "posterior": leaky}), "bayes")
    assert "nothing suggests" in section(render(**inputs), "bayes")


def section(page: str, name: str) -> str:
    start = page.index(f'<section id="{name}">')
    return page[start : page.index("</section>", start)]
