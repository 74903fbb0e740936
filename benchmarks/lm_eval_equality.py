"""Our scores against the lm_eval command line: python -m benchmarks.lm_eval_equality --model DIR --tasks DIR.

Runs `lm_eval` as its users do, in processes of their own on the same task files, and compares every score with `==`:
what lm-eval prints as it is, and the perplexities per token by the formula of docs/evaluation.md from the samples that
it logs. The last line printed is one JSON object: scores compared, scores that differ, those that are not there, and
both values of each. The exit status is 1 where any differs or is not there.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from benchmarks.arguments import parser
from sbp_assets.evaluation.readme import command
from sbp_assets.evaluation.suite import evaluate
from sbp_assets.evaluation.tasks import Task, Tasks
from sbp_assets.training.device import resolve_device


def main() -> int:
    taking = parser(__doc__)
    taking.add_argument("--model", type=Path, required=True, help="Hugging Face model directory")
    taking.add_argument("--tasks", type=Path, required=True, help="artifact evaluation/tasks")
    taking.add_argument("--device", default="cpu")
    taking.add_argument("--batch-size", type=int, default=1)
    arguments = taking.parse_args()
    found = compare(arguments.model, arguments.tasks, device=arguments.device, batch_size=arguments.batch_size)
    print(json.dumps(found))
    return 1 if found["different"] or found["not_scored"] else 0


def compare(model: Path, tasks_dir: Path, *, device: str = "cpu", batch_size: int = 1) -> dict[str, Any]:
    """Both values of every task and metric, the names of those that are not equal (`==`), and what has no score."""
    made = Tasks.load(tasks_dir)
    names = {task.name for task in made.tasks}  # Groups of a task's samples are no tasks of lm-eval.
    ours = evaluate(model, tasks_dir, device=device, batch_size=batch_size)
    theirs = lm_eval_scores(model, tasks_dir, made, device=resolve_device(device), batch_size=batch_size)
    scores = {
        f"{task} {metric}": {"ours": value, "lm_eval": theirs.get((task, metric))}
        for task, metric, value in ours.table.select("task", "metric", "value").iter_rows()
        if task in names
    }
    expected = {f"{task.name} {metric}" for task in made.tasks for metric in task.metrics}
    return {
        "model": model.name,
        "tasks": len({name.split()[0] for name in scores}),
        "compared": len(scores),
        "different": sorted(name for name, pair in scores.items() if pair["ours"] != pair["lm_eval"]),
        "not_scored": [*sorted(expected - set(scores)), *ours.problems],
        "scores": scores,
    }


def lm_eval_scores(
    model: Path, tasks_dir: Path, made: Tasks, *, device: str, batch_size: int
) -> dict[tuple[str, str], float]:
    """Score by task and metric, from the files that the command line writes.

    With batch size 1 no score depends on what else is in a run, so that one run does for all tasks of a kind.
    """
    found: dict[tuple[str, str], float] = {}
    for rolling in (True, False):
        tasks = [task for task in made.tasks if task.rolling is rolling]
        for part in [tasks] if batch_size == 1 else [[task] for task in tasks]:
            if not part:
                continue
            with tempfile.TemporaryDirectory() as output:
                names = [task.lm_eval for task in part]
                line = command(
                    names, rolling=rolling, model=str(model), tasks_dir=str(tasks_dir), device=device,
                    batch_size=batch_size,
                )  # fmt: skip
                line[0] = str(Path(sys.executable).with_name(line[0]))
                done = subprocess.run(
                    [*line, "--output_path", output, "--log_samples"], capture_output=True, text=True,
                    # lm-eval's own bootstrap forks a pool per metric, which was seen to wait for ever when it ends.
                    env={
                        **os.environ, "HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1", "DISABLE_MULTIPROC": "1",
                    },
                )  # fmt: skip
                if done.returncode:
                    raise RuntimeError(f"{' '.join(line)} failed:\n{done.stderr[-4000:]}")
                for task in part:
                    found |= {(task.name, key): value for key, value in _scores(Path(output), task, model).items()}
    return found


def _scores(output: Path, task: Task, model: Path) -> dict[str, float]:
    (results,) = output.rglob("results_*.json")
    # 'acc,none' and 'exact_match,remove_whitespace': the metric and the filter that the answers went through.
    printed = {
        key.split(",")[0]: value for key, value in json.loads(results.read_text())["results"][task.lm_eval].items()
    }
    scores = {metric: printed[metric] for metric in task.metrics if metric in printed}
    if len(scores) < len(task.metrics):
        rows = [
            json.loads(line)
            for leaf in task.leaves
            for path in output.rglob(f"samples_{leaf}_2*.jsonl")
            for line in path.read_text(encoding="utf-8").splitlines()
        ]
        nats = _nats_per_token(rows, task, model)
        scores |= {"perplexity": math.exp(nats)} | ({"nats_per_token": nats} if task.rolling else {})
    return scores


def _nats_per_token(rows: list[dict[str, Any]], task: Task, model: Path) -> float:
    """-Σ log-likelihood / Σ tokens: of documents' texts, or of the right answers after their prompts."""
    tokenizer = AutoTokenizer.from_pretrained(model)

    def length(text: str) -> int:
        return len(tokenizer(text, add_special_tokens=False).input_ids)

    losses, tokens = [], 0
    for row in rows:
        right = 0 if task.rolling else int(row["target"])
        arguments = row["arguments"][f"gen_args_{right}"]
        if task.rolling:
            losses.append(-float(row["resps"][0][0]))
            tokens += length(arguments["arg_0"])
        else:
            losses.append(-float(row["resps"][right][0][0]))
            tokens += length(arguments["arg_0"] + arguments["arg_1"]) - length(arguments["arg_0"])
    return math.fsum(losses) / tokens


if __name__ == "__main__":
    sys.exit(main())
