"""The training loop of pretraining and of synthesizer-tuning: plain torch, one process or several."""

from __future__ import annotations

import logging
import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, cast

import polars as pl
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from transformers import PreTrainedTokenizerBase

from sbp_assets.storage.progress import Progress
from sbp_assets.training.checkpoint import (
    finished,
    load_best,
    load_checkpoint,
    prune_best,
    remove_partial,
    save_best,
    save_checkpoint,
)
from sbp_assets.training.divergence import diverged, not_finite
from sbp_assets.training.launch import ENDING_SECONDS
from sbp_assets.training.layer_execution import prepare_layers
from sbp_assets.training.metrics import METRIC_SCHEMA
from sbp_assets.training.model import initial_weights, load_training_tokenizer, require_model
from sbp_assets.training.optimizer import learning_rate, make_optimizers
from sbp_assets.training.order import DataOrder
from sbp_assets.training.packed_loss import PackedLoss
from sbp_assets.training.parallel import World, flat_gradients, full_tensor, shard_module
from sbp_assets.training.plan import evaluation_steps, fingerprint, make_order, total_steps
from sbp_assets.training.rows import Rows, heldout_rows
from sbp_assets.training.spec import TrainingSpec
from sbp_assets.training.tracking import open_tracker

logger = logging.getLogger("sbp_assets.training")

_FULL_STATE = StateDictOptions(full_state_dict=True, cpu_offload=True)


class TrainingEnded(Exception):
    """The run was asked to end and has saved its state, from which the next one resumes."""


@dataclass
class Trained:
    """A trained model's full weights (empty on processes that do not lead) and its curve."""

    state: dict[str, torch.Tensor]
    metrics: pl.DataFrame
    seconds: float
    fingerprint: dict[str, Any]
    tokens: int
    best_step: int | None  # of the lowest held-out loss, where it is to be kept
    best_state: dict[str, torch.Tensor] | None  # its weights, where that is not the last step


def train(spec: TrainingSpec, world: World) -> Trained | None:
    """Train the model of `spec`, from its checkpoint if any, and return it; None where `output_dir` already holds it.

    Every process of the run must call this, in its main thread. After SIGTERM or SIGINT, as sent when a run is
    cancelled or the machine is reclaimed, it writes a checkpoint after the step and raises TrainingEnded.

    Raises ValueError for data, tokenizers or initial models that do not fit, CheckpointMismatch for a checkpoint of
    another run, TrackerError for a tracker that cannot be used, and TrainingDiverged where the loss is no longer
    finite.
    """
    if spec.initial_model is not None:
        require_model(spec.initial_model)
    tokenizer = load_training_tokenizer(spec.tokenizer_dir)
    order = make_order(spec, cast(int, tokenizer.pad_token_id))
    steps = total_steps(spec, order)
    identity = fingerprint(spec, order, steps, len(tokenizer))
    if finished(spec.output_dir, identity):
        return None
    return _Run(spec, world, tokenizer, order, steps, identity).train()


