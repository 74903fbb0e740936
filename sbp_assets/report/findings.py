"""Says in sentences what a run found and what kind of run it is, also where SBP loses or nothing can be said."""

from __future__ import annotations

from typing import Any

import polars as pl

from sbp_assets.evaluation.comparison import AGAINST, oracle_gains, seed_count
from sbp_assets.evaluation.comparison_table import BASELINE_NAMES, DETAILED_TASKS, TASK_NAMES
from sbp_assets.evaluation.contamination import CONTAINED
from sbp_assets.evaluation.scores import ACCURACIES
from sbp_assets.evaluation.tasks import HELDOUT, QUESTIONS
from sbp_assets.evaluation.views import FORWARD_BY_INVERTED, REVERSED_BY_ENTRIES
from sbp_assets.report.dynamics import early_stops, over_seeds
from sbp_assets.report.formatting import decimal, percent, quantity, signed
from sbp_assets.settings import Experiment

# Name and meaning of every way in which a run may not be SBP on a corpus to learn from, but a control of it.
NEGATIVE_CONTROL = (
    "negative control: five-token world",
    "Its documents are letters drawn at random: nothing can be learned, and no arm should do better than another.",
)
_NOT_OWED = "What the SBP arm gains over the baseline is not owed to relations between documents."
UNCONDITIONAL = (
    "placebo: unconditional",
    f"The synthetic documents are sampled from the baseline, without seed documents. {_NOT_OWED}",
)
REAL_PAIRS = (
    "control: real pairs in one document",
    "In the place of synthetic documents the SBP arm reads related real documents, d1 and d2 in one: relations without "
    "a synthesizer. What it gains over the baseline is not owed to synthesis.",
)
RANDOM_PARTNERS = (
    "placebo: random partners",
    f"The synthesizer is tuned on pairs of documents that have nothing to do with each other. {_NOT_OWED}",
)
SYNTHESIZER_STARTS = {
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
    """Return name and meaning of every setting that makes this run a control, a placebo or an ablation."""
    found = [NEGATIVE_CONTROL] if experiment.corpus.source.kind == "five_tokens" else []
    if experiment.synthesis.condition == "none":  # No synthesizer is used, however it is set.
        return [*found, UNCONDITIONAL]
    if not experiment.sampled:
        found.append(REAL_PAIRS)
    if experiment.synthesizer.partners == "random":
        found.append(RANDOM_PARTNERS)
    if not experiment.sampled:
        return found
    if start := SYNTHESIZER_STARTS.get(experiment.synthesizer.start):
        found.append(start)
    return found


def controls(experiment: Experiment) -> list[str]:
    """Return what placebos would tell of this run, in a sentence or two; nothing where it is one itself."""
    if departures(experiment):
        return []
    return [
        "Whether relations between documents brought SBP’s gain, or regularisation by any synthetic text, this run "
        "alone does not tell. Placebos of the same budget do, each a branch of it: “sbp branch unconditional "
        "synthesis.condition=none” and “sbp branch random_pairs synthesizer.partners=random”."
    ]


def verdict(comparison: pl.DataFrame) -> list[str]:
    """Return what was found on held-out documents: a sentence or two against each of the two baselines."""
    rows = [_heldout_perplexity(comparison, against) for against in AGAINST]
    if any(row is None or None in (row["baseline"], row["sbp"], row["oracle"]) for row in rows):
        return ["The held-out perplexity of one of the arms is missing: of held-out documents nothing can be said yet."]
    return [_finding(row) for row in rows if row]


def _heldout_perplexity(comparison: pl.DataFrame, against: str) -> dict[str, Any] | None:
    rows = comparison.filter(task=HELDOUT, metric="perplexity", against=against).to_dicts()
    return rows[0] if rows else None


def _finding(row: dict[str, Any]) -> str:
    final = row["against"] == "final"
    other = "the compute-matched baseline" if final else "the baseline as early stopping would leave it"
    baseline, sbp, delta, share = (row[key] for key in ("baseline", "sbp", "delta_sbp", "share_of_oracle_gain"))
    if delta == 0:
        found = f"SBP and {other} reached the same held-out perplexity ({decimal(sbp)})."
    else:
        figures = f"a perplexity of {decimal(sbp)} against {decimal(baseline)}, a difference of {signed(delta)}"
        if row["delta_sbp_low"] is not None:
            low, high = signed(row["delta_sbp_low"]), signed(row["delta_sbp_high"])
            figures += f" (95% interval {low} to {high})"
        if clear_of_zero(row, "sbp") is False:
            found = f"On held-out documents SBP and {other} cannot be told apart: {figures}."
        elif delta > 0:
            found = f"On held-out documents SBP did worse than {other}: {figures}."
        else:
            found = f"On held-out documents SBP beat {other}: {figures}"
            if share is not None and oracle_gains(row):
                found += f", {share:.0%} of what the oracle gained from more real data"
                if interval := _share_interval(row):
                    found += f" ({interval})"
            found += "."
    if share is None:
        found += f" The oracle ({decimal(row['oracle'])}) did not beat it, so there was no gain to recover a share of."
    elif not oracle_gains(row):
        found += " What the oracle gained cannot be told from zero, so that no share of it is given."
    elif delta >= 0:
        found += f" The oracle, with more real data, reached {decimal(row['oracle'])}."
    return found


def _share_interval(row: dict[str, Any]) -> str:
    return "" if row["share_low"] is None else f"{percent(row['share_low'], 0)} to {percent(row['share_high'], 0)}"


ONE_VIEW = {
    REVERSED_BY_ENTRIES: "Asked for the name of concepts that D knows by entries alone, which begin with it",
    FORWARD_BY_INVERTED: (
        "Asked for the facts of concepts that D knows by inverted forms alone, which end with the name"
    ),
}


def other_way_round(comparison: pl.DataFrame) -> list[str]:
    """Return what the arms answer to questions that ask for a fact the other way round than D tells it.

    A sentence for each of the two groups of concepts that D knows in one view alone; none for other corpora.
    """
    rows = {row["task"]: row for row in comparison.filter(metric="acc", against="final").iter_rows(named=True)}
    found = []
    for task, asked in ONE_VIEW.items():
        if not (row := rows.get(task)) or None in (row["baseline"], row["sbp"], row["oracle"]):
            continue
        baseline, sbp, oracle = (f"{row[arm]:.0%}" for arm in ("baseline", "sbp", "oracle"))
        more = ""
        if clear_of_zero(row, "sbp") is False:
            more = "; SBP and the baseline cannot be told apart"
        elif row["share_of_oracle_gain"] is not None and oracle_gains(row):
            more = f": {percent(row['share_of_oracle_gain'], 0)} of the oracle’s gain"
            if interval := _share_interval(row):
                more += f" (95% interval {interval})"
        found.append(f"{asked}, the baseline is right {baseline} of the time, SBP {sbp}, the oracle {oracle}{more}.")
    return found


def clear_of_zero(row: dict[str, Any], arm: str) -> bool | None:
    """Return whether zero lies outside the 95% interval of the arm's delta; None where there is no interval."""
    low, high = row[f"delta_{arm}_low"], row[f"delta_{arm}_high"]
    return None if low is None else not low <= 0 <= high


def tone(row: dict[str, Any], arm: str) -> str:
    """Return 'good' or 'bad' where the arm's delta is clear of zero, else ''; also the CSS class that shows it."""
    if not clear_of_zero(row, arm):
        return ""
    return "good" if (row[f"delta_{arm}"] > 0) == row["higher_is_better"] else "bad"


def caveats(comparison: pl.DataFrame) -> list[str]:
    """Return what the verdict leaves out: the results on the other tasks, and what the intervals do not cover."""
    found = []
    for against in AGAINST:
        compared = comparison.filter(
            pl.col("against") == against,
            pl.col("delta_sbp").is_not_null(),
            ~pl.col("task").is_in(list(DETAILED_TASKS)),
        )
        # Perplexity, nats and bits of one task are one measurement: count tasks, by accuracy where they have one.
        accuracies_first = compared.sort(~pl.col("metric").is_in(ACCURACIES), maintain_order=True)
        first = accuracies_first.unique("task", keep="first", maintain_order=True).filter(pl.col("task") != HELDOUT)
        if first.is_empty():
            continue
        tasks: dict[str, list[str]] = {"good": [], "bad": [], "": []}
        for row in first.iter_rows(named=True):
            tasks[tone(row, "sbp")].append(TASK_NAMES.get(row["task"], row["task"]))
        ahead, behind, level = (f"{len(names)} ({', '.join(names)})" if names else "none" for names in tasks.values())
        found.append(
            f"Of {len(first)} further task{'s' if len(first) > 1 else ''}, by accuracy where it has one and by 95% "
            f"interval: SBP is ahead of the {BASELINE_NAMES[against]} baseline on {ahead}, behind on {behind}, and "
            f"cannot be told apart from it on {level}."
        )
    if seed_count(comparison) == 1:
        found.append(
            "One training seed: how much the figures vary from run to run is not known. "
            "The errors and intervals shown are of the examples only."
        )
    elif seed_count(comparison) > 1:
        found.append(
            f"Errors and intervals are of the examples and of {seed_count(comparison)} training seeds. The synthesizer "
            "was tuned and sampled once: how much another would move the figures is not in them."
        )
    return found


def contamination_found(contamination: pl.DataFrame) -> list[str]:
    """Return what the search for evaluation items in the training documents found, in a sentence or two."""
    if contamination.is_empty():
        return ["The evaluation items were not looked for in the training documents."]
    words = int(contamination["words"][0])
    corpora = {"unique": "D", "oracle": "the oracle’s documents", "synthetic": "the synthetic documents"}

    def listed(rows: pl.DataFrame) -> str:
        return ", ".join(
            f"{TASK_NAMES.get(row['evaluation_set'], row['evaluation_set'])} {row['contained']:,} of "
            f"{row['judged']:,} in {corpora.get(row['corpus'], row['corpus'])}"
            for row in rows.filter(pl.col("contained") > 0).iter_rows(named=True)
        )

    is_question = pl.col("evaluation_set").is_in(QUESTIONS)
    others = contamination.filter(~is_question)
    judged = sum(others.group_by("evaluation_set").agg(pl.col("judged").max())["judged"].to_list())
    rule = f"{CONTAINED:.0%} or more of its runs of {words} words in one training document"
    found = []
    if len(others):
        found.append(
            f"Evaluation items in the training data ({rule}): {listed(others)}."
            if listed(others)
            else f"Of {judged:,} evaluation items that are long enough to judge, none is in the training data ({rule})."
        )
    if answered := listed(contamination.filter(is_question)):
        found.append(
            f"{answered}: documents state the facts that these questions ask for, in the same words. "
            "That is the task, and no leak."
        )
    return found


def overfitting(dynamics: pl.DataFrame) -> str | None:
    """Return where along training the baseline was best and how much it lost later; None without measurements."""
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
