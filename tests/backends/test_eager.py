"""The oracle's own promises: its chunking changes nothing, and it keeps the table in the table's dtype."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from entrgi_kernels.backends import eager
from entrgi_kernels.backends.arguments import Adam, Draw

N, V, D = 5, 37, 6


def _inputs(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(0)
    return tuple(torch.randn(*s, generator=g, dtype=torch.float64).to(dtype) for s in ((N, V), (V, D), (N, D)))


def _everything(dtype: torch.dtype) -> list[torch.Tensor]:
    x, e, g = _inputs(dtype)
    rng, rows = torch.tensor([1, 2]), torch.arange(N)
    soft, lse = eager.soft_embedding(x, e, 0.7)
    m, v = torch.zeros_like(x), torch.zeros_like(x)
    results = [
        eager.sample_tokens(x, Draw(rng, rows, 0.7, 0, 0.9)),
        soft,
        eager.soft_embedding_backward(x, e, g, soft, lse, 0.7),
        eager.soft_embedding_grad_table(x, g, lse, 0.7, dtype),
        *eager.entrgi_embedding(x, e, Draw(rng, rows, 0.7, 3, 0.9), None, None, "entropy"),
    ]
    for step in (1, 2):
        eager.guidance_update_(x, g, e, soft, lse, 0.7, Adam(m, v, step, 0.5, 0.9, 0.999, 1e-3))
    return [*results, x, m, v]


@pytest.mark.parametrize("budget", [1, 40, 100])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_chunks_change_nothing(monkeypatch, dtype, budget):
    whole = _everything(dtype)
    monkeypatch.setattr(eager, "CHUNK_ELEMENTS", budget)
    for ours, expected in zip(_everything(dtype), whole, strict=True):
        torch.testing.assert_close(ours, expected)


class _Largest(TorchDispatchMode):
    """Remembers the largest output of a dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype, self.elements = dtype, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor) and t.dtype == self.dtype:
                self.elements = max(self.elements, t.numel())
        return out


def test_a_half_precision_table_is_never_copied_in_float32(monkeypatch):
    monkeypatch.setattr(eager, "CHUNK_ELEMENTS", 64)
    v, d = 512, 64
    x, e, g = (torch.randn(*s).bfloat16() for s in ((2, v), (v, d), (2, d)))
    with _Largest(torch.float32) as largest:
        soft, lse = eager.soft_embedding(x, e, 0.7)
        eager.soft_embedding_backward(x, e, g, soft, lse, 0.7)
        eager.guidance_update_(x, g, e, soft, lse, 0.7, Adam(None, None, 1, 0.5, 0.9, 0.999, 1e-3))
    assert 0 < largest.elements <= 2 * v < v * d


def test_raw_functions_serve_everything():
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        assert eager.why_not(torch.device("cpu"), dtype) is None


def test_threshold_is_the_smallest_kept_logit():
    x = torch.tensor([[0.0, 3.0, 1.0, 1.0, 2.0], [5.0, -9.0, -9.0, -9.0, -9.0]])
    assert eager.filter_threshold(x, 1.0, 0, 1.0).tolist() == [-torch.inf, -torch.inf]
    assert eager.filter_threshold(x, 1.0, 3, 1.0).tolist() == [1.0, -9.0]
    assert eager.filter_threshold(x, 1.0, 0, 0.5).tolist() == [3.0, 5.0]
    assert eager.filter_threshold(x, 1.0, 0, 0.7).tolist() == [2.0, 5.0]
    assert eager.filter_threshold(x, 1.0, 1, 0.7).tolist() == [3.0, 5.0]
    assert eager.filter_threshold(x, 10.0, 0, 0.7).tolist() == [1.0, -9.0]
