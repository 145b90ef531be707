"""soft_embedding against float64 torch."""

from __future__ import annotations

import ops_reference as ref
import pytest
import torch

from entrgi_kernels import ops

SHAPES = [(0, 7, 3), (1, 1, 1), (3, 1, 5), (1, 7, 4), (5, 63, 17), (9, 1001, 33), (2, 151_936, 8)]
PAIRS = [(d, d) for d in ref.DTYPES] + [
    (torch.bfloat16, torch.float32),
    (torch.float32, torch.bfloat16),
    (torch.float64, torch.float32),
    (torch.float32, torch.float64),
]


def naive(logits: torch.Tensor, embedding: torch.Tensor, temperature: float) -> torch.Tensor:
    # Mixed dtypes: a product in the dtype of the table, as torch asks for.
    return torch.softmax(logits / temperature, dim=-1).to(embedding.dtype) @ embedding


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("pair", PAIRS, ids=str)
def test_values_and_both_gradients(backend, pair, shape):
    n, v, d = shape
    if v > 10_000 and pair not in ((torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16)):
        pytest.skip("the large vocabulary in two dtypes only")
    x, e = ref.peaked(n, v, pair[0]).requires_grad_(), ref.table(v, d, pair[1]).requires_grad_()
    ref.served(backend, x, e)
    g = ref.table(n, d, e.dtype, seed=3)
    results = []
    for function, logits, embedding in (
        (lambda a, b: ops.soft_embedding(a, b, temperature=0.7, backend=backend), x, e),
        (lambda a, b: ref.soft(a, b, 0.7), x.detach().double().requires_grad_(), e.detach().double().requires_grad_()),
        (lambda a, b: naive(a, b, 0.7), x.detach().clone().requires_grad_(), e.detach().clone().requires_grad_()),
    ):
        out = function(logits, embedding)
        results.append((out.detach(), *torch.autograd.grad(out, (logits, embedding), g.to(out.dtype))))
    for ours, dtype in zip(results[0], (e.dtype, x.dtype, e.dtype), strict=True):
        assert ours.dtype == dtype
    for ours, truth, plain in zip(*results, strict=True):
        assert ours.shape == truth.shape
        ref.assert_accurate(ours, truth, plain, ulps=32, floor=float(v == 1))  # V = 1: terms cancel to 0


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("shape", [(2, 1, 3), (3, 7, 4), (2, 63, 5)], ids=str)
def test_gradcheck(backend, shape, temperature):
    n, v, d = shape
    x, e = ref.peaked(n, v, spread=1.0).requires_grad_(), ref.table(v, d).requires_grad_()
    ref.served(backend, x, e)
    assert torch.autograd.gradcheck(
        lambda a, b: ops.soft_embedding(a, b, temperature=temperature, backend=backend), (x, e), fast_mode=v > 7
    )


@pytest.mark.parametrize("layout", ["strided", "transposed", "sliced"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_strides_of_logits_table_and_gradient(backend, dtype, layout):
    dense = [ref.peaked(5, 63, dtype), ref.table(63, 17, dtype), ref.table(5, 17, dtype, seed=3)]
    ref.served(backend, *dense)
    results = []
    for logits, embedding, g in (dense, [ref.layouts(t)[layout] for t in dense]):
        logits, embedding = logits.requires_grad_(), embedding.requires_grad_()
        out = ops.soft_embedding(logits, embedding, temperature=0.7, backend=backend)
        results.append((out, *torch.autograd.grad(out, (logits, embedding), g)))
    for expected, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected)


def test_stride_0(backend):
    row, e = ref.peaked(1, 63), ref.table(63, 5)
    ref.served(backend, row)
    x = row.expand(4, 63).requires_grad_()
    out = ops.soft_embedding(x, e, temperature=0.7, backend=backend)
    torch.testing.assert_close(out, ref.soft(row, e, 0.7).expand(4, 5), rtol=1e-12, atol=1e-12)
    gradient = torch.autograd.grad(out.sum(), x)[0]  # out.sum() sends a gradient of stride 0 back
    truth = row.clone().requires_grad_()
    ref.soft(truth, e, 0.7).sum().backward()
    torch.testing.assert_close(gradient, truth.grad.expand(4, 63), rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(
        ops.soft_embedding(row, e[:1].expand(63, 5), backend=backend), e[:1], rtol=1e-12, atol=1e-12
    )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_extreme_rows(backend, dtype):
    x, e = torch.full((3, 63), -torch.inf, dtype=dtype), ref.table(63, 5, dtype)
    ref.served(backend, x)
    x[0, 17] = 4.0
    x[1], x[1, 9] = -1e4, 1e4
    x[2, 3], x[2, 4] = -1e4, -1e4
    x.requires_grad_()
    out = ops.soft_embedding(x, e, temperature=0.7, backend=backend)
    torch.testing.assert_close(out, torch.stack([e[17], e[9], (e[3] + e[4]) / 2]), rtol=1e-5, atol=1e-6)
    gradient = torch.autograd.grad(out.sum(), x)[0]
    assert gradient.isfinite().all() and (gradient[x == -torch.inf] == 0).all()


def test_bad_rows_leave_the_others_alone(backend):
    x, good = ref.good_and_bad(63)
    e = ref.table(63, 5)
    ref.served(backend, x)
    x.requires_grad_()
    out = ops.soft_embedding(x, e, temperature=0.7, backend=backend)
    assert out[~good].isnan().all()
    torch.testing.assert_close(out[good], ref.soft(x[good], e, 0.7), rtol=1e-12, atol=1e-12)
    gradient = torch.autograd.grad(out.sum(), x)[0]
    assert gradient[good].isfinite().all() and gradient[~good].isnan().all()


def test_only_the_gradient_that_is_asked_for(backend):
    x, e = ref.peaked(3, 7), ref.table(7, 4)
    ref.served(backend, x)
    ops.soft_embedding(x, e.requires_grad_(), backend=backend).sum().backward()
    assert x.grad is None
    torch.testing.assert_close(e.grad, ref.log_p(x, 1.0).exp().T @ torch.ones(3, 4, dtype=torch.float64))
    assert not ops.soft_embedding(x, e.detach(), backend=backend).requires_grad


def test_same_bits_from_run_to_run(backend):
    x, e = ref.peaked(33, 5003, torch.float32), ref.table(5003, 64, torch.float32)
    ref.served(backend, x)
    x.requires_grad_()
    e.requires_grad_()
    runs = []
    for _ in range(2):
        out = ops.soft_embedding(x, e, temperature=0.7, backend=backend)
        runs.append((out, *torch.autograd.grad(out.square().sum(), (x, e))))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
