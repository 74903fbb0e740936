"""The commands with which anyone scores a model on a tasks folder, and the README that shows them there."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version

from sbp_assets.dagster_support.preview import escape
from sbp_assets.evaluation.tasks import Tasks


def command(
    tasks: Sequence[str], *, rolling: bool, model: str, tasks_dir: str, device: str, batch_size: int | str
) -> list[str]:
    """Return the lm_eval command line that gives this project's scores of `tasks` (lm-eval names), all rolling or none.

    A training document starts with <bos>, so a prompt does too. For a rolling task lm-eval gives the <bos> as the
    context of the first window itself; added to the text it would be one more token to predict.
    """
    arguments = f"pretrained={model},dtype=float32,add_bos_token={not rolling}"
    return [
        "lm_eval", "run", "--model", "hf", "--model_args", arguments, "--include_path", tasks_dir,
        "--tasks", ",".join(tasks), "--batch_size", str(batch_size), "--device", device,
    ]  # fmt: skip


def readme(tasks: Tasks) -> str:
    """Return the README of a tasks folder, as markdown."""

    def loop(rolling: bool) -> list[str]:
        names = [task.lm_eval for task in tasks.tasks if task.rolling is rolling]
        line = command(
            ["$TASK"], rolling=rolling, model="$MODEL", tasks_dir=".", device="$DEVICE", batch_size="$BATCH_SIZE"
        )
        call = " ".join([*line, "--output_path", "$OUT", "--log_samples"])
        return [f"for TASK in {' '.join(names)}; do", f"  {call}", "done"] if names else []

    rows = [
        f"| {task.name} | {task.lm_eval} | {task.documents} | {task.shots} | {', '.join(task.metrics)} |"
        for task in tasks.tasks
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
        "without special tokens, and `nats_per_token` its logarithm. `perplexity` of sbp_mmlu and of the questions",
        "about the corpus' own facts is the same of the right answers: resps of the choice `target`, and the tokens",
        "that it adds to the prompt. Scores of groups are of the samples that tasks.json lists under `groups`.",
        # These may quote files and servers of others, and Dagster shows them as markdown.
        *(f"\nNot made: {escape(problem, 1000)}" for problem in tasks.problems),
        *(f"\nNote: {escape(note, 1000)}" for note in tasks.notes),
    ]
    return "\n".join(lines) + "\n"
