"""Reversed questions in which all four names are known alike: python -m benchmarks.name_bias [PROFILE].

A reversed question about a concept that D knows by entries alone offers names of its kind. Most of the wrong ones end
inverted forms in D, the right one never does. So a model can be wrong because a name is new to it in that place, and
SBP, which reads inverted forms of all concepts, can be right more often without knowing the fact. Here the wrong names
are those of other concepts of the same kind that D knows by entries alone, so that no name has an advantage; questions
about a kind with too few of them are left out. The trained models of the headline's runs that are there are scored on
these questions as they were on their own, on one device, and compared in the same way.

Prints how many wrong names end inverted forms in D, what guessing by how often names do would score on either set, and
the arms' differences and shares of the oracle's gain; the last line is one JSON object. See `benchmarks.headline` for
the runs.
"""

from __future__ import annotations

import json
import random
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from benchmarks.arguments import parser_with_profile
from benchmarks.copying import concepts_run
from benchmarks.exposures import synthetic_texts
from benchmarks.headline import ARM_NAMES, planned, share_text, store_of
from sbp_assets.corpus.concept_texts import ENTRIES, INVERTED
from sbp_assets.corpus.concepts import CHOICES, ConceptWorld, Question, view_of
from sbp_assets.corpus.split import UNIQUE
from sbp_assets.corpus.tokenizer import stream_texts
from sbp_assets.evaluation import suite
from sbp_assets.evaluation.assets import concept_questions
from sbp_assets.evaluation.scores import with_samples
from sbp_assets.evaluation.task_files import write_tasks
from sbp_assets.evaluation.tasks import REVERSED_QUESTIONS, Tasks
from sbp_assets.evaluation.tuning_seeds import SHARED, compare_arms
from sbp_assets.evaluation.views import ALONE
from sbp_assets.settings import Settings
from sbp_assets.storage.paths import scan_table
from sbp_assets.training.checkpoint import best_model

HELDOUT = pl.DataFrame({"id": ["none"], "text": ["A folder of tasks has held-out documents, too."]})


def main(profile: str, tuning_seeds: int) -> None:
    settings, world, data = concepts_run(profile)
    asked = _asked(settings, data)
    even = _evenly_known(world, asked)
    shards = settings.experiment.shard_keys
    documents = {shard: scan_table(data / f"corpus/documents/{shard}.parquet") for shard in shards}
    in_d = _endings(world, chain.from_iterable(stream_texts(documents, UNIQUE)))
    read = in_d + _endings(world, chain.from_iterable(synthetic_texts(data, shard) for shard in shards))
    guesses = {
        name: {
            "never ends an inverted form in D": _guess(questions, {n: -c for n, c in in_d.items()}),
            "ends most inverted forms in D": _guess(questions, in_d),
            "ends most of those that SBP reads": _guess(questions, read),
        }
        for name, questions in (("the run's own", asked), ("known alike", even))
    }
    wrong = [name for q in asked for name in q["choices"] if name != q["choices"][q["answer"]]]
    ending = sum(in_d[name] > 0 for name in wrong) / len(asked)
    print(f"wrong names that end an inverted form in D: {ending:.2f} of {CHOICES - 1} in the run's own questions")
    for name, of in guesses.items():
        print(f"{name}: right by the name that " + ", ".join(f"{rule} {right:.1%}" for rule, right in of.items()))
    with tempfile.TemporaryDirectory(prefix="sbp-benchmark-") as folder:
        clusters = {REVERSED_QUESTIONS: tuple(question["concept"] for question in even)}
        write_tasks(Path(folder), HELDOUT, questions={REVERSED_QUESTIONS: even}, clusters=clusters)

        def scored(store: Path, model: str) -> dict[str, pl.DataFrame]:
            return {seed: _score(settings, store, model, seed, Path(folder)) for seed in settings.experiment.seed_keys}

        shared = {model: scored(data, model) for model in SHARED}
        arms: dict[str, dict[str, dict[str, pl.DataFrame]]] = {}
        for run in planned(tuning_seeds):
            if (store_of(settings, run) / "pretraining/sbp_model").is_dir():
                arms.setdefault(run[0], {})[str(run[1])] = scored(store_of(settings, run), "sbp")
    rows, leads = compare_arms(shared, arms)
    _print(rows, leads)
    print(json.dumps({
        "profile": profile, "seeds": settings.experiment.seed_keys, "questions": len(even),
        "concepts": len({question["concept"] for question in even}), "wrong_names_ending_in_d": ending,
        "guesses": guesses, "rows": rows,
        "lead_over_controls": leads,
    }))  # fmt: skip


