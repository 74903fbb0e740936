"""Writes the evaluation's tasks as lm-eval task files beside their data: a folder with which anyone scores a model."""

from __future__ import annotations

import hashlib
import heapq
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import polars as pl
import yaml

from sbp_assets.evaluation.benchmarks import BENCHMARKS, BenchmarkDataError, Rows, benchmark_rows, stock_tasks
from sbp_assets.evaluation.readme import readme
from sbp_assets.evaluation.tasks import DATA, HELDOUT, MANIFEST, QUESTIONS, README, Task, Tasks
from sbp_assets.storage.columns import Column, table_schema

# Copied into the folder, so it stands alone: it imports nothing of this package.
LOCAL_DATA = Path(__file__).with_name("local_data.py")

HELDOUT_COLUMNS = (
    Column("id", pl.String, "Held-out document.", "corpus/documents"),
    Column("text", pl.String, "What is scored of it.", "corpus/documents"),
)


def write_tasks(
    directory: Path,
    heldout: pl.DataFrame,
    *,
    questions: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    groups: Mapping[str, Mapping[str, tuple[int, ...]]] | None = None,
    clusters: Mapping[str, tuple[int, ...]] | None = None,
    benchmarks: Sequence[str] = (),
    benchmarks_dir: Path | None = None,
    benchmark_limit: int | None = None,
) -> Tasks:
    """Write task files, their data, tasks.json and a README with the commands into the existing `directory`.

    `heldout` has the documents' `id` and `text`. `questions` are by task (QUESTIONS); each has `question`, `choices`
    and `answer` (the right choice, or its index). `groups` and `clusters` are those of `Task`, by task.
    `benchmarks_dir` holds local Parquet files; None downloads from the hub. `benchmark_limit` is the number of rows of
    each benchmark that are kept, over all subjects for MMLU.

    Returns the manifest, as tasks.json has it. A benchmark whose data cannot be used is named in its `problems`,
    and the others are written all the same. Raises ValueError when there are no held-out documents.
    """
    if heldout.is_empty():
        raise ValueError("no held-out documents to score: raise corpus.split.heldout or the number of documents")
    (directory / DATA).mkdir(exist_ok=True)
    shutil.copyfile(LOCAL_DATA, directory / LOCAL_DATA.name)
    tasks = [_heldout(directory, heldout)]
    problems: list[str] = []
    notes: list[str] = []
    tasks += [_questions(directory, name, own) for name, own in (questions or {}).items() if own]
    for name in benchmarks:
        try:
            rows = benchmark_rows(name, benchmarks_dir, benchmark_limit)
            tasks.append(_benchmark(directory, name, rows))
            notes += rows.notes
        except Exception as error:
            # One benchmark's data must not cost the scores of the rest; the checks report it.
            reason = str(error) if isinstance(error, BenchmarkDataError) else f"{type(error).__name__}: {error}"
            problems.append(f"{name}: {reason}")
    groups, clusters = groups or {}, clusters or {}
    tasks = [replace(task, groups=groups.get(task.name, {}), clusters=clusters.get(task.name, ())) for task in tasks]
    written = Tasks(tuple(tasks), tuple(problems), tuple(notes))
    (directory / MANIFEST).write_text(json.dumps(asdict(written), indent=2) + "\n", encoding="utf-8")
    (directory / README).write_text(readme(written), encoding="utf-8")
    return written


def sample_heldout(documents: Mapping[str, pl.LazyFrame], count: int) -> pl.DataFrame:
    """Return the `count` held-out documents (HELDOUT_COLUMNS) of the lowest SHA-256 of the id, or all if fewer exist.

    Which these are does not depend on the sharding. Ids are read first, and texts only of the chosen documents. Memory
    holds one shard's held-out ids and `count` documents.
    """
    frames = [
        frame.filter(pl.col("split") == "heldout", pl.col("text").str.len_chars() > 0) for frame in documents.values()
    ]
    ids = (id_ for frame in frames for id_ in frame.select("id").collect(engine="streaming")["id"])
    chosen = heapq.nsmallest(count, ids, key=lambda id_: hashlib.sha256(id_.encode()).digest())
    order = pl.DataFrame({"id": chosen}, schema={"id": pl.String})
    texts = [
        frame.select("id", "text").join(order.lazy(), on="id", how="semi").collect(engine="streaming")
        for frame in frames
    ]
    found = pl.concat([pl.DataFrame(schema=table_schema(HELDOUT_COLUMNS)), *texts])
    return order.join(found, on="id", how="left", maintain_order="left")


