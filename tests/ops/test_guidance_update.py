"""guidance_update_ against autograd and torch.optim.Adam in float64."""

from __future__ import annotations

import math

import ops_reference as ref
import pytest
import torch

from entrgi_kernels import ops

TAU, LR = 0.7, 0.5


def loss_of(embedding: torch.Tensor, step: int) -> torch.Tensor:
    """Some loss of the blend that differs from step to step, with a gradient that depends on the blend."""
    target = ref.table(*embedding.shape, seed=10 + step)
    return (embedding.double() - target).square().sum() + (embedding.double() * target).sin().sum()


def published_steps(
    x: torch.Tensor, e: torch.Tensor, tokens: list[torch.Tensor], betas: tuple[float, float], eps: float
) -> list[torch.Tensor]:
    """phi after each step: autograd through the written-out blend, torch.optim.Adam, float64."""
    phi = x.double().clone().requires_grad_()
    adam = torch.optim.Adam([phi], lr=LR, betas=betas, eps=eps)
    after = []
    for step, token in enumerate(tokens):
        soft = torch.softmax(phi / TAU, dim=-1) @ e.double()
        q = torch.softmax(phi, dim=-1).detach()
        weight = torch.special.entr(q).sum(dim=-1) / math.log(max(phi.shape[1], 2))
        blend = soft + (weight[:, None] * (e.double()[token] - soft)).detach()
        adam.zero_grad()
        loss_of(blend, step).backward()
        adam.step()
        after.append(phi.detach().clone())
    return after


def our_steps(
    x: torch.Tensor,
    e: torch.Tensor,
    tokens: list[torch.Tensor],
    backend: str,
    adam: ops.AdamState | None,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    keeps_all: bool = True,
) -> list[torch.Tensor]:
    """phi after each step; without `keeps_all` the last one leaves the state alone."""
    after = []
    for step, token in enumerate(tokens):
        keep = keeps_all or step < len(tokens) - 1
        out = ops.entrgi_embedding(x, e, temperature=TAU, tokens=token, backend=backend)
        leaf = out.embedding.detach().requires_grad_()
        (grad,) = torch.autograd.grad(loss_of(leaf, step), leaf)
        ops.guidance_update_(x, grad, e, out.state, lr=LR, adam=adam, betas=betas, eps=eps, keep=keep, backend=backend)
        after.append(x.clone())
    return after


def fresh_tokens(n: int, v: int, steps: int = 3) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(4)
    return [torch.randint(v, (n,), generator=g) for _ in range(steps)]


@pytest.mark.parametrize("hyper", [((0.9, 0.999), 1e-8), ((0.5, 0.9), 1e-3), ((0.0, 0.0), 1e-2)], ids=str)
@pytest.mark.parametrize("shape", [(0, 7, 3), (1, 1, 2), (1, 7, 3), (5, 63, 9), (3, 1001, 4)], ids=str)
def test_three_steps_of_adam_in_float64(backend, shape, hyper):
    n, v, d = shape
    x, e, tokens = ref.peaked(n, v, spread=1.0), ref.table(v, d), fresh_tokens(n, v)
    ref.served(backend, x)
    if v == 1:  # the gradient is 0 up to rounding, and Adam normalises rounding: only its absence can be asked for
        hyper = (hyper[0], 1.0)
    expected = published_steps(x, e, tokens, *hyper)
    state = ops.AdamState.zeros(x)
    ours = our_steps(x, e, tokens, backend, state, *hyper)
    assert state.step == 3 and state.exp_avg.dtype == torch.float64
    for step, (a, b) in enumerate(zip(ours, expected, strict=True)):
        moved = (b - expected[step - 1]).abs() if step else torch.ones_like(b)
        assert moved.numel() == 0 or v == 1 or moved.max() > 1e-2
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("moments", [None, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("length", [1, 3])
def test_a_first_step_reads_no_moments_and_a_last_one_writes_none(backend, length, dtype, moments):
    x, e = ref.peaked(6, 255, dtype, spread=1.0), ref.table(255, 16, dtype)
    ref.served(backend, x, e)
    tokens = fresh_tokens(6, 255, length)
    clean, used = (ops.AdamState.zeros(x, moments) for _ in range(2))
    expected = our_steps(x.clone(), e, tokens, backend, clean)
    for moment in (used.exp_avg, used.exp_avg_sq):
        moment.fill_(math.nan)
    ours = our_steps(x.clone(), e, tokens, backend, used, keeps_all=False)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))
    before = ops.AdamState.zeros(x, moments)
    our_steps(x.clone(), e, tokens[:-1], backend, before)
    assert clean.step == length and used.step == length - 1 == before.step
    if length > 1:
        assert torch.equal(used.exp_avg, before.exp_avg) and torch.equal(used.exp_avg_sq, before.exp_avg_sq)
    else:
        assert used.exp_avg.isnan().all() and used.exp_avg_sq.isnan().all()


