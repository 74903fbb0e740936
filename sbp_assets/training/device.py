"""Which device a model runs on, and how fast it can be."""

from __future__ import annotations

from typing import Literal

Device = Literal["auto", "cpu", "cuda"]

# Dense bf16 FLOP/s of a device, from the makers' data sheets, by a part of its name.
_PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12, "L40S": 362e12}


def resolve_device(device: Device) -> Literal["cpu", "cuda"]:
    """Return the device that `device` stands for on this machine: `auto` is CUDA where torch finds a CUDA device.

    A device that is named is returned as it is, whether it is there or not: the library that runs the model there
    says so in its own words. torch, which takes seconds to load, is imported for `auto` alone.
    """
    if device != "auto":
        return device
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def peak_flops(name: str) -> float | None:
    """Return the bfloat16 FLOP/s, at most, of a device by its name, None where they are not known."""
    return next((peak for part, peak in _PEAK_FLOPS.items() if part in name), None)
