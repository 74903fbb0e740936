"""What a training run is going to compute, before it computes anything: its data, its steps and its fingerprint."""

from __future__ import annotations

import math
from typing import Any

from sbp_assets.settings import Optimizer
from sbp_assets.storage.artifacts import content_version
from sbp_assets.training.checkpoint import ORDER_DIRECTORY
from sbp_assets.training.documents import Documents
from sbp_assets.training.mapped import MappedArrays
from sbp_assets.training.order import DataOrder, ExamplesOrder, StreamOrder
from sbp_assets.training.spec import StreamData, TrainingSpec


def evaluation_steps(steps: int, evaluations: int) -> set[int]:
    """Return the steps after which held-out loss is measured: 0, and `evaluations` spread evenly up to the last."""
    return {0, *(math.ceil(k * steps / evaluations) for k in range(1, evaluations + 1))}


def make_order(spec: TrainingSpec, pad: int) -> DataOrder:
    """Return the run's data order, whose index is in `work_dir`; `pad` is the token id that fills rows of examples."""
    folder = spec.work_dir / ORDER_DIRECTORY
    if isinstance(spec.data, StreamData):
        return StreamOrder(spec.data, spec.model.context_length, spec.seed, folder)
    return ExamplesOrder(spec.data, spec.model.context_length, spec.seed, pad, folder)


def total_steps(spec: TrainingSpec, order: DataOrder) -> int:
    """Return the number of steps of the run. Raises ValueError where the data ends before them."""
    available = order.total_rows
    if spec.steps is None:
        assert available is not None
        return math.ceil(available / spec.rows_per_step)
    if isinstance(spec.data, StreamData) and available is not None and available < spec.steps * spec.rows_per_step:
        raise ValueError(
            f"{spec.name}: {spec.steps} steps read {spec.steps * spec.rows_per_step} rows of "
            f"{spec.model.context_length} tokens, but the data ends after {available}"
        )
    return spec.steps


def fingerprint(spec: TrainingSpec, order: DataOrder, steps: int, vocab_size: int) -> dict[str, Any]:
    """Return what the run computes, field by field: two runs with equal fingerprints train the same model."""
    scratch = MappedArrays(scratch=spec.work_dir)
    heldout = Documents(spec.heldout, scratch).digest(vocab_size)[:16] if spec.heldout else None
    return {
        "data": order.digest(vocab_size)[:16],
        "tokenizer": content_version(spec.tokenizer_dir),
        **{f"model.{key}": value for key, value in spec.model.model_dump().items()},
        # A subclass's further fields say nothing about the optimizer.
        **{f"optimizer.{key}": getattr(spec.optimizer, key) for key in Optimizer.model_fields},
        "initial_model": content_version(spec.initial_model) if spec.initial_model else None,
        "seed": spec.seed,
        "steps": steps,
        "heldout": heldout,
        "heldout_tokens": spec.heldout_tokens,
        "evaluations": spec.evaluations,
        "keep_best": spec.keep_best,
    }
