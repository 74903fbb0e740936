"""Renders the report: one self-contained HTML page about the experiment, from a Jinja2 template with autoescape."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import jinja2
import polars as pl
import yaml
from markupsafe import Markup

from sbp_assets.evaluation.comparison import AGAINST, seed_count
from sbp_assets.evaluation.comparison_table import BASELINE_NAMES
from sbp_assets.pairing.ground_truth import DEFINITIONS as PAIR_DEFINITIONS
from sbp_assets.pairing.ground_truth import OVERALL
from sbp_assets.report import findings, tables
from sbp_assets.report.dynamics import svg
from sbp_assets.report.formatting import excerpt, percent, publishable, quantity
from sbp_assets.report.published import SOURCE
from sbp_assets.report.samples import BIN_WIDTH, Pair, SyntheticSample
from sbp_assets.settings import Experiment
from sbp_assets.synthesis.posterior_table import UNKNOWN, leak_problems

TEMPLATE = Path(__file__).with_name("report.html.j2")


def render(
    experiment: Experiment,
    *,
    comparison: pl.DataFrame,
    dynamics: pl.DataFrame,
    token_budget: pl.DataFrame,
    quality: pl.DataFrame,
    novelty: pl.DataFrame,
    posterior: pl.DataFrame,
    pair_truth: pl.DataFrame,
    contamination: pl.DataFrame,
    similarities: pl.DataFrame,
    pairs: Sequence[Pair],
    synthetic: SyntheticSample | None,
) -> str:
    """Return the page as HTML text, the same for the same arguments.

    Frames have the columns of the assets of the same names; `similarities`, `pairs` and `synthetic` are what
    `samples.similarity_counts`, `example_pairs` and `example_synthetic_documents` return.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATE.parent), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters.update(quantity=quantity, excerpt=excerpt, percent=percent)
    truth = pair_truth.filter(shard=OVERALL).to_dicts()
    context = {
        "experiment": experiment,
        "departures": findings.departures(experiment),
        "parameters": tables.parameters(experiment, token_budget),
        "verdict": [*findings.verdict(comparison), *findings.other_way_round(comparison)],
        "caveats": [*findings.caveats(comparison), *findings.controls(experiment)],
        "contamination": findings.contamination_found(contamination),
        "results": [
            (BASELINE_NAMES[against], tables.result_groups(tables.with_average(comparison.filter(against=against))))
            for against in AGAINST
        ],
        "seeds": seed_count(comparison),
        "published": tables.published_rows(),
        "published_6b": tables.published_at_6b(),
        "source": SOURCE,
        "plot": Markup(svg(dynamics)) if len(dynamics) else None,
        "overfitting": findings.overfitting(dynamics),
        "quality": tables.quality_rows(quality, judged=experiment.synthesis.judge is not None),
        "novelty": tables.novelty_rows(novelty),
        "beliefs": tables.belief_rows(posterior),
        "unknown": posterior.filter(pl.col("group").is_in(UNKNOWN))["statements"].sum(),
        "leaks": leak_problems(posterior),
        "histogram": tables.histogram(similarities),
        "bin_width": BIN_WIDTH,
        "pair_truth": truth[0] if truth else None,
        "pair_definitions": PAIR_DEFINITIONS,
        "pairs": pairs,
        "synthetic": synthetic,
        **tables.budget(token_budget),
        "settings": yaml.safe_dump(
            publishable(experiment.model_dump(mode="json")), sort_keys=False, allow_unicode=True
        ),
    }
    return environment.get_template(TEMPLATE.name).render(context)
