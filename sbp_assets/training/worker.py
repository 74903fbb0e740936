"""One training process: `python -m sbp_assets.training.worker SPEC.json`, alone or under torchrun.

The leading process reports progress to Dagster where Dagster Pipes launched it, and to standard error otherwise.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import signal
import sys
import threading
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from dagster_pipes import DAGSTER_PIPES_CONTEXT_ENV_VAR, PipesContext, open_dagster_pipes
from pydantic import ValidationError

from sbp_assets.storage.artifacts import atomic_path, exclusive
from sbp_assets.training.checkpoint import BEST_DIRECTORY, RUN_RECORD, discard_checkpoint
from sbp_assets.training.device import emulates_bfloat16, peak_flops
from sbp_assets.training.launch import LAUNCHER_PID
from sbp_assets.training.loop import Trained, TrainingEnded, train
from sbp_assets.training.model import load_training_tokenizer, model_config, save_model
from sbp_assets.training.parallel import World, open_world
from sbp_assets.training.spec import TrainingSpec

logger = logging.getLogger("sbp_assets.training")

_EMULATED = (
    "%s: dtype is bfloat16, which this %s device has no arithmetic for: it is emulated, more slowly than float32 "
    "(2 to 4 times on a CPU). dtype is a setting of the experiment: with float32 it trains another model."
)


class _PipesHandler(logging.Handler):
    def __init__(self, pipes: PipesContext) -> None:
        super().__init__()
        self._pipes = pipes

    def emit(self, record: logging.LogRecord) -> None:
        log = self._pipes.log.warning if record.levelno >= logging.WARNING else self._pipes.log.info
        log(self.format(record))


def write_output(spec: TrainingSpec, world: World, trained: Trained) -> None:
    """Write the finished model directory: Hugging Face files, metrics.parquet and run.json, whole or not at all.

    Where a best model is to be kept and is not the last, its Hugging Face files are in the directory's `best/`.
    """
    tokenizer = load_training_tokenizer(spec.tokenizer_dir)
    with atomic_path(spec.output_dir) as temporary:
        save_model(temporary, model_config(spec.model, tokenizer), trained.state, tokenizer)
        if trained.best_state is not None:
            save_model(temporary / BEST_DIRECTORY, model_config(spec.model, tokenizer), trained.best_state, tokenizer)
        trained.metrics.write_parquet(temporary / "metrics.parquet")
        record = _run_record(spec, world, trained, len(tokenizer))
        (temporary / RUN_RECORD).write_text(json.dumps(record, indent=1), encoding="utf-8")


def _run_record(spec: TrainingSpec, world: World, trained: Trained, vocab_size: int) -> dict[str, Any]:
    flops = spec.model.flops_per_token(vocab_size) * trained.tokens
    rate = trained.tokens / max(trained.seconds, 1e-9)
    hardware = torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else platform.machine()
    peak = peak_flops(hardware)
    return {
        "spec": spec.model_dump(mode="json"),
        "fingerprint": trained.fingerprint,
        "host": platform.node(),
        "hardware": hardware,
        "processes": world.size,
        "tokens": trained.tokens,
        "seconds": round(trained.seconds, 3),
        "tokens_per_second": round(rate, 1),
        "flops": flops,
        "mfu": round(flops / trained.seconds / (peak * world.size), 4) if peak else None,
        "final_train_loss": trained.metrics["train_loss"].drop_nulls().last(),
        "final_heldout_loss": trained.metrics["heldout_loss"].drop_nulls().last()
        if trained.metrics["heldout_loss"].drop_nulls().len()
        else None,
        "best_step": trained.best_step,
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def run(spec: TrainingSpec) -> None:
    """Train and write the output, or return at once where it is there already. Every process calls this."""
    with open_world(spec) as world:
        if world.leads and spec.optimizer.dtype == "bfloat16" and emulates_bfloat16(world.device):
            logger.warning(_EMULATED, spec.name, world.device.type)
        trained = train(spec, world)
        if world.leads and trained is None:
            logger.info("%s: %s already holds this run's model", spec.name, spec.output_dir)
        if trained is None:
            world.barrier()  # All have indexed the data: nobody writes there again.
            if world.leads:
                discard_checkpoint(spec.work_dir)
            return
        if world.leads:
            write_output(spec, world, trained)
            discard_checkpoint(spec.work_dir)
            rate = trained.tokens / trained.seconds
            logger.info("%s: %d tokens in %.0f s (%.0f tokens/s)", spec.name, trained.tokens, trained.seconds, rate)
        world.barrier()


def leave_with_launcher(seconds: float = 1.0) -> None:
    """Watch the launching process, where one is named, and torchrun; end this one when either has ended.

    Checkpoints stay.
    """
    if LAUNCHER_PID not in os.environ:
        return
    parent = os.getppid()

    def watch() -> None:
        with suppress(psutil.NoSuchProcess):
            launcher = psutil.Process(int(os.environ[LAUNCHER_PID]))
            if "TORCHELASTIC_RUN_ID" in os.environ and psutil.Process(parent).ppid() != launcher.pid:
                os._exit(1)  # torchrun ended before this process looked: another one is the parent
            # A killed one that nobody waits for, as in a container without an init, is a zombie and keeps its number.
            while os.getppid() == parent and launcher.is_running() and launcher.status() != psutil.STATUS_ZOMBIE:
                time.sleep(seconds)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def main(arguments: list[str]) -> int:
    """Train what the spec file of `arguments` describes, and return the exit status.

    It is 0 after success, 1 after one readable message for a run that cannot continue, 2 for other arguments than one
    file, and 143 where the process was asked to end.
    """
    if len(arguments) != 1:
        print("usage: python -m sbp_assets.training.worker SPEC.json", file=sys.stderr)
        return 2
    leads = os.environ.get("RANK", "0") == "0"
    root = logging.getLogger("sbp_assets")
    root.setLevel(logging.INFO if leads else logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    with ExitStack() as stack:
        handler: logging.Handler = logging.StreamHandler()
        if leads and DAGSTER_PIPES_CONTEXT_ENV_VAR in os.environ:
            handler = _PipesHandler(stack.enter_context(open_dagster_pipes()))
        root.addHandler(handler)
        leave_with_launcher()
        try:
            spec = TrainingSpec.read(Path(arguments[0]))
            if leads:
                # Two runs of one model would write each other's checkpoints; wait for the workers of a killed one.
                stack.enter_context(exclusive(spec.work_dir, f"training {spec.name}", seconds=15))
            run(spec)
        except TrainingEnded as ended:
            logger.warning("%s", ended)
            return 128 + signal.SIGTERM
        except (ValueError, RuntimeError, OSError, ValidationError) as error:
            # Under Pipes the message must also reach the process's own output, which the launcher shows on failure.
            logger.error("%s: %s", type(error).__name__, error)
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
