"""The report: one self-contained HTML page about the experiment, rendered with autoescape from a Jinja2 template."""

from __future__ import annotations

from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path, PurePosixPath
from typing import Any

import jinja2
import polars as pl
import yaml
from markupsafe import Markup

from sbp_assets.evaluation.comparison import (
    AGAINST,
    BASELINE_NAMES,
    PERCENT_METRICS,
    TASK_NAMES,
    display_rows,
    seed_count,
    share_of_oracle_gain,
)
from sbp_assets.evaluation.contamination import CONTAINED
from sbp_assets.evaluation.tasks import CONCEPT_QUESTIONS
from sbp_assets.pairing.truth import DEFINITIONS as PAIR_DEFINITIONS
from sbp_assets.pairing.truth import OVERALL
from sbp_assets.pretraining.budget import ARMS
from sbp_assets.report.dynamics import early_stops, over_seeds, svg
from sbp_assets.report.samples import BIN, Pair, Syntheses
from sbp_assets.settings import Experiment
from sbp_assets.synthesis.posterior import UNKNOWN, leak_problems
from sbp_assets.synthesis.quality import DETAILS, JUDGE

SECTIONS = ("found", "results", "dynamics", "quality", "bayes", "pairs", "samples", "cost", "settings")
SOURCE = "Yang, Zhang, Liu, Hashimoto, Candès, Wang and Pang, Synthetic Bootstrapped Pretraining, arXiv 2509.15248"
TEXT_CHARS = 1200

# Published results of the 3B model (SOURCE, main table): higher is better, then baseline, SBP and oracle deltas at the
# 200B-token and the 1T-token scale. Accuracies in percent.
PUBLISHED: tuple[tuple[str, bool, tuple[float, float, float], tuple[float, float, float]], ...] = (
    ("OpenWebText2 perplexity", False, (5.74, -0.53, -1.02), (4.51, -0.02, -0.12)),
    ("LAMBADA perplexity", False, (6.87, -0.85, -1.86), (4.33, -0.03, -0.22)),
    ("MMLU perplexity, five-shot", False, (3.83, -0.36, -0.51), (3.17, -0.06, -0.05)),
    ("ARC-Challenge", True, (35.32, 1.28, 2.82), (42.66, 1.62, 3.84)),
    ("ARC-Easy", True, (68.94, 2.65, 4.29), (75.63, 0.42, 2.11)),
    ("SciQ", True, (90.50, 1.00, 2.40), (93.20, 0.80, 0.50)),
    ("Winogrande", True, (60.14, 1.90, 5.53), (65.19, 1.42, 2.92)),
    ("TriviaQA, one-shot", True, (22.51, 3.36, 7.37), (36.07, 0.25, 0.59)),
    ("WebQS, one-shot", True, (8.56, 3.74, 10.83), (19.34, 0.54, 0.44)),
    ("Average QA accuracy", True, (47.66, 2.32, 5.54), (55.35, 0.84, 1.73)),
)
# Six tasks whose mean accuracy is the published table's last row.
QA = ("arc_challenge", "arc_easy", "sciq", "winogrande", "triviaqa", "webqs")
# Published quality of synthetic data (SOURCE), percent: 200B scale, 1T scale, real data.
PUBLISHED_QUALITY: dict[str, tuple[float, float, float | None]] = {
    "repetition": (4.3, 3.9, 1.8),
    "duplicates": (0.8, 0.8, 0.7),
    "non_factual": (15.1, 8.7, 1.8),
    "pair_irrelevance": (25.6, 7.8, None),
    "pair_copying": (0.1, 0.9, None),
}
# Groups of the posterior table that are shown; the others are sums of these.
BELIEFS = {
    "concept": "Whom a fact is about",
    "restated": "Facts that d1 states",
    "new_known": "Other facts of its concept, stated elsewhere in D",
    "new_unknown": "Other facts of its concept, stated nowhere in D",
    "other_known": "Facts of another concept, stated in D",
    "other_unknown": "Facts of another concept, stated nowhere in D",
}


