"""What the share of the oracle's gain depends on: python -m benchmarks.ablations [PROFILE [NAME ...]].

Each ablation changes settings of the finished profile (default: headline) in a branch of its store, for the first
training seed alone; what the settings do not touch, such as the baseline and the oracle, is taken over. Without NAMEs
all of ABLATIONS run. Prints a table and, as its last line, one JSON object: per ablation the settings changed, the
comparison's rows and the quality of the synthetic documents.
"""

from __future__ import annotations

import json
import os
from typing import Any

import polars as pl

from benchmarks.arguments import parser_with_profile
from benchmarks.headline import quality, share_text
from sbp_assets.evaluation.comparison import oracle_gains
from sbp_assets.instance.branch import run_branch
from sbp_assets.settings import load_settings

ABLATIONS: dict[str, dict[str, Any]] = {
    "as_configured": {},
    "share_025": {"pretraining.synthetic_share": 0.25},
    "share_075": {"pretraining.synthetic_share": 0.75},
    "epochs_1": {"synthesizer.epochs": 1},
    "epochs_4": {"synthesizer.epochs": 4},
    "similarity_080": {"pairing.min_similarity": 0.8},
    "no_pair_filter": {"pairing.max_shared_shingles": 1.0, "pairing.max_pairs_per_document": 1000},
    "from_scratch": {"synthesizer.start": "scratch"},
    "from_early_stopped": {"synthesizer.start": "early_stopped"},
    "top_p_1": {"synthesis.top_p": 1.0},
    "temperature_07": {"synthesis.temperature": 0.7},
}
SHOWN = (("heldout", "perplexity"), ("concept_questions", "acc"))
SHARE = ("share_of_oracle_gain", "share_low", "share_high")
QUALITY = ("non_factual", "pair_irrelevance", "duplicates")


def main(profile: str, names: list[str]) -> None:
    if unknown := [name for name in names if name not in ABLATIONS]:
        raise SystemExit(f"no ablation {', '.join(unknown)}; there are {', '.join(ABLATIONS)}")
    os.environ["SBP_PROFILE"] = profile
    settings = load_settings()
    found = {}
    for name in names or ABLATIONS:
        changes = {"pretraining.seeds": [settings.experiment.first_seed], **ABLATIONS[name]}
        store = run_branch(settings, name, changes)
        found[name] = {
            "changes": ABLATIONS[name],
            "comparison": pl.read_parquet(store / "evaluation/comparison.parquet").to_dicts(),
            "quality": quality(store),
        }
        print(_markdown(found))  # so far: an ablation takes minutes, and a later one may fail
    print(json.dumps({"profile": profile, "seed": settings.experiment.first_seed, "ablations": found}))


def _markdown(found: dict[str, dict[str, Any]]) -> str:
    columns = [
        f"{task} {metric}, share against {against}" for task, metric in SHOWN for against in ("final", "stopped")
    ]
    header = ["ablation", *columns, *(f"{metric} of syntheses" for metric in QUALITY)]
    lines = ["", f"| {' | '.join(header)} |", "|---|" + "--:|" * (len(header) - 1)]
    for name, result in found.items():
        rows = {(row["task"], row["metric"], row["against"]): row for row in result["comparison"]}
        cells = []
        for task, metric in SHOWN:
            for against in ("final", "early_stopped"):
                row = rows.get((task, metric, against))
                cells.append(share_text(*(row[column] for column in SHARE)) if row and oracle_gains(row) else "–")
        values = (result["quality"].get(f"{metric}_synthetic") for metric in QUALITY)
        cells += ["–" if value is None else f"{value:.1%}" for value in values]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    taking = parser_with_profile(__doc__, "headline")
    taking.add_argument("names", nargs="*", metavar="NAME", help=f"ablations (default: all): {', '.join(ABLATIONS)}")
    given = taking.parse_args()
    main(given.profile, given.names)
