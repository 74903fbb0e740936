"""Scores an exported Hugging Face model on a tasks folder, by lm-eval in this process.

Every arm answers the same task files on the same backend. What lm-eval reports is used unchanged; what it does not
report (perplexities per token) follows from its logged samples, so that its command line gives the same numbers.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import polars as pl

from sbp_assets.evaluation.audit import foreign_files
from sbp_assets.evaluation.scores import SAMPLES_SCHEMA, estimate, score_table
from sbp_assets.evaluation.tasks import HELDOUT, MMLU, QUESTIONS, Task, Tasks
from sbp_assets.storage.progress import Progress
from sbp_assets.training.device import Device, resolve_device

if TYPE_CHECKING:
    from lm_eval.models.huggingface import HFLM

    from sbp_assets.evaluation.backend import CountingHFLM

logger = logging.getLogger("sbp_assets.evaluation.suite")


@dataclass
class Scores:
    """The scores of one model.

    `samples` has a row per task, metric and document or question. `sample` is its place in the task, the same for every
    model. `value` is what it scored: an accuracy of 0 or 1, or its mean negative log-likelihood, in nats per token for
    `perplexity` and `nats_per_token`, in bits per byte for `bits_per_byte`. `weight` is the number of tokens or bytes
    that this is the mean of (1 for accuracies). `cluster` is that of `Task.clusters`, or `sample` where the task has
    none. `scores.estimate` gives the score of any such rows.
    """

    table: pl.DataFrame  # Columns of SCORES_SCHEMA.
    samples: pl.DataFrame  # Columns of SAMPLES_SCHEMA.
    problems: list[str]  # Tasks that have no score, each with the reason.
    notes: list[str]  # What a reader should know about the tasks that have one.
    run: dict[str, float]  # Wall seconds, sequences per second, peak memory, threads.


@dataclass(frozen=True)
class Measurement:
    """One score: its value, and per document or question the values and weights that it is the weighted mean of."""

    metric: str
    value: float
    values: np.ndarray
    weights: np.ndarray

    def of(self, places: Sequence[int]) -> Measurement:
        """Return the score of the documents or questions at `places` alone."""
        values, weights = self.values[list(places)], self.weights[list(places)]
        return Measurement(self.metric, estimate(self.metric, values, weights), values, weights)


def evaluate(
    model_dir: Path, tasks_dir: Path, *, device: Device = "auto", batch_size: int = 1, name: str = "model"
) -> Scores:
    """Return the scores of the model in `model_dir` on all tasks that `task_files.write_tasks` wrote into `tasks_dir`.

    Each task is a run of its own: with the same batch size, device and threads, `readme.command` gives the same
    numbers. A benchmark that cannot be run, or could not be written, is named in `problems` and the others still run;
    an error in the model, the held-out documents or the questions is raised. Raises ValueError when `tasks_dir` has
    files that this project did not write.
    """
    if foreign := foreign_files(tasks_dir):
        raise ValueError(
            f"{tasks_dir}: {', '.join(foreign)} did not come from this project, and lm-eval would run what they hold; "
            "re-materialise evaluation/tasks"
        )
    manifest = Tasks.load(tasks_dir)
    problems, notes = list(manifest.problems), list(manifest.notes)
    measured: dict[str, list[Measurement]] = {}
    truncated = 0
    with _quiet_lm_eval(), Progress(f"scoring {name}", "sequences") as progress:
        for rolling in (True, False):
            tasks = [task for task in manifest.tasks if task.rolling is rolling]
            model = load_model(model_dir, device, batch_size, progress.advance, add_bos_token=not rolling)
            for number, task in enumerate(tasks, 1):
                logger.info("%s (%d/%d): %d samples", task.name, number, len(tasks), task.documents)
                try:
                    measured[task.name] = measure(task, *_run(model, task, tasks_dir), model)
                except Exception as error:
                    if task.name in (HELDOUT, *QUESTIONS):
                        raise
                    # One benchmark's data must not cost the scores of the rest; the check on this asset reports it.
                    problems.append(f"{task.name}: {type(error).__name__}: {error}")
                    logger.warning("%s did not run: %s", task.name, error, exc_info=True)
            truncated += model.truncated
            # Two copies of a large model need not fit.
            del model
    if truncated:
        notes.append(f"{truncated} different prompts were longer than the model's context and were cut on the left")
    samples = pl.concat(
        [
            _samples(name, measurement, clusters)
            for task in manifest.tasks
            if task.name in measured
            for name, own, clusters in _lines(task, measured[task.name])
            for measurement in own
        ]
    )
    exact = {(task, m.metric): m.value for task, measurements in measured.items() for m in measurements}
    import torch

    run = progress.metadata() | {"threads": torch.get_num_threads()}
    return Scores(score_table(samples, exact), samples, problems, notes, run)


def load_model(
    model_dir: Path, device: Device, batch_size: int, on_sequences: Callable[[int], None], *, add_bos_token: bool
) -> CountingHFLM:
    """Return the model as `lm_eval --model hf` loads it, in float32; device 'auto' is CUDA where there is one.

    It calls `on_sequences` with the number of sequences of every batch that it has read.

    Raises FileNotFoundError when the directory holds no model, ValueError when its tokenizer has no bos token.
    """
    if not (model_dir / "config.json").is_file():
        raise FileNotFoundError(f"{model_dir} has no config.json: it is not a Hugging Face model directory")
    from sbp_assets.evaluation.backend import CountingHFLM

    model = CountingHFLM(
        on_sequences, pretrained=str(model_dir), device=resolve_device(device), dtype="float32",
        batch_size=batch_size, add_bos_token=add_bos_token, trust_remote_code=False, use_safetensors=True,
    )  # fmt: skip
    bos = model.tokenizer.bos_token_id
    if bos is None:
        raise ValueError(f"the tokenizer in {model_dir} has no bos token, with which every training document starts")
    if model.tok_encode("a").count(bos) != add_bos_token:
        raise ValueError(f"the tokenizer in {model_dir} does not put exactly one {model.tokenizer.bos_token} in front")
    return model


def measure(
    task: Task, reported: Mapping[str, Any], logged: Sequence[Mapping[str, Any]], model: HFLM
) -> list[Measurement]:
    """Return the task's metrics, from what lm-eval reports of it (`reported`) and its samples in order (`logged`).

    With l the log-likelihood of a document's text, or of a question's right answer, and n its tokens, what lm-eval does
    not report is perplexity = exp(-Σ l / Σ n) and its logarithm nats_per_token. Sums are exactly rounded (math.fsum).
    """
    if task.rolling:
        texts = [sample["arguments"][0][0] for sample in logged]
        losses = np.array([-float(sample["resps"][0][0]) for sample in logged])
        tokens = np.array([len(model.tok_encode(text)) for text in texts])
        bytes_ = np.array([len(text.encode()) for text in texts])
        nats = math.fsum(losses) / int(tokens.sum())
        known = {
            "perplexity": Measurement("perplexity", math.exp(nats), losses / tokens, tokens),
            "nats_per_token": Measurement("nats_per_token", nats, losses / tokens, tokens),
            "bits_per_byte": Measurement(
                "bits_per_byte", _reported(reported, "bits_per_byte"), losses / bytes_ / np.log(2), bytes_
            ),
        }
        return [known[metric] for metric in task.metrics]
    found = []
    for metric in task.metrics:
        ones = np.ones(len(logged), dtype=np.int64)
        if metric != "perplexity":
            values = np.array([float(sample[metric]) for sample in logged])
            found.append(Measurement(metric, _reported(reported, metric), values, ones))
        elif task.name in (MMLU, *QUESTIONS):
            found.append(_answer_perplexity(logged, model))
        else:
            # LAMBADA's: the last word as one unit, whatever its tokens.
            values = np.array([-float(sample[metric]) for sample in logged])
            found.append(Measurement(metric, _reported(reported, metric), values, ones))
    return found


def _run(model: HFLM, task: Task, tasks_dir: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return what lm-eval reports of `task`, and its logged samples, those of a group's tasks one after the other."""
    from lm_eval import evaluator
    from lm_eval.tasks import TaskManager

    with _no_bytecode(), _no_environment_report():
        results = evaluator.simple_evaluate(
            model=model,
            tasks=[task.lm_eval],
            task_manager=TaskManager(include_path=str(tasks_dir), include_defaults=False),
            bootstrap_iters=0,  # No standard errors of lm-eval's own.
        )
    logged = [
        sample for leaf in task.leaves for sample in sorted(results["samples"][leaf], key=lambda row: row["doc_id"])
    ]
    return results["results"][task.lm_eval], logged