def render(
    experiment: Experiment,
    *,
    comparison: pl.DataFrame,
    dynamics: pl.DataFrame,
    token_budget: pl.DataFrame,
    quality: pl.DataFrame,
    posterior: pl.DataFrame,
    pair_truth: pl.DataFrame,
    contamination: pl.DataFrame,
    similarities: pl.DataFrame,
    pairs: Sequence[Pair],
    syntheses: Syntheses | None,
) -> str:
    """The page as HTML text. Frames have the columns of the assets of the same names; similarities is (low, count)."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters.update(quantity=quantity, excerpt=excerpt, percent=_percent, signed=_signed)
    truth = pair_truth.filter(shard=OVERALL).to_dicts()
    context = {
        "experiment": experiment,
        "departures": departures(experiment),
        "parameters": parameters(experiment, token_budget),
        "verdict": verdict(comparison),
        "caveats": caveats(comparison),
        "results": [
            (BASELINE_NAMES[against], _result_groups(with_average(comparison.filter(against=against))))
            for against in AGAINST
        ],
        "seeds": seed_count(comparison),
        "contamination": contamination_found(contamination),
        "published": [
            (
                name,
                "↑" if higher else "↓",
                [(*deltas, share_of_oracle_gain(deltas[1], deltas[2], higher)) for deltas in scales],
            )
            for name, higher, *scales in PUBLISHED
        ],
        "source": SOURCE,
        "plot": Markup(svg(dynamics)) if len(dynamics) else None,
        "overfitting": overfitting(dynamics),
        "histogram": _histogram(similarities),
        "bin_width": BIN,
        "pair_truth": truth[0] if truth else None,
        "pair_definitions": PAIR_DEFINITIONS,
        "pairs": pairs,
        "syntheses": syntheses,
        "quality": _quality_rows(quality, experiment.synthesis.judge is not None),
        "beliefs": [
            {**row, "name": BELIEFS[row["group"]]}
            for row in posterior.filter(pl.col("group").is_in(BELIEFS)).iter_rows(named=True)
        ],
        "unknown": posterior.filter(pl.col("group").is_in(UNKNOWN))["statements"].sum(),
        "leaks": leak_problems(posterior),
        **_budget(token_budget),
        "settings": yaml.safe_dump(public(experiment.model_dump(mode="json")), sort_keys=False, allow_unicode=True),
    }
    return environment.get_template("report.html.j2").render(context)


# By what a run is not SBP on a corpus to learn from, but a control of it: name, and what it means.
CONTROL = (
    "negative control: five-token world",
    "Its documents are letters drawn at random: nothing can be learned, and no arm should do better than another.",
)
NOT_OWED = "What the SBP arm gains over the baseline is not owed to relations between documents."
UNCONDITIONAL = (
    "placebo: unconditional",
    f"The synthetic documents are sampled from the baseline, without seed documents. {NOT_OWED}",
)
RANDOM_PARTNERS = (
    "placebo: random partners",
    f"The synthesizer is tuned on pairs of documents that have nothing to do with each other. {NOT_OWED}",
)
STARTS = {
    "scratch": (
        "ablation: synthesizer from random weights",
        "The synthesizer is not tuned from the baseline: it knows of D only what the pairs hold.",
    ),
    "early_stopped": (
        "variant: synthesizer from the early-stopped baseline",
        "The synthesizer is tuned from the baseline at its lowest held-out loss, which knows less of D by heart.",
    ),
}


def departures(experiment: Experiment) -> list[tuple[str, str]]:
    """(name, meaning) of every setting that makes this run a control, a placebo or an ablation."""
    found = [CONTROL] if experiment.corpus.source.kind == "five_tokens" else []
    if not experiment.conditional:  # No synthesizer is used, however it is set.
        return [*found, UNCONDITIONAL]
    if experiment.synthesizer.partners == "random":
        found.append(RANDOM_PARTNERS)
    if start := STARTS.get(experiment.synthesizer.start):
        found.append(start)
    return found


def parameters(experiment: Experiment, token_budget: pl.DataFrame) -> int | None:
    """Parameters of the model, from the FLOPs per token that the budget counts; None without a budget."""
    rows = token_budget.filter(arm="baseline")
    if rows.is_empty():
        return None
    model = experiment.model
    per_token = sum(rows["flops"].to_list()) / sum(rows["tokens_read"].to_list())
    # FLOPs per token are linear in the vocabulary, the one thing about the model that no setting tells.
    slope = model.flops_per_token(1) - model.flops_per_token(0)
    return model.parameters(round((per_token - model.flops_per_token(0)) / slope))


def verdict(table: pl.DataFrame) -> list[str]:
    """What was found on held-out documents, a sentence or two per baseline; plain also where SBP loses."""
    rows = [_row(table, "heldout", "perplexity", against) for against in AGAINST]
    if any(row is None or None in (row["baseline"], row["sbp"], row["oracle"]) for row in rows):
        return ["The held-out perplexity of one of the arms is missing, so nothing can be said yet."]
    return [_finding(row) for row in rows if row]


def _finding(row: dict[str, Any]) -> str:
    final = row["against"] == "final"
    other = "the compute-matched baseline" if final else "the baseline as early stopping would leave it"
    baseline, sbp, delta, share = (row[key] for key in ("baseline", "sbp", "delta_sbp", "share_of_oracle_gain"))
    if delta == 0:
        found = f"SBP and {other} reached the same held-out perplexity ({_figure(sbp)})."
    else:
        figures = f"a perplexity of {_figure(sbp)} against {_figure(baseline)}, a difference of {_signed(delta)}"
        if row["delta_sbp_low"] is not None:
            low, high = _signed(row["delta_sbp_low"]), _signed(row["delta_sbp_high"])
            figures += f" (95% interval {low} to {high})"
        if _clear(row, "sbp") is False:
            found = f"On held-out documents SBP and {other} cannot be told apart: {figures}."
        elif delta > 0:
            found = f"On held-out documents SBP did worse than {other}: {figures}."
        else:
            found = f"On held-out documents SBP beat {other}: {figures}"
            if share is not None:
                found += f", {share:.0%} of what the oracle gained from more real data"
                if row["share_low"] is not None:
                    found += f" ({_percent(row['share_low'], 0)} to {_percent(row['share_high'], 0)})"
            found += "."
    if share is None:
        found += f" The oracle ({_figure(row['oracle'])}) did not beat it, so there was no gain to recover a share of."
    elif delta >= 0:
        found += f" The oracle, with more real data, reached {_figure(row['oracle'])}."
    return found


def caveats(table: pl.DataFrame) -> list[str]:
    """What the verdict does not say: the other measures, and what the intervals leave out."""
    found = []
    for against in AGAINST:
        directed = table.filter(pl.col("against") == against, pl.col("delta_sbp").is_not_null())
        # Perplexity, nats and bits of one task are one measurement: count tasks, by accuracy where they have one.
        accuracies_first = directed.sort(~pl.col("metric").is_in(PERCENT_METRICS), maintain_order=True)
        first = accuracies_first.unique("task", keep="first", maintain_order=True).filter(pl.col("task") != "heldout")
        if first.is_empty():
            continue
        standings: dict[str, list[str]] = {"good": [], "bad": [], "": []}
        for row in first.iter_rows(named=True):
            standings[_standing(row, "sbp")].append(TASK_NAMES.get(row["task"], row["task"]))
        ahead, behind, level = (
            f"{len(names)} ({', '.join(names)})" if names else "none" for names in standings.values()
        )
        found.append(
            f"Of {len(first)} further task{'s' if len(first) > 1 else ''}, by accuracy where it has one and by 95% "
            f"interval: SBP is ahead of the {BASELINE_NAMES[against]} baseline on {ahead}, behind on {behind}, and "
            f"cannot be told apart from it on {level}."
        )
    if seed_count(table) == 1:
        found.append(
            "One training seed: how much the figures vary from run to run is not known. "
            "The errors and intervals shown are of the examples only."
        )
    elif seed_count(table) > 1:
        found.append(
            f"Errors and intervals are of the examples and of {seed_count(table)} training seeds. The synthesizer was "
            "tuned and sampled once: how much another would move the figures is not in them."
        )
    return found


def with_average(table: pl.DataFrame) -> pl.DataFrame:
    """`table` (rows against one baseline) with the mean accuracy of the six QA tasks, where all were scored.

    Of each task the first accuracy counts. No error: the published row has none either.
    """
    first = table.filter(pl.col("task").is_in(QA), pl.col("metric").is_in(PERCENT_METRICS)).unique("task", keep="first")
    if set(first["task"]) != set(QA) or first["delta_sbp"].null_count():
        return table
    means = first.select(pl.col(*ARMS, "delta_sbp", "delta_oracle").mean()).with_columns(
        task=pl.lit("Average QA"), metric=pl.lit("acc"), higher_is_better=True, against=pl.lit(table["against"][0]),
        seeds=first["seeds"].min(),
    )  # fmt: skip
    share = share_of_oracle_gain(means["delta_sbp"][0], means["delta_oracle"][0], True)
    average = means.with_columns(share_of_oracle_gain=pl.lit(share, dtype=pl.Float64))
    return pl.concat([table, average], how="diagonal_relaxed")


def contamination_found(table: pl.DataFrame) -> list[str]:
    """What the search for evaluation items in the training documents found, in a sentence or two."""
    if table.is_empty():
        return ["The evaluation items were not looked for in the training documents."]
    words = int(table["words"][0])
    places = {"unique": "D", "oracle": "the oracle’s documents", "synthetic": "the syntheses"}

    def listed(rows: pl.DataFrame) -> str:
        return ", ".join(
            f"{TASK_NAMES.get(row['evaluation_set'], row['evaluation_set'])} {row['contained']:,} of "
            f"{row['judged']:,} in {places.get(row['corpus'], row['corpus'])}"
            for row in rows.filter(pl.col("contained") > 0).iter_rows(named=True)
        )

    own = pl.col("evaluation_set") == CONCEPT_QUESTIONS
    others = table.filter(~own)
    judged = sum(others.group_by("evaluation_set").agg(pl.col("judged").max())["judged"].to_list())
    rule = f"{CONTAINED:.0%} or more of its runs of {words} words in one training document"
    found = []
    if len(others):
        found.append(
            f"Evaluation items in the training data ({rule}): {listed(others)}."
            if listed(others)
            else f"Of {judged:,} evaluation items that are long enough to judge, none is in the training data ({rule})."
        )
    if listed(table.filter(own)):
        found.append(
            f"{listed(table.filter(own))}: documents state the facts that these questions ask for, in the same words. "
            "That is the task, and no leak."
        )
    return found


def overfitting(dynamics: pl.DataFrame) -> str | None:
    """Where the baseline was best along training, and how much it lost after that; None without measurements."""
    stops = early_stops(dynamics)
    if stops.is_empty():
        return None
    end = over_seeds(dynamics).filter(arm="baseline").row(-1, named=True)
    lowest = sum(stops["heldout_loss"].to_list()) / len(stops)
    tokens = dict.fromkeys(quantity(count) for count in sorted(stops["tokens"]))
    mean = ", mean over the seeds" if len(stops) > 1 else ""
    if (stops["tokens"] == end["tokens"]).all():
        return f"The baseline is best at the end ({lowest:.3f} nats per token{mean}): early stopping changes nothing."
    return (
        f"The baseline is best after {' / '.join(tokens)} of {quantity(end['tokens'])} tokens "
        f"({lowest:.3f} nats per token{mean}) and ends {end['mean'] - lowest:.3f} higher."
    )


def public(value: Any) -> Any:
    """Settings fit to be published: absolute paths and URLs cut to their last part, which names data, not a machine.

    Of a URL that is a host alone nothing is left, nor is a query.
    """
    if isinstance(value, dict):
        return {key: public(item) for key, item in value.items()}
    if isinstance(value, list):
        return [public(item) for item in value]
    if isinstance(value, str) and "://" in value:
        location = value.rpartition("://")[2].partition("?")[0]
        return f"…/{PurePosixPath(location).name if '/' in location else ''}"
    if isinstance(value, str) and (value.startswith(("/", "~", "\\")) or value[1:3] in (":\\", ":/")):
        return f"…/{PurePosixPath(value.replace(chr(92), '/')).name}"
    return value


def quantity(value: float | None) -> str:
    """A count or cost for people: 1,234 · 12.3 K · 4.56 M · 1.2e18."""
    if value is None:
        return "–"
    if abs(value) >= 1e15:
        return f"{value:.2e}"
    for size, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e4, "K")):
        if abs(value) >= size:
            return f"{value / (1e3 if suffix == 'K' else size):.3g} {suffix}"
    return f"{value:,.0f}"


def excerpt(text: str) -> str:
    """The beginning of a document, without control characters."""
    cleaned = "".join(character for character in text if character >= " " or character in "\n\t").strip()
    return cleaned if len(cleaned) <= TEXT_CHARS else cleaned[:TEXT_CHARS].rsplit(" ", 1)[0] + " …"


def page_problems(page: str) -> list[str]:
    """What a finished page must not have: a missing or empty section, a script, or anything loaded from elsewhere."""
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


def _row(table: pl.DataFrame, task: str, metric: str, against: str = "final") -> dict[str, Any] | None:
    rows = table.filter(task=task, metric=metric, against=against).to_dicts()
    return rows[0] if rows else None


def _clear(row: dict[str, Any], arm: str) -> bool | None:
    """Whether zero lies outside the 95% interval of the arm's delta; None where there is no interval."""
    low, high = row[f"delta_{arm}_low"], row[f"delta_{arm}_high"]
    return None if low is None else not low <= 0 <= high


