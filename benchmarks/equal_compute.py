"""SBP against a baseline of equal total compute: python -m benchmarks.equal_compute [PROFILE].

The arms of a run are matched by the tokens that they train on; tuning and generation come on top. Here the baseline is
charged for nothing and reads D as often as SBP's total FLOPs buy: those of its training, of synthesizer-tuning and of
generation, by pretraining/token_budget. It is trained and scored in the branch `equal_compute` of the finished profile
(default: headline), for all training seeds, with the settings of the profile: its learning rate decays over its longer
budget. Prints SBP and the oracle against it and, as its last line, one JSON object.

The baseline that the synthesizer starts from is not charged (`repetitions_with_start` in the JSON says what it would
be), nor are embedding and search.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import polars as pl

from benchmarks.arguments import parser_with_profile, profile_settings
from sbp_assets.evaluation.comparison import SCORED, compare
from sbp_assets.evaluation.comparison_table import render_markdown
from sbp_assets.instance.branch import branch_environment, make_branch
from sbp_assets.pretraining.budget import equal_total_compute

BRANCH = "equal_compute"
STEPS = ("pretrain_baseline", "score_baseline", "score_early_stopped")
OF_BRANCH = ("baseline", "early_stopped")


def main(profile: str) -> None:
    settings = profile_settings(profile)
    store = Path(settings.deployment.data_dir)
    table = store / "pretraining/token_budget.parquet"
    equal = equal_total_compute(pl.read_parquet(table)) if table.exists() else None
    if equal is None:
        raise SystemExit(f"{table} has no budget of SBP and of its tuning and generation: first `sbp run -p {profile}`")
    make_branch(settings, BRANCH, {"pretraining.repetitions": round(equal.repetitions, 4)})
    environment = {**os.environ, **branch_environment(settings, BRANCH)}
    only = [option for step in STEPS for option in ("--only", step)]
    subprocess.run([sys.executable, "-P", "-m", "sbp_assets.cli", "run", *only], env=environment, check=True)
    branch = store.with_name(f"{store.name}.branches") / BRANCH / "artifacts"
    stores = {model: branch if model in OF_BRANCH else store for model in SCORED}
    scores = {
        model: {
            seed: pl.read_parquet(home / f"evaluation/{model}_scores/{seed}.parquet")
            for seed in settings.experiment.seed_keys
        }
        for model, home in stores.items()
    }
    rows = compare(scores)
    print(
        f"baseline that reads D {equal.repetitions:.1f} times instead of {settings.experiment.pretraining.repetitions}"
    )
    print(render_markdown(rows))
    told = {"profile": profile, "seeds": settings.experiment.seed_keys, "equal_total_compute": asdict(equal)}
    print(json.dumps({**told, "comparison": rows.to_dicts()}))


if __name__ == "__main__":
    main(parser_with_profile(__doc__, "headline").parse_args().profile)
