"""Does the synthesizer copy facts from its seed or recall them? python -m benchmarks.copying [PROFILE].

Reads a finished run on the concepts corpus. A fact that d1 states can be copied, however rare; one that D states in
many documents can be recalled, whatever d1 says. So statements about the concept of d1 are counted by the number of
documents of D that state the fact (5: five or more), by whether d1 does, and by whether the synthetic document is of
the other view: an entry told as a riddle, a riddle as an entry. Prints a table and, as its last line, one
JSON object: per group the facts, the synthetic documents' statements about them, the share that is right with its
standard error (bootstrap over facts, whose statements stand or fall together), and the share of facts that most
statements have right.

Of a concept that no tuning pair is about, nothing can have been recalled from tuning. So a second table has the
synthetic documents by whether a pair is about the concept of d1: the share that names it (subject kept), the share of
their statements about it that is right, and the share of the documents that state all its facts, each of them right.

A third table tells whether the synthesizer writes in either view as often as its tuning pairs do: by the view of d1,
the share of the pairs and of the synthetic documents whose d2 is an inverted form.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import polars as pl

from benchmarks.arguments import parser_with_profile, profile_settings
from sbp_assets.corpus.concept_texts import INVERTED
from sbp_assets.corpus.concepts import ConceptWorld, view_of
from sbp_assets.corpus.split import UNIQUE
from sbp_assets.evaluation.scores import bootstrap_stderr
from sbp_assets.settings import Settings

MOST = 5
Fact = tuple[int, str]  # concept, attribute


def concepts_run(profile: str) -> tuple[Settings, ConceptWorld, Path]:
    """Return the settings, the world and the data_dir of a run on the concepts corpus; SystemExit for another."""
    settings = profile_settings(profile)
    if not (source := settings.experiment.ground_truth):
        raise SystemExit(f"profile {profile}: the ground truth is known of source concepts alone")
    return settings, ConceptWorld(source), Path(settings.deployment.data_dir)


def main(profile: str) -> None:
    settings, world, data = concepts_run(profile)
    stated_by: dict[str, set[Fact]] = {}
    about: dict[str, int | None] = {}
    views: dict[str, str | None] = {}
    for shard in settings.experiment.shard_keys:
        documents = pl.scan_parquet(data / f"corpus/documents/{shard}.parquet").filter(split=UNIQUE)
        for id_, text in documents.select("id", "text").collect().iter_rows():
            about[id_], views[id_] = world.concept_of(text), view_of(text)
            stated_by[id_] = {(fact.concept, fact.attribute) for fact in world.statements(text)}
    documents_of = Counter(fact for facts in stated_by.values() for fact in facts)
    # {(documents of D, whether d1 states it, whether the view is another): {fact: values stated}}
    found: dict[tuple[int, bool, bool], dict[Fact, Counter[str]]] = defaultdict(lambda: defaultdict(Counter))
    tuned = set[int | None]()
    written: dict[str | None, dict[str, Counter[str | None]]] = defaultdict(lambda: defaultdict(Counter))
    for shard in settings.experiment.shard_keys:
        pairs = pl.read_parquet(data / f"pairing/neighbor_pairs/{shard}.parquet", columns=["d1", "d2"])
        for d1, d2 in pairs.iter_rows():
            tuned |= {about[d1], about[d2]}
            written[views[d1]]["pairs"][views[d2]] += 1
    # {(whether a pair is about the concept of d1, whether the view is another): counts}
    documents_by: dict[tuple[bool, bool], Counter[str]] = defaultdict(Counter)
    for shard in settings.experiment.shard_keys:
        synthetic = pl.read_parquet(
            data / f"synthesis/synthetic_documents/{shard}.parquet", columns=["seed_id", "text"]
        )
        for seed_id, text in synthetic.iter_rows():
            concept, view = about[seed_id], view_of(text)
            crosses = view != views[seed_id]
            written[views[seed_id]]["synthetic"][view] += 1
            right = set[str]()
            counts = documents_by[concept in tuned, crosses]
            for statement in world.statements(text):
                if statement.concept != concept:
                    continue
                fact = (statement.concept, statement.attribute)
                group = (min(documents_of[fact], MOST), fact in stated_by[seed_id], crosses)
                found[group][fact][statement.value] += 1
                if statement.value == world.facts[statement.concept][statement.attribute]:
                    right.add(statement.attribute)
                    counts["right"] += 1
                counts["statements"] += 1
            counts["documents"] += 1
            counts["kept"] += world.concept_of(text) == concept
            counts["whole"] += concept is not None and len(right) == len(world.facts[concept])
    rows = []
    for (documents_stating, in_seed, crosses), facts in sorted(found.items()):
        right_of = np.array([values[world.facts[concept][key]] for (concept, key), values in facts.items()])
        total = np.array([values.total() for values in facts.values()])
        winners = [values.most_common(1)[0][0] == world.facts[c][key] for (c, key), values in facts.items()]
        rows.append({
            "documents_of_d": documents_stating, "stated_by_d1": in_seed, "crosses_view": crosses, "facts": len(facts),
            "statements": int(total.sum()), "right": float(right_of.sum() / total.sum()),
            "right_stderr": bootstrap_stderr("acc", right_of / total, total),
            "majority_right": sum(winners) / len(winners),
        })  # fmt: skip
    by_pairs = [
        {
            "pairs_about_concept": in_pairs,
            "crosses_view": crosses,
            "documents": counts["documents"],
            "subject_kept": counts["kept"] / counts["documents"],
            "statements_right": counts["right"] / max(counts["statements"], 1),
            "all_facts_right": counts["whole"] / counts["documents"],
        }
        for (in_pairs, crosses), counts in sorted(documents_by.items())
    ]
    by_view = [
        {
            "view_of_d1": view,
            **{f"inverted_of_{name}": counts[INVERTED] / counts.total() for name, counts in of.items()},
        }
        for view, of in sorted(written.items(), key=lambda item: str(item[0]))
    ]
    with pl.Config(tbl_rows=-1, tbl_cols=-1):
        print(pl.DataFrame(rows), pl.DataFrame(by_pairs), pl.DataFrame(by_view), sep="\n")
    print(json.dumps({"profile": profile, "groups": rows, "documents": by_pairs, "views": by_view}))


if __name__ == "__main__":
    main(parser_with_profile(__doc__, "headline").parse_args().profile)
