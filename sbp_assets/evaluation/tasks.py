"""The evaluation's tasks: what each asks, and the manifest of the folder that holds them as lm-eval task files.

The tasks are held-out documents, always; questions about the concepts, from the name to a value and reversed, where the
ground truth of the corpus is known; and those of the paper's nine stock benchmarks (section 4) that are configured.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

HELDOUT, CONCEPT_QUESTIONS, MMLU = "heldout", "concept_questions", "mmlu"
REVERSED_QUESTIONS = "reversed_questions"
# About the corpus' own facts: from the name to a value, and from all values to the name.
QUESTIONS = (CONCEPT_QUESTIONS, REVERSED_QUESTIONS)
# Names inside a tasks folder.
MANIFEST, README, DATA = "tasks.json", "README.md", "data"


@dataclass(frozen=True)
class Task:
    """One line of the score tables: an lm-eval task, or for MMLU a group of one task per subject.

    `rolling` tasks score whole documents. `documents` counts the documents or questions. `groups` names sets of them,
    by their places, that are scored apart as well, each on a line of its own. `clusters` has a number per document or
    question: those about one thing share it, and bootstraps draw them together. Empty, each is drawn by itself.
    """

    name: str
    documents: int
    shots: int
    metrics: tuple[str, ...]
    rolling: bool
    subjects: tuple[str, ...] = ()
    groups: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    clusters: tuple[int, ...] = ()

    @property
    def lm_eval(self) -> str:
        """Return the task's name in lm-eval: the prefix keeps it apart from the stock task."""
        return f"sbp_{self.name}"

    @property
    def group_metric(self) -> str:
        """Return the metric that groups are scored by."""
        return "perplexity" if self.rolling else "acc"

    def group_name(self, group: str) -> str:
        """Return the name of a group's line in the score tables."""
        return f"{self.name}_{group}"

    def clusters_of(self, group: str | None = None) -> list[int]:
        """Return the cluster of each of the task's rows, or of a group's; a row's place where the task has none."""
        clusters = self.clusters or tuple(range(self.documents))
        return [clusters[place] for place in self.groups[group]] if group else list(clusters)

    @property
    def leaves(self) -> tuple[str, ...]:
        """Return the names of the lm-eval tasks whose samples give the score, in order."""
        return tuple(f"{self.lm_eval}_{subject}" for subject in self.subjects) or (self.lm_eval,)


@dataclass(frozen=True)
class Tasks:
    """The manifest of a tasks folder, which `task_files.write_tasks` writes as tasks.json."""

    tasks: tuple[Task, ...]
    problems: tuple[str, ...]  # Configured tasks that could not be written, each with the reason.
    notes: tuple[str, ...]  # What a reader should know about the tasks that were.

    def missing(self, configured: Sequence[str]) -> list[str]:
        """Return the configured tasks that cannot be scored, each with the reason where one is known."""
        reasons = {problem.split(":")[0]: problem for problem in self.problems}
        prepared = {task.name for task in self.tasks if task.documents}
        return [reasons.get(name, f"{name}: was not prepared") for name in configured if name not in prepared]

    @classmethod
    def load(cls, directory: Path) -> Tasks:
        """Return the manifest of a tasks folder; raise FileNotFoundError when there is none."""
        path = directory / MANIFEST
        if not path.is_file():
            raise FileNotFoundError(f"{directory} has no {MANIFEST}: materialise evaluation/tasks")
        content = json.loads(path.read_text(encoding="utf-8"))
        tasks = (
            Task(**{
                **task, **{name: tuple(task.get(name, ())) for name in ("metrics", "subjects", "clusters")},
                "groups": {name: tuple(places) for name, places in task["groups"].items()},
            })
            for task in content["tasks"]
        )  # fmt: skip
        return cls(tuple(tasks), tuple(content["problems"]), tuple(content["notes"]))
