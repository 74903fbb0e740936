"""The evaluation's tasks as lm-eval task files beside their data: a folder with which anyone can score a model.

Held-out documents always; concept questions where the truth of the corpus is known; the paper's nine stock benchmarks
(section 4) as configured, with lm-eval's own prompts, on rows of local files or of the hub.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path, PurePath
from typing import Any

import polars as pl
import yaml

from sbp_assets.dagster_support.preview import escape
from sbp_assets.storage.artifacts import content_version

# Named, not imported: that would take seconds of every process that loads the definitions.
LOCAL_DATA = Path(__file__).with_name("local_data.py")
STOCK_TASKS = Path(str(find_spec("lm_eval").origin)).parent / "tasks"  # type: ignore[union-attr]
HELDOUT, CONCEPT_QUESTIONS, MMLU = "heldout", "concept_questions", "mmlu"
MANIFEST, README, DATA = "tasks.json", "README.md", "data"
SPLITS = ("train", "dev", "validation", "test")


@dataclass(frozen=True)
class Benchmark:
    """How one stock benchmark is run.

    `stock` is the YAML inside lm-eval; `files` the names a local copy may have, before `.<split>.parquet`; `columns`
    what the stock prompts read; `overrides` task settings replaced in local and hub runs alike.
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


@dataclass(frozen=True)
class Task:
    """One line of the score tables: an lm-eval task, or for MMLU a group of one task per subject.

    `rolling` tasks score whole documents. `documents` counts the documents or questions.
    """

    name: str
    documents: int
    shots: int
    metrics: tuple[str, ...]
    rolling: bool
    subjects: tuple[str, ...] = ()

    @property
    def lm_eval(self) -> str:
        """Its name in lm-eval: the prefix keeps it apart from the stock task."""
        return f"sbp_{self.name}"

    @property
    def leaves(self) -> tuple[str, ...]:
        """Names of the lm-eval tasks whose samples make its score, in order."""
        return tuple(f"{self.lm_eval}_{subject}" for subject in self.subjects) or (self.lm_eval,)


@dataclass(frozen=True)
class Tasks:
    """What `write_tasks` wrote; kept as tasks.json."""

    tasks: tuple[Task, ...]
    problems: tuple[str, ...]  # configured tasks that could not be made, each with the reason
    notes: tuple[str, ...]  # what a reader should know about tasks that were

    def missing(self, configured: Sequence[str]) -> list[str]:
        """Configured tasks that cannot be scored, each with the reason where one is known."""
        reasons = {problem.split(":")[0]: problem for problem in self.problems}
        made = {task.name for task in self.tasks if task.documents}
        return [reasons.get(name, f"{name}: not made") for name in configured if name not in made]

    @classmethod
    def load(cls, directory: Path) -> Tasks:
        """The manifest of a tasks folder; FileNotFoundError where there is none."""
        path = directory / MANIFEST
        if not path.is_file():
            raise FileNotFoundError(f"{directory} has no {MANIFEST}: materialise evaluation/tasks")
        content = json.loads(path.read_text(encoding="utf-8"))
        tasks = (
            Task(**{**task, "metrics": tuple(task["metrics"]), "subjects": tuple(task["subjects"])})
            for task in content["tasks"]
        )
        return cls(tuple(tasks), tuple(content["problems"]), tuple(content["notes"]))


def foreign_files(directory: Path) -> list[str]:
    """Files of a tasks folder that `write_tasks` would not have written so, its data apart.

    lm-eval imports the functions that task files name, from Python files beside them too: what others have put there
    must not be run.
    """
    texts = {LOCAL_DATA.name: LOCAL_DATA.read_bytes()}
    for task in Tasks.load(directory).tasks:
        own_shots = (directory / DATA / f"{task.lm_eval}.shots.parquet").is_file()
        texts |= {name: text.encode() for name, text in _files(task, own_shots).items()}
    found = {path.relative_to(directory).as_posix(): path for path in directory.rglob("*") if not path.is_dir()}
    inert = {name for name in found if name in (MANIFEST, README) or PurePath(name).match(f"{DATA}/*.parquet")}
    return sorted(name for name in found.keys() - inert if texts.get(name) != found[name].read_bytes())


