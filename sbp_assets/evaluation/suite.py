"""The evaluation suite: lm-eval on an exported Hugging Face model, every task made from local files (or the hub).

Held-out perplexity always runs; concept questions where the truth of the corpus is known; the paper's nine stock
benchmarks (section 4) as configured. Every arm is scored by the same backend with the same prompts.
"""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
import yaml
from lm_eval import evaluator
from lm_eval import tasks as lm_eval_tasks
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from sbp_assets.storage.progress import Progress

logger = logging.getLogger("sbp_assets.evaluation.suite")

# It warns once per prompt that it cuts; `Scores.notes` has their number.
logging.getLogger("lm_eval.models").setLevel(logging.ERROR)

STOCK_TASKS = Path(lm_eval_tasks.__file__).parent
BOOTSTRAP_RESAMPLES = 1000
SEED = 1234  # of few-shot choice and bootstrap: one value, so that arms see the same prompts and resamples
HELDOUT, CONCEPT_QUESTIONS = "heldout", "concept_questions"

SCORES_SCHEMA = {
    "task": pl.String, "metric": pl.String, "value": pl.Float64, "stderr": pl.Float64, "samples": pl.Int64,
    "higher_is_better": pl.Boolean,
}  # fmt: skip
SAMPLES_SCHEMA = {
    "task": pl.String, "metric": pl.String, "sample": pl.Int64, "value": pl.Float64, "weight": pl.Int64,
}  # fmt: skip
ACCURACIES = ("acc", "acc_norm", "exact_match")


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
        "pile/pile_openwebtext2.yaml", ("openwebtext2", "webtext"), ("text",), metrics=("perplexity",)
    ),
    "lambada": Benchmark(
        "lambada/lambada_openai.yaml", ("lambada_openai", "lambada"), ("text",), metrics=("perplexity", "acc")
    ),
    "mmlu": Benchmark(
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
    """Local benchmark files that cannot be used; the message names the file or column and what to do."""


@dataclass
class Scores:
    """What `evaluate` found.

    `samples` has a row per task, metric and document or question (columns of SAMPLES_SCHEMA): `sample` is its place in
    the task, the same for every model; `value` is what it scored, an accuracy of 0 or 1, or for `perplexity` and
    `nats_per_token` its mean negative log-likelihood in nats per token, for `bits_per_byte` in bits per byte; `weight`
    the tokens or bytes that this is the mean of (1 for accuracies). `estimate` makes the score of any such rows.
    """

    table: pl.DataFrame  # columns of SCORES_SCHEMA
    samples: pl.DataFrame  # columns of SAMPLES_SCHEMA
    problems: list[str]  # tasks that did not run, each with the reason
    notes: list[str]  # what a reader should know about tasks that did run
    run: dict[str, float]  # wall seconds, rate and peak memory


def evaluate(
    model_dir: Path,
    work_dir: Path,
    heldout: pl.DataFrame,
    *,
    questions: Sequence[Mapping[str, Any]] = (),
    benchmarks: Sequence[str] = (),
    benchmarks_dir: Path | None = None,
    benchmark_limit: int | None = None,
    device: str = "auto",
    batch_size: int = 32,
    name: str = "model",
) -> Scores:
    """Score the model directory on all configured tasks.

    heldout: documents with `id` and `text`. questions: dicts with `question`, `choices` and `answer` (the right
    choice, or its index). work_dir: an existing empty folder for generated task files and caches. A benchmark whose
    data cannot be used is named in `problems` and the others still run; anything wrong with the model, the held-out
    documents or the questions raises.
    """
    if heldout.is_empty():
        raise ValueError("no held-out documents to score: raise corpus.split.heldout or the number of documents")
    samples: list[pl.DataFrame] = []
    problems: list[str] = []
    notes: list[str] = []
    with Progress(f"scoring {name}", "sequences") as progress:
        model = load_model(model_dir, device, batch_size, progress.advance)
        runner = _Runner(model, work_dir)
        logger.info("held-out perplexity: %d documents", len(heldout))
        samples += runner.rolling(HELDOUT, heldout.select("text"))
        if questions:
            logger.info("concept questions: %d", len(questions))
            samples += runner.questions(questions)
        for number, benchmark in enumerate(benchmarks, 1):
            logger.info("benchmark %d/%d: %s", number, len(benchmarks), benchmark)
            try:
                samples += runner.benchmark(benchmark, benchmarks_dir, benchmark_limit, notes)
            except Exception as error:
                # One benchmark's data must not cost the scores of the rest; the check on this asset reports it.
                reason = str(error) if isinstance(error, BenchmarkDataError) else f"{type(error).__name__}: {error}"
                problems.append(f"{benchmark}: {reason}")
                logger.warning(
                    "benchmark %s did not run: %s",
                    benchmark,
                    reason,
                    exc_info=not isinstance(error, BenchmarkDataError),
                )
    if model.truncated:
        notes.append(f"{model.truncated} prompts were longer than the model's context and were cut on the left")
    frame = pl.concat(samples)
    return Scores(score_table(frame), frame, problems, notes, progress.metadata())


def score_table(samples: pl.DataFrame) -> pl.DataFrame:
    """Columns of SCORES_SCHEMA from rows of SAMPLES_SCHEMA: one row per task and metric, in order of appearance."""
    rows = []
    for (task, metric), group in samples.group_by("task", "metric", maintain_order=True):
        values, weights = group["value"].to_numpy(), group["weight"].to_numpy()
        rows.append({
            "task": task, "metric": metric, "value": estimate(str(metric), values, weights),
            "stderr": bootstrap_stderr(str(metric), values, weights), "samples": len(group),
            "higher_is_better": metric in ACCURACIES,
        })  # fmt: skip
    return pl.DataFrame(rows, schema=SCORES_SCHEMA)


def estimate(metric: str, values: np.ndarray, weights: np.ndarray) -> float:
    """The score of some documents or questions: the weighted mean of their values, and exp of it for a perplexity."""
    mean = float(values @ weights / weights.sum())
    return float(np.exp(mean)) if metric == "perplexity" else mean


def bootstrap_stderr(metric: str, values: np.ndarray, weights: np.ndarray) -> float | None:
    """Standard deviation of `estimate` over BOOTSTRAP_RESAMPLES resamples of the documents; None for a single one.

    Documents are drawn with replacement with one fixed seed, so that two models' scores on the same task are resampled
    alike. One method for every metric (Efron and Tibshirani, An Introduction to the Bootstrap, chapter 6).
    """
    if len(values) < 2:
        return None
    rng = np.random.default_rng(SEED)
    draws = (rng.integers(0, len(values), len(values)) for _ in range(BOOTSTRAP_RESAMPLES))
    return float(np.std([estimate(metric, values[drawn], weights[drawn]) for drawn in draws], ddof=1))


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


class CountingHFLM(HFLM):
    """lm-eval's Hugging Face backend, conditioned as in pretraining: one <bos> before the text, never two.

    Loglikelihood and generation prompts start with <bos>; rolling perplexity predicts the text's own tokens, the first
    of them from <bos>. Forward passes advance `on_sequences`, and `truncated` counts prompts cut to the context.
    """

    def __init__(self, on_sequences: Callable[[int], None], **arguments: Any) -> None:
        self._on_sequences = on_sequences
        self.truncated = 0
        super().__init__(**arguments)

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        # lm-eval gives the <bos> as the prefix of the first window itself; encoded again it would be a predicted token.
        self.add_bos_token = False
        try:
            return super().loglikelihood_rolling(requests, disable_tqdm=True)
        finally:
            self.add_bos_token = True

    def _loglikelihood_tokens(self, requests: Any, disable_tqdm: bool = False, override_bs: int | None = None) -> Any:
        self.truncated += sum(len(context) + len(target) > self.max_length + 1 for _, context, target in requests)
        return super()._loglikelihood_tokens(requests, disable_tqdm=True, override_bs=override_bs)

    def _model_call(self, inps: torch.Tensor, *arguments: Any, **keywords: Any) -> torch.Tensor:
        out = super()._model_call(inps, *arguments, **keywords)
        self._on_sequences(inps.shape[0])
        return out

    def _model_generate(self, context: torch.Tensor, *arguments: Any, **keywords: Any) -> torch.Tensor:
        out = super()._model_generate(context, *arguments, **keywords)
        self._on_sequences(context.shape[0])
        return out


def load_model(model_dir: Path, device: str, batch_size: int, on_sequences: Callable[[int], None]) -> CountingHFLM:
    """The model as lm-eval runs it; device 'auto' is CUDA where there is one. Log-softmax is in float32."""
    if not (model_dir / "config.json").is_file():
        raise FileNotFoundError(f"{model_dir} has no config.json: it is not a Hugging Face model directory")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(str(model_dir))
    if tokenizer.bos_token_id is None:
        raise ValueError(f"the tokenizer in {model_dir} has no bos token, with which every training document starts")
    # Explicit, whatever post-processor the tokenizer was saved with: <bos> before, nothing after; and the text of a
    # document is text, even where it spells a special token.
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{tokenizer.bos_token} $A", special_tokens=[(tokenizer.bos_token, tokenizer.bos_token_id)]
    )
    tokenizer.split_special_tokens = True
    model = CountingHFLM(
        on_sequences, pretrained=str(model_dir), tokenizer=tokenizer, backend="causal", device=device,
        dtype="float32" if device == "cpu" else "auto", softmax_dtype="float32", batch_size=batch_size,
        add_bos_token=True,
    )  # fmt: skip
    if model.tok_encode("a")[0] != tokenizer.bos_token_id or model.tok_encode("a").count(tokenizer.bos_token_id) != 1:
        raise ValueError(f"the tokenizer in {model_dir} does not put exactly one {tokenizer.bos_token} before a text")
    return model


