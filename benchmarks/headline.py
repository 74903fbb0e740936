"""How much of the oracle's gain SBP recovers, beside three controls: python -m benchmarks.headline [PROFILE].

Runs the profile (default: headline) through Dagster in its own store, then each control in a branch of it, and all of
that once more per further tuning seed. Whatever is finished is not run again, so the command may be stopped and
repeated. Controls have SBP's budget and synthetic share:

- unconditional: documents drawn from the baseline after <bos> alone; nothing in them relates documents
- random_pairs: documents of a synthesizer tuned on pairs dealt at random; nothing in them relates documents, either
- concatenated_pairs: real neighbour pairs, d1 and d2 in one document: relations without a synthesizer

Tuning seed 0 is the profile as it is. For a further one SBP and random_pairs are tuned with another synthesizer.seed
and sampled with another synthesis.salt. The others are not tuned: the salt draws other samples, and of the real pairs
another selection. Their intervals hold that luck and no other.

--only runs some of the arms, --finished runs nothing and prints what is there. Prints, against the final and against
the early-stopped baseline, the arms' differences and shares of the oracle's gain, then SBP's lead over each control,
the quality of the documents and seconds. The last line is one JSON object with all of it. Intervals are those of
`sbp_assets.evaluation.tuning_seeds`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import polars as pl

from benchmarks.arguments import parser_with_profile, profile_settings
from sbp_assets.evaluation.comparison import PERPLEXITY, oracle_gains
from sbp_assets.evaluation.comparison_table import BASELINE_NAMES, METRIC_NAMES, TASK_NAMES
from sbp_assets.evaluation.scores import ACCURACIES
from sbp_assets.evaluation.tuning_seeds import SHARED, compare_arms
from sbp_assets.instance.branch import run_branch
from sbp_assets.settings import Experiment, Settings

SBP = "sbp"
ARMS: dict[str, dict[str, Any]] = {
    SBP: {},
    "unconditional": {"synthesis.condition": "none"},
    "random_pairs": {"synthesizer.partners": "random"},
    "concatenated_pairs": {"synthesis.condition": "pairs"},
}
TUNED = (SBP, "random_pairs")
ARM_NAMES = {
    SBP: "SBP",
    "unconditional": "unconditional",
    "random_pairs": "random pairs",
    "concatenated_pairs": "concatenated pairs",
}
RECORD = ".headline.json"  # Beside the branches: what is finished, of which experiment, and the seconds that it took.
SHOWN_QUALITY = ("repetition", "duplicates", "non_factual", "pair_irrelevance", "pair_copying")

Run = tuple[str, int]  # An arm and its tuning seed.


def main(profile: str, tuning_seeds: int, only: list[str], finished_alone: bool) -> int:
    settings = profile_settings(profile)
    record = Record(settings)
    runs = planned(tuning_seeds, only)
    for run in runs:
        done = f"finished ({record.seconds(run):.0f} s)" if record.finished(run) else "to run"
        print(f"{name_of(run):24} {done}{'' if done != 'to run' or not finished_alone else ', left out'}", flush=True)
    started, failed = time.monotonic(), []
    for run in [] if finished_alone else runs:
        # A finished run is looked at, too: what has become stale is materialised again.
        print(f"\n== {name_of(run)}", flush=True)
        began = time.monotonic()
        try:
            execute(settings, run)
        except subprocess.CalledProcessError:
            failed.append(name_of(run))
            if run == (SBP, 0):
                break  # The others are branches of it.
        record.add(run, time.monotonic() - began, finished=name_of(run) not in failed)
    wall = time.monotonic() - started
    stores = {run: store_of(settings, run) for run in runs if record.finished(run)}
    if record.finished((SBP, 0)):
        stores.setdefault((SBP, 0), store_of(settings, (SBP, 0)))
        result = evaluate(stores, settings.experiment.seed_keys)
        seconds = {name_of(run): round(record.seconds(run), 1) for run in stores}
        print_tables(result, seconds)
        final = {"profile": profile, "cores": os.cpu_count(), "wall_seconds_of_this_call": round(wall, 1)}
        print(json.dumps({**final, "seconds": seconds, "failed": failed, **result}))
    else:
        print("\nnothing to show before the profile's own run is finished")
    if failed:
        print(f"failed: {', '.join(failed)}; the same command goes on from there", file=sys.stderr)
    return 1 if failed else 0


def planned(tuning_seeds: int, only: Iterable[str] = ()) -> list[Run]:
    """Return the runs in order: all arms of tuning seed 0, SBP first, then those of the next; a part is of use, too."""
    chosen = [arm for arm in ARMS if arm in set(only or ARMS)]
    runs = [(arm, tuning) for tuning in range(tuning_seeds) for arm in chosen]
    return runs if (SBP, 0) in runs else [(SBP, 0), *runs]


def name_of(run: Run) -> str:
    """Return the name of a run, and of its branch: "sbp", "random_pairs", "random_pairs_1"."""
    return run[0] if run[1] == 0 else f"{run[0]}_{run[1]}"


def changes_of(run: Run, experiment: Experiment) -> dict[str, Any]:
    """Return the settings that the run's branch changes."""
    arm, tuning = run
    changes = dict(ARMS[arm])
    if tuning:
        changes["synthesis.salt"] = f"{experiment.synthesis.salt}-{tuning}"
        if arm in TUNED:
            changes["synthesizer.seed"] = experiment.tuning_seed + tuning
    return changes


