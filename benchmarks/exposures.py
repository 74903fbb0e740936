"""How often a fact has to be met in the other view: python -m benchmarks.exposures [PROFILE].

Reads a finished run on the concepts corpus. Questions in the other view about concepts that D knows in one view alone
are counted by the synthetic documents that tell their answer: those in the other view that name the concept and state
all of its facts, each of them right. Prints, by their number (in steps of four; 24: 24 and more) and by the documents
of D about the concept (5: five and more), the accuracy of baseline, SBP and oracle over all training seeds, and as its
last line one JSON object. Standard errors are of a bootstrap over concepts; null where there is one. Only of worlds
whose documents state all facts of their concept (corpus.source.facts_per_document: null).
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import polars as pl

from benchmarks.arguments import parser_with_profile
from benchmarks.copying import concepts_run
from sbp_assets.corpus.concept_texts import ENTRIES, INVERTED
from sbp_assets.corpus.concepts import view_of
from sbp_assets.corpus.split import UNIQUE
from sbp_assets.evaluation.scores import bootstrap_stderr
from sbp_assets.evaluation.tasks import CONCEPT_QUESTIONS, REVERSED_QUESTIONS, Tasks
from sbp_assets.evaluation.views import ALONE
from sbp_assets.storage.paths import read_table, scan_table

MODELS = ("baseline", "sbp", "oracle")
STEP, MOST_TOLD, MOST_DOCUMENTS = 4, 24, 5
ASKED = {REVERSED_QUESTIONS: ENTRIES, CONCEPT_QUESTIONS: INVERTED}  # The view that D has of what is asked.


def main(profile: str) -> None:
    settings, world, data = concepts_run(profile)
    if world.facts_per_document < len(world.attributes):
        raise SystemExit(f"profile {profile}: no document states all facts (corpus.source.facts_per_document)")
    documents, told = Counter[int | None](), Counter[tuple[int | None, str | None]]()
    for shard in settings.experiment.shard_keys:
        texts = scan_table(data / f"corpus/documents/{shard}.parquet").filter(split=UNIQUE).select("text")
        documents.update(world.concept_of(text) for text in texts.collect()["text"])
        for text in synthetic_texts(data, shard):
            concept = world.concept_of(text)
            right = {stated.attribute for stated in world.statements(text) if stated.concept == concept and stated.true}
            if concept is not None and len(right) == len(world.facts[concept]):
                told[concept, view_of(text)] += 1
    rows = []
    for task in Tasks.load(data / "evaluation/tasks").tasks:
        if task.name not in ASKED:
            continue
        known = ASKED[task.name]
        other = INVERTED if known == ENTRIES else ENTRIES
        scores = {
            model: np.mean([_right(data, model, seed, task.name) for seed in settings.experiment.seed_keys], axis=0)
            for model in MODELS
        }
        places: dict[tuple[str, int], list[int]] = defaultdict(list)
        for place in task.groups.get(ALONE[known], ()):
            concept = task.clusters[place]
            places["told_by", min(told[concept, other], MOST_TOLD) // STEP * STEP].append(place)
            places["documents_of_d", min(documents[concept], MOST_DOCUMENTS)].append(place)
        for (by, count), asked in sorted(places.items()):
            concepts = np.array(task.clusters)[asked]
            row = {"task": task.name, "known_by": known, "by": by, "count": count, "questions": len(asked)}
            for model, right in scores.items():
                row[model] = float(right[asked].mean())
                row[f"{model}_stderr"] = bootstrap_stderr("acc", right[asked], np.ones(len(asked)), concepts)
            rows.append(row)
    with pl.Config(tbl_rows=-1, tbl_cols=-1, tbl_width_chars=200, float_precision=3):
        print(pl.DataFrame(rows))
    print(json.dumps({"profile": profile, "seeds": settings.experiment.seed_keys, "rows": rows}))


def synthetic_texts(data: Path, shard: str) -> pl.Series:
    """Return the synthetic documents of a shard that SBP is trained on: a filter may have dropped others."""
    synthetic = read_table(data / f"synthesis/synthetic_documents/{shard}.parquet", ["id", "text"])
    trained_on = read_table(data / f"synthesis/synthetic_tokens/{shard}/documents.parquet", ["id"])
    return synthetic.join(trained_on, on="id", how="semi")["text"]


def _right(data: Path, model: str, seed: str, task: str) -> np.ndarray:
    table = read_table(data / f"evaluation/{model}_scores/{seed}.parquet").filter(task=task, metric="acc")
    return table["sample_values"][0].to_numpy()


if __name__ == "__main__":
    main(parser_with_profile(__doc__, "headline").parse_args().profile)