@contextmanager
def _quiet_lm_eval() -> Iterator[None]:
    """Silence lm-eval's warnings of each cut prompt (`Scores.notes` has their number) and of tasks with own data."""
    loggers = [logging.getLogger(name) for name in ("lm_eval.models", "lm_eval.api.task")]
    before = [quiet.level for quiet in loggers]
    for quiet in loggers:
        quiet.setLevel(logging.ERROR)
    try:
        yield
    finally:
        for quiet, level in zip(loggers, before, strict=True):
            quiet.setLevel(level)


@contextmanager
def _no_bytecode() -> Iterator[None]:
    """Write no .pyc files: lm-eval imports Python from the tasks folder, an artifact that nothing may be added to."""
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:
        yield
    finally:
        sys.dont_write_bytecode = before


@contextmanager
def _no_environment_report() -> Iterator[None]:
    """Without lm-eval's report on machine and git checkout, which nothing here reads.

    It takes 0.9 s a task, and outside a checkout git prints an error for every task.
    """
    from lm_eval import evaluator

    before = evaluator.add_env_info, evaluator.get_git_commit_hash
    evaluator.add_env_info, evaluator.get_git_commit_hash = lambda storage: None, lambda: None
    try:
        yield
    finally:
        evaluator.add_env_info, evaluator.get_git_commit_hash = before


