"""entrgi_embedding against the method written out in float64."""

from __future__ import annotations

import math

import ops_reference as ref
import pytest
import torch

from entrgi_kernels import ops

TAU = 0.7


def blend(
    x: torch.Tensor, e: torch.Tensor, tokens: torch.Tensor, weight: str | torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(embedding, weight, entropy) in the tensors' own dtype, by autograd's own means."""
    q = torch.softmax(x.detach(), dim=-1)
    entropy = torch.special.entr(q).sum(dim=-1)
    if isinstance(weight, str):
        scale = {"entropy": entropy / math.log(max(x.shape[1], 2)), "one": 1.0 + 0 * entropy, "zero": 0 * entropy}
        weight = scale[weight]
    soft = torch.softmax(x / TAU, dim=-1) @ e
    return soft + (weight[:, None].to(e.dtype) * (e[tokens] - soft)).detach(), weight, entropy


@pytest.mark.parametrize("weight", ["entropy", "one", "zero", "given"])
@pytest.mark.parametrize("shape", [(0, 7, 3), (1, 1, 1), (3, 1, 5), (1, 7, 4), (5, 63, 17), (9, 1001, 33)], ids=str)
@pytest.mark.parametrize("dtype", ref.DTYPES, ids=str)
def test_values_and_gradient(backend, dtype, shape, weight):
    n, v, d = shape
    x, e = ref.peaked(n, v, dtype), ref.table(v, d, dtype)
    ref.served(backend, x, e)
    tokens = torch.randint(v, (n,), generator=torch.Generator().manual_seed(2))
    mode = torch.linspace(-0.5, 1.5, n).double() if weight == "given" else weight
    g = ref.table(n, d, seed=3)
    results = []
    for logits, embedding in ((x, e), (x.double(), e.double()), (x, e)):
        logits = logits.clone().requires_grad_()
        if not results:
            out = ops.entrgi_embedding(logits, embedding, temperature=TAU, weight=mode, tokens=tokens, backend=backend)
            assert torch.equal(out.tokens, tokens) and not out.weight.requires_grad and not out.entropy.requires_grad
            values = out.embedding, out.weight, out.entropy
        else:
            values = blend(logits, embedding, tokens, mode)
        (gradient,) = torch.autograd.grad(values[0], logits, g.to(values[0].dtype))
        results.append((values[0].detach(), gradient))
        if len(results) == 2:
            torch.testing.assert_close(out.weight.double(), values[1].double(), rtol=1e-5, atol=2e-6)
            torch.testing.assert_close(out.entropy.double(), values[2], rtol=1e-5, atol=1e-5)
    assert out.weight.dtype == out.entropy.dtype == ref.accumulation(x)
    assert out.embedding.dtype == dtype
    for ours, truth, plain in zip(*results, strict=True):
        ref.assert_accurate(ours, truth, plain, ulps=32, floor=float(v == 1))


@pytest.mark.parametrize("weight", ["entropy", "one", "zero"])
def test_gradient_is_that_of_the_soft_embedding(backend, weight):
    """w and x are constants: whatever they are, the gradient is the soft embedding's, unscaled."""
    x, e, g = ref.peaked(5, 63, spread=1.0).requires_grad_(), ref.table(63, 9), ref.table(5, 9, seed=3)
    ref.served(backend, x)
    out = ops.entrgi_embedding(x, e, temperature=TAU, weight=weight, top_p=0.9, seed=3, backend=backend)
    soft = ref.soft(x, e, TAU)
    ours, expected = (torch.autograd.grad(y, x, g)[0] for y in (out.embedding, soft))
    torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-13)
    assert weight == "zero" or not torch.allclose(out.embedding, soft)


@pytest.mark.parametrize("v", [1, 7, 63])
def test_gradcheck(backend, v):
    """Finite differences see the whole value, so they agree with the gradient for w = 0 alone."""
    x, e = ref.peaked(3, v, spread=1.0).requires_grad_(), ref.table(v, 4)
    ref.served(backend, x)
    assert torch.autograd.gradcheck(
        lambda t: ops.entrgi_embedding(t, e, temperature=TAU, weight="zero", backend=backend).embedding,
        x,
        fast_mode=v > 7,
    )


def test_own_draws_are_sample_tokens(backend):
    x, e = ref.peaked(200, 63, torch.float32, spread=1.0), ref.table(63, 4, torch.float32)
    ref.served(backend, x)
    draw = {"temperature": TAU, "top_k": 20, "top_p": 0.9, "seed": 5, "counter": 6, "keys": torch.arange(200) * 7 - 9}
    for weight in ("entropy", "one", torch.rand(200), lambda h, v: h / 9):
        out = ops.entrgi_embedding(x, e, weight=weight, backend=backend, **draw)
        assert torch.equal(out.tokens, ops.sample_tokens(x, backend=backend, **draw))
    hard = ops.entrgi_embedding(x, e, weight="one", backend=backend, **draw)
    torch.testing.assert_close(hard.embedding, e[hard.tokens], rtol=1e-6, atol=1e-6)