def _heldout(directory: Path, heldout: pl.DataFrame) -> Task:
    """Write the held-out documents; return their task."""
    metrics = ("perplexity", "nats_per_token", "bits_per_byte")
    task = Task(HELDOUT, len(heldout), 0, metrics, rolling=True)
    _write(directory, task, heldout.select("id", "text"))
    return task


def _questions(directory: Path, name: str, questions: Sequence[Mapping[str, Any]]) -> Task:
    """Write multiple-choice questions about the corpus' own facts; return their task."""
    task = Task(name, len(questions), 0, ("perplexity", "acc"), rolling=False)
    answers = [
        q["answer"] if isinstance(q["answer"], int) else list(q["choices"]).index(q["answer"]) for q in questions
    ]
    _write(directory, task, pl.DataFrame({
        "question": [q["question"] for q in questions], "choices": [list(q["choices"]) for q in questions],
        "answer": answers,
    }))  # fmt: skip
    return task


def _benchmark(directory: Path, name: str, rows: Rows) -> Task:
    benchmark = BENCHMARKS[name]
    rolling = name == "openwebtext2"
    task = Task(name, len(rows.scored), benchmark.shots, benchmark.metrics, rolling, rows.subjects)
    _write(directory, task, rows.scored, rows.shots if benchmark.shots else None)
    return task


def _stock(path: Path) -> dict[str, Any]:
    """Return lm-eval's own task settings, its includes filled in, without its data and tags."""
    from lm_eval.tasks._yaml_loader import load_yaml

    config = load_yaml(path, resolve_func=False)
    own = {"task", "task_alias", "tag", "dataset_path", "dataset_name", "dataset_kwargs"}
    return {key: _importable(value) for key, value in config.items() if key not in own and not key.endswith("_split")}


def _importable(value: Any) -> Any:
    """Return a function's path inside lm-eval as a name that lm-eval imports on any machine."""
    if isinstance(value, str) and value.startswith(f"{stock_tasks()}/"):
        return _Function("lm_eval.tasks." + value.removeprefix(f"{stock_tasks()}/").replace("/", "."))
    return value


def _write(directory: Path, task: Task, scored: pl.DataFrame, shots: pl.DataFrame | None = None) -> None:
    scored.write_parquet(directory / DATA / f"{task.lm_eval}.test.parquet")
    if shots is not None:
        shots.write_parquet(directory / DATA / f"{task.lm_eval}.shots.parquet")
    for name, text in file_texts(task, shots is not None).items():
        (directory / name).write_text(text, encoding="utf-8")


def file_texts(task: Task, own_shots: bool) -> dict[str, str]:
    """Return the files that define `task` for lm-eval, text by name.

    `own_shots` says whether its shots have a split of their own.
    """
    files = {}
    for subject, leaf in zip(task.subjects or (None,), task.leaves, strict=True):
        data = {"data": task.lm_eval} | ({"subject": subject} if subject else {})
        written = {
            "task": leaf, **_config(task, subject, own_shots), "custom_dataset": _Function("local_data.load"),
            "dataset_kwargs": data, "test_split": "test", "num_fewshot": task.shots,
        }  # fmt: skip
        files[f"{leaf}.yaml"] = yaml.dump(written, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    if task.subjects:
        group = {
            "group": task.lm_eval, "task": list(task.leaves),
            "aggregate_metric_list": [{"metric": "acc", "aggregation": "mean", "weight_by_size": True}],
        }  # fmt: skip
        files[f"{task.lm_eval}.yaml"] = yaml.safe_dump(group, sort_keys=False)
    return files


def _config(task: Task, subject: str | None, own_shots: bool) -> dict[str, Any]:
    """Return the settings by which lm-eval asks and scores the task's rows."""
    if task.name == HELDOUT:
        return {
            "output_type": "loglikelihood_rolling", "doc_to_text": "",
            # A column's name, not a template: see openwebtext2.
            "doc_to_target": "text",
            "metric_list": [
                {"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False},
            ],
        }  # fmt: skip
    if task.name in QUESTIONS:
        return {
            "output_type": "multiple_choice", "doc_to_text": "question", "doc_to_target": "answer",
            "doc_to_choice": "choices",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        }  # fmt: skip
    benchmark = BENCHMARKS[task.name]
    config = _stock(stock_tasks() / benchmark.stock.format(subject=subject)) | dict(benchmark.overrides)
    # Without a split of their own: lm-eval leaves the asked row out of its shots.
    return config | ({"fewshot_split": "shots" if own_shots else "test"} if benchmark.shots else {})


class _Function(str):
    """A dotted name that YAML writes as !function."""


class _Dumper(yaml.SafeDumper):
    pass


_Dumper.add_representer(_Function, lambda dumper, name: dumper.represent_scalar("!function", str(name)))
