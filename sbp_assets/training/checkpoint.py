"""Checkpoints of a training run: exact to resume from, refused by any other run."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any, cast

import torch

from sbp_assets.storage.artifacts import atomic_path

logger = logging.getLogger("sbp_assets.training")

_CHECKPOINT = "checkpoint.pt"
_BEST = "best.pt"
RUN_RECORD = "run.json"
BEST_DIRECTORY = "best"


class CheckpointMismatch(ValueError):
    """A checkpoint or a finished model belongs to another run; the message names each difference."""


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Lines 'field: old → new' of the fingerprint fields that differ."""
    fields = sorted(old.keys() | new.keys())
    return [f"{field}: {old.get(field)} → {new.get(field)}" for field in fields if old.get(field) != new.get(field)]


def save_checkpoint(work_dir: Path, checkpoint: dict[str, Any]) -> None:
    """Write a checkpoint (tensors, numbers, strings and containers of them), replacing the one before atomically."""
    with atomic_path(work_dir / _CHECKPOINT) as temporary:
        torch.save(checkpoint, temporary)


def load_checkpoint(work_dir: Path, fingerprint: dict[str, Any]) -> dict[str, Any] | None:
    """Checkpoint in `work_dir`, None where there is none; CheckpointMismatch where its run was another one."""
    path = work_dir / _CHECKPOINT
    if not path.exists():
        return None
    # weights_only: a checkpoint holds data and must not be able to run code.
    checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if lines := differences(checkpoint["fingerprint"], fingerprint):
        raise CheckpointMismatch(
            f"the checkpoint {path} belongs to another run and cannot be resumed:\n  "
            + "\n  ".join(lines)
            + f"\nDelete {work_dir} to start again, or restore what it was trained on."
        )
    return checkpoint


def finished(output_dir: Path, fingerprint: dict[str, Any]) -> bool:
    """Whether `output_dir` is the finished model of this run. One of another run counts as absent and is replaced."""
    record = output_dir / RUN_RECORD
    if not record.exists():
        return False
    lines = differences(json.loads(record.read_text())["fingerprint"], fingerprint)
    if lines:
        logger.info("replacing the model in %s, which another run made: %s", output_dir, "; ".join(lines))
    return not lines


def save_best(work_dir: Path, step: int, weights: dict[str, torch.Tensor]) -> None:
    """Keep `weights` as those of the lowest held-out loss so far, replacing the ones before atomically."""
    work_dir.mkdir(parents=True, exist_ok=True)
    with atomic_path(work_dir / _BEST) as temporary:
        torch.save({"step": step, "weights": weights}, temporary)


def load_best(work_dir: Path, step: int) -> dict[str, torch.Tensor]:
    """The weights kept at `step`; CheckpointMismatch where the file is gone or holds those of another step."""
    path = work_dir / _BEST
    best = torch.load(path, map_location="cpu", weights_only=True, mmap=True) if path.exists() else {"step": None}
    if best["step"] != step:
        raise CheckpointMismatch(
            f"{path} should hold the weights after step {step}, the lowest held-out loss, and holds those of "
            f"{best['step']}: delete {work_dir} to train again"
        )
    return cast(dict[str, torch.Tensor], best["weights"])


def discard_checkpoint(work_dir: Path) -> None:
    """Remove the checkpoint and the best weights: the run has finished."""
    for name in (_CHECKPOINT, _BEST):
        (work_dir / name).unlink(missing_ok=True)


def remove_partial(work_dir: Path) -> None:
    """Remove what a process killed while it wrote a checkpoint has left."""
    for name in (_CHECKPOINT, _BEST):
        for partial in work_dir.glob(f".{name}.*.partial"):
            partial.unlink(missing_ok=True)
