"""The stock benchmarks: how each is run with lm-eval's own prompts, and its rows in local files or on the hub."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import polars as pl

from sbp_assets.evaluation.tasks import MMLU
from sbp_assets.storage.artifacts import content_version
from sbp_assets.storage.paths import read_table

SPLITS = ("train", "dev", "validation", "test")


@dataclass(frozen=True)
class Benchmark:
    """How one stock benchmark is run.

    `stock` is the YAML file inside lm-eval. `files` are names that a local copy may have, before `.<split>.parquet`.
    `columns` are those that the stock prompts read. `overrides` replace task settings, with local and hub rows alike.
    """

    stock: str
    files: tuple[str, ...]
    columns: tuple[str, ...]
    shots: int = 0
    metrics: tuple[str, ...] = ("acc",)
    overrides: Mapping[str, Any] = field(default_factory=dict)


BENCHMARKS: dict[str, Benchmark] = {
    "openwebtext2": Benchmark(
        "pile/pile_openwebtext2.yaml", ("openwebtext2", "webtext"), ("text",),
        metrics=("perplexity", "nats_per_token", "bits_per_byte"),
        # A column's name, not a template: lm-eval evaluates a rendered target that looks like a Python list.
        overrides={"doc_to_target": "text"},
    ),
    "lambada": Benchmark(
        "lambada/lambada_openai.yaml", ("lambada_openai", "lambada"), ("text",), metrics=("perplexity", "acc")
    ),
    MMLU: Benchmark(
        "mmlu/default/mmlu_{subject}.yaml", ("mmlu",), ("question", "subject", "choices", "answer"), 5,
        ("perplexity", "acc"),
    ),
    "arc_challenge": Benchmark(
        "arc/arc_challenge.yaml", ("arc_challenge",), ("question", "choices", "answerKey"), metrics=("acc", "acc_norm")
    ),
    "arc_easy": Benchmark(
        "arc/arc_easy.yaml", ("arc_easy",), ("question", "choices", "answerKey"), metrics=("acc", "acc_norm")
    ),
    "sciq": Benchmark(
        "sciq/sciq.yaml", ("sciq",),
        ("question", "distractor1", "distractor2", "distractor3", "correct_answer", "support"),
        metrics=("acc", "acc_norm"),
    ),
    "winogrande": Benchmark(
        "winogrande/default.yaml", ("winogrande",), ("sentence", "option1", "option2", "answer")
    ),
    "triviaqa": Benchmark(
        "triviaqa/default.yaml", ("triviaqa",), ("question", "answer"), 1, ("exact_match",),
        # The stock limit of 256 new tokens leaves no room for a prompt in a short context; answers are a few words.
        {"generation_kwargs": {"until": ["\n", ".", ","], "do_sample": False, "temperature": 0.0, "max_gen_toks": 32}},
    ),
    "webqs": Benchmark(
        "webqs/webqs.yaml", ("webqs",), ("question", "answers"), 1, ("exact_match",),
        # The stock target is a list of indices, which lm-eval 0.4.13 cannot write into a shot: show the first answer.
        {"fewshot_config": {"doc_to_target": "{{0}}"}},
    ),
}  # fmt: skip


class BenchmarkDataError(ValueError):
    """Benchmark data that cannot be used; the message names the file or column and what to do."""


def stock_tasks() -> Path:
    """Return the folder of lm-eval's own task files, found without importing lm_eval, which would take seconds."""
    return Path(str(find_spec("lm_eval").origin)).parent / "tasks"  # type: ignore[union-attr]


def local_files(benchmark: Benchmark, directory: Path) -> dict[str, Path]:
    """Return the paths of the benchmark's local copy, `<name>.<split>.parquet`, by split.

    Raises BenchmarkDataError when there is neither a validation nor a test split.
    """
    for stem in benchmark.files:
        files = {split: path for split in SPLITS if (path := directory / f"{stem}.{split}.parquet").is_file()}
        if {"validation", "test"} & set(files):
            return files
    names = " or ".join(f"{stem}.{split}.parquet" for stem in benchmark.files for split in ("validation", "test"))
    raise BenchmarkDataError(f"deployment.benchmarks_dir has no {names}")


def data_version(benchmarks: Sequence[str], directory: Path | None) -> str:
    """Return a digest (12 hex digits) of names and bytes of the local copies of `benchmarks`; "hub" if none is read.

    No asset holds these files, so they are part of the tasks' code version: with other rows the tasks are stale. A
    benchmark without a usable copy counts as absent.
    """
    if not benchmarks or directory is None or not directory.is_dir():
        return "hub"
    digest = hashlib.sha256()
    for name in sorted(benchmarks):
        try:
            files = sorted(local_files(BENCHMARKS[name], directory).values())
            read = [f"{path.name} {content_version(path)}" for path in files]
        except (BenchmarkDataError, OSError):
            # Writing the tasks reports what is wrong with it; raised here, it would keep all assets from being loaded.
            read = []
        digest.update(json.dumps([name, read]).encode())
    return digest.hexdigest()[:12]