def data_problems(
    directory: Path, documents: Mapping[str, pl.LazyFrame], questions: Sequence[Mapping[str, Any]]
) -> list[str]:
    """Tasks whose data are not all there, held-out documents that are not the corpus', and other `questions`."""
    problems = []
    for task in Tasks.load(directory).tasks:
        try:
            rows = pl.read_parquet(directory / DATA / f"{task.lm_eval}.test.parquet")
        except (OSError, pl.exceptions.PolarsError) as error:
            problems.append(f"{task.name}: its data cannot be read: {error}")
            continue
        if len(rows) != task.documents:
            problems.append(f"{task.name}: {len(rows)} rows of {task.documents}")
        if task.name == HELDOUT:
            wanted = rows.lazy().select("id", "text")
            held = [frame.filter(pl.col("split") == HELDOUT).select("id", "text") for frame in documents.values()]
            known = pl.concat(held).join(wanted, on=["id", "text"], how="semi").collect(engine="streaming")
            strange = rows.join(known, on="id", how="anti")["id"]
            problems += [f"{name}: no held-out document of this text" for name in strange.head(10)]
        elif task.name == CONCEPT_QUESTIONS:
            asked = pl.DataFrame([{name: question[name] for name in rows.columns} for question in questions])
            if not asked.equals(rows):
                problems.append(f"{task.name}: not the questions of the settings, in their order")
    return problems


class _Function(str):
    """A dotted name that the YAML names as !function."""


class _Dumper(yaml.SafeDumper):
    pass


_Dumper.add_representer(_Function, lambda dumper, name: dumper.represent_scalar("!function", str(name)))


def write_tasks(
    directory: Path,
    heldout: pl.DataFrame,
    *,
    questions: Sequence[Mapping[str, Any]] = (),
    benchmarks: Sequence[str] = (),
    benchmarks_dir: Path | None = None,
    benchmark_limit: int | None = None,
) -> Tasks:
    """Write task files, their data, tasks.json and a README with the commands into the existing `directory`.

    heldout: documents with `id` and `text`. questions: dicts with `question`, `choices` and `answer` (the right
    choice, or its index). benchmarks_dir: local Parquet files; None downloads from the hub. benchmark_limit: rows of
    each benchmark that are kept, over all subjects for MMLU. A benchmark whose data cannot be used is named in
    `problems` and the others are written all the same. Raises ValueError where there are no held-out documents.
    """
    if heldout.is_empty():
        raise ValueError("no held-out documents to score: raise corpus.split.heldout or the number of documents")
    (directory / DATA).mkdir(exist_ok=True)
    shutil.copyfile(LOCAL_DATA, directory / LOCAL_DATA.name)
    tasks, problems = [_heldout(directory, heldout)], list[str]()
    notes: list[str] = []
    if questions:
        tasks.append(_questions(directory, questions))
    for name in benchmarks:
        try:
            tasks.append(_benchmark(directory, name, benchmarks_dir, benchmark_limit, notes))
        except Exception as error:
            # One benchmark's data must not cost the scores of the rest; the checks report it.
            reason = str(error) if isinstance(error, BenchmarkDataError) else f"{type(error).__name__}: {error}"
            problems.append(f"{name}: {reason}")
    made = Tasks(tuple(tasks), tuple(problems), tuple(notes))
    (directory / MANIFEST).write_text(json.dumps(asdict(made), indent=2) + "\n", encoding="utf-8")
    (directory / README).write_text(_readme(made), encoding="utf-8")
    return made


