"""softmax_entropy against float64 torch."""

from __future__ import annotations

import ops_reference as ref
import pytest
import torch

from entrgi_kernels import ops

SHAPES = [(0, 7), (1, 1), (4, 1), (1, 7), (5, 63), (3, 1001), (64, 255), (2, 151_936)]


def naive(logits: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    log_p = torch.log_softmax(logits / temperature, dim=-1)
    return torch.logsumexp(logits / temperature, dim=-1), -(log_p.exp() * log_p).sum(dim=-1)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 3.0])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", ref.DTYPES, ids=str)
def test_values(backend, dtype, shape, temperature):
    x = ref.peaked(*shape, dtype)
    ref.served(backend, x)
    lse, entropy = ops.softmax_entropy(x, temperature, backend=backend)
    assert lse.dtype == entropy.dtype == ref.accumulation(x) and lse.shape == entropy.shape == (shape[0],)
    # Statistics are float32 whatever the logits: plain torch is given them in float32 too.
    plain = naive(x.to(lse.dtype), temperature)
    ref.assert_accurate(lse, torch.logsumexp(x.double() / temperature, dim=-1), plain[0])
    ref.assert_accurate(entropy, ref.entropy(x, temperature), plain[1], ulps=16)
    assert (entropy >= 0).all()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("v", [2, 7, 63])
def test_gradcheck(backend, v, temperature):
    x = ref.peaked(3, v, spread=1.0).requires_grad_()
    ref.served(backend, x)
    assert torch.autograd.gradcheck(lambda t: ops.softmax_entropy(t, temperature, backend=backend), x, fast_mode=v > 7)


@pytest.mark.parametrize("dtype", ref.DTYPES, ids=str)
def test_gradient_in_the_logits_dtype(backend, dtype):
    x = ref.peaked(6, 255, dtype).requires_grad_()
    ref.served(backend, x)
    truth = x.detach().double().requires_grad_()
    plain = x.detach().to(ref.accumulation(x)).requires_grad_()
    weights = ref.table(6, 2)
    for t, (lse, entropy) in (
        (x, ops.softmax_entropy(x, 0.7, backend=backend)),
        (truth, (torch.logsumexp(truth / 0.7, dim=-1), ref.entropy(truth, 0.7))),
        (plain, naive(plain, 0.7)),
    ):
        ((lse * weights[:, 0].to(lse.dtype)).sum() + (entropy * weights[:, 1].to(lse.dtype)).sum()).backward()
        assert t.grad.dtype == t.dtype
    ref.assert_accurate(x.grad, truth.grad, plain.grad.to(dtype), ulps=16)


@pytest.mark.parametrize("which", [0, 1])
def test_one_output_alone_and_a_stride_0_gradient(backend, which):
    x = ref.peaked(4, 9).requires_grad_()
    ref.served(backend, x)
    ops.softmax_entropy(x, 0.7, backend=backend)[which].sum().backward()
    truth = x.detach().clone().requires_grad_()
    (torch.logsumexp(truth / 0.7, dim=-1), ref.entropy(truth, 0.7))[which].sum().backward()
    torch.testing.assert_close(x.grad, truth.grad, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("layout", ["strided", "transposed", "sliced"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_strides(backend, dtype, layout):
    dense = ref.peaked(5, 63, dtype)
    ref.served(backend, dense)
    x = ref.layouts(dense)[layout].requires_grad_()
    dense.requires_grad_()
    ours, expected = (torch.stack(ops.softmax_entropy(t, 0.7, backend=backend)) for t in (x, dense))
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)
    gradients = [torch.autograd.grad(out.sum(), t)[0] for out, t in ((ours, x), (expected, dense))]
    torch.testing.assert_close(*gradients)


def test_stride_0(backend):
    row, column = ref.peaked(1, 63), torch.full((5, 1), 2.5, dtype=torch.float64)
    ref.served(backend, row)
    lse, entropy = ops.softmax_entropy(row.expand(5, 63), backend=backend)
    assert torch.equal(lse, lse[:1].expand(5)) and torch.equal(entropy, entropy[:1].expand(5))
    torch.testing.assert_close(entropy[:1], ref.entropy(row))
    entropy = ops.softmax_entropy(column.expand(5, 63), backend=backend)[1]
    torch.testing.assert_close(entropy, torch.full_like(entropy, 63).log())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_extreme_rows(backend, dtype):
    x = torch.full((4, 63), -torch.inf, dtype=dtype)
    ref.served(backend, x)
    x[0, 17] = -3.0
    x[1] = -1e4
    x[2, ::2], x[2, 1::2] = 1e4, -1e4
    x[3, 5], x[3, 6] = 1e4, 1e4
    x.requires_grad_()
    lse, entropy = ops.softmax_entropy(x, backend=backend)
    # As the dtype holds them: 1e4 itself is exact in float16.
    log = torch.tensor([1.0, 63.0, 32.0, 2.0], dtype=torch.float64).log()
    torch.testing.assert_close(entropy.double(), log, rtol=1e-6, atol=1e-6)
    expected = torch.tensor([-3.0, -1e4, 1e4, 1e4], dtype=torch.float64) + log
    torch.testing.assert_close(lse.double(), expected, rtol=1e-6, atol=1e-6)
    (gradient,) = torch.autograd.grad(lse.sum() + entropy.sum(), x)
    assert gradient.isfinite().all()
    assert (gradient[0][torch.arange(63) != 17] == 0).all() and gradient[0, 17] == 1


def test_bad_rows_leave_the_others_alone(backend):
    x, good = ref.good_and_bad(63)
    ref.served(backend, x)
    x.requires_grad_()
    lse, entropy = ops.softmax_entropy(x, 0.7, backend=backend)
    assert torch.equal(lse.isnan(), ~good) and torch.equal(entropy.isnan(), ~good)
    alone = x.detach()[good].requires_grad_()
    lse1, entropy1 = ops.softmax_entropy(alone, 0.7, backend=backend)
    assert torch.equal(lse[good], lse1) and torch.equal(entropy[good], entropy1)
    gradient = torch.autograd.grad(lse.sum() + entropy.sum(), x)[0]
    assert torch.equal(gradient[good], torch.autograd.grad(lse1.sum() + entropy1.sum(), alone)[0])
    assert gradient[~good].isnan().all()


def test_temperature_0_stands_for_1(backend):
    x = ref.peaked(3, 7)
    ref.served(backend, x)
    for ours, expected in zip(
        ops.softmax_entropy(x, 0, backend=backend), ops.softmax_entropy(x, 1.0, backend=backend), strict=True
    ):
        assert torch.equal(ours, expected)


def test_same_bits_from_run_to_run(backend):
    x = ref.peaked(33, 5003, torch.float32)
    ref.served(backend, x)
    first, second = (torch.stack(ops.softmax_entropy(x, 0.7, backend=backend)) for _ in range(2))
    assert torch.equal(first, second)
