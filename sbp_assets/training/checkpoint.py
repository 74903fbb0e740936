"""Checkpoints of a training run: exact to resume from, refused by any other run."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from sbp_assets.storage.artifacts import atomic_path

if TYPE_CHECKING:
    import torch

logger = logging.getLogger("sbp_assets.training")

_CHECKPOINT = "checkpoint.pt"
RUN_RECORD = "run.json"
BEST_DIRECTORY = "best"
ORDER_DIRECTORY = "order"  # In a run's work_dir: the index of its data's order.


class CheckpointMismatch(ValueError):
    """A checkpoint or a finished model belongs to another run, or cannot be read; the message says in what way."""


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Return the fingerprint fields that differ, as lines 'field: old → new'."""
    fields = sorted(old.keys() | new.keys())
    return [f"{field}: {old.get(field)} → {new.get(field)}" for field in fields if old.get(field) != new.get(field)]


def checkpoint_path(work_dir: Path) -> Path:
    """Return the file of a run's checkpoint."""
    return work_dir / _CHECKPOINT


def save_checkpoint(work_dir: Path, checkpoint: dict[str, Any]) -> None:
    """Write a checkpoint (tensors, numbers, strings and containers of them), replacing the one before atomically."""
    import torch

    with atomic_path(checkpoint_path(work_dir)) as temporary:
        torch.save(checkpoint, temporary)


def load_checkpoint(work_dir: Path, fingerprint: dict[str, Any]) -> dict[str, Any] | None:
    """Return the checkpoint in `work_dir`, None where there is none; raise CheckpointMismatch where it is unusable."""
    path = checkpoint_path(work_dir)
    if not path.exists():
        return None
    checkpoint = _load(path)
    if lines := differences(checkpoint["fingerprint"], fingerprint):
        raise CheckpointMismatch(
            f"the checkpoint {path} belongs to another run and cannot be resumed:\n  "
            + "\n  ".join(lines)
            + f"\nDelete {work_dir} to train from the start, or restore what it was trained on."
        )
    return checkpoint


def finished(output_dir: Path, fingerprint: dict[str, Any]) -> bool:
    """Return whether `output_dir` is the finished model of this run; one of another run counts as absent."""
    record = output_dir / RUN_RECORD
    if not record.exists():
        return False
    lines = differences(json.loads(record.read_text(encoding="utf-8"))["fingerprint"], fingerprint)
    if lines:
        logger.info("replacing the model in %s, which another run trained: %s", output_dir, "; ".join(lines))
    return not lines


def best_model(model: Path) -> Path:
    """Return the directory of a baseline's weights of lowest held-out loss: its own where those are the last."""
    best = model / BEST_DIRECTORY
    return best if best.is_dir() else model


def save_best(work_dir: Path, step: int, weights: dict[str, torch.Tensor]) -> None:
    """Keep `weights`, those after `step`, as the ones of the lowest held-out loss so far.

    Earlier ones stay: a run that resumes before `step` may find another lowest loss, where floating-point work is not
    exactly repeatable. `prune_best` removes them once a checkpoint no longer needs them.
    """
    import torch

    work_dir.mkdir(parents=True, exist_ok=True)
    with atomic_path(_best(work_dir, step)) as temporary:
        torch.save(weights, temporary)


def prune_best(work_dir: Path, step: int | None) -> None:
    """Remove the kept weights of all steps but `step`."""
    for path in work_dir.glob(_best(work_dir, "*").name):
        if step is None or path != _best(work_dir, step):
            path.unlink(missing_ok=True)


def load_best(work_dir: Path, step: int) -> dict[str, torch.Tensor]:
    """Return the weights kept after `step`; raise CheckpointMismatch where they are missing or unreadable."""
    path = _best(work_dir, step)
    if not path.exists():
        raise CheckpointMismatch(
            f"{path}, the weights of the lowest held-out loss, is missing: delete {work_dir} to train from the start"
        )
    return cast("dict[str, torch.Tensor]", _load(path))


def _load(path: Path) -> Any:
    import torch

    try:
        # weights_only: a checkpoint holds data and must not be able to run code.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # of the unpickler, of the archive, of the file: torch has no type for them all
        # Not torch's words, which advise to load it all the same.
        raise CheckpointMismatch(
            f"{path} is corrupted, or holds more than tensors, numbers and strings ({type(error).__name__}): delete "
            f"{path.parent} to train from the start"
        ) from None


def _best(work_dir: Path, step: int | str) -> Path:
    return work_dir / f"best-{step}.pt"


def discard_checkpoint(work_dir: Path) -> None:
    """Remove the checkpoint, the best weights and the index of the data's order: the run has finished."""
    checkpoint_path(work_dir).unlink(missing_ok=True)
    prune_best(work_dir, None)
    shutil.rmtree(work_dir / ORDER_DIRECTORY, ignore_errors=True)


def files_to_resume_from(work_dir: Path) -> list[Path]:
    """Return the checkpoint, the kept weights and the index of the data's order, where there are any in `work_dir`."""
    weights = sorted(work_dir.glob(_best(work_dir, "*").name))
    return [path for path in (checkpoint_path(work_dir), *weights, work_dir / ORDER_DIRECTORY) if path.exists()]


def remove_partial(work_dir: Path) -> None:
    """Remove what a process killed while it wrote a checkpoint or best weights has left."""
    for name in (_CHECKPOINT, _best(work_dir, "*").name):
        for partial in work_dir.glob(f".{name}.*.partial"):
            partial.unlink(missing_ok=True)