def execute(settings: Settings, run: Run) -> None:
    if run == (SBP, 0):
        subprocess.run([sys.executable, "-P", "-m", "sbp_assets.cli", "run"], check=True)
    else:
        run_branch(settings, name_of(run), changes_of(run, settings.experiment))


def store_of(settings: Settings, run: Run) -> Path:
    own = settings.deployment.data_dir
    return Path(own) if run == (SBP, 0) else Path(f"{own}.branches") / name_of(run) / "artifacts"


class Record:
    """What is finished, in a file beside the branches. A new branch holds SBP's scores, so that files do not tell."""

    def __init__(self, settings: Settings) -> None:
        self.path = Path(f"{settings.deployment.data_dir}.branches") / RECORD
        self.compared = Path(settings.deployment.data_dir) / "evaluation/comparison.parquet"
        self.experiment = settings.experiment.version("1", *Experiment.model_fields)
        found = json.loads(self.path.read_text(encoding="utf-8")) if self.path.is_file() else {}
        # Runs of other settings are not those that are asked for.
        self.entries: dict[str, Any] = found["runs"] if found.get("experiment") == self.experiment else {}

    def finished(self, run: Run) -> bool:
        """Return whether the run was finished; of the profile's own store, which is no copy, its files tell as well."""
        own = run == (SBP, 0) and self.compared.is_file()
        return own or bool(self.entries.get(name_of(run), {}).get("finished"))

    def seconds(self, run: Run) -> float:
        """Return the seconds of all calls until the run was finished."""
        return float(self.entries.get(name_of(run), {}).get("seconds", 0.0))

    def add(self, run: Run, seconds: float, finished: bool) -> None:
        # Of the profile's own run the files tell that it is finished before its seconds have been added.
        added = bool(self.entries.get(name_of(run), {}).get("finished"))
        took = self.seconds(run) + (0 if added else seconds)
        self.entries[name_of(run)] = {"finished": finished, "seconds": took}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".partial")
        temporary.write_text(json.dumps({"experiment": self.experiment, "runs": self.entries}), encoding="utf-8")
        temporary.replace(self.path)


def evaluate(stores: dict[Run, Path], seeds: list[str]) -> dict[str, Any]:
    """Return rows, leads and quality of the finished runs; SystemExit where a branch has another baseline or oracle."""
    own = stores[SBP, 0]
    shared = {model: scores_of(own, model, seeds) for model in SHARED}
    arms: dict[str, dict[str, dict[str, pl.DataFrame]]] = {}
    for (arm, tuning), store in stores.items():
        if others := other_models(shared, store, seeds):
            raise SystemExit(f"{store}: its {others[0]} is another one, so its deltas are; delete the branch")
        arms.setdefault(arm, {})[str(tuning)] = scores_of(store, "sbp", seeds)
    rows, leads = compare_arms(shared, {arm: arms[arm] for arm in ARMS if arm in arms})
    return {
        "training_seeds": seeds,
        "tuning_seeds": {arm: sorted(runs) for arm, runs in arms.items()},
        "rows": rows,
        "lead_over_controls": leads,
        "quality": {name_of(run): quality(store) for run, store in stores.items()},
    }


def other_models(shared: Mapping[str, Mapping[str, pl.DataFrame]], store: Path, seeds: list[str]) -> list[str]:
    """Return the models of SHARED that score otherwise in `store` than in `shared`."""
    found = {model: scores_of(store, model, seeds) for model in SHARED}
    return [model for model in SHARED if any(not found[model][seed].equals(shared[model][seed]) for seed in seeds)]


def scores_of(store: Path, model: str, seeds: list[str]) -> dict[str, pl.DataFrame]:
    """Return the scores of a store's model, `with_samples`, by training seed."""
    return {seed: pl.read_parquet(store / f"evaluation/{model}_scores/{seed}.parquet") for seed in seeds}


def quality(store: Path) -> dict[str, float]:
    """{metric}_{corpus} of a store's quality table, for metrics that have a value."""
    table = pl.read_parquet(store / "synthesis/quality_table.parquet").filter(pl.col("value").is_not_null())
    return {f"{metric}_{corpus}": value for metric, corpus, value in table["metric", "corpus", "value"].iter_rows()}