class _Runner:
    """Makes task files in `work_dir` and runs them on one loaded model."""

    def __init__(self, model: CountingHFLM, work_dir: Path) -> None:
        self._model = model
        self._tasks = work_dir / "tasks"
        self._data = work_dir / "data"
        self._cache = work_dir / "datasets_cache"
        for folder in (self._tasks, self._data, self._cache):
            folder.mkdir(parents=True, exist_ok=True)

    def rolling(self, name: str, texts: pl.DataFrame) -> list[pl.DataFrame]:
        """Perplexity of documents: the corpus-level mean over tokens, with a bootstrap over documents."""
        path = self._write(name, texts)
        config = {
            "task": name, "output_type": "loglikelihood_rolling", "test_split": "test", "doc_to_text": "",
            # A column's name, not a template: lm-eval evaluates a rendered target that looks like a Python list.
            "doc_to_target": "text",
            "metric_list": [{"metric": "bits_per_byte", "aggregation": "bits_per_byte", "higher_is_better": False}],
            **self._local({"test": path}),
        }  # fmt: skip
        return self._perplexity_rows(name, self._run(name, [config], 0, None))

    def questions(self, questions: Sequence[Mapping[str, Any]]) -> list[pl.DataFrame]:
        """Accuracy on multiple-choice questions about the corpus' own facts."""
        answers = [
            q["answer"] if isinstance(q["answer"], int) else list(q["choices"]).index(q["answer"]) for q in questions
        ]
        frame = pl.DataFrame({
            "question": [q["question"] for q in questions], "choices": [list(q["choices"]) for q in questions],
            "answer": answers,
        })  # fmt: skip
        config = {
            "task": CONCEPT_QUESTIONS, "output_type": "multiple_choice", "test_split": "test",
            "doc_to_text": "question", "doc_to_target": "answer", "doc_to_choice": "choices",
            "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
            **self._local({"test": self._write(CONCEPT_QUESTIONS, frame)}),
        }  # fmt: skip
        samples = self._run(CONCEPT_QUESTIONS, [config], 0, None)
        return [
            _accuracy(CONCEPT_QUESTIONS, "acc", samples),
            _answer_perplexity(CONCEPT_QUESTIONS, samples, self._model),
        ]

    def benchmark(self, name: str, directory: Path | None, limit: int | None, notes: list[str]) -> list[pl.DataFrame]:
        """Samples of one stock benchmark, from `directory` or, when that is None, from the hub."""
        benchmark = BENCHMARKS[name]
        files = None if directory is None else local_files(benchmark, directory)
        if files and not next(iter(files.values())).name.startswith(f"{benchmark.files[0]}."):
            notes.append(f"{name}: scored on {', '.join(path.name for path in files.values())}, which stands in for it")
        if name == "mmlu":
            configs = self._mmlu(benchmark, files)
            # The limit is for the whole benchmark; every subject gives its share.
            limit = None if limit is None else -(-limit // len(configs))
        else:
            configs = [self._stock(name, benchmark, files)]
        samples = self._run(name, configs, benchmark.shots, limit)
        if name == "openwebtext2":
            return self._perplexity_rows(name, samples)
        rows = [_accuracy(name, metric, samples) for metric in benchmark.metrics if metric != "perplexity"]
        if name == "mmlu":
            rows.insert(0, _answer_perplexity(name, samples, self._model))
        if name == "lambada":
            # The last word as one unit, whatever its tokens: lm-eval's own definition.
            rows.insert(0, _values(name, "perplexity", [-sample["perplexity"] for sample in samples]))
        return rows

    def _stock(self, name: str, benchmark: Benchmark, files: dict[str, Path] | None) -> dict[str, Any]:
        config: dict[str, Any] = {"include": str(STOCK_TASKS / benchmark.stock), "task": name, **benchmark.overrides}
        if files is not None:
            names = {"training_split": "train", "validation_split": "validation", "test_split": "test"}
            config |= self._local(files) | {key: split if split in files else None for key, split in names.items()}
        return config

    def _mmlu(self, benchmark: Benchmark, files: dict[str, Path] | None) -> list[dict[str, Any]]:
        """One task per subject: the five shots and the prompt's first line are the subject's own."""
        if files is None:
            stock = sorted((STOCK_TASKS / "mmlu" / "default").glob("mmlu_*.yaml"))
            return [{"include": str(path), "task": f"sbp_{path.stem}"} for path in stock]
        if "dev" not in files or "test" not in files:
            raise BenchmarkDataError("five-shot MMLU needs mmlu.dev.parquet and mmlu.test.parquet")
        dev, test = pl.read_parquet(files["dev"]), pl.read_parquet(files["test"])
        configs = []
        for subject in sorted(set(test["subject"])):
            path = STOCK_TASKS / benchmark.stock.format(subject=subject)
            if not path.is_file():
                raise BenchmarkDataError(f"{files['test'].name}: subject {subject!r} is not one of MMLU's")
            parts = {
                split: self._write(f"mmlu_{subject}.{split}", frame.filter(pl.col("subject") == subject))
                for split, frame in (("dev", dev), ("test", test))
            }
            configs.append({"include": str(path), "task": f"sbp_mmlu_{subject}", **self._local(parts)})
        return configs

    def _perplexity_rows(self, name: str, samples: list[dict[str, Any]]) -> list[pl.DataFrame]:
        texts = [sample["arguments"][0][0] for sample in samples]
        losses = np.array([-_loglikelihood(sample["resps"][0][0]) for sample in samples])
        tokens = np.array([len(self._model.tokenizer.encode(text, add_special_tokens=False)) for text in texts])
        bytes_ = np.array([len(text.encode()) for text in texts])
        return [
            _values(name, "perplexity", losses / tokens, tokens),
            _values(name, "nats_per_token", losses / tokens, tokens),
            _values(name, "bits_per_byte", losses / bytes_ / np.log(2), bytes_),
        ]

    def _write(self, name: str, frame: pl.DataFrame) -> Path:
        path = self._data / f"{name}.parquet"
        frame.write_parquet(path)
        return path

    def _local(self, files: Mapping[str, Path]) -> dict[str, Any]:
        data_files = {split: str(path) for split, path in files.items()}
        return {
            "dataset_path": "parquet", "dataset_name": None,
            "dataset_kwargs": {"data_files": data_files, "cache_dir": str(self._cache)},
        }  # fmt: skip

    def _run(self, name: str, configs: list[dict[str, Any]], shots: int, limit: int | None) -> list[dict[str, Any]]:
        """Logged samples of all `configs`, pooled. Task files are kept in the work folder for inspection."""
        folder = self._tasks / name
        folder.mkdir(exist_ok=True)
        for config in configs:
            (folder / f"{config['task']}.yaml").write_text(
                yaml.safe_dump({**config, "num_fewshot": shots}, sort_keys=False)
            )
        results = evaluator.simple_evaluate(
            model=self._model,
            tasks=[config["task"] for config in configs],
            task_manager=TaskManager(include_path=str(folder), include_defaults=False),
            limit=limit,
            bootstrap_iters=0,
            log_samples=True,
            random_seed=SEED,
            numpy_random_seed=SEED,
            torch_random_seed=SEED,
            fewshot_random_seed=SEED,
        )
        samples = [sample for config in configs for sample in results["samples"][config["task"]]]
        if not samples:
            raise BenchmarkDataError("no examples")
        return samples


def local_files(benchmark: Benchmark, directory: Path) -> dict[str, Path]:
    """Split → file of a benchmark's local copy, `<name>.<split>.parquet`; BenchmarkDataError where none can be used."""
    for stem in benchmark.files:
        files = {
            split: path
            for split in ("train", "dev", "validation", "test")
            if (path := directory / f"{stem}.{split}.parquet").is_file()
        }
        if {"validation", "test"} & set(files):
            break
    else:
        names = " or ".join(f"{stem}.{split}.parquet" for stem in benchmark.files for split in ("validation", "test"))
        raise BenchmarkDataError(f"deployment.benchmarks_dir has no {names}")
    for path in files.values():
        found = pl.read_parquet_schema(path)
        if missing := [column for column in benchmark.columns if column not in found]:
            raise BenchmarkDataError(f"{path.name} lacks column {', '.join(missing)}; it has {', '.join(found)}")
    return files


def score_problems(table: pl.DataFrame, tasks: Sequence[str]) -> list[str]:
    """What is wrong with a score table: configured tasks that it lacks, values that cannot be."""
    problems = [f"{task} was configured but has no score" for task in tasks if task not in set(table["task"])]
    for row in table.iter_rows(named=True):
        name = f"{row['task']} {row['metric']}"
        if row["value"] is None or not math.isfinite(row["value"]):
            problems.append(f"{name} is not finite: {row['value']}")
        elif row["metric"] in ("acc", "acc_norm", "exact_match") and not 0 <= row["value"] <= 1:
            problems.append(f"{name} is outside [0, 1]: {row['value']}")
        elif not row["higher_is_better"] and row["value"] < 0:
            problems.append(f"{name} is negative: {row['value']}")
    return problems


def _loglikelihood(response: Any) -> float:
    """Log-likelihood in a logged response: a number for rolling requests, (number, is greedy) for the others."""
    return float(response[0] if isinstance(response, (tuple, list)) else response)


def _answer_perplexity(task: str, samples: list[dict[str, Any]], model: CountingHFLM) -> pl.DataFrame:
    """Negative log-likelihood per token of the right answer's continuation, in nats, of every question.

    For stock MMLU the continuation is the right letter (" A"), so a model that knows only the format scores 4.
    """
    losses, tokens = [], []
    for sample in samples:
        right = int(sample["target"])
        context, continuation = sample["arguments"][right]
        losses.append(-_loglikelihood(sample["resps"][right][0]))
        tokens.append(len(model.tok_encode(context + continuation)) - len(model.tok_encode(context)))
    return _values(task, "perplexity", np.array(losses) / np.array(tokens), np.array(tokens))


def _accuracy(task: str, metric: str, samples: list[dict[str, Any]]) -> pl.DataFrame:
    return _values(task, metric, [float(sample[metric]) for sample in samples])


def _values(
    task: str, metric: str, values: Sequence[float] | np.ndarray, weights: np.ndarray | None = None
) -> pl.DataFrame:
    """Rows of SAMPLES_SCHEMA, one per document; weights default to 1."""
    weights = np.ones(len(values), dtype=np.int64) if weights is None else weights
    return pl.DataFrame(
        {
            "task": [task] * len(values), "metric": [metric] * len(values), "sample": range(len(values)),
            "value": values, "weight": weights,
        },
        schema=SAMPLES_SCHEMA,
    )  # fmt: skip
