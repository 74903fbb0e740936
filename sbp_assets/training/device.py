"""Which device a model runs on, and how fast it can be."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

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


def emulates_bfloat16(device: torch.device) -> bool:
    """Return whether `device` has no bfloat16 products of its own, so that torch computes them in float32."""
    import torch

    if device.type == "cuda":
        return not torch.cuda.is_bf16_supported(including_emulation=False)
    capabilities = torch.cpu.get_capabilities()
    return not any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"))


def peak_flops(name: str) -> float | None:
    """Return the bfloat16 FLOP/s, at most, of a device by its name, None where they are not known."""
    return next((peak for part, peak in _PEAK_FLOPS.items() if part in name), None)