@dataclass(frozen=True)
class Rows:
    """Rows of a benchmark: those to score, those for shots (None where they are drawn from the scored ones).

    `subjects` are MMLU's; `notes` say what a reader should know about the rows.
    """

    scored: pl.DataFrame
    shots: pl.DataFrame | None
    subjects: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def benchmark_rows(name: str, directory: Path | None, limit: int | None) -> Rows:
    """Return the rows of the benchmark `name` from its local copy in `directory`, or from the hub for None.

    At most `limit` are scored (for MMLU over all subjects, at least one of each). Raises BenchmarkDataError when the
    data cannot be used, and what `datasets` raises when the hub does not serve them.
    """
    benchmark = BENCHMARKS[name]
    notes: tuple[str, ...] = ()
    if directory is None:
        scored, shots = _hub_rows(benchmark)
    else:
        scored, shots, files = _local_rows(benchmark, directory)
        if not files[0].startswith(f"{benchmark.files[0]}."):
            notes = (f"{name}: scored on {', '.join(files)}, which stands in for it",)
    if name == MMLU:
        subjects = _subjects(benchmark, scored, shots)
        if limit is not None:
            # The limit is for the whole benchmark; every subject gives its share.
            scored = scored.group_by("subject", maintain_order=True).head(-(-limit // len(subjects)))
        return Rows(scored, shots, subjects, notes)
    if limit is not None and len(scored) > limit:
        if benchmark.shots and shots is None:
            # No row is both shown and asked.
            shots = scored[limit:]
        scored = scored[:limit]
    return Rows(scored, shots, notes=notes)


def _subjects(benchmark: Benchmark, scored: pl.DataFrame, shots: pl.DataFrame | None) -> tuple[str, ...]:
    """Return MMLU's subjects in order; BenchmarkDataError if lm-eval lacks one, or one has too few rows for shots."""
    subjects = tuple(sorted(scored["subject"].unique()))
    unknown = [s for s in subjects if not (stock_tasks() / benchmark.stock.format(subject=s)).is_file()]
    if unknown:
        raise BenchmarkDataError(f"subject {', '.join(unknown)} is not one of MMLU's")
    few = [s for s in subjects if shots is None or shots["subject"].eq(s).sum() < benchmark.shots]
    if few:
        raise BenchmarkDataError(f"fewer than {benchmark.shots} dev rows of subject {', '.join(few)}")
    return subjects


def _local_rows(benchmark: Benchmark, directory: Path) -> tuple[pl.DataFrame, pl.DataFrame | None, list[str]]:
    """Return rows to score, rows for shots (None where the copy has no split for them) and the files' names."""
    files = local_files(benchmark, directory)
    scored = "test" if "test" in files else "validation"
    shots = next((split for split in ("dev", "train") if split in files), None) if benchmark.shots else None
    if benchmark is BENCHMARKS[MMLU] and shots != "dev":
        raise BenchmarkDataError(f"five-shot MMLU needs mmlu.dev.parquet beside {files[scored].name}")
    frames = {split: _read(files[split], benchmark) for split in (scored, shots) if split}
    return frames[scored], frames[shots] if shots else None, [files[split].name for split in frames]


def _read(path: Path, benchmark: Benchmark) -> pl.DataFrame:
    try:
        frame = read_table(path)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise BenchmarkDataError(f"{path.name} cannot be read as Parquet: {error}") from error
    return _usable(frame, benchmark, path.name)


def _usable(frame: pl.DataFrame, benchmark: Benchmark, source: str) -> pl.DataFrame:
    if missing := [column for column in benchmark.columns if column not in frame.columns]:
        raise BenchmarkDataError(f"{source} lacks column {', '.join(missing)}; it has {', '.join(frame.columns)}")
    if frame.is_empty():
        raise BenchmarkDataError(f"{source} has no rows")
    return frame.select(benchmark.columns)


def _hub_rows(benchmark: Benchmark) -> tuple[pl.DataFrame, pl.DataFrame | None]:
    """Return rows to score and rows for shots, of the data set and splits that the stock task names."""
    import datasets
    from lm_eval.tasks._yaml_loader import load_yaml

    stock = load_yaml(stock_tasks() / benchmark.stock.format(subject="anatomy"), resolve_func=False)
    # MMLU's configurations are its subjects, and 'all'.
    config = "all" if benchmark is BENCHMARKS[MMLU] else stock.get("dataset_name")
    scored = stock.get("test_split") or stock["validation_split"]
    shots = (stock.get("fewshot_split") or stock.get("training_split")) if benchmark.shots else None

    def rows(split: str) -> pl.DataFrame:
        loaded = datasets.load_dataset(stock["dataset_path"], config, split=split)
        return _usable(loaded.to_polars(), benchmark, f"{stock['dataset_path']} {split}")

    return rows(scored), rows(shots) if shots else None
