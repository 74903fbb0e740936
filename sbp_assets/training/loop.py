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
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint as recompute
from transformers import PreTrainedTokenizerBase, Qwen3ForCausalLM

from sbp_assets.settings import Optimizer
from sbp_assets.storage.artifacts import content_version
from sbp_assets.storage.progress import Progress
from sbp_assets.training.checkpoint import (
    discard_checkpoint,
    finished,
    load_best,
    load_checkpoint,
    prune_best,
    remove_partial,
    save_best,
    save_checkpoint,
)
from sbp_assets.training.launch import ENDING_SECONDS
from sbp_assets.training.model import build_model, load_model, load_training_tokenizer, model_config
from sbp_assets.training.order import IGNORED, DataOrder, Documents, ExamplesOrder, Rows, StreamOrder, heldout_rows
from sbp_assets.training.spec import StreamData, TrainingSpec

logger = logging.getLogger("sbp_assets.training")

METRICS = {
    "step": pl.Int64,
    "tokens": pl.Int64,
    "train_loss": pl.Float64,
    "heldout_loss": pl.Float64,
    "learning_rate": pl.Float64,
    "gradient_norm": pl.Float64,
}
"""Columns of metrics.parquet: one row per step, row 0 before any. Losses are nats per supervised token."""

_LOGITS_AT_ONCE = 1 << 28  # Above this many, logits are made in chunks and made again in the backward pass.
_FULL_STATE = StateDictOptions(full_state_dict=True, cpu_offload=True)


class TrainingDiverged(RuntimeError):
    """The loss or the gradient is no longer a finite number."""


class TrainingEnded(Exception):
    """The run was asked to end and has saved its state; the next one goes on from there."""


@dataclass(frozen=True)
class World:
    """This process among the run's processes."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this process logs and writes."""
        return self.rank == 0

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum of `tensor` over the processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def barrier(self) -> None:
        """Wait for the other processes."""
        if self.size > 1:
            dist.barrier()


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


class PackedLoss(nn.Module):
    """Summed next-token loss of packed rows.

    transformers builds the mask that keeps documents apart from restarting `position_ids`, once per forward pass, if
    and only if no attention mask is given and no cache is used (measured otherwise: logits differ by 0.30).
    """

    def __init__(self, causal: Qwen3ForCausalLM) -> None:
        super().__init__()
        self.causal = causal

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Scalar sum of -log p(label) over labels that are not IGNORED; all arguments (rows, context)."""
        hidden = self.causal.model(input_ids=input_ids, position_ids=position_ids, use_cache=False).last_hidden_state
        # Logits only where there is a label: a third to a half of a tuning example has none.
        supervised = labels != IGNORED
        hidden, labels = hidden[supervised], labels[supervised]
        chunk = max(1, _LOGITS_AT_ONCE // self.causal.config.vocab_size)
        if len(labels) <= chunk:
            return self._loss(hidden, labels)
        parts = [
            recompute(self._loss, h, y, use_reentrant=False)
            for h, y in zip(hidden.split(chunk), labels.split(chunk), strict=True)
        ]
        return torch.stack(parts).sum()

    def _loss(self, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(self.causal.lm_head(hidden).float(), labels, reduction="sum")


def learning_rate(step: int, steps: int, optimizer: Optimizer) -> float:
    """Rate of 0-based `step`: linear warm-up to the peak, then a cosine that ends at the final rate."""
    warmup = max(1, round(optimizer.warmup * steps))
    if step < warmup:
        return optimizer.learning_rate * (step + 1) / warmup
    share = (step + 1 - warmup) / max(1, steps - warmup)
    final = optimizer.final_learning_rate
    return optimizer.learning_rate * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * share)))


def evaluation_steps(steps: int, evaluations: int) -> set[int]:
    """Steps after which held-out loss is measured: 0, and `evaluations` evenly spread ones up to the last."""
    return {0, *(math.ceil(k * steps / evaluations) for k in range(1, evaluations + 1))}


def make_order(spec: TrainingSpec, pad: int) -> DataOrder:
    """The run's data order."""
    if isinstance(spec.data, StreamData):
        return StreamOrder(spec.data, spec.model.context_length, spec.seed)
    return ExamplesOrder(spec.data, spec.model.context_length, spec.seed, pad)


def total_steps(spec: TrainingSpec, order: DataOrder) -> int:
    """Steps of the run; ValueError where the data ends before them."""
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
    """What the run computes, field by field: two runs with equal fingerprints make the same model."""
    heldout = Documents(spec.heldout).digest(vocab_size)[:16] if spec.heldout else None
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


