"""What a run whose numbers are no longer finite says: at which step, on what it read, and what is left of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from sbp_assets.training.checkpoint import checkpoint_path
from sbp_assets.training.order import DataOrder
from sbp_assets.training.spec import TrainingSpec

if TYPE_CHECKING:
    import torch

_NAMED = 3  # documents of the batch that the message names


class TrainingDiverged(RuntimeError):
    """A loss, a gradient or a weight is no longer a finite number."""


def diverged(spec: TrainingSpec, order: DataOrder, step: int, found: str) -> TrainingDiverged:
    """Return the error of a run that at `step`, the 1-based one of its last batch, has `found`: "the loss is nan".

    Its message names the batch's rows and documents. Step 0 is before any batch.
    """
    if not step:
        return TrainingDiverged(f"{spec.name}: before any step {found}: the weights that it starts from are at fault")
    path = checkpoint_path(spec.work_dir)
    kept = (
        f"The last checkpoint, written before that, is kept: {path}" if path.exists() else "No checkpoint was due yet"
    )
    return TrainingDiverged(
        f"{spec.name}: at step {step} {found}, on {_batch(spec, order, step)}. Lower the learning rate or "
        f"gradient_clip, or train in float32. {kept}."
    )


def not_finite(weights: Mapping[str, torch.Tensor]) -> str | None:
    """Return the name of the first weight that holds a number that is not finite; None where there is none."""
    return next((name for name, weight in weights.items() if not bool(weight.isfinite().all())), None)


def _batch(spec: TrainingSpec, order: DataOrder, step: int) -> str:
    first, last = (step - 1) * spec.rows_per_step, step * spec.rows_per_step
    documents = order.documents(first, last)
    others = f" and {len(documents) - _NAMED} more" if len(documents) > _NAMED else ""
    named = ", ".join(documents[:_NAMED])
    return f"rows {first} to {last - 1} of its data: {named}{others} (`sbp trace ID` shows a document)"