def test_weight_zero_draws_nothing(backend):
    x, e = ref.peaked(4, 63), ref.table(63, 4)
    ref.served(backend, x)
    out = ops.entrgi_embedding(x, e, temperature=TAU, weight="zero", backend=backend)
    assert out.tokens.tolist() == [-1] * 4 and out.weight.tolist() == [0] * 4
    torch.testing.assert_close(out.embedding, ref.soft(x, e, TAU), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(out.entropy, ref.entropy(x), rtol=1e-12, atol=1e-12)
    tokens = torch.arange(4)
    given = ops.entrgi_embedding(x, e, temperature=TAU, weight="zero", tokens=tokens, backend=backend)
    assert torch.equal(given.tokens, tokens) and torch.equal(given.embedding, out.embedding)


def test_callable_weight_sees_entropy_in_nats_and_v(backend):
    x, e, seen = ref.peaked(4, 63), ref.table(63, 4), []
    ref.served(backend, x)
    out = ops.entrgi_embedding(
        x, e, temperature=TAU, weight=lambda h, v: seen.append((h, v)) or h / math.log(v), backend=backend
    )
    torch.testing.assert_close(seen[0][0], ref.entropy(x), rtol=1e-12, atol=1e-12)
    assert seen[0][1] == 63 and len(seen) == 1
    named = ops.entrgi_embedding(x, e, temperature=TAU, backend=backend)
    torch.testing.assert_close(out.embedding, named.embedding, rtol=1e-12, atol=1e-12)


def test_uniform_rows_weigh_1_and_certain_rows_0(backend):
    x = torch.zeros(2, 64, dtype=torch.float64)
    ref.served(backend, x)
    x[1], x[1, 5] = -torch.inf, 2.0
    out = ops.entrgi_embedding(x, ref.table(64, 3), temperature=TAU, backend=backend)
    torch.testing.assert_close(out.weight, torch.tensor([1.0, 0.0], dtype=torch.float64), rtol=1e-12, atol=1e-12)
    assert out.tokens[1] == 5
    one = ops.entrgi_embedding(x[:1, :1].expand(2, 1), ref.table(1, 3), backend=backend)
    assert one.weight.tolist() == one.entropy.tolist() == one.tokens.tolist() == [0, 0]


def test_temperature_0_draws_the_argmax_of_temperature_1(backend):
    x, e = ref.peaked(9, 63).requires_grad_(), ref.table(63, 4)
    ref.served(backend, x)
    cold = ops.entrgi_embedding(x, e, temperature=0, backend=backend)
    assert torch.equal(cold.tokens, x.argmax(dim=-1))
    warm = ops.entrgi_embedding(x, e, temperature=1.0, tokens=x.argmax(dim=-1), backend=backend)
    assert torch.equal(cold.embedding, warm.embedding)
    assert torch.equal(*(torch.autograd.grad(o.embedding.sum(), x)[0] for o in (cold, warm)))


def test_state_for_the_update(backend):
    x, e = ref.peaked(5, 63), ref.table(63, 4)
    ref.served(backend, x)
    x[3, 7] = x[3, 2] = 50.0
    out = ops.entrgi_embedding(x, e, temperature=TAU, backend=backend)
    kept = out.state
    torch.testing.assert_close(kept.soft, ref.soft(x, e, TAU), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(kept.logsumexp, torch.logsumexp(x / TAU, dim=-1), rtol=1e-12, atol=1e-12)
    assert torch.equal(kept.argmax, x.argmax(dim=-1)) and kept.argmax[3] == 2
    half = ops.entrgi_embedding(x.bfloat16(), e.bfloat16(), temperature=TAU, backend="eager").state
    assert half.soft.dtype == half.logsumexp.dtype == torch.float32


@pytest.mark.parametrize("weight", ["entropy", "one", "zero"])
def test_bad_rows_leave_the_others_alone(backend, weight):
    x, good = ref.good_and_bad(63)
    ref.served(backend, x)
    x.requires_grad_()
    e, rows = ref.table(63, 4), torch.arange(8)
    out = ops.entrgi_embedding(x, e, temperature=TAU, weight=weight, top_p=0.9, backend=backend)
    assert torch.equal(out.embedding.isnan().all(dim=-1), ~good) and torch.equal(out.entropy.isnan(), ~good)
    if weight != "zero":
        assert torch.equal(out.tokens == -1, ~good)
    if weight == "entropy":
        assert torch.equal(out.weight.isnan(), ~good)
    alone = ops.entrgi_embedding(
        x.detach()[good], e, temperature=TAU, weight=weight, top_p=0.9, keys=rows[good], backend=backend
    )
    assert torch.equal(out.tokens[good], alone.tokens)
    torch.testing.assert_close(out.embedding[good], alone.embedding, rtol=1e-12, atol=1e-12)
    gradient = torch.autograd.grad(out.embedding.sum(), x)[0]
    assert gradient[good].isfinite().all()


@pytest.mark.parametrize("layout", ["strided", "transposed", "sliced"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_strides(backend, dtype, layout):
    x, e, g = ref.peaked(5, 63, dtype), ref.table(63, 17, dtype), ref.table(5, 17, dtype, seed=3)
    ref.served(backend, x, e)
    tokens, weight = torch.arange(10)[::2], torch.rand(10)[::2]
    results = []
    for case in ((x, e, g, tokens, weight), (*(ref.layouts(t)[layout] for t in (x, e, g)), tokens, weight)):
        logits = case[0].requires_grad_()
        out = ops.entrgi_embedding(
            logits, case[1], temperature=TAU, tokens=case[3], weight=case[4], top_p=0.9, backend=backend
        )
        results.append((*out, torch.autograd.grad(out.embedding, logits, case[2])[0]))
    for expected, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("weight", ["entropy", "one", "zero", "given"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_rows_go_to_their_places(backend, dtype, weight):
    """The very bits of the blend by itself, in a slice of something wider; whatever lies around them stays."""
    e, wide = ref.table(63, 17, dtype), torch.full((14, 40), torch.nan, dtype=dtype)
    for n in (9, 1, 0):
        x = ref.peaked(n, 63, dtype)
        ref.served(backend, x)
        mode = torch.linspace(-0.5, 1.5, n) if weight == "given" else weight
        settings = dict(temperature=TAU, weight=mode, top_p=0.9, seed=3, backend=backend)
        out, index = wide[1:13, 5:22], torch.randperm(12).repeat_interleave(2)[: 2 * n : 2]
        placed = ops.entrgi_embedding(x, e, out=out, index=index, **settings)
        alone = ops.entrgi_embedding(x, e, **settings)
        assert placed.embedding is out and torch.equal(out[index], alone.embedding)
        beside = ((*each[1:4], *each.state[:3]) for each in (placed, alone))
        assert all(torch.equal(a, b) for a, b in zip(*beside, strict=True))
        out[index] = torch.nan
        assert wide.isnan().all()


def test_places_outside_are_an_error_on_a_cpu(backend):
    x, e, out = ref.peaked(2, 7), ref.table(7, 4), torch.zeros(3, 4, dtype=torch.float64)
    ref.served(backend, x)
    if backend == "triton":
        pytest.skip("on a GPU nobody looks at indices")
    for outside in (3, -1):
        with pytest.raises(IndexError):
            ops.entrgi_embedding(x, e, out=out, index=torch.tensor([1, outside]), backend=backend)


def test_phi_that_requires_grad_is_written_out_under_no_grad(backend):
    x, e = ref.peaked(2, 7).requires_grad_(), ref.table(7, 4)
    ref.served(backend, x)
    out = torch.zeros(3, 4, dtype=torch.float64)
    version = out._version
    with torch.no_grad():
        ops.entrgi_embedding(x, e, out=out, index=torch.tensor([2, 0]), backend=backend)
    assert out[[0, 2]].any() and out._version > version  # autograd is told


def test_large_vocabulary(backend):
    x, e = ref.peaked(2, 151_936, torch.bfloat16), ref.table(151_936, 8, torch.bfloat16)
    ref.served(backend, x, e)
    out = ops.entrgi_embedding(x, e, temperature=TAU, top_p=0.95, seed=1, backend=backend)
    truth = blend(x.double(), e.double(), out.tokens, "entropy")
    torch.testing.assert_close(out.weight.double(), truth[1], rtol=1e-5, atol=1e-6)
    ref.assert_accurate(out.embedding, truth[0], blend(x, e, out.tokens, "entropy")[0])


def test_inputs_are_left_alone_and_outputs_are_new(backend):
    x, e = ref.peaked(3, 7), ref.table(7, 4)
    ref.served(backend, x)
    tokens, weight = torch.tensor([0, 1, 2]), torch.rand(3).double()
    before = [t.clone() for t in (x, e, tokens, weight)]
    out = ops.entrgi_embedding(x, e, tokens=tokens, weight=weight, backend=backend)
    out.tokens.zero_()
    out.weight.zero_()
    out.embedding.zero_()
    assert all(torch.equal(a, b) for a, b in zip(before, (x, e, tokens, weight), strict=True))


def test_a_table_that_requires_grad_gets_none(backend):
    x, e = ref.peaked(3, 7), ref.table(7, 4).requires_grad_()
    ref.served(backend, x)
    assert not ops.entrgi_embedding(x, e, backend=backend).embedding.requires_grad
    ops.entrgi_embedding(x.requires_grad_(), e, backend=backend).embedding.sum().backward()
    assert e.grad is None and x.grad is not None


def test_same_bits_from_run_to_run(backend):
    x, e = ref.peaked(33, 5003, torch.float32), ref.table(5003, 64, torch.float32)
    ref.served(backend, x)
    x.requires_grad_()
    runs = []
    for _ in range(2):
        out = ops.entrgi_embedding(x, e, temperature=TAU, top_p=0.9, backend=backend)
        runs.append((*out[:4], *out.state[:3], torch.autograd.grad(out.embedding.square().sum(), x)[0]))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