def _standing(row: dict[str, Any], arm: str) -> str:
    """'good' or 'bad' where the arm's delta is clear of zero, else ''."""
    if not _clear(row, arm):
        return ""
    return "good" if (row[f"delta_{arm}"] > 0) == row["higher_is_better"] else "bad"


def _result_groups(table: pl.DataFrame) -> list[list[dict[str, Any]]]:
    """Display rows grouped by task, with the standing of each delta and the share's place in its small plot."""
    groups: list[list[dict[str, Any]]] = []
    for shown, row in zip(display_rows(table), table.iter_rows(named=True), strict=True):
        entry: dict[str, Any] = {
            **shown,
            "samples": row["baseline_samples"],
            "share_plot": None
            if row["share_of_oracle_gain"] is None
            else [_clamp(row[key]) for key in ("share_of_oracle_gain", "share_low", "share_high")],
            **{f"{arm}_tone": _standing(row, arm) for arm in ("sbp", "oracle")},
        }
        if groups and groups[-1][0]["task"] == shown["task"]:
            groups[-1].append(entry)
        else:
            groups.append([entry])
    return groups


def _clamp(share: float | None, low: float = -0.5, high: float = 1.5) -> float | None:
    """Where a share lies between `low` (0) and `high` (1)."""
    return None if share is None else (min(max(share, low), high) - low) / (high - low)


