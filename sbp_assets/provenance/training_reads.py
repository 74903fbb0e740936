"""How often training reads a document or a tuning example, counted along the training order itself."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from sbp_assets.pretraining.budget import ARMS, Arm, ArmPlan, BudgetError, plan_arm
from sbp_assets.provenance.lookup import EXAMPLES, SYNTHETIC_TOKENS, TOKENS
from sbp_assets.provenance.store import Store
from sbp_assets.settings import Experiment
from sbp_assets.storage.paths import read_table
from sbp_assets.storage.token_arrays import TokenArrays
from sbp_assets.synthesizer.examples import TRAIN
from sbp_assets.training.order import ExamplesOrder, StreamOrder
from sbp_assets.training.spec import ExamplesData, Source


class TrainingReads:
    """Reads of the arms' pretraining and of synthesizer-tuning, over the whole token budget of each."""

    def __init__(self, experiment: Experiment, store: Store) -> None:
        self.experiment, self.store = experiment, store
        self._plans: dict[Arm, ArmPlan | None] = {}

    def readers(self, asset: str, split: str | None, shard: str, name: str) -> list[dict[str, Any]]:
        """Return per arm and training seed how often a document is read, how many of its tokens, and at which steps."""
        if shard not in self.store.present(asset):
            return []
        readers = []
        for arm in ARMS:
            if (plan := self._plan(arm)) is None:
                continue
            document, length = _number(plan, self.store.directory(asset, shard), split, name)
            for seed in self.experiment.seed_keys:
                starts: list[int] = []
                tokens = 0
                context = self.experiment.model.context_length
                order = StreamOrder(plan.data, context, int(seed), scratch=self.store.scratch)
                for documents, begins, counts in order.reading(plan.tokens) if document is not None else ():
                    here = documents == document
                    starts += begins[here].tolist()
                    tokens += int(counts[here].sum())
                model = f"pretraining/{arm}_model"
                step = self.experiment.pretraining.tokens_per_step
                readers.append({
                    "arm": arm,
                    "seed": seed,
                    "reads": len(starts),
                    "tokens": tokens,
                    "document_tokens": length,
                    "steps": [start // step for start in starts],
                    "of_steps": plan.steps,
                    "trained": seed in self.store.present(model),
                })  # fmt: skip
        return readers

    def example(self, name: str) -> dict[str, Any] | None:
        """Return a pair's tuning example: its split and how often synthesizer-tuning reads it; None without one."""
        if (example := self._examples.get(name)) is None:
            return None
        split, prompt_tokens, cut, number = example
        reads = self._examples_order.reads(number) if split == TRAIN else 0
        return {"split": split, "prompt_tokens": prompt_tokens, "d2_cut": cut, "reads": reads}

    @cached_property
    def _examples(self) -> dict[str, tuple[str, int, bool, int]]:
        """Return the tuning examples by id: split, prompt tokens, cut, number among those of its split."""
        if not self.store.present(EXAMPLES):
            return {}
        columns = ["id", "split", "prompt_tokens", "cut"]
        frame = read_table(self.store.directory(EXAMPLES, None) / "documents.parquet", columns=columns)
        numbered = frame.with_columns(number=pl.int_range(pl.len()).over("split"))
        return {name: tuple(rest) for name, *rest in numbered.iter_rows()}  # type: ignore[misc]

    @cached_property
    def _examples_order(self) -> ExamplesOrder:
        source = Source(directory=self.store.directory(EXAMPLES, None), split=TRAIN)
        data = ExamplesData(source=source, epochs=self.experiment.synthesizer.epochs)
        context, seed = self.experiment.model.context_length, self.experiment.first_seed
        return ExamplesOrder(data, context, seed, pad=0, scratch=self.store.scratch)

    def _plan(self, arm: Arm) -> ArmPlan | None:
        """Return what an arm reads; None where some of it is missing, or does not suffice for the token budget."""
        if arm not in self._plans:
            plan = None
            needed = (TOKENS, SYNTHETIC_TOKENS) if arm == "sbp" else (TOKENS,)
            if not any(self.store.missing(asset) for asset in needed):
                try:
                    plan = plan_arm(arm, self.experiment.pretraining, *(self._shards(a) for a in needed))
                except BudgetError:
                    plan = None
            self._plans[arm] = plan
        return self._plans[arm]

    def _shards(self, asset: str) -> dict[str, Path]:
        return {str(shard): self.store.directory(asset, shard) for shard in self.store.present(asset)}


def _number(plan: ArmPlan, directory: Path, split: str | None, name: str) -> tuple[int | None, int | None]:
    """Return a document's number in the arm's reading order and its tokens; None if the arm does not read it."""
    before = 0
    for source in [*plan.data.repeated, *plan.data.once]:
        arrays = TokenArrays.load(source.directory)
        chosen = np.ones(len(arrays.documents), bool)
        if source.split is not None:
            chosen = (arrays.documents["split"] == source.split).to_numpy()
        if source.directory == directory and source.split == split:
            found = np.flatnonzero(chosen & (arrays.documents["id"] == name).to_numpy())
            if len(found):
                return before + int(chosen[: found[0]].sum()), int(arrays.lengths[found[0]])
        before += int(chosen.sum())
    return None, None
