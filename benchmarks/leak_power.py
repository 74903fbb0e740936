"""How large a leak the posterior table finds: python -m benchmarks.leak_power [PROFILE], on a finished run.

The learner is given only a random share of D's documents, so that the rest is text which the synthesizer should not
have read and has. The last line printed is one JSON object: per share, over random choices of documents, how often
`unknown_facts_are_at_chance` fails, and medians of the groups of unknown facts.
"""

from __future__ import annotations

import json
import random
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import polars as pl

from benchmarks.arguments import parser_with_profile
from sbp_assets.corpus.concepts import ConceptWorld
from sbp_assets.corpus.tokenizer import load_tokenizer
from sbp_assets.settings import load_settings
from sbp_assets.storage.token_arrays import TokenArrays
from sbp_assets.synthesis.posterior import Learner, grade, seed_documents
from sbp_assets.synthesis.posterior_table import UNKNOWN, leak_problems, posterior_table

SHARES = (1.0, 0.95, 0.9, 0.75, 0.5)
CHOICES = 10


def main(profile: str | None) -> None:
    settings = load_settings(profile)
    experiment, data = settings.experiment, Path(settings.deployment.data_dir)
    if not experiment.ground_truth:
        raise SystemExit(f"profile {settings.profile}: the ground truth is known of source concepts alone")
    world, tokenizer = ConceptWorld(experiment.ground_truth), load_tokenizer(data / "corpus/tokenizer")
    world.statements = cache(world.statements)  # type: ignore[method-assign]  # The texts are the same each time.
    seeds: dict[str, Any] = {}
    synthetic = []
    for shard in experiment.shard_keys:
        arrays = TokenArrays.load(data / "corpus/tokens" / shard)
        seeds |= seed_documents(arrays, tokenizer, experiment.max_document_tokens, experiment.conditional)
        path = data / f"synthesis/synthetic_documents/{shard}.parquet"
        synthetic.append(pl.read_parquet(path, columns=["seed_id", "text"]))
    found = {}
    for share in SHARES:
        tables = []
        for choice in range(CHOICES if share < 1 else 1):
            learner, rng = Learner(world), random.Random(choice)
            learner.read(seed.text for seed in seeds.values() if rng.random() < share)
            with tempfile.TemporaryDirectory() as scratch:
                graded = grade(learner, seeds, pl.concat(synthetic))
                tables.append(posterior_table([graded], world, Path(scratch), settings.deployment.memory_limit))
        unknown = pl.concat(tables).filter(pl.col("group").is_in(UNKNOWN)).group_by("group", maintain_order=True)
        medians = unknown.agg(pl.col("statements", "facts", "accuracy", "p_above_chance").median())
        caught = sum(bool(leak_problems(table)) for table in tables)
        found[share] = {"choices": len(tables), "caught": caught, "medians": medians.to_dicts()}
        print(share, found[share], flush=True)
    print(json.dumps({"profile": settings.profile, "shares_of_D": found}))


if __name__ == "__main__":
    main(parser_with_profile(__doc__, None).parse_args().profile)
