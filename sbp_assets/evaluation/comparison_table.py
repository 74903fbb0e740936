"""The comparison of the arms as people read it: names, numbers with their units, and tables as text and markdown."""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl

from sbp_assets.evaluation.comparison import UNDEFINED_SHARE, oracle_gains, seed_count
from sbp_assets.evaluation.scores import ACCURACIES
from sbp_assets.evaluation.views import FORWARD_BY_INVERTED, REVERSED_BY_ENTRIES

# Concepts by the views of D's documents about them (`evaluation.views`).
GROUP_NAMES = {
    "in_both_views": "concepts in D in both views", "by_entries_alone": "concepts that D knows by entries alone",
    "by_inverted_alone": "concepts that D knows by inverted forms alone", "not_in_d": "concepts that D lacks",
}  # fmt: skip
TASK_NAMES = {
    "heldout": "Held-out documents", "heldout_entries": "Held-out entries",
    "heldout_inverted": "Held-out inverted forms", "concept_questions": "Concept questions",
    "reversed_questions": "Reversed questions",
    **{
        f"{task}_{group}": f"{name}: {of}"
        for task, name in (("concept_questions", "Concept questions"), ("reversed_questions", "Reversed questions"))
        for group, of in GROUP_NAMES.items()
    },
    "openwebtext2": "OpenWebText2", "lambada": "LAMBADA", "mmlu": "MMLU, five-shot", "arc_challenge": "ARC-Challenge",
    "arc_easy": "ARC-Easy", "sciq": "SciQ", "winogrande": "Winogrande", "triviaqa": "TriviaQA, one-shot",
    "webqs": "WebQS, one-shot",
}  # fmt: skip
# Groups of the concepts world that stand in the full table alone. The two others are what no repetition of D teaches.
DETAILED_TASKS = frozenset(
    {"heldout_entries", "heldout_inverted"}
    | {f"{task}_{group}" for task in ("concept_questions", "reversed_questions") for group in GROUP_NAMES}
) - {REVERSED_BY_ENTRIES, FORWARD_BY_INVERTED}
METRIC_NAMES = {
    "perplexity": "perplexity", "nats_per_token": "nats per token", "bits_per_byte": "bits per byte",
    "acc": "accuracy", "acc_norm": "accuracy, length-normalised", "exact_match": "exact match",
}  # fmt: skip
SHARE = ("share_of_oracle_gain", "share_low", "share_high")
BASELINE_NAMES = {"final": "final", "early_stopped": "early-stopped"}


def display_rows(table: pl.DataFrame) -> list[dict[str, str]]:
    """Return the comparison as strings: accuracies in percent, deltas signed, a dash where there is no value.

    There is no share of a gain that is not clear of zero (`oracle_gains`).
    """

    def number(value: float | None, metric: str, signed: bool = False) -> str:
        if value is None:
            return "–"
        scaled, digits = (100 * value, 2) if metric in ACCURACIES else (value, 3 if abs(value) < 100 else 1)
        shown = f"{scaled:+.{digits}f}" if signed else f"{scaled:.{digits}f}"
        return shown.replace("-", "−")

    rows = []
    for row in table.iter_rows(named=True):
        metric = row["metric"]
        direction = "↑" if row["higher_is_better"] else "↓"
        share = {end: row[end] if oracle_gains(row) else None for end in SHARE}
        unit = " %" if metric in ACCURACIES else ""
        rows.append({
            "task": TASK_NAMES.get(row["task"], row["task"]),
            "metric": f"{METRIC_NAMES.get(metric, metric)}{unit} {direction}",
            "against": BASELINE_NAMES[row["against"]],
            "baseline": number(row["baseline"], metric),
            "baseline_stderr": number(row["baseline_stderr"], metric),
            "sbp": number(row["delta_sbp"], metric, signed=True),
            "sbp_stderr": number(row["delta_sbp_stderr"], metric),
            "oracle": number(row["delta_oracle"], metric, signed=True),
            "oracle_stderr": number(row["delta_oracle_stderr"], metric),
            "share": _percent(share["share_of_oracle_gain"]),
            "share_interval": f"{_percent(share['share_low'])} to {_percent(share['share_high'])}"
            if share["share_low"] is not None
            else "–",
        })  # fmt: skip
    return rows


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.0%}".replace("-", "−")


HEADER = (
    "task",
    "metric",
    "against baseline",
    "baseline",
    "SBP",
    "oracle",
    "share of oracle's gain",
    "95% interval",
)
NOTE = (
    "SBP and oracle are differences to the baseline, ± one standard error (paired bootstrap over examples, those about "
    "one concept together, and seeds); "
    "{seeds} seed{plural}."
)
DASH_NOTE = (
    "–: not defined. There is no share where the oracle's gain cannot be told from zero, and no interval where it does "
    f"not gain in more than {UNDEFINED_SHARE:.1%} of the resamples."
)


def _cells(table: pl.DataFrame) -> list[list[str]]:
    return [
        [row["task"], row["metric"], row["against"], row["baseline"], _with_error(row, "sbp"),
         _with_error(row, "oracle"), row["share"], row["share_interval"]]
        for row in display_rows(table)
    ]  # fmt: skip


def render_table(table: pl.DataFrame) -> str:
    """Return the comparison as a plain-text table for a terminal."""
    cells = _cells(table)
    widths = [max(len(line[column]) for line in [HEADER, *cells]) for column in range(len(HEADER))]

    def line(parts: Sequence[str]) -> str:
        aligned = [
            part.ljust(width) if column < 3 else part.rjust(width)
            for column, (part, width) in enumerate(zip(parts, widths, strict=True))
        ]
        return "  ".join(aligned).rstrip()

    seeds = seed_count(table)
    note = NOTE.format(seeds=seeds, plural="" if seeds == 1 else "s")
    notes = [note, DASH_NOTE] if any("–" in cell for row in cells for cell in row) else [note]
    return "\n".join([line(HEADER), line(["─" * width for width in widths]), *map(line, cells), "", *notes])


def render_markdown(table: pl.DataFrame) -> str:
    """Return the comparison as a markdown table."""
    lines = [f"| {' | '.join(HEADER)} |", "|---|---|---|--:|--:|--:|--:|--:|"]
    return "\n".join(lines + [f"| {' | '.join(cells)} |" for cells in _cells(table)])


def _with_error(row: dict[str, str], arm: str) -> str:
    error = row[f"{arm}_stderr"]
    return row[arm] if error == "–" else f"{row[arm]} ± {error}"
