import sys

import pytest
import torch

from sbp_assets.training.device import emulates_bfloat16, peak_flops, resolve_device


@pytest.mark.parametrize(("available", "expected"), [(True, "cuda"), (False, "cpu")])
def test_auto_is_cuda_where_torch_finds_it(monkeypatch: pytest.MonkeyPatch, available: bool, expected: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    assert resolve_device("auto") == expected


@pytest.mark.parametrize("named", ["cpu", "cuda"])
def test_a_named_device_is_returned_without_loading_torch(monkeypatch: pytest.MonkeyPatch, named: str) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert resolve_device(named) == named


@pytest.mark.parametrize(
    ("capabilities", "emulated"),
    [
        ({"avx2": True, "avx512_f": True, "avx512_bf16": False}, True),
        ({"avx512_bf16": True}, False),
        ({"amx_bf16": True}, False),
        ({"architecture": "aarch64", "bf16": True}, False),
        ({"architecture": "aarch64", "neon": True}, True),
    ],
)
def test_a_cpu_without_bfloat16_products_emulates_them(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, object], emulated: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert emulates_bfloat16(torch.device("cpu")) == emulated


@pytest.mark.parametrize("native", [True, False])
def test_a_gpu_without_bfloat16_products_emulates_them(monkeypatch: pytest.MonkeyPatch, native: bool) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation or native)
    assert emulates_bfloat16(torch.device("cuda")) != native


def test_peak_flops_are_known_by_a_part_of_the_name():
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("x86_64") is None
