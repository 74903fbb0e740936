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

from sbp_assets.evaluation.comparison import display_rows, seed_count, share_of_oracle_gain
from sbp_assets.evaluation.dynamics import svg
from sbp_assets.evaluation.report_data import BIN, Pair, Syntheses
from sbp_assets.experiment import Experiment

SECTIONS = ("found", "results", "dynamics", "pairs", "synthesis", "budget", "settings")
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
# Published quality of synthetic data (SOURCE), percent: 200B scale, 1T scale, real data.
PUBLISHED_QUALITY: dict[str, tuple[float, float, float | None]] = {
    "repetition": (4.3, 3.9, 1.8),
    "duplicate": (0.8, 0.8, 0.7),
    "factual": (15.1, 8.7, 1.8),
    "irrelevan": (25.6, 7.8, None),
    "copying": (0.1, 0.9, None),
}


def render(
    experiment: Experiment,
    *,
    comparison: pl.DataFrame,
    dynamics: pl.DataFrame,
    token_budget: pl.DataFrame,
    quality: pl.DataFrame,
    similarities: pl.DataFrame,
    pairs: Sequence[Pair],
    syntheses: Syntheses | None,
) -> str:
    """The page as HTML text. Frames have the columns of the assets of the same names; similarities is (low, count)."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=jinja2.StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters.update(quantity=quantity, excerpt=excerpt)
    context = {
        "experiment": experiment,
        "verdict": verdict(comparison),
        "caveats": caveats(comparison),
        "results": _result_groups(comparison),
        "seeds": seed_count(comparison),
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
        "histogram": _histogram(similarities),
        "bin_width": BIN,
        "pairs": pairs,
        "syntheses": syntheses,
        "quality": _quality_rows(quality),
        **_budget(token_budget),
        "settings": yaml.safe_dump(public(experiment.model_dump(mode="json")), sort_keys=False, allow_unicode=True),
    }
    return environment.get_template("report.html.j2").render(context)


def verdict(table: pl.DataFrame) -> str:
    """One or two sentences on what was found, from held-out perplexity; plain also where SBP loses."""
    row = _row(table, "heldout", "perplexity")
    if row is None or None in (row["baseline"], row["sbp"], row["oracle"]):
        return "The held-out perplexity of one of the arms is missing, so nothing can be said yet."
    baseline, sbp, oracle, share = (row[key] for key in ("baseline", "sbp", "oracle", "share_of_oracle_gain"))
    change = abs(sbp / baseline - 1)
    figures = f"({sbp:.2f} against {baseline:.2f}, {change:.1%} {'lower' if sbp < baseline else 'higher'})"
    error = row["delta_sbp_stderr"]
    if row["seeds"] > 1 and error is not None and abs(row["delta_sbp"]) < 2 * error:
        found = f"SBP and the baseline cannot be told apart on held-out documents {figures}: the difference is within "
        found += f"two standard errors over {row['seeds']} seeds."
    elif sbp < baseline:
        found = f"SBP beat the compute-matched baseline on held-out perplexity {figures}"
        found += (
            f", recovering {share:.0%} of what the oracle gained from more real data." if share is not None else "."
        )
    elif sbp > baseline:
        found = (
            f"SBP did not help here: its held-out perplexity is worse than the compute-matched baseline's {figures}."
        )
    else:
        found = f"SBP and the baseline reached the same held-out perplexity ({sbp:.2f})."
    if share is None:
        found += f" The oracle ({oracle:.2f}) did not beat the baseline, so there was no gain to recover a share of."
    elif sbp >= baseline:
        found += f" The oracle, with more real data, reached {oracle:.2f}."
    return found


def caveats(table: pl.DataFrame) -> list[str]:
    """What the verdict does not say: the other measures, early stopping, the number of seeds."""
    found = []
    directed = table.filter(pl.col("against") == "final", pl.col("delta_sbp").is_not_null())
    # Perplexity, nats and bits of one task are one measurement: count tasks, by their first metric.
    first = directed.unique("task", keep="first", maintain_order=True).filter(pl.col("task") != "heldout")
    if len(first):
        gain = pl.when("higher_is_better").then("delta_sbp").otherwise(-pl.col("delta_sbp"))
        clear = gain.abs() > 2 * pl.col("delta_sbp_stderr")
        ahead, behind = first.filter(gain > 0, clear).height, first.filter(gain < 0, clear).height
        found.append(
            f"Of {len(first)} further task{'s' if len(first) > 1 else ''}, SBP is ahead of the baseline by more than "
            f"two standard errors on {ahead}, behind on {behind}, and within them on {len(first) - ahead - behind}."
        )
    if (best := _row(table, "heldout", "nats_per_token", "early_stopped")) and best["delta_sbp"] is not None:
        standing = "still ahead" if best["delta_sbp"] < 0 else "no longer ahead" if best["delta_sbp"] > 0 else "level"
        found.append(
            f"Against the baseline as early stopping would leave it, at its best point, SBP is {standing}: "
            f"{best['sbp']:.3f} against {best['baseline']:.3f} nats per token (oracle {best['oracle']:.3f})."
        )
    if seed_count(table) == 1:
        found.append(
            "One training seed: how much the figures vary from run to run is not known. "
            "The errors shown are of the examples only."
        )
    return found


def public(value: Any) -> Any:
    """Settings fit to be published: absolute paths and URLs cut to their last part, which names data, not a machine."""
    if isinstance(value, dict):
        return {key: public(item) for key, item in value.items()}
    if isinstance(value, list):
        return [public(item) for item in value]
    if isinstance(value, str) and (value.startswith(("/", "~", "\\")) or "://" in value or value[1:3] in (":\\", ":/")):
        return f"…/{PurePosixPath(value.replace(chr(92), '/')).name}"
    return value


def quantity(value: float | None) -> str:
    """A count or cost for people: 1,234 · 12.3 K · 4.56 M · 1.2e18."""
    if value is None:
        return "–"
    if abs(value) >= 1e15:
        return f"{value:.2e}"
    for size, suffix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "K")):
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


def _result_groups(table: pl.DataFrame) -> list[list[dict[str, Any]]]:
    """Display rows grouped by task, with the sign of each delta ('good', 'bad' or '') and the share as a number."""
    groups: list[list[dict[str, Any]]] = []
    for shown, row in zip(display_rows(table), table.iter_rows(named=True), strict=True):
        entry: dict[str, Any] = {
            **shown,
            "share_value": row["share_of_oracle_gain"],
            "samples": row["baseline_samples"],
            "counted": row["baseline_samples"] is not None,
        }
        for arm in ("sbp", "oracle"):
            delta = row[f"delta_{arm}"]
            better = delta is not None and delta != 0 and (delta > 0) == row["higher_is_better"]
            entry[f"{arm}_tone"] = "" if not delta else "good" if better else "bad"
        if groups and all(groups[-1][0][key] == shown[key] for key in ("task", "against")):
            groups[-1].append(entry)
        else:
            groups.append([entry])
    return groups


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


def _quality_rows(quality: pl.DataFrame) -> list[dict[str, Any]]:
    """One row per metric and method: this run's synthetic and real values in percent, and the published ones."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for row in quality.iter_rows(named=True):
        name = row["metric"]
        published = next((figures for key, figures in PUBLISHED_QUALITY.items() if key in name), (None, None, None))
        entry = rows.setdefault((name, row["method"]), {
            "name": f"{name.replace('_', '-')} ({row['method']})", "definition": row["definition"],
            "published": [_percent(v and v / 100) for v in published],
            "synthetic": "–", "real": "–", "documents": {}, "unjudged": 0,
        })  # fmt: skip
        entry[row["corpus"]] = _percent(row["value"])
        entry["documents"][row["corpus"]] = row["documents"]
        entry["unjudged"] += row["sample"] - row["documents"]
    return list(rows.values())


