"""A training run's curves where people watch them: TensorBoard event files, and Weights & Biases."""

from __future__ import annotations

import hashlib
import json
import logging
import secrets
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Protocol

from sbp_assets.training.spec import TrainingSpec

logger = logging.getLogger("sbp_assets.training")

_WANDB_RUN = "wandb-run"  # in work_dir: the id under which a resumed run continues its curves

_FINISH_SECONDS = 120


class TrackerError(RuntimeError):
    """A tracker that the settings name cannot be used; the message says why and what to do."""


class _Sink(Protocol):
    def record(self, step: int, values: dict[str, float]) -> None: ...

    def flush(self) -> None: ...

    def close(self, failed: bool) -> None: ...


class Tracker:
    """The scalars of a training run on their way to its sinks, of which there may be none.

    A model is worth more than its curve: a sink that fails is reported once and left, and training continues.
    """

    def __init__(self, name: str, sinks: Sequence[_Sink] = ()) -> None:
        self._name, self._sinks = name, list(sinks)

    def record(self, row: Mapping[str, float | None]) -> None:
        """Write a row of metrics.parquet (sbp_assets.training.metrics) at its optimizer step, without what is None."""
        values = {name: value for name, value in row.items() if name != "step" and value is not None}
        step = int(row["step"] or 0)
        self._each(lambda sink: sink.record(step, values))

    def flush(self) -> None:
        """Write out what is recorded: before each checkpoint, so that no step before it is missing after a kill."""
        self._each(lambda sink: sink.flush())

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._each(lambda sink: sink.close(kind is not None))

    def _each(self, action: Callable[[_Sink], None]) -> None:
        for sink in list(self._sinks):
            try:
                action(sink)
            except Exception as error:  # of a full disk, of a network, of a library
                self._sinks.remove(sink)
                reason = f"{type(error).__name__}: {error}"
                logger.warning("%s: its curves are no longer written, training continues (%s)", self._name, reason)


class _TensorBoard:
    def __init__(self, directory: str, after: int) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise TrackerError(_missing("tensorboard_dir", "tensorboard", error)) from error
        try:
            # What a killed run wrote of later steps is hidden: they are taken again.
            self._writer = SummaryWriter(directory, purge_step=after + 1 if after else 0, flush_secs=30)
        except OSError as error:
            raise TrackerError(f"deployment.tensorboard_dir cannot be written: {error}") from error

    def record(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def flush(self) -> None:
        self._writer.flush()

    def close(self, failed: bool) -> None:
        self._writer.close()


class _WeightsAndBiases:
    def __init__(self, spec: TrainingSpec, after: int) -> None:
        try:
            import wandb
        except ImportError as error:
            raise TrackerError(_missing("wandb_project", "wandb", error)) from error
        spec.work_dir.mkdir(parents=True, exist_ok=True)
        mark = spec.work_dir / _WANDB_RUN
        name = mark.read_text(encoding="utf-8") if after and mark.exists() else secrets.token_hex(4)
        try:
            # Steps that the service has already are left out by it, and so none is there twice.
            self._run = wandb.init(
                project=spec.wandb_project,
                name=spec.name,
                id=name,
                resume="allow",
                dir=str(spec.work_dir),
                config=spec.model_dump(mode="json"),
                # Without it the finished model would wait for a service that is out of reach, for days.
                settings={"finish_timeout": _FINISH_SECONDS},
            )
        except wandb.Error as error:
            raise TrackerError(
                f"Weights & Biases does not start ({error}): set WANDB_API_KEY, or WANDB_MODE=offline, or "
                "deployment.wandb_project to null"
            ) from error
        mark.write_text(name, encoding="utf-8")
        self._run.define_metric("tokens")
        self._run.define_metric("*", step_metric="tokens")

    def record(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def flush(self) -> None:
        pass  # a process of its own writes

    def close(self, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


def open_tracker(spec: TrainingSpec, fingerprint: Mapping[str, Any], after: int, leads: bool) -> Tracker:
    """Return the tracker of a run that continues after step `after`, 0 for one that begins.

    Only the leading process writes; the tracker of another, like that of a spec that names none, has no sink.
    TensorBoard's event files are in a folder named after the fingerprint: a resumed run continues its curves, and a run
    of another experiment has its own beside them. Raises TrackerError where one cannot be used.
    """
    sinks: list[_Sink] = []
    if leads and spec.tensorboard_dir is not None:
        digest = hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()
        sinks.append(_TensorBoard(f"{spec.tensorboard_dir}/{digest[:8]}", after))
    if leads and spec.wandb_project is not None:
        sinks.append(_WeightsAndBiases(spec, after))
    return Tracker(spec.name, sinks)


def _missing(setting: str, package: str, error: ImportError) -> str:
    return (
        f"deployment.{setting} is set, and the package {package} does not load ({error}): pip install {package}, "
        f"or set deployment.{setting} to null"
    )
