"""The training launcher: the resource through which assets start training runs in processes of their own."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Protocol

import dagster as dg

from sbp_assets.training.launch import ENDING_SECONDS, training_command, training_environment
from sbp_assets.training.pipes import WholeLinesMessageReader
from sbp_assets.training.spec import TrainingSpec


class Trainer(Protocol):
    """What the assets need of a training launcher."""

    def train(self, context: dg.AssetExecutionContext, spec: TrainingSpec, processes: int) -> None:
        """Run `spec` to its end, leaving the model in `spec.output_dir`; raise where it fails."""


class LocalTrainer:
    """Trains in processes of this host, one per GPU or CPU process, whose messages reach Dagster through Pipes."""

    def __init__(self) -> None:
        self._client = dg.PipesSubprocessClient(
            message_reader=WholeLinesMessageReader(), termination_timeout_seconds=ENDING_SECONDS + 20
        )

    def train(self, context: dg.AssetExecutionContext, spec: TrainingSpec, processes: int) -> None:
        """Run `spec` in worker processes; raise DagsterPipesExecutionError where they fail."""
        command: Sequence[str] = training_command(spec.write(spec.work_dir / "spec.json"), processes)
        with warnings.catch_warnings():
            # A hook that Pipes itself calls is marked beta in Dagster 1.13; the version is pinned.
            warnings.filterwarnings("ignore", message="Function `PipesMessageReader.expected_writer_count`")
            self._client.run(command=command, context=context, env=training_environment())
