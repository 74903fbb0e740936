"""The processes that train one model together: their places, and how gradients and weights are shared."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from sbp_assets.training.device import resolve_device
from sbp_assets.training.packed_loss import PackedLoss
from sbp_assets.training.spec import TrainingSpec

_WORLD_TIMEOUT = timedelta(minutes=30)  # The leader may write a large checkpoint while the others wait.


@dataclass(frozen=True)
class World:
    """This process among the run's processes."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def leads(self) -> bool:
        """Return whether this process is the one that logs and writes."""
        return self.rank == 0

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the sum of `tensor` over the processes, which also replaces its content."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor

    def barrier(self) -> None:
        """Wait for the other processes."""
        if self.size > 1:
            dist.barrier()


@contextmanager
def open_world(spec: TrainingSpec) -> Iterator[World]:
    """Yield this process's place, from torchrun's environment variables, and leave the process group at the end.

    Raises RuntimeError where CUDA is asked for and absent, or has fewer devices than there are processes.
    """
    kind = resolve_device(spec.device)
    if kind == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("device is 'cuda', but torch finds no CUDA device; set deployment.device to auto or cpu")
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    device = torch.device(kind, int(os.environ.get("LOCAL_RANK", "0"))) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        if (local := int(os.environ.get("LOCAL_WORLD_SIZE", "1"))) > torch.cuda.device_count():
            raise RuntimeError(f"{local} training processes need as many GPUs, not {torch.cuda.device_count()}")
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    torch.set_num_threads(spec.threads)
    if size == 1:
        yield World(device)
        return
    dist.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=_WORLD_TIMEOUT)
    try:
        yield World(device, rank, size)
    finally:
        dist.destroy_process_group()


def flat_gradients(module: nn.Module) -> torch.Tensor:
    """Return one zeroed buffer of all parameters' numbers and two more, of which the gradients become views.

    The last two places are free for two numbers that are summed with them.

    Summing over processes, the norm and clipping then take one operation each instead of one per parameter.
    """
    parameters = list(module.parameters())
    flat = torch.zeros(sum(p.numel() for p in parameters) + 2, device=parameters[0].device)
    at = 0
    for parameter in parameters:
        parameter.grad = flat[at : at + parameter.numel()].view_as(parameter)
        at += parameter.numel()
    return flat


def shard_module(module: PackedLoss, dtype: str) -> None:
    """Shard the weights of `module` over the processes (FSDP2), layer by layer; `dtype` is that of the computation."""
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if dtype == "bfloat16" else MixedPrecisionPolicy()
    for layer in module.causal.model.layers:
        fully_shard(layer, mp_policy=policy)
    fully_shard(module, mp_policy=policy)


def full_tensor(tensor: Any) -> torch.Tensor:
    """Return the whole of a tensor that may be sharded over the processes."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
