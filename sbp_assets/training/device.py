"""Which device a model runs on."""

from __future__ import annotations

from typing import Literal

Device = Literal["auto", "cpu", "cuda"]


def resolve_device(device: Device) -> Literal["cpu", "cuda"]:
    """Return the device that `device` stands for on this machine: `auto` is CUDA where torch finds a CUDA device.

    A device that is named is returned as it is, whether it is there or not: the library that runs the model there
    says so in its own words. torch, which takes seconds to load, is imported for `auto` alone.
    """
    if device != "auto":
        return device
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