def initial_weights(spec: TrainingSpec, tokenizer: PreTrainedTokenizerBase) -> Qwen3ForCausalLM:
    """Model to start from; ValueError where `initial_model` has another geometry or vocabulary than the spec."""
    if spec.initial_model is None:
        return build_model(spec.model, tokenizer, spec.seed)
    model = load_model(spec.initial_model)
    wanted, found = model_config(spec.model, tokenizer).to_dict(), model.config.to_dict()
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads", "head_dim", "rope_parameters", "tie_word_embeddings")  # fmt: skip
    if lines := [f"{name}: {found[name]} → {wanted[name]}" for name in names if found[name] != wanted[name]]:
        raise ValueError(f"initial model {spec.initial_model} is not the spec's model:\n  " + "\n  ".join(lines))
    return model


def train(spec: TrainingSpec, world: World) -> Trained | None:
    """Train `spec`'s model, from its checkpoint where there is one; None where `output_dir` already holds it.

    SIGTERM or SIGINT in the midst of it, as from whoever cancels a run or takes the machine back, writes a checkpoint
    after the step and raises TrainingEnded. To be called in the main thread.

    Raises ValueError for data, tokenizers or initial models that do not fit, CheckpointMismatch for a checkpoint of
    another run, TrainingDiverged where the loss is no longer finite. Every process must call this.
    """
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
        self.microbatch = max(1, spec.microbatch_tokens // spec.model.context_length)
        self.module = PackedLoss(initial_weights(spec, tokenizer)).to(world.device)
        self.module.train()
        if self.sharded:
            _shard(self.module, spec.optimizer.dtype)
        self.optimizer = _make_optimizer(self.module, spec.optimizer)
        context = spec.model.context_length
        self.heldout = heldout_rows(spec.heldout, context, spec.heldout_tokens) if spec.heldout else None
        self.metrics: dict[str, list[float | None]] = {name: [] for name in METRICS}
        self.step, self.seconds_before = 0, 0.0
        self._restore()
        # Counted from the batches, not multiplied out: the arms' budgets are compared by it.
        self.tokens_read = int(self.metrics["tokens"][-1] or 0) if self.metrics["tokens"] else 0
        self.gradients = None if self.sharded else _flat_gradients(self.module)
        self.asked_to_end = False  # by a signal to this process
        self.end = False  # one of the processes was, as all of them found in the last step

    def train(self) -> Trained:
        spec, per_step = self.spec, self.spec.optimizer.tokens_per_step
        measured = evaluation_steps(self.steps, spec.evaluations)
        progress = Progress(spec.name, "tokens", self.steps * per_step, done=self.step * per_step)
        started = self.saved = time.monotonic()
        with self._ending_on_request(), progress if self.world.leads else nullcontext():
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
                    self.world.barrier()  # torchrun, seeing one gone, would not wait long for the one that saves
                    raise TrainingEnded(f"{spec.name}: ended as asked after step {self.step} of {self.steps}, saved")
        seconds = self.seconds_before + time.monotonic() - started
        state, _ = get_state_dict(self.module.causal, [], options=_FULL_STATE)
        metrics = pl.DataFrame(self.metrics, schema=METRICS)
        best = self._best_step()
        best_state = load_best(spec.work_dir, best) if self.world.leads and best not in (None, self.steps) else None
        return Trained(
            cast(dict[str, torch.Tensor], state), metrics, seconds, self.identity, self.tokens_read, best, best_state
        )

    def _optimize(self, rate: float) -> tuple[float, float]:
        """One optimizer step: loss per supervised token of the global batch, gradient norm before clipping."""
        spec, rows_per_step = self.spec, self.spec.rows_per_step
        batch = self.order.rows(self.step * rows_per_step, (self.step + 1) * rows_per_step)
        self.tokens_read += batch.input_ids.size
        # Every process makes the global batch's rows, which costs less than agreeing on the number by message.
        supervised = max(1, batch.supervised)
        share = math.ceil(rows_per_step / self.world.size)
        own = batch.part(self.world.rank * share, (self.world.rank + 1) * share).padded(share)
        loss_sum = torch.zeros((), device=self.world.device)
        for ids, positions, labels in self._microbatches(own):
            with self._autocast():
                loss = self.module(ids, positions, labels)
            # FSDP averages gradients over processes; here they are sums over tokens.
            (loss * (self.world.size if self.sharded else 1) / supervised).backward()
            loss_sum += loss.detach() / supervised
        if self.gradients is None:
            asked = torch.tensor(float(self.asked_to_end), device=loss_sum.device)
            message = self.world.sum(torch.stack([asked, loss_sum]))
            end, total = message.tolist()
            norm = float(_full(nn.utils.clip_grad_norm_(self.module.parameters(), spec.optimizer.gradient_clip)))
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
            raise TrainingDiverged(
                f"{spec.name}: at step {self.step + 1} the loss is {total} and the gradient norm {norm} (learning rate "
                f"{rate:.3g}); lower the learning rate or gradient_clip, or train in float32"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        if self.gradients is None:
            self.optimizer.zero_grad()
        else:
            self.gradients.zero_()
        return total, norm

    @torch.no_grad()
    def _heldout_loss(self) -> float | None:
        if self.heldout is None:
            return None
        share = math.ceil(len(self.heldout.input_ids) / self.world.size)
        own = self.heldout.part(self.world.rank * share, (self.world.rank + 1) * share).padded(share)
        total = torch.zeros((), dtype=torch.float64, device=self.world.device)
        for ids, positions, labels in self._microbatches(own):
            with self._autocast():
                total += self.module(ids, positions, labels)
        return float(self.world.sum(total)) / max(1, self.heldout.supervised)

    def _microbatches(self, rows: Rows) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        for start in range(0, len(rows.input_ids), self.microbatch):
            part = rows.part(start, start + self.microbatch)
            # Sharded processes must all make the same number of passes.
            if part.supervised or self.sharded:
                ids, positions, labels = (
                    torch.from_numpy(array).to(self.world.device, non_blocking=True)
                    for array in (part.input_ids, part.position_ids, part.labels)
                )
                yield ids, positions, labels

    def _autocast(self) -> torch.autocast:
        # Sharded modules cast by their own policy.
        enabled = self.spec.optimizer.dtype == "bfloat16" and not self.sharded
        return torch.autocast(self.world.device.type, dtype=torch.bfloat16, enabled=enabled)

    def _record(
        self, step: int, loss: float | None, heldout: float | None, rate: float | None, norm: float | None
    ) -> None:
        values = (step, self.tokens_read, loss, heldout, rate, norm)
        for name, value in zip(METRICS, values, strict=True):
            self.metrics[name].append(value)
        if heldout is not None and self.world.leads:
            logger.info("%s: step %d/%d · held-out loss %.4f", self.spec.name, step, self.steps, heldout)

    def _best_step(self) -> int | None:
        """Trained step of the lowest held-out loss so far, the first of equals; None where none is to be kept."""
        # From the record, so that a resumed run goes on from what the one before had found.
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
        """Signals that would end the process are noted for the block, and heard with the step under way.

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
        weights, optimizer = get_state_dict(self.module, self.optimizer, options=_FULL_STATE)
        if self.world.leads:
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
            self.optimizer,
            model_state_dict=checkpoint["weights"],
            optim_state_dict=checkpoint["optimizer"],
            options=StateDictOptions(full_state_dict=True),
        )
        self.step, self.seconds_before = checkpoint["step"], checkpoint["seconds"]
        self.metrics = checkpoint["metrics"]
        if self.world.leads:
            if (best := self._best_step()) is not None:
                load_best(self.spec.work_dir, best)  # missing weights are told now, not after the last step
            logger.info("%s: resuming after step %d of %d", self.spec.name, self.step, self.steps)


def finish(spec: TrainingSpec) -> None:
    """Remove what a finished run leaves in its work directory."""
    discard_checkpoint(spec.work_dir)


def _make_optimizer(module: nn.Module, settings: Optimizer) -> torch.optim.AdamW:
    parameters = list(module.parameters())
    return torch.optim.AdamW(
        [
            # Norm weights are not decayed; embeddings are matrices and are.
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": settings.weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        # 0.7M parameters on one core, whole step: fused 117 ms, foreach 122 ms, neither 139 ms (busy machine).
        fused=True,
    )


def _flat_gradients(module: nn.Module) -> torch.Tensor:
    """One zeroed buffer that the parameters' gradients are views of, and two places more at its end.

    Summing over processes, the norm and clipping then take one operation each instead of one per parameter.
    """
    parameters = list(module.parameters())
    flat = torch.zeros(sum(p.numel() for p in parameters) + 2, device=parameters[0].device)
    at = 0
    for parameter in parameters:
        parameter.grad = flat[at : at + parameter.numel()].view_as(parameter)
        at += parameter.numel()
    return flat


def _shard(module: PackedLoss, dtype: str) -> None:
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if dtype == "bfloat16" else MixedPrecisionPolicy()
    for layer in module.causal.model.layers:
        fully_shard(layer, mp_policy=policy)
    fully_shard(module, mp_policy=policy)


def _full(tensor: Any) -> torch.Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
