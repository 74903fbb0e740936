import sys

import pytest
import torch

from sbp_assets.training.device import peak_flops, resolve_device


@pytest.mark.parametrize(("available", "expected"), [(True, "cuda"), (False, "cpu")])
def test_auto_is_cuda_where_torch_finds_it(monkeypatch: pytest.MonkeyPatch, available: bool, expected: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
    assert resolve_device("auto") == expected


@pytest.mark.parametrize("named", ["cpu", "cuda"])
def test_a_named_device_is_returned_without_loading_torch(monkeypatch: pytest.MonkeyPatch, named: str) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    assert resolve_device(named) == named


def test_peak_flops_are_known_by_a_part_of_the_name():
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_flops("x86_64") is None
