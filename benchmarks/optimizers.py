"""Optimizer settings by the arms' held-out loss: python -m benchmarks.optimizers [PROFILE] --try SETTING=VALUE …

Trains arms of a finished run again, one after another in this process on one core, from the run's own tokens, with
other settings of `pretraining`: `--try weight_decay=0.5 --try method=muon,weight_decay=1.5`. The synthetic documents
that the SBP arm reads stay those of the run. Prints a JSON object per model and, as its last line, one of all: per arm
and settings the steps, the lowest held-out loss (nats per token) with its step, the last one, the mean training loss
of the last 20 steps, and the processor time.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.arguments import parser_with_profile, profile_settings
from benchmarks.machine import describe
from sbp_assets.corpus.split import HELDOUT
from sbp_assets.pretraining.assets import optimizer_of
from sbp_assets.pretraining.budget import ARMS, Arm, plan_arm
from sbp_assets.settings import Settings
from sbp_assets.settings.experiment import Pretraining
from sbp_assets.training.loop import train
from sbp_assets.training.parallel import World
from sbp_assets.training.spec import Source, TrainingSpec


def main(profile: str, arms: list[Arm], tried: list[dict[str, Any]], seed: int) -> None:
    settings = profile_settings(profile)
    torch.set_num_threads(1)
    found = []
    for changes in tried:
        pretraining = Pretraining.model_validate(settings.experiment.pretraining.model_dump() | changes)
        for arm in arms:
            with tempfile.TemporaryDirectory(prefix="sbp-benchmark-") as folder:
                found.append({"arm": arm, **changes, **_train(settings, pretraining, arm, seed, Path(folder))})
            print(json.dumps(found[-1]), flush=True)
    print(json.dumps({**describe(), "profile": profile, "seed": seed, "models": found}))


def _train(settings: Settings, pretraining: Pretraining, arm: Arm, seed: int, folder: Path) -> dict[str, Any]:
    data, shards = Path(settings.deployment.data_dir), settings.experiment.shard_keys
    tokens = {shard: data / "corpus/tokens" / shard for shard in shards}
    synthetic = {shard: data / "synthesis/synthetic_tokens" / shard for shard in shards}
    plan = plan_arm(arm, pretraining, tokens, synthetic if arm == "sbp" else None)
    spec = TrainingSpec(
        name=f"{arm} model",
        model=settings.experiment.model,
        optimizer=optimizer_of(pretraining),
        tokenizer_dir=data / "corpus/tokenizer",
        data=plan.data,
        steps=plan.steps,
        seed=seed,
        heldout=[Source(directory=directory, split=HELDOUT) for directory in tokens.values()],
        heldout_tokens=pretraining.heldout_tokens,
        evaluations=pretraining.evaluations,
        device="cpu",
        microbatch_tokens=settings.deployment.microbatch_tokens,
        work_dir=folder / "work",
        output_dir=folder / "model",
    )
    started = time.process_time()
    trained = train(spec, World(torch.device("cpu")))
    assert trained is not None
    measured = trained.metrics
    best = measured.drop_nulls("heldout_loss").sort("heldout_loss").row(0, named=True)
    return {
        "steps": plan.steps,
        "lowest_heldout_loss": round(best["heldout_loss"], 4),
        "at_step": best["step"],
        "last_heldout_loss": round(measured["heldout_loss"][-1], 4),
        "last_train_loss": round(measured["train_loss"].tail(20).mean(), 4),  # type: ignore[arg-type]
        "processor_seconds": round(time.process_time() - started, 1),
    }


def _settings_of(text: str) -> dict[str, Any]:
    """Return the settings written as `name=value,name=value`; a value is JSON where it can be, else a string."""
    changes = {}
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        try:
            changes[name] = json.loads(value)
        except json.JSONDecodeError:
            changes[name] = value
    return changes


if __name__ == "__main__":
    taking = parser_with_profile(__doc__, "demo")
    taking.add_argument("--arms", nargs="+", choices=ARMS, default=["baseline"])
    taking.add_argument("--try", action="append", dest="tried", metavar="SETTING=VALUE[,…]", help="once per training")
    taking.add_argument("--seed", type=int, default=0)
    given = taking.parse_args()
    main(given.profile, given.arms, [_settings_of(text) for text in given.tried or [""]], given.seed)