def _reported(reported: Mapping[str, Any], metric: str) -> float:
    """Return lm-eval's value of a metric, which it names with the filter that the answers went through."""
    (value,) = (value for key, value in reported.items() if key.split(",")[0] == metric)
    return float(value)


def _lines(task: Task, measurements: Sequence[Measurement]) -> Iterator[tuple[str, list[Measurement], list[int]]]:
    """Yield the name, scores and clusters of the task and of each of its groups, as the score tables list them."""
    yield task.name, list(measurements), task.clusters_of()
    own = [measurement for measurement in measurements if measurement.metric == task.group_metric]
    for group, places in task.groups.items():
        yield task.group_name(group), [one.of(places) for one in own], task.clusters_of(group)


def _answer_perplexity(logged: Sequence[Mapping[str, Any]], model: HFLM) -> Measurement:
    """Return exp(-mean log-likelihood per token of the right answer's continuation), over all questions.

    For stock MMLU the continuation is the right letter (" A"), so a model that knows only the format scores 4.
    """
    losses, tokens = [], []
    for sample in logged:
        right = int(sample["target"])
        context, continuation = sample["arguments"][right]
        losses.append(-float(sample["resps"][right][0][0]))
        tokens.append(len(model.tok_encode(context + continuation)) - len(model.tok_encode(context)))
    weights = np.array(tokens)
    return Measurement(
        "perplexity", math.exp(math.fsum(losses) / int(weights.sum())), np.array(losses) / weights, weights
    )


def _samples(task: str, measurement: Measurement, clusters: list[int]) -> pl.DataFrame:
    """Return rows of SAMPLES_SCHEMA, one per document or question."""
    count = len(measurement.values)
    return pl.DataFrame(
        {
            "task": [task] * count, "metric": [measurement.metric] * count, "sample": range(count),
            "value": measurement.values, "weight": measurement.weights, "cluster": clusters,
        },
        schema=SAMPLES_SCHEMA,
    )  # fmt: skip