def _asked(settings: Settings, data: Path) -> list[Question]:
    """Return the run's reversed questions about concepts that D knows by entries alone."""
    (task,) = (task for task in Tasks.load(data / "evaluation/tasks").tasks if task.name == REVERSED_QUESTIONS)
    questions = concept_questions(settings)[REVERSED_QUESTIONS]
    return [questions[place] for place in task.groups.get(ALONE[ENTRIES], ())]


def _evenly_known(world: ConceptWorld, asked: Sequence[Question]) -> list[Question]:
    """Return the questions with wrong names of concepts of the same kind that are asked about.

    Questions about a kind of which fewer concepts than a question has choices are asked about are left out: every
    inverted form states the kind, and a name of another kind would give the answer away. Raises SystemExit where none
    is left.
    """
    of_kind: dict[str, list[int]] = {}
    for concept in sorted({question["concept"] for question in asked}):
        of_kind.setdefault(world.kinds[concept], []).append(concept)
    found = []
    for place, question in enumerate(asked):
        alike = [concept for concept in of_kind[world.kinds[question["concept"]]] if concept != question["concept"]]
        if len(alike) < CHOICES - 1:
            continue
        drawing = random.Random(f"name-bias-{place}")
        names = [world.names[concept] for concept in drawing.sample(alike, CHOICES - 1)]
        answer = drawing.randrange(CHOICES)
        names.insert(answer, world.names[question["concept"]])
        found.append(Question(**{**question, "choices": names, "answer": answer}))
    if not found:
        raise SystemExit(f"there is no kind of which D knows {CHOICES} concepts by entries alone")
    return found


def _endings(world: ConceptWorld, texts: Iterable[str]) -> Counter[str]:
    """Return how many inverted forms are about each name."""
    concepts = (world.concept_of(text) for text in texts if view_of(text) == INVERTED)
    return Counter(world.names[concept] for concept in concepts if concept is not None)


def _guess(questions: Sequence[Question], counts: Mapping[str, int]) -> float:
    """Return how often the choice of the highest count is right; choices of one count share a point."""
    points = []
    for question in questions:
        of = [counts.get(name, 0) for name in question["choices"]]
        points.append((of[question["answer"]] == max(of)) / of.count(max(of)))
    return float(np.mean(points))


def _score(settings: Settings, store: Path, model: str, seed: str, tasks: Path) -> pl.DataFrame:
    arm = "baseline" if model == "early_stopped" else model
    directory = store / f"pretraining/{arm}_model/{seed}"
    result = suite.evaluate(
        best_model(directory) if model == "early_stopped" else directory, tasks, device=settings.deployment.device,
        batch_size=settings.deployment.evaluation_batch_size, name=f"{model} model, seed {seed}",
    )  # fmt: skip
    return with_samples(result.table, result.samples).filter(task=REVERSED_QUESTIONS, metric="acc")


def _print(rows: Sequence[Mapping[str, Any]], leads: Sequence[Mapping[str, Any]]) -> None:
    print("\n| known alike | against | baseline | accuracy | oracle | share of the gain | SBP's lead in share |")
    print("|---|---|--:|--:|--:|--:|--:|")
    for row in rows:
        lead = next((o for o in leads if (o["control"], o["against"]) == (row["arm"], row["against"])), None)
        texts = [
            share_text(of[name], of[f"{name}_low"], of[f"{name}_high"]) if of else ""
            for of, name in ((row, "share"), (lead, "share_lead"))
        ]
        scores = " | ".join(f"{row[name]:.1%}" for name in ("baseline", "score", "oracle"))
        print(f"| {ARM_NAMES[row['arm']]} | {row['against'].replace('_', '-')} | {scores} | {' | '.join(texts)} |")


if __name__ == "__main__":
    taking = parser_with_profile(__doc__, "headline")
    taking.add_argument("--tuning-seeds", type=int, default=2, metavar="N", help="tuning seeds of the headline (2)")
    given = taking.parse_args()
    main(given.profile, given.tuning_seeds)
