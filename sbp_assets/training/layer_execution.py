"""How the layers of a model are executed on a device, or where they are sharded; what they compute stays the same."""

from __future__ import annotations

import logging

import torch

from sbp_assets.training.packed_loss import PackedLoss
from sbp_assets.training.spec import TrainingSpec
from sbp_assets.training.varlen import varlen_works

logger = logging.getLogger("sbp_assets.training")


def prepare_layers(module: PackedLoss, spec: TrainingSpec, device: torch.device) -> None:
    """Let the layers of `module`, which is on `device` and not sharded yet, be executed as `spec` says.

    Documents are kept apart by torch's variable-length attention where it works, which is on CUDA in bfloat16, and by
    a mask elsewhere. Raises RuntimeError where layers are to be compiled and torch finds no compiler.
    """
    causal = module.causal
    if device.type == "cuda" and spec.optimizer.dtype == "bfloat16":
        if varlen_works(device, spec.model.heads, spec.model.kv_heads, spec.model.head_dim):
            module.use_varlen()
        else:
            logger.warning("%s: variable-length attention does not work here: attention is under a mask", spec.name)
    if spec.activation_checkpointing:
        # There is no dropout whose random state would have to be kept.
        causal.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
        # For frozen embeddings; here it makes compiled layers be compiled once more.
        causal.disable_input_require_grads()
    if spec.compile:
        _require_compiler(device)
        for layer in causal.model.layers:
            # Layer by layer, as in torchtitan: one compilation serves all of them. Of `forward` alone: hooks of
            # sharding, and the second forward pass of activation checkpointing, stay outside.
            layer.forward = torch.compile(layer.forward)  # type: ignore[method-assign]


def _require_compiler(device: torch.device) -> None:
    try:
        torch.compile(lambda x: x.sin() + 1)(torch.zeros(16, device=device))
    except Exception as error:  # of dynamo, inductor, triton, the compiler: they have no type in common
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RuntimeError(
            f"compile is true, but torch.compile cannot build code on this machine ({reason}): install a C++ compiler "
            "(for a GPU also triton), or set deployment.compile to false"
        ) from None
