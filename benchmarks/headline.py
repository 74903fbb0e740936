"""How much of the oracle's gain SBP recovers, beside two placebos: python -m benchmarks.headline [PROFILE].

Runs the profile (default: headline) through Dagster in its own store, then each placebo in a branch of it; whatever is
finished is not run again. Placebos have SBP's budget and synthetic share, but nothing in them relates documents:
`unconditional` trains on documents drawn from the baseline after <bos> alone, `random_pairs` on those of a synthesizer
tuned on pairs dealt at random.

Prints a table per baseline (as trained, and early-stopped), and as its last line one JSON object: for every task,
metric and baseline the arms' scores, deltas with standard error and 95% interval, and the share of the oracle's gain;
SBP's lead over each placebo; the quality of synthetic documents; seconds of the assets' own work.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import polars as pl

from benchmarks.arguments import parser_with_profile
from sbp_assets.evaluation.comparison import SCORED, compare
from sbp_assets.evaluation.comparison_table import BASELINE_NAMES, METRIC_NAMES, TASK_NAMES
from sbp_assets.evaluation.scores import ACCURACIES
from sbp_assets.instance.branch import run_branch
from sbp_assets.settings import load_settings

PLACEBOS: dict[str, dict[str, Any]] = {
    "unconditional": {"synthesis.condition": "none"},
    "random_pairs": {"synthesizer.partners": "random"},
}
ARM_NAMES = {"sbp": "SBP", "unconditional": "unconditional placebo", "random_pairs": "random-pairs placebo"}


def main(profile: str) -> None:
    os.environ["SBP_PROFILE"] = profile
    settings = load_settings()
    own = Path(settings.deployment.data_dir)
    started = time.monotonic()
    subprocess.run([sys.executable, "-m", "sbp_assets.cli", "run"], check=True)
    stores = {"sbp": own} | {name: run_branch(settings, name, changes) for name, changes in PLACEBOS.items()}
    wall = time.monotonic() - started
    seeds = settings.experiment.seed_keys
    scores: dict[str, dict[str, dict[str, pl.DataFrame]]] = {
        arm: {model: _scores(store, model, seeds) for model in SCORED} for arm, store in stores.items()
    }
    for name, branch in scores.items():
        for model in ("baseline", "early_stopped", "oracle"):
            if any(not branch[model][seed].equals(scores["sbp"][model][seed]) for seed in seeds):
                raise SystemExit(f"{stores[name]}: its {model} is another one, so its deltas are; delete the branch")
    tables = {arm: pl.read_parquet(store / "evaluation/comparison.parquet") for arm, store in stores.items()}
    rows = [_row(row, tables) for row in tables["sbp"].iter_rows(named=True)]
    for against in BASELINE_NAMES:
        print(f"\nagainst the {BASELINE_NAMES[against]} baseline, training seeds {', '.join(seeds)}\n")
        print(_markdown([row for row in rows if row["against"] == against]))
    print()
    result = {
        "profile": profile,
        "seeds": seeds,
        "cores": os.cpu_count(),
        "wall_seconds_of_this_call": round(wall, 1),
        "rows": rows,
        "lead_over_placebos": _leads(scores),
        "quality": {arm: quality(store) for arm, store in stores.items()},
    }
    print(json.dumps(result))


def _row(row: dict[str, Any], tables: dict[str, pl.DataFrame]) -> dict[str, Any]:
    """One row of the headline table; the oracle and the baseline are those of SBP's store, which the branches share."""
    key = {name: row[name] for name in ("task", "metric", "against")}
    arms = {}
    for arm, table in tables.items():
        own = table.filter(**key).row(0, named=True)
        arms[arm] = {
            "score": own["sbp"],
            **{f"delta{name}": own[f"delta_sbp{name}"] for name in ("", "_stderr", "_low", "_high")},
            "share": own["share_of_oracle_gain"],
            "share_low": own["share_low"],
            "share_high": own["share_high"],
        }
    oracle = {"score": row["oracle"]} | {
        f"delta{name}": row[f"delta_oracle{name}"] for name in ("", "_stderr", "_low", "_high")
    }
    shared = ("higher_is_better", "seeds", "baseline", "baseline_stderr")
    return {**key, **{name: row[name] for name in shared}, **arms, "oracle": oracle}


def _scores(store: Path, model: str, seeds: list[str]) -> dict[str, pl.DataFrame]:
    return {seed: pl.read_parquet(store / f"evaluation/{model}_scores/{seed}.parquet") for seed in seeds}


def _leads(scores: dict[str, dict[str, dict[str, pl.DataFrame]]]) -> list[dict[str, Any]]:
    """SBP against each placebo, which stands where the baseline would: paired over the same examples and seeds."""
    rows = []
    for placebo in PLACEBOS:
        own = scores[placebo]["sbp"]
        sbp, oracle = scores["sbp"]["sbp"], scores["sbp"]["oracle"]
        table = compare({"baseline": own, "early_stopped": own, "sbp": sbp, "oracle": oracle}).filter(against="final")
        rows += [
            {"placebo": placebo, "task": row["task"], "metric": row["metric"]}
            | {f"lead{name}": row[f"delta_sbp{name}"] for name in ("", "_stderr", "_low", "_high")}
            for row in table.iter_rows(named=True)
        ]
    return rows


def quality(store: Path) -> dict[str, float]:
    """{metric}_{corpus} of a store's quality table, for metrics that have a value."""
    table = pl.read_parquet(store / "synthesis/quality_table.parquet").filter(pl.col("value").is_not_null())
    return {f"{metric}_{corpus}": value for metric, corpus, value in table["metric", "corpus", "value"].iter_rows()}


def share_text(share: float | None, low: float | None, high: float | None) -> str:
    """A share of the oracle's gain with its interval, as in '66% [61%, 71%]'."""
    if share is None:
        return "–"
    return f"{share:.0%}" + ("" if low is None else f" [{low:.0%}, {high:.0%}]")


def _markdown(rows: list[dict[str, Any]]) -> str:
    header = ["", "baseline", *ARM_NAMES.values(), "oracle", *(f"share: {name}" for name in ARM_NAMES.values())]
    lines = [f"| {' | '.join(header)} |", "|---|" + "--:|" * (len(header) - 1)]
    for row in rows:
        scale, digits = (100, 1) if row["metric"] in ACCURACIES else (1, 3)

        def delta(arm: dict[str, Any], scale: int = scale, digits: int = digits) -> str:
            shown = f"{scale * arm['delta']:+.{digits}f}"
            if arm["delta_low"] is None:
                return shown
            return f"{shown} [{scale * arm['delta_low']:+.{digits}f}, {scale * arm['delta_high']:+.{digits}f}]"

        name = f"{TASK_NAMES.get(row['task'], row['task'])}, {METRIC_NAMES.get(row['metric'], row['metric'])}"
        arms = [row[arm] for arm in ARM_NAMES]
        cells = [
            name,
            f"{scale * row['baseline']:.{digits}f}",
            *map(delta, [*arms, row["oracle"]]),
            *(share_text(arm["share"], arm["share_low"], arm["share_high"]) for arm in arms),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main(parser_with_profile(__doc__, "headline").parse_args().profile)