def sample_heldout(documents: Mapping[str, pl.LazyFrame], count: int) -> pl.DataFrame:
    """At most `count` held-out documents (id, text), the same ones whatever the sharding: lowest SHA-256 of the id.

    Ids are read first and texts only of the chosen, so memory does not grow with the corpus' text.
    """
    frames = [
        frame.filter(pl.col("split") == "heldout", pl.col("text").str.len_chars() > 0) for frame in documents.values()
    ]
    if not frames:
        return pl.DataFrame(schema={"id": pl.String, "text": pl.String})
    ids = pl.concat([frame.select("id") for frame in frames]).collect()["id"].to_list()
    chosen = sorted(ids, key=lambda id_: hashlib.sha256(id_.encode()).digest())[:count]
    order = pl.DataFrame({"id": chosen}, schema={"id": pl.String})
    texts = pl.concat([frame.select("id", "text").filter(pl.col("id").is_in(chosen)) for frame in frames]).collect()
    return order.join(texts, on="id", how="left", maintain_order="left")


def command(
    tasks: Sequence[str], *, rolling: bool, model: str, tasks_dir: str, device: str, batch_size: int | str
) -> list[str]:
    """The lm_eval command line that gives this project's scores of `tasks` (lm-eval names), all rolling or none.

    A training document starts with <bos>, so a prompt does too. For a rolling task lm-eval gives the <bos> as the
    context of the first window itself; added to the text it would be one more token to predict.
    """
    arguments = f"pretrained={model},dtype=float32,add_bos_token={not rolling}"
    return [
        "lm_eval", "run", "--model", "hf", "--model_args", arguments, "--include_path", tasks_dir,
        "--tasks", ",".join(tasks), "--batch_size", str(batch_size), "--device", device,
    ]  # fmt: skip


def local_files(benchmark: Benchmark, directory: Path) -> dict[str, Path]:
    """Split → file of a benchmark's local copy, `<name>.<split>.parquet`; BenchmarkDataError where none can be used."""
    for stem in benchmark.files:
        files = {split: path for split in SPLITS if (path := directory / f"{stem}.{split}.parquet").is_file()}
        if {"validation", "test"} & set(files):
            return files
    names = " or ".join(f"{stem}.{split}.parquet" for stem in benchmark.files for split in ("validation", "test"))
    raise BenchmarkDataError(f"deployment.benchmarks_dir has no {names}")


def data_version(benchmarks: Sequence[str], directory: Path | None) -> str:
    """Digest of the local copies of `benchmarks`, by names and bytes (12 hex digits); "hub" where none is read.

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
            # Making the tasks says what is wrong with it; here it would keep all assets from being loaded.
            read = []
        digest.update(json.dumps([name, read]).encode())
    return digest.hexdigest()[:12]


def _heldout(directory: Path, heldout: pl.DataFrame) -> Task:
    task = Task(HELDOUT, len(heldout), 0, ("perplexity", "nats_per_token", "bits_per_byte"), rolling=True)
    _write(directory, task, heldout.select("id", "text"))
    return task


def _questions(directory: Path, questions: Sequence[Mapping[str, Any]]) -> Task:
    """Multiple-choice questions about the corpus' own facts."""
    task = Task(CONCEPT_QUESTIONS, len(questions), 0, ("perplexity", "acc"), rolling=False)
    answers = [
        q["answer"] if isinstance(q["answer"], int) else list(q["choices"]).index(q["answer"]) for q in questions
    ]
    _write(directory, task, pl.DataFrame({
        "question": [q["question"] for q in questions], "choices": [list(q["choices"]) for q in questions],
        "answer": answers,
    }))  # fmt: skip
    return task