def test_float32_follows_float64(backend):
    n, v, d = 6, 255, 16
    x, e, tokens = ref.peaked(n, v, torch.float32, spread=1.0), ref.table(v, d, torch.float32), fresh_tokens(n, v)
    ref.served(backend, x, e)
    expected = published_steps(x, e, tokens, (0.9, 0.999), 1e-3)
    ours = our_steps(x, e, tokens, backend, ops.AdamState.zeros(x), eps=1e-3)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("moments", [None, torch.float32], ids=str)
def test_half_precision_moves_the_right_way(backend, dtype, moments):
    """Adam's first step is lr x sign: judged by the share of flipped signs, as DESIGN's numerics ask."""
    x, e, tokens = ref.peaked(16, 255, dtype, spread=1.0), ref.table(255, 16, dtype), fresh_tokens(16, 255, 1)
    ref.served(backend, x, e)
    before = x.clone()
    (expected,) = published_steps(x, e, tokens, (0.9, 0.999), 1e-8)
    state = ops.AdamState.zeros(x, moments)
    assert state.exp_avg.dtype == (moments or (torch.float32 if dtype == torch.float16 else dtype))
    our_steps(x, e, tokens, backend, state)
    flips = ((x.double() - before) * (expected - before.double()) < 0).double().mean()
    assert flips < 0.01 and (x != before).double().mean() > 0.95


@pytest.mark.parametrize("size", [1e-2, 1e-5, 1e-9])
def test_float16_logits_follow_float64_however_small_the_gradient(backend, size):
    """Squares of such gradients are 0 in float16: moments kept in it would make the step m / eps."""
    x, e = ref.peaked(6, 255, torch.float16, spread=1.0), ref.table(255, 16, torch.float16)
    ref.served(backend, x, e)
    grads = [size * ref.table(6, 16, torch.float32, seed=seed) for seed in (1, 2, 3)]
    exact, adam = x.double().requires_grad_(), None
    state = ops.AdamState.zeros(x)
    for grad in grads:
        kept = ops.entrgi_embedding(x, e, temperature=TAU, backend=backend).state
        # The gradient is taken where float16 has brought phi, the step and its moments are float64's.
        at = x.double().requires_grad_()
        (slope,) = torch.autograd.grad((torch.softmax(at / TAU, -1) @ e.double() * grad.double()).sum(), at)
        ops.guidance_update_(x, grad, e, kept, lr=LR, adam=state, backend=backend)
        adam = adam or torch.optim.Adam([exact], lr=LR)
        exact.grad = slope
        adam.step()
    assert x.isfinite().all() and state.exp_avg_sq.dtype == torch.float32
    torch.testing.assert_close(x.double(), exact.detach(), rtol=2e-3, atol=2e-2)