def _histogram(counts: pl.DataFrame, width: int = 640, height: int = 150) -> dict[str, Any] | None:
    """Bars of the similarity histogram in SVG user units."""
    if counts.is_empty():
        return None
    top, step = max(counts["count"]), width / len(counts)
    bars = [
        {
            "x": round(index * step + 0.75, 2), "width": round(max(step - 1.5, 1), 2),
            "height": round(height * count / top, 2), "y": round(height * (1 - count / top), 2),
            "title": f"{low:.2f} to {low + BIN:.2f}: {count:,} pairs",
        }
        for index, (low, count) in enumerate(counts.select("low", "count").iter_rows())
    ]  # fmt: skip
    every = max(1, len(counts) // 8)
    ticks = [(round(index * step, 2), f"{low:.2f}") for index, low in enumerate(counts["low"]) if index % every == 0]
    return {"bars": bars, "ticks": ticks, "width": width, "height": height, "top": top, "total": sum(counts["count"])}


def _quality_rows(quality: pl.DataFrame, judged: bool) -> list[dict[str, Any]]:
    """One row per metric and method: this run's synthetic and real values in percent, and the published ones."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for row in quality.iter_rows(named=True):
        metric, method = row["metric"], row["method"]
        published: tuple[float | None, ...] = PUBLISHED_QUALITY.get(metric, ())
        entry = rows.setdefault((metric, method), {
            "name": metric.replace("_", "-"), "method": method, "definition": row["definition"],
            "detail": metric in DETAILS,
            "synthetic": ("–", ""), "real": ("–", ""),
            "published": ["n.a." if figure is None else f"{figure}%" for figure in published] or [""] * 3,
        })  # fmt: skip
        if row["value"] is not None:
            value, count = _percent(row["value"]), f"{row['flagged']:,} of {row['scored']:,}"
            if unjudged := row["sample"] - row["documents"]:
                count += f", {unjudged:,} unjudged"
        elif metric.startswith("pair_") and row["corpus"] == "real":
            value, count = "n.a.", ""
        elif method == JUDGE:
            value, count = "unjudged" if judged else "no judge configured", ""
        else:
            value, count = "none scored", ""
        entry[row["corpus"]] = (value, count)
    return list(rows.values())


def _percent(fraction: float | None, digits: int = 1) -> str:
    return "–" if fraction is None else f"{fraction:.{digits}%}".replace("-", "−")


def _figure(value: float) -> str:
    return f"{value:.{3 if abs(value) < 100 else 1}f}".replace("-", "−")


def _signed(value: float) -> str:
    return ("+" if value > 0 else "") + _figure(value)


def _budget(table: pl.DataFrame) -> dict[str, Any]:
    """Rows and totals of the arms, the ledger of synthesis, and its cost as a share of one arm's FLOPs."""
    rows = table.to_dicts()
    arms = {arm: [row for row in rows if row["arm"] == arm] for arm in ARMS}
    arms = {arm: own for arm, own in arms.items() if own}
    totals = {
        arm: {key: sum(row[key] or 0 for row in own) for key in ("tokens_read", "flops")} for arm, own in arms.items()
    }
    ledger = [row for row in rows if row["arm"] not in ARMS]
    of_arm = totals["baseline"]["flops"] if "baseline" in totals else 0
    return {
        "budget_arms": arms,
        "budget_ledger": ledger,
        "budget_totals": totals,
        "corpus": next((row for row in arms.get("baseline", []) if row["source"] == "unique"), None),
        "synthesis_cost": _percent(sum(row["flops"] or 0 for row in ledger) / of_arm) if of_arm and ledger else None,
        "budget_matched": len({total["tokens_read"] for total in totals.values()}) <= 1,
    }