def _benchmark(directory: Path, name: str, benchmarks_dir: Path | None, limit: int | None, notes: list[str]) -> Task:
    benchmark = BENCHMARKS[name]
    if benchmarks_dir is None:
        scored, shots = _hub_rows(benchmark)
    else:
        scored, shots, files = _local_rows(benchmark, benchmarks_dir)
        if not files[0].startswith(f"{benchmark.files[0]}."):
            notes.append(f"{name}: scored on {', '.join(files)}, which stands in for it")
    subjects: tuple[str, ...] = ()
    if name == MMLU:
        subjects = tuple(sorted(scored["subject"].unique()))
        unknown = [s for s in subjects if not (STOCK_TASKS / benchmark.stock.format(subject=s)).is_file()]
        if unknown:
            raise BenchmarkDataError(f"subject {', '.join(unknown)} is not one of MMLU's")
        few = [s for s in subjects if shots is None or shots["subject"].eq(s).sum() < benchmark.shots]
        if few:
            raise BenchmarkDataError(f"fewer than {benchmark.shots} dev rows of subject {', '.join(few)}")
        # The limit is for the whole benchmark; every subject gives its share.
        scored = (
            scored
            if limit is None
            else scored.group_by("subject", maintain_order=True).head(-(-limit // len(subjects)))
        )
    elif limit is not None and len(scored) > limit:
        if benchmark.shots and shots is None:
            # No row is both shown and asked.
            shots = scored[limit:]
        scored = scored[:limit]
    rolling = name == "openwebtext2"
    task = Task(name, len(scored), benchmark.shots, benchmark.metrics, rolling, subjects)
    _write(directory, task, scored, shots if benchmark.shots else None)
    return task


def _local_rows(benchmark: Benchmark, directory: Path) -> tuple[pl.DataFrame, pl.DataFrame | None, list[str]]:
    """Rows to score, rows for shots (None where the copy has no split for them), and the names of the files read."""
    files = local_files(benchmark, directory)
    scored = "test" if "test" in files else "validation"
    shots = next((split for split in ("dev", "train") if split in files), None) if benchmark.shots else None
    if benchmark is BENCHMARKS[MMLU] and shots != "dev":
        raise BenchmarkDataError(f"five-shot MMLU needs mmlu.dev.parquet beside {files[scored].name}")
    frames = {split: _read(files[split], benchmark) for split in (scored, shots) if split}
    return frames[scored], frames[shots] if shots else None, [files[split].name for split in frames]


def _read(path: Path, benchmark: Benchmark) -> pl.DataFrame:
    try:
        frame = pl.read_parquet(path)
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
    """Rows to score and rows for shots, of the data set and splits that the stock task names."""
    import datasets
    from lm_eval.tasks._yaml_loader import load_yaml

    stock = load_yaml(STOCK_TASKS / benchmark.stock.format(subject="anatomy"), resolve_func=False)
    # MMLU's configurations are its subjects, and 'all'.
    config = "all" if benchmark is BENCHMARKS[MMLU] else stock.get("dataset_name")
    scored = stock.get("test_split") or stock["validation_split"]
    shots = (stock.get("fewshot_split") or stock.get("training_split")) if benchmark.shots else None

    def rows(split: str) -> pl.DataFrame:
        loaded = datasets.load_dataset(stock["dataset_path"], config, split=split)
        return _usable(loaded.to_polars(), benchmark, f"{stock['dataset_path']} {split}")

    return rows(scored), rows(shots) if shots else None


def _stock(path: Path) -> dict[str, Any]:
    """lm-eval's own task settings, its includes filled in, without its data and tags."""
    from lm_eval.tasks._yaml_loader import load_yaml

    config = load_yaml(path, resolve_func=False)
    own = {"task", "task_alias", "tag", "dataset_path", "dataset_name", "dataset_kwargs"}
    return {key: _importable(value) for key, value in config.items() if key not in own and not key.endswith("_split")}


def _importable(value: Any) -> Any:
    """A function's path inside lm-eval as a name that lm-eval imports on any machine."""
    if isinstance(value, str) and value.startswith(f"{STOCK_TASKS}/"):
        return _Function("lm_eval.tasks." + value.removeprefix(f"{STOCK_TASKS}/").replace("/", "."))
    return value


def _write(directory: Path, task: Task, scored: pl.DataFrame, shots: pl.DataFrame | None = None) -> None:
    scored.write_parquet(directory / DATA / f"{task.lm_eval}.test.parquet")
    if shots is not None:
        shots.write_parquet(directory / DATA / f"{task.lm_eval}.shots.parquet")
    for name, text in _files(task, shots is not None).items():
        (directory / name).write_text(text, encoding="utf-8")


def _files(task: Task, own_shots: bool) -> dict[str, str]:
    """Text of the files that tell lm-eval about a task, by name; `own_shots`: shots come from a split of their own."""
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
    """What lm-eval is to do with the task's rows."""
    if task.name == HELDOUT:
        return {
            "output_type": "loglikelihood_rolling", "doc_to_text": "",
            # A column's name, not a template: see openwebtext2.
            "doc_to_target": "text",
            "metric_list": [
                {"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False},
            ],
        }  # fmt: skip
    if task.name == CONCEPT_QUESTIONS:
        return {
            "output_type": "multiple_choice", "doc_to_text": "question", "doc_to_target": "answer",
            "doc_to_choice": "choices",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        }  # fmt: skip
    benchmark = BENCHMARKS[task.name]
    config = _stock(STOCK_TASKS / benchmark.stock.format(subject=subject)) | dict(benchmark.overrides)
    # Without a split of their own: lm-eval leaves the asked row out of its shots.
    return config | ({"fewshot_split": "shots" if own_shots else "test"} if benchmark.shots else {})


def _readme(made: Tasks) -> str:
    def loop(rolling: bool) -> list[str]:
        names = [task.lm_eval for task in made.tasks if task.rolling is rolling]
        line = command(
            ["$TASK"], rolling=rolling, model="$MODEL", tasks_dir=".", device="$DEVICE", batch_size="$BATCH_SIZE"
        )
        call = " ".join([*line, "--output_path", "$OUT", "--log_samples"])
        return [f"for TASK in {' '.join(names)}; do", f"  {call}", "done"] if names else []

    rows = [
        f"| {task.name} | {task.lm_eval} | {task.documents} | {task.shots} | {', '.join(task.metrics)} |"
        for task in made.tasks
    ]
    lines = [
        "# Evaluation tasks",
        "",
        f"Task files for lm-eval {version('lm-eval')} with their data. They score any Hugging Face model directory",
        "as this experiment scores its models; run in this folder:",
        "",
        "```sh",
        "MODEL=/path/to/model OUT=/path/for/results DEVICE=cpu BATCH_SIZE=32",
        "export PYTHONDONTWRITEBYTECODE=1 DISABLE_MULTIPROC=1",
        *loop(rolling=True),
        *loop(rolling=False),
        "```",
        "",
        "This folder is a versioned artifact, in which nothing else may appear: give `OUT` a place outside, and let",
        "Python keep no bytecode. DISABLE_MULTIPROC: lm-eval's bootstrap forks a pool per metric, which can hang.",
        "",
        "A training document starts with `<bos>`: so does a prompt (`add_bos_token=True`). To whole documents lm-eval",
        "gives the `<bos>` as context itself (`add_bos_token=False`).",
        "Scores are equal to the last digit with the same batch size and number of threads (OMP_NUM_THREADS), both in",
        "the scores' metadata, and the same device. Sums round by the shape of a batch: so one task a command, or with",
        "batch size 1 any number of them.",
        "",
        "| task | in lm-eval | documents | shots | metrics |",
        "|---|---|---|---|---|",
        *rows,
        "",
        "From the logged samples follow the metrics that lm-eval does not print:",
        "`perplexity` of documents is exp(-Σ resps / Σ tokens) over all documents, tokens being those of the text",
        "without special tokens, and `nats_per_token` its logarithm. `perplexity` of sbp_mmlu and of",
        "sbp_concept_questions is the same of the right answers: resps of the choice `target`, and the tokens that it",
        "adds to the prompt.",
        # Of files and servers of others, and shown as markdown in Dagster.
        *(f"\nNot made: {escape(problem, 1000)}" for problem in made.problems),
        *(f"\nNote: {escape(note, 1000)}" for note in made.notes),
    ]
    return "\n".join(lines) + "\n"