def test_float16_moments_are_refused(backend):
    x, e = ref.peaked(2, 7, torch.float16), ref.table(7, 3, torch.float16)
    ref.served(backend, x, e)
    kept, before = ops.entrgi_embedding(x, e, backend=backend).state, x.clone()
    with pytest.raises(TypeError, match="float16: expected float64, float32 or bfloat16"):
        ops.AdamState.zeros(x, torch.float16)
    for name in ("exp_avg", "exp_avg_sq"):
        state = ops.AdamState.zeros(x)
        setattr(state, name, torch.zeros_like(x))
        with pytest.raises(TypeError, match=f"adam.{name} is torch.float16.*expected float64, float32 or bfloat16"):
            ops.guidance_update_(x, e[:2], e, kept, lr=LR, adam=state, backend=backend)
        assert state.step == 0 and torch.equal(x, before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_first_step_needs_no_state(backend, dtype):
    e, tokens = ref.table(63, 9, dtype), fresh_tokens(5, 63, 1)
    with_state, without = (ref.peaked(5, 63, dtype) for _ in range(2))
    ref.served(backend, without, e)
    our_steps(with_state, e, tokens, backend, ops.AdamState.zeros(with_state))
    our_steps(without, e, tokens, backend, None)
    assert torch.equal(with_state, without) and not torch.equal(without, ref.peaked(5, 63, dtype))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_suppressed_columns_stay_minus_infinity(backend, dtype):
    x, e = ref.peaked(5, 63, dtype), ref.table(63, 9, dtype)
    ref.served(backend, x, e)
    x[:, 10] = x[2, 20:40] = -torch.inf
    gone = x == -torch.inf
    state = ops.AdamState.zeros(x)
    our_steps(x, e, [torch.zeros(5, dtype=torch.int64)] * 3, backend, state)
    assert torch.equal(x == -torch.inf, gone) and x[~gone].isfinite().all()
    assert (state.exp_avg[gone] == 0).all() and (state.exp_avg_sq[gone] == 0).all()
    assert (state.exp_avg[~gone] != 0).any()


@pytest.mark.parametrize("layout", ["strided", "transposed", "sliced"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_strided_logits_and_moments_in_place(backend, dtype, layout):
    dense, e, tokens = ref.peaked(5, 63, dtype), ref.table(63, 9, dtype), fresh_tokens(5, 63)
    ref.served(backend, dense, e)
    view = ref.layouts(dense)[layout]
    base, place = view._base, torch.zeros_like(view._base, dtype=torch.bool)
    place.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(True)
    moments = ops.AdamState(*(ref.layouts(torch.zeros_like(dense))[layout] for _ in range(2)))
    state = ops.AdamState.zeros(dense)
    address = view.data_ptr()
    # bfloat16: another order of summation may round phi the other way, which later steps see.
    tolerance = 1e-12 if dtype == torch.float64 else 0.05
    ours = our_steps(view, ref.layouts(e)[layout], tokens, backend, moments)
    expected = our_steps(dense, e, tokens, backend, state)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)
    torch.testing.assert_close(moments.exp_avg, state.exp_avg, rtol=0, atol=tolerance)
    torch.testing.assert_close(moments.exp_avg_sq, state.exp_avg_sq, rtol=0, atol=tolerance)
    assert view.data_ptr() == address and base[~place].isnan().all()  # what lies between was not written


def test_strided_and_stride_0_gradients(backend):
    e = ref.table(63, 8)
    x = ref.peaked(5, 63)
    ref.served(backend, x)
    kept = ops.entrgi_embedding(x, e, temperature=TAU, backend=backend).state
    wide, scalar = ref.table(10, 24, seed=3), torch.tensor(0.5, dtype=torch.float64)
    for view in (wide[::2, ::3], wide.T[:5, :8], scalar.expand(5, 8)):
        results = []
        for grad in (view, view.clone()):
            phi = x.clone()
            ops.guidance_update_(phi, grad, e, kept, lr=LR, eps=1e-3, backend=backend)
            results.append(phi)
        torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


def test_bad_rows_leave_the_others_alone(backend):
    x, good = ref.good_and_bad(63)
    ref.served(backend, x)
    e, expected = ref.table(63, 9), x[good].clone()
    our_steps(expected, e, [torch.arange(3)], backend, None)
    # loss_of's target depends on the row number, so step the good rows by the same gradient instead.
    kept = ops.entrgi_embedding(x, e, temperature=TAU, tokens=torch.zeros(8, dtype=torch.int64), backend=backend).state
    grad = ref.table(8, 9, seed=3)
    alone = x[good].clone()
    ops.guidance_update_(x, grad, e, kept, lr=LR, eps=1e-3, backend=backend)
    ops.guidance_update_(alone, grad[good], e, kept.rows(good), lr=LR, eps=1e-3, backend=backend)
    torch.testing.assert_close(x[good], alone, rtol=1e-12, atol=1e-12)
    assert not torch.equal(alone, expected)


def test_large_vocabulary(backend):
    x, e = ref.peaked(2, 151_936, torch.float32), ref.table(151_936, 8, torch.float32)
    ref.served(backend, x, e)
    tokens = fresh_tokens(2, 151_936, 1)
    (expected,) = published_steps(x, e, tokens, (0.9, 0.999), 1e-3)
    our_steps(x, e, tokens, backend, None, eps=1e-3)
    torch.testing.assert_close(x.double(), expected, rtol=0, atol=2e-5)


def test_a_call_that_raises_leaves_the_state_alone(backend):
    x, e = ref.peaked(2, 7), ref.table(7, 3)
    ref.served(backend, x)
    state = ops.AdamState.zeros(x)
    kept = ops.entrgi_embedding(x, e, backend=backend).state
    with pytest.raises(ValueError, match="grad has shape"):
        ops.guidance_update_(x, e, e, kept, lr=LR, adam=state, backend=backend)
    assert state.step == 0 and (state.exp_avg == 0).all()


def test_a_graph_that_saved_phi_notices_the_update(backend):
    """In place means that a backward through the old values is an error, not a wrong gradient."""
    x, e = ref.peaked(2, 7), ref.table(7, 3).requires_grad_()
    ref.served(backend, x)
    out = ops.soft_embedding(x, e, backend=backend)
    kept = ops.entrgi_embedding(x, e, backend=backend).state
    ops.guidance_update_(x, out.detach(), e, kept, lr=LR, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_same_bits_from_run_to_run(backend):
    runs = []
    for _ in range(2):
        x, e = ref.peaked(17, 1003, torch.float32), ref.table(1003, 32, torch.float32)
        ref.served(backend, x, e)
        our_steps(x, e, fresh_tokens(17, 1003), backend, ops.AdamState.zeros(x))
        runs.append(x)
    assert torch.equal(*runs)