def share_text(share: float | None, low: float | None, high: float | None) -> str:
    """A share of the oracle's gain with its interval, as in '66% [61%, 71%]'."""
    if share is None:
        return "–"
    return f"{share:.0%}" + ("" if low is None else f" [{low:.0%}, {high:.0%}]")


def print_tables(result: dict[str, Any], seconds: dict[str, float]) -> None:
    shown = [row for row in result["rows"] if row["metric"] in (PERPLEXITY, *ACCURACIES)]
    arms = [arm for arm in ARMS if arm in result["tuning_seeds"]]
    names = [ARM_NAMES[arm] for arm in arms]
    counts = ", ".join(f"{ARM_NAMES[arm]} {len(result['tuning_seeds'][arm])}" for arm in arms)
    print(f"\ntraining seeds {', '.join(result['training_seeds'])}; tuning seeds: {counts}. [95% interval]")
    for against, baseline in BASELINE_NAMES.items():
        of_task: dict[str, dict[str, dict[str, Any]]] = {}
        for row in shown:
            if row["against"] == against:
                of_task.setdefault(_title(row), {})[row["arm"]] = row
        print(f"\nagainst the {baseline} baseline: differences\n")
        print(_table(["", "baseline", *names, "oracle"], [
            [title, _number(of[SBP], of[SBP]["baseline"], sign=False), *(_text(of[arm], "delta") for arm in arms),
             _text(of[SBP], "delta_oracle")]
            for title, of in of_task.items()
        ]))  # fmt: skip
        print(f"\nagainst the {baseline} baseline: share of the oracle's gain (–: it is not clear of zero)\n")
        print(_table(["", *names], [[title, *(_share(of[arm], "share") for arm in arms)]
                                    for title, of in of_task.items()]))  # fmt: skip
    leads = [lead for lead in result["lead_over_controls"] if lead["metric"] in (PERPLEXITY, *ACCURACIES)]
    gains = {(row["task"], row["metric"], row["against"]): row for row in shown if row["arm"] == SBP}
    header = ["", "over", "score", *(f"share of gain over {name}" for name in BASELINE_NAMES.values())]
    lines = []
    for lead in (lead for lead in leads if lead["against"] == "final"):
        key = {name: lead[name] for name in ("task", "metric", "control")}
        pair = [other for other in leads if all(other[name] == value for name, value in key.items())]
        of_gain = [
            _share({**other, **_oracle(gains[other["task"], other["metric"], other["against"]])}, "share_lead")
            for other in pair
        ]
        lines.append([_title(lead), ARM_NAMES[lead["control"]], _text(lead, "lead"), *of_gain])
    if lines:
        print("\nSBP's lead over each control\n")
        print(_table(header, lines))
    print("\nquality of the documents, and seconds of each run\n")
    print(_table(["", *SHOWN_QUALITY, "seconds"], [
        [name, *(_percent(found.get(f"{metric}_synthetic")) for metric in SHOWN_QUALITY), f"{seconds[name]:.0f}"]
        for name, found in result["quality"].items()
    ]))  # fmt: skip
    print()


def _oracle(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name.startswith("delta_oracle")}


def _title(row: dict[str, Any]) -> str:
    return f"{TASK_NAMES.get(row['task'], row['task'])}, {METRIC_NAMES.get(row['metric'], row['metric'])}"


def _number(row: dict[str, Any], value: float, sign: bool = True) -> str:
    scale, digits = (100, 1) if row["metric"] in ACCURACIES else (1, 3)
    return f"{scale * value:{'+' if sign else ''}.{digits}f}"


def _text(row: dict[str, Any], name: str) -> str:
    return _with_interval(row, name, lambda value: _number(row, value))


def _share(row: dict[str, Any], name: str) -> str:
    return _with_interval(row, name, "{:.0%}".format) if oracle_gains(row) else "–"


def _with_interval(row: dict[str, Any], name: str, text: Callable[[float], str]) -> str:
    if row[name] is None:
        return "–"
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    return text(row[name]) + ("" if low is None else f" [{text(low)}, {text(high)}]")


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---", *["--:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    taking = parser_with_profile(__doc__, "headline")
    taking.add_argument("--tuning-seeds", type=int, default=2, metavar="N", help="seeds of tuning and sampling (2)")
    taking.add_argument("--only", nargs="+", default=[], choices=list(ARMS), metavar="ARM", help=", ".join(ARMS))
    taking.add_argument("--finished", action="store_true", help="run nothing; print the tables of what is finished")
    given = taking.parse_args()
    if given.tuning_seeds < 1:
        taking.error("--tuning-seeds must be 1 or more")
    sys.exit(main(given.profile, given.tuning_seeds, given.only, given.finished))
