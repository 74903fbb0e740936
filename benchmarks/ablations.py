"""What the share of the oracle's gain depends on: python -m benchmarks.ablations [PROFILE [NAME ...]].

Each ablation changes settings of the finished profile (default: headline) in a branch of its store, for the first
training seed and one tuning seed; what the settings do not touch is taken over. Those of SYNTHESIS leave the baseline
and the oracle as they are; those of BUDGET and of CORPUS train them again. Without NAMEs all of them run. What is
finished is not run again. Prints a table after each one and, as its last line, one JSON object: per ablation the
settings changed, the comparison's rows, the lead of the profile's own SBP where both have one baseline and oracle, the
quality of the synthetic documents and, of concepts, the precision of the pairs and how many of them cross the views.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import polars as pl

from benchmarks.arguments import parser_with_profile, profile_settings
from benchmarks.headline import other_models, quality, scores_of, share_text
from sbp_assets.evaluation.comparison import oracle_gains
from sbp_assets.evaluation.tuning_seeds import SHARED, compare_arms
from sbp_assets.evaluation.views import FORWARD_BY_INVERTED, REVERSED_BY_ENTRIES
from sbp_assets.instance.branch import run_branch
from sbp_assets.pairing.ground_truth import OVERALL

OWN = "the data_dir of the profile"
SYNTHESIS: dict[str, dict[str, Any]] = {
    "as_configured": {},
    "share_025": {"pretraining.synthetic_share": 0.25},
    "share_050": {"pretraining.synthetic_share": 0.5},
    "share_085": {"pretraining.synthetic_share": 0.85},
    "without_centring": {"pairing.centring": 0},
    "similarity_045": {"pairing.min_similarity": 0.45},
    "similarity_065": {"pairing.min_similarity": 0.65},
    "epochs_3": {"synthesizer.epochs": 3},
    "epochs_12": {"synthesizer.epochs": 12},
    "rate_ends_at_a_tenth": {"synthesizer.final_learning_rate": 0.1},
    "adamw_tuning": {
        "synthesizer.method": "adamw",
        "synthesizer.learning_rate": 2e-3,
        "synthesizer.final_learning_rate": 0.1,
        "synthesizer.weight_decay": 0.1,
        "synthesizer.epochs": 3,
        "synthesis.temperature": 1.0,
    },
    "from_scratch": {"synthesizer.start": "scratch"},
    "from_early_stopped": {"synthesizer.start": "early_stopped"},
    "temperature_1": {"synthesis.temperature": 1.0},
    "top_p_09": {"synthesis.top_p": 0.9},
    "filtered": {"synthesis.filter.max_copying": 0.5, "synthesis.filter.min_seed_similarity": 0.5},
    "second_round": {"synthesizer.earlier_round": OWN},
}
# In readings_16 and readings_40 SBP reads D eight times, as configured: they change how much synthetic text it reads.
# In rate_001_decay_2_readings_56 all is doubled.
BUDGET: dict[str, dict[str, Any]] = {
    "readings_16": {"pretraining.repetitions": 16, "pretraining.synthetic_share": 0.5},
    "readings_40": {"pretraining.repetitions": 40, "pretraining.synthetic_share": 0.8},
    "weight_decay_01": {"pretraining.weight_decay": 0.1},
    "rate_002_decay_1": {"pretraining.learning_rate": 2e-2, "pretraining.weight_decay": 1.0},
    "rate_001_decay_2": {"pretraining.learning_rate": 1e-2, "pretraining.weight_decay": 2.0},
    "rate_001_decay_2_readings_56": {
        "pretraining.learning_rate": 1e-2,
        "pretraining.weight_decay": 2.0,
        "pretraining.repetitions": 56,
    },
    "rate_001_decay_2_unconditional": {
        "pretraining.learning_rate": 1e-2,
        "pretraining.weight_decay": 2.0,
        "synthesis.condition": "none",
    },
}
CORPUS: dict[str, dict[str, Any]] = {
    "one_view": {"corpus.source.inverted_share": 0.0},
    "two_facts_of_three": {"corpus.source.facts_per_document": 2},
    "eight_documents_a_concept": {"corpus.source.concepts": 150},
}
ABLATIONS = SYNTHESIS | BUDGET | CORPUS
ARMS = ("baseline", "sbp", "oracle")
REVERSED = (REVERSED_BY_ENTRIES, "acc")
SHOWN = {
    REVERSED: "reversed, entries alone",
    ("heldout", "perplexity"): "held-out perplexity",
    (FORWARD_BY_INVERTED, "acc"): "forward, inverted alone",
}
BEHIND = tuple(SHOWN)[:2]
LEAD = ("share_lead", "share_lead_low", "share_lead_high")
SHARE = ("share_of_oracle_gain", "share_low", "share_high")
QUALITY = ("non_factual", "pair_irrelevance", "duplicates")


def main(profile: str, names: list[str]) -> None:
    if unknown := [name for name in names if name not in ABLATIONS]:
        raise SystemExit(f"no ablation {', '.join(unknown)}; there are {', '.join(ABLATIONS)}")
    settings = profile_settings(profile)
    found = {}
    for name in names or ABLATIONS:
        changed = {
            key: settings.deployment.data_dir if value == OWN else value for key, value in ABLATIONS[name].items()
        }
        changes = {"pretraining.seeds": [settings.experiment.first_seed], **changed}
        store = run_branch(settings, name, changes)
        leads = profile_leads(Path(settings.deployment.data_dir), store, settings.experiment.seed_keys[:1])
        found[name] = {"changes": ABLATIONS[name], **results(store), "profile_leads": leads}
        print(_markdown(found), flush=True)  # so far: an ablation takes minutes, and a later one may fail
    print(json.dumps({"profile": profile, "seed": settings.experiment.first_seed, "ablations": found}))


def results(store: Path) -> dict[str, Any]:
    """Return the comparison's rows, the quality of the synthetic documents, and what is true of the pairs."""
    found = {
        "comparison": pl.read_parquet(store / "evaluation/comparison.parquet").to_dicts(),
        "quality": quality(store),
    }
    if (truth := store / "pairing/pair_truth.parquet").exists():  # Only of a corpus with ground truth.
        table = pl.read_parquet(truth).filter(shard=OVERALL)
        found["pairs"] = table.select("pairs", "precision", "crossing").to_dicts()[0]
    return found