def _percent(fraction: float | None) -> str:
    return "–" if fraction is None else f"{100 * fraction:.1f}%"


def _budget(table: pl.DataFrame) -> dict[str, Any]:
    """Rows of the arms, the tokens of each arm, the ledger of synthesis, and its cost as a share of one arm's FLOPs."""
    columns = table.columns
    rows = [{"flops": None, "note": "", **row} for row in table.to_dicts()]
    arms = [row for row in rows if row["arm"] in ("baseline", "sbp", "oracle")]
    ledger = [row for row in rows if row["arm"] not in ("baseline", "sbp", "oracle")]
    totals: dict[str, int] = {}
    for row in arms:
        totals[row["arm"]] = totals.get(row["arm"], 0) + (row["tokens_read"] or 0)
    cost = None
    if "flops" in columns and ledger:
        of_arm = sum(row["flops"] or 0 for row in arms if row["arm"] == "baseline")
        cost = _percent(sum(row["flops"] or 0 for row in ledger) / of_arm) if of_arm else None
    return {
        "budget_arms": {arm: [row for row in arms if row["arm"] == arm] for arm in totals},
        "budget_ledger": ledger, "budget_totals": totals, "synthesis_cost": cost,
        "budget_matched": len(set(totals.values())) <= 1,
    }  # fmt: skip