class _Run:
    def __init__(
        self,
        spec: TrainingSpec,
        world: World,
        tokenizer: PreTrainedTokenizerBase,
        order: DataOrder,
        steps: int,
        identity: dict[str, Any],
    ) -> None:
        self.spec, self.world, self.order, self.steps, self.identity = spec, world, order, steps, identity
        self.sharded = spec.sharding == "full" and world.size > 1
        # Devices, shards and compiled layers want batches of one shape; on the CPU only the tokens count.
        whole_rows = self.sharded or spec.activation_checkpointing or spec.compile
        self.by_document = world.device.type == "cpu" and not whole_rows
        self.module = PackedLoss(initial_weights(spec, tokenizer), self.by_document).to(world.device)
        self.module.train()
        if not self.by_document:
            prepare_layers(self.module, spec, world.device)
        if self.sharded:
            shard_module(self.module, spec.optimizer.dtype)
        self.optimizers = make_optimizers(self.module, spec.optimizer)
        context = spec.model.context_length
        self.heldout = None
        if spec.heldout:
            self.heldout = heldout_rows(spec.heldout, context, spec.heldout_tokens, spec.work_dir)
        self.metrics: dict[str, list[float | None]] = {name: [] for name in METRIC_SCHEMA}
        self.step, self.seconds_before = 0, 0.0
        self._restore()
        # Counted from the batches, not multiplied out: the arms' budgets are compared by it.
        self.tokens_read = int(self.metrics["tokens"][-1] or 0) if self.metrics["tokens"] else 0
        self.gradients = None if self.sharded else flat_gradients(self.module)
        self.asked_to_end = False  # by a signal to this process
        self.end = False  # one of the processes was, as all of them found in the last step
        self.tracker = open_tracker(spec, identity, self.step, world.leads)

    def train(self) -> Trained:
        spec, per_step = self.spec, self.spec.optimizer.tokens_per_step
        measured = evaluation_steps(self.steps, spec.evaluations)
        progress = Progress(spec.name, "tokens", self.steps * per_step, done=self.step * per_step)
        started = self.saved = time.monotonic()
        with self._ending_on_request(), progress if self.world.leads else nullcontext(), self.tracker:
            if self.step == 0 and not self.metrics["step"]:
                self._record(0, None, self._heldout_loss(), None, None)
            while self.step < self.steps:
                rate = learning_rate(self.step, self.steps, spec.optimizer)
                loss, norm = self._optimize(rate)
                self.step += 1
                heldout = self._heldout_loss() if self.step in measured else None
                self._record(self.step, loss, heldout, rate, norm)
                if heldout is not None and self._best_step() == self.step < self.steps:
                    self._save_best()
                if self.world.leads:
                    progress.advance(per_step, f"step {self.step}/{self.steps} · loss {loss:.4f}")
                if self._checkpoint_due():
                    self._save(time.monotonic() - started)
                if self.end and self.step < self.steps:
                    self.world.barrier()  # torchrun, seeing one end, would not wait long for the one that saves
                    raise TrainingEnded(f"{spec.name}: ended as asked after step {self.step} of {self.steps}, saved")
        seconds = self.seconds_before + time.monotonic() - started
        state, _ = get_state_dict(self.module.causal, [], options=_FULL_STATE)
        metrics = pl.DataFrame(self.metrics, schema=METRIC_SCHEMA)
        best = self._best_step()
        best_state = load_best(spec.work_dir, best) if self.world.leads and best not in (None, self.steps) else None
        return Trained(
            cast(dict[str, torch.Tensor], state), metrics, seconds, self.identity, self.tokens_read, best, best_state
        )

    def _optimize(self, rate: float) -> tuple[float, float]:
        """Take an optimizer step; return its loss, nats per supervised token, and the gradient norm before clipping."""
        spec, rows_per_step = self.spec, self.spec.rows_per_step
        batch = self.order.rows(self.step * rows_per_step, (self.step + 1) * rows_per_step)
        self.tokens_read += batch.input_ids.size
        # Every process reads the global batch's rows, which costs less than agreeing on the number by message.
        supervised = max(1, batch.supervised)
        loss_sum = torch.zeros((), device=self.world.device)
        for ids, positions, labels in self._microbatches(batch):
            with self._autocast():
                loss = self.module(ids, positions, labels)
            # FSDP averages gradients over processes; here they are sums over tokens.
            (loss * (self.world.size if self.sharded else 1) / supervised).backward()
            loss_sum += loss.detach() / supervised
        if self.gradients is None:
            asked = torch.tensor(float(self.asked_to_end), device=loss_sum.device)
            message = self.world.sum(torch.stack([asked, loss_sum]))
            end, total = message.tolist()
            norm = float(full_tensor(nn.utils.clip_grad_norm_(self.module.parameters(), spec.optimizer.gradient_clip)))
        else:
            # Two numbers ride in the last places, for one message per step.
            self.gradients[-2], self.gradients[-1] = float(self.asked_to_end), loss_sum
            self.world.sum(self.gradients)
            end, total = self.gradients[-2:].tolist()
            norm = float(self.gradients[:-2].norm())
            if norm > spec.optimizer.gradient_clip:
                self.gradients.mul_(spec.optimizer.gradient_clip / norm)
        self.end = end > 0
        if not math.isfinite(total) or not math.isfinite(norm):
            found = f"the loss is {total} and the gradient norm {norm} (learning rate {rate:.3g})"
            raise diverged(spec, self.order, self.step + 1, found)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
        if self.gradients is None:
            self.module.zero_grad()
        else:
            self.gradients.zero_()
        return total, norm

    @torch.no_grad()
    def _heldout_loss(self) -> float | None:
        if self.heldout is None:
            return None
        total = torch.zeros((), dtype=torch.float64, device=self.world.device)
        for ids, positions, labels in self._microbatches(self.heldout):
            with self._autocast():
                total += self.module(ids, positions, labels)
        loss = float(self.world.sum(total)) / max(1, self.heldout.supervised)
        if not math.isfinite(loss):
            raise diverged(self.spec, self.order, self.step, f"the held-out loss is {loss}")
        return loss

    def _microbatches(self, rows: Rows) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """Yield this process's share of `rows`, which are those of all processes."""
        for part in self._parts(rows):
            ids, positions, labels = (
                torch.from_numpy(array).to(self.world.device, non_blocking=True)
                for array in (part.input_ids, part.position_ids, part.labels)
            )
            yield ids, positions, labels

    def _parts(self, rows: Rows) -> Iterator[Rows]:
        world, at_once = self.world, self.spec.microbatch_tokens
        if self.by_document:
            own = rows.pieces(world.size)[world.rank]
            yield from (
                part for part in own.pieces(max(1, math.ceil(own.input_ids.size / at_once))) if part.input_ids.size
            )
            return
        share = math.ceil(len(rows.input_ids) / world.size)
        own = rows.part(world.rank * share, (world.rank + 1) * share).padded(share)
        count = max(1, at_once // self.spec.model.context_length)
        for start in range(0, share, count):
            part = own.part(start, start + count)
            # Sharded processes must all run the same number of forward passes.
            if part.supervised or self.sharded:
                yield part

    def _autocast(self) -> torch.autocast:
        # Sharded modules cast by their own policy.
        enabled = self.spec.optimizer.dtype == "bfloat16" and not self.sharded
        return torch.autocast(self.world.device.type, dtype=torch.bfloat16, enabled=enabled)

    def _record(
        self, step: int, loss: float | None, heldout: float | None, rate: float | None, norm: float | None
    ) -> None:
        values = (step, self.tokens_read, loss, heldout, rate, norm)
        for name, value in zip(METRIC_SCHEMA, values, strict=True):
            self.metrics[name].append(value)
        self.tracker.record(dict(zip(METRIC_SCHEMA, values, strict=True)))
        if heldout is not None and self.world.leads:
            logger.info("%s: step %d/%d · held-out loss %.4f", self.spec.name, step, self.steps, heldout)

    def _best_step(self) -> int | None:
        """Return the trained step of the lowest held-out loss so far, the first of equals; None where none is kept."""
        # From the record, so that a resumed run continues from what the one before had found.
        measured = [
            (loss, step)
            for step, loss in zip(self.metrics["step"], self.metrics["heldout_loss"], strict=True)
            if step and loss is not None
        ]
        return int(min(measured)[1]) if self.spec.keep_best and measured else None

    def _save_best(self) -> None:
        # Gathering shards takes every process; each of them has the same losses.
        if not self.sharded and not self.world.leads:
            return
        weights, _ = get_state_dict(self.module.causal, [], options=_FULL_STATE)
        if self.world.leads:
            save_best(self.spec.work_dir, self.step, cast(dict[str, torch.Tensor], weights))

    def _checkpoint_due(self) -> bool:
        if self.step == self.steps:
            return False
        if self.end:
            return True
        if self.spec.checkpoint_every_steps:
            return self.step % self.spec.checkpoint_every_steps == 0
        due = time.monotonic() - self.saved >= self.spec.checkpoint_minutes * 60
        if not self.sharded:
            return due and self.world.leads
        # Gathering shards takes every process, so the leader decides for all.
        flag = torch.tensor(float(due and self.world.leads), device=self.world.device)
        return bool(self.world.sum(flag) > 0)

    @contextmanager
    def _ending_on_request(self) -> Iterator[None]:
        """Note signals that would end the process during the block, which heeds them after the step under way.

        After ENDING_SECONDS the process ends with what it last saved: nobody waits for it any longer.
        """
        leave = threading.Timer(ENDING_SECONDS, os._exit, [1])
        leave.daemon = True

        def note(number: int, frame: object) -> None:
            if not self.asked_to_end:
                self.asked_to_end = True
                leave.start()

        before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            leave.cancel()
            for number, handler in before.items():
                signal.signal(number, handler)

    def _save(self, seconds: float) -> None:
        if not self.sharded and not self.world.leads:
            return
        weights, optimizer = get_state_dict(self.module, self.optimizers, options=_FULL_STATE)
        if self.world.leads:
            if bad := not_finite(cast(dict[str, torch.Tensor], weights)):
                raise diverged(self.spec, self.order, self.step, f"{bad} has weights that are no finite numbers")
            self.tracker.flush()
            save_checkpoint(
                self.spec.work_dir,
                {
                    "fingerprint": self.identity,
                    "step": self.step,
                    "seconds": self.seconds_before + seconds,
                    "metrics": self.metrics,
                    "weights": weights,
                    "optimizer": optimizer,
                },
            )
            prune_best(self.spec.work_dir, self._best_step())
        self.saved = time.monotonic()

    def _restore(self) -> None:
        if self.world.leads:
            remove_partial(self.spec.work_dir)
        checkpoint = load_checkpoint(self.spec.work_dir, self.identity)
        if checkpoint is None:
            return
        set_state_dict(
            self.module,
            self.optimizers,
            model_state_dict=checkpoint["weights"],
            optim_state_dict=checkpoint["optimizer"],
            options=StateDictOptions(full_state_dict=True),
        )
        self.step, self.seconds_before = checkpoint["step"], checkpoint["seconds"]
        self.metrics = checkpoint["metrics"]
        if self.world.leads:
            if (best := self._best_step()) is not None:
                load_best(self.spec.work_dir, best)  # missing weights are reported now, not after the last step
            logger.info("%s: resuming after step %d of %d", self.spec.name, self.step, self.steps)