def profile_leads(own: Path, store: Path, seeds: list[str]) -> list[dict[str, Any]]:
    """Return the leads of the profile's SBP over the ablation's (`compare_arms`), one per task, metric and baseline.

    There are none where the ablation has another baseline or oracle, of which it has other shares, or other questions.
    """
    shared = {model: scores_of(own, model, seeds) for model in SHARED}
    if other_models(shared, store, seeds):
        return []
    arms = {"sbp": {"0": scores_of(own, "sbp", seeds)}, "ablation": {"0": scores_of(store, "sbp", seeds)}}
    return compare_arms(shared, arms)[1]


def _markdown(found: dict[str, dict[str, Any]]) -> str:
    columns = [f"{name}: share of the gain" for name in SHOWN.values()]
    quality_columns = [metric.replace("_", " ") for metric in QUALITY]
    behind = [f"{name}: points behind the profile" for key, name in SHOWN.items() if key in BEHIND]
    header = ["ablation", "pairs", "precision", "baseline, SBP, oracle", *columns, *behind, *quality_columns]
    lines = ["", f"| {' | '.join(header)} |", "|---|" + "--:|" * (len(header) - 1)]
    for name, result in found.items():
        pairs = result.get("pairs")
        cells = (
            [f"{pairs['pairs']}, {pairs['crossing']:.0%} cross", f"{pairs['precision']:.1%}"] if pairs else ["–"] * 2
        )
        rows = {(row["task"], row["metric"]): row for row in result["comparison"] if row["against"] == "final"}
        reversed_row = rows.get(REVERSED)
        cells.append(", ".join(f"{reversed_row[arm]:.0%}" for arm in ARMS) if reversed_row else "–")
        for key in SHOWN:
            row = rows.get(key)
            cells.append(share_text(*(row[column] for column in SHARE)) if row and oracle_gains(row) else "–")
        leads = {(lead["task"], lead["metric"]): lead for lead in result["profile_leads"] if lead["against"] == "final"}
        for key in BEHIND:
            lead = leads.get(key)
            cells.append(share_text(*(lead[column] for column in LEAD)) if lead and oracle_gains(rows[key]) else "–")
        values = (result["quality"].get(f"{metric}_synthetic") for metric in QUALITY)
        cells += ["–" if value is None else f"{value:.1%}" for value in values]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines.append(f"\nbaseline, SBP, oracle: accuracy, {SHOWN[REVERSED]}")
    return "\n".join(lines)


if __name__ == "__main__":
    taking = parser_with_profile(__doc__, "headline")
    taking.add_argument("names", nargs="*", metavar="NAME", help=f"ablations (default: all): {', '.join(ABLATIONS)}")
    given = taking.parse_args()
    main(given.profile, given.names)
