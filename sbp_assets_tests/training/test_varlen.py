import pytest
import torch

from sbp_assets.training import varlen
from sbp_assets.training.varlen import attend, document_boundaries, varlen_works

CPU = torch.device("cpu")


def test_boundaries_are_the_starts_of_documents_and_the_end():
    positions = torch.tensor([0, 1, 2, 0, 0, 1])
    boundaries = document_boundaries(positions)
    assert boundaries.tolist() == [0, 3, 4, 6] and boundaries.dtype == torch.int32


def test_the_kernels_take_these_arguments():
    """Shapes and types alone: the numbers need a GPU."""
    query, key, value = (
        torch.empty(6, heads, 16, dtype=torch.bfloat16, device="meta", requires_grad=True) for heads in (4, 2, 2)
    )
    found = attend(query, key, value, torch.empty(4, dtype=torch.int32, device="meta"), longest=3)
    gradients = torch.autograd.grad(found.sum(), (query, key, value))
    assert found.shape == query.shape
    assert [gradient.shape for gradient in gradients] == [query.shape, key.shape, value.shape]


def test_attention_that_agrees_with_the_one_in_float32_works():
    assert varlen_works(CPU, heads=4, kv_heads=2, width=16)


def test_attention_across_documents_does_not_work(monkeypatch: pytest.MonkeyPatch):
    across = torch.tensor([0, sum(varlen._PROBE_LENGTHS)])
    monkeypatch.setattr(varlen, "attend", lambda q, k, v, **_: varlen._one_by_one(q, k, v, across))
    assert not varlen_works(CPU, heads=4, kv_heads=2, width=16)


@pytest.mark.parametrize(
    "error", [RuntimeError("USE_FLASH_ATTENTION was not enabled for build"), TypeError("unexpected keyword argument")]
)
def test_kernels_that_are_missing_do_not_work(monkeypatch: pytest.MonkeyPatch, error: Exception):
    def missing(*_: object, **__: object) -> torch.Tensor:
        raise error

    monkeypatch.setattr(varlen, "attend", missing)
    assert not varlen_works(CPU, heads=4, kv_heads=2, width=16)


def test_kernels_without_grouped_heads_get_each_key_as_often_as_queries_share_it(monkeypatch: pytest.MonkeyPatch):
    """As torch 2.11 has them. Only the device's kind is feigned: the kernels stand aside for attention one by one."""
    query, key, value = (torch.randn(6, heads, 8) for heads in (4, 2, 2))
    boundaries = torch.tensor([0, 2, 6])
    wanted = attend(query, key, value, boundaries, longest=4)

    def kernels(q, k, v, begins, _ends, *_longest, window_size):
        assert q.shape == k.shape == v.shape and window_size == (-1, 0)
        return varlen._one_by_one(q.as_subclass(torch.Tensor), k, v, begins)

    class Elsewhere(torch.Tensor):
        device = torch.device("meta")

    monkeypatch.setattr(varlen, "varlen_attn", kernels)
    monkeypatch.setattr(varlen, "_GROUPED", {})
    assert torch.equal(attend(query.as_subclass(Elsewhere), key, value, boundaries, longest=4), wanted)
