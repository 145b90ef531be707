"""first_order_update_ against autograd in float64."""

from __future__ import annotations

import math

import ops_reference as ref
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from entrgi_kernels import ops

GAMMA = 0.6


def reward_of(embedding: torch.Tensor) -> torch.Tensor:
    """Some reward of the rows' embeddings, not linear in them."""
    target = ref.table(*embedding.shape, seed=10)
    return (embedding.double() * target).sin().sum() - 0.1 * embedding.double().square().sum()


def linearised(x: torch.Tensor, e: torch.Tensor, tokens: torch.Tensor, gamma: float = GAMMA) -> torch.Tensor:
    """phi + gamma d/ds reward(s @ E) at the one-hot s of the tokens, over steps from there to each other token."""
    hot = torch.nn.functional.one_hot(tokens, x.shape[1]).double().requires_grad_()
    (slope,) = torch.autograd.grad(reward_of(hot @ e.double()), hot)
    return x.double() + gamma * (slope - slope.gather(1, tokens[:, None]))


def moved(x: torch.Tensor, e: torch.Tensor, tokens: torch.Tensor, backend: str) -> torch.Tensor:
    leaf = e[tokens].detach().requires_grad_()
    (grad,) = torch.autograd.grad(reward_of(leaf), leaf)
    x = x.clone()
    ops.first_order_update_(x, grad, e, tokens, scale=GAMMA, backend=backend)
    return x


def problem(n: int, v: int, d: int, dtype: torch.dtype = torch.float64):
    tokens = torch.randint(v, (n,), generator=torch.Generator().manual_seed(4))
    return ref.peaked(n, v, dtype, spread=1.0), ref.table(v, d, dtype), tokens


@pytest.mark.parametrize("shape", [(0, 7, 3), (1, 1, 2), (1, 7, 3), (5, 63, 9), (3, 1001, 4), (37, 129, 17)], ids=str)
def test_is_gamma_times_the_gradient_of_the_linearised_reward_in_float64(backend, shape):
    x, e, tokens = problem(*shape)
    ref.served(backend, x)
    torch.testing.assert_close(moved(x, e, tokens, backend), linearised(x, e, tokens), rtol=0, atol=1e-12)


@pytest.mark.parametrize("n", [1, 3, 6, 40])
@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float32, torch.float32, 1e-5),
        (torch.float16, torch.float16, 2e-2),
        (torch.bfloat16, torch.bfloat16, 1e-1),
        (torch.float32, torch.bfloat16, 5e-2),
        (torch.bfloat16, torch.float32, 1e-1),
        (torch.float32, torch.float64, 1e-5),
    ],
    ids=str,
)
def test_narrower_numbers_follow_float64(backend, n, dtypes):
    x, e, tokens = problem(n, 255, 16, dtypes[1])
    x = x.to(dtypes[0])
    ref.served(backend, x, e)
    expected = linearised(x, e, tokens)
    assert (expected - x.double()).abs().max() > 0.5
    ours = moved(x, e, tokens, backend)
    torch.testing.assert_close(ours.double(), expected, rtol=2 * torch.finfo(x.dtype).eps, atol=dtypes[2])


def test_the_row_keeps_its_own_tokens_logit(backend):
    """g . E_x is taken away: what a ranking by raw logits sees of the token it was drawn at does not change."""
    x, e, tokens = problem(6, 63, 9, torch.float32)
    ref.served(backend, x)
    after = moved(x, e, tokens, backend)
    torch.testing.assert_close(after.gather(1, tokens[:, None]), x.gather(1, tokens[:, None]), rtol=0, atol=1e-5)


def test_a_linear_reward_tilts_the_distribution_exactly(backend):
    """softmax(phi) exp(gamma R) is what D-CBG asks for; of R = r . e the first order is all there is."""
    x, e, tokens = problem(4, 31, 5, torch.float32)
    ref.served(backend, x)
    slope, after = ref.table(4, 5, torch.float32, seed=9), x.clone()
    ops.first_order_update_(after, slope, e, tokens, scale=GAMMA, backend=backend)
    tilted = torch.softmax(x.double(), -1) * (GAMMA * slope.double() @ e.double().T).exp()
    torch.testing.assert_close(
        torch.softmax(after.double(), -1), tilted / tilted.sum(-1, keepdim=True), rtol=1e-4, atol=1e-7
    )


def test_rows_without_a_token_become_nan_and_no_others_do(backend):
    x, e, tokens = problem(6, 63, 9, torch.float32)
    ref.served(backend, x)
    tokens[1], tokens[4] = -1, 63
    x[2, ::2], x[3, 5] = -math.inf, math.nan
    grad = ref.table(6, 9, torch.float32, seed=3)
    grad[5, 2] = math.nan
    after = x.clone()
    ops.first_order_update_(after, grad, e, tokens, scale=1.0, backend=backend)
    assert after[[1, 4, 5]].isnan().all() and after[0].isfinite().all()
    assert (after[2, ::2] == -math.inf).all() and after[2, 1::2].isfinite().all()
    assert after[3, 5].isnan() and after[3].isnan().sum() == 1


def test_same_bits_at_every_run_and_no_row_depends_on_another(backend):
    x, e, tokens = problem(40, 255, 33, torch.float32)
    ref.served(backend, x)
    grad = ref.table(40, 33, torch.float32, seed=3)

    def run(rows: slice) -> torch.Tensor:
        after = x[rows].clone()
        ops.first_order_update_(after, grad[rows], e, tokens[rows], scale=0.7, backend=backend)
        return after

    whole = run(slice(None))
    assert torch.equal(whole, run(slice(None)))
    for rows in (slice(0, 1), slice(39, 40), slice(5, 22)):
        torch.testing.assert_close(run(rows), whole[rows], rtol=1e-5, atol=1e-5)


def test_strides(backend):
    x, e, tokens = problem(5, 64, 8, torch.float32)
    ref.served(backend, x)
    grad = ref.table(5, 8, torch.float32, seed=3)
    expected = x.clone()
    ops.first_order_update_(expected, grad, e, tokens, scale=0.7, backend="eager")
    wide = torch.full((5, 130), math.nan)
    wide[:, 1:65] = x
    for place in (wide[:, 1:65], x.T.contiguous().T, torch.stack([x, x], 2)[..., 0]):
        ops.first_order_update_(
            place, grad.T.contiguous().T, e.T.contiguous().T, torch.stack([tokens, tokens], 1)[:, 0], scale=0.7,
            backend=backend,
        )  # fmt: skip
        torch.testing.assert_close(place, expected, rtol=1e-6, atol=1e-5)
    assert wide[:, 0].isnan().all() and wide[:, 65:].isnan().all()
    spread = x.clone()
    ops.first_order_update_(spread, grad[:1].expand(5, 8), e[:1].expand(64, 8), tokens, scale=0.7, backend=backend)
    torch.testing.assert_close(spread, x, rtol=0, atol=1e-5)  # one embedding for all tokens: nothing to gain


X, E, TOKENS = ref.peaked(3, 7), ref.table(7, 4), torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"scale": math.nan}, ValueError, ["scale=nan", "finite number"]),
        ({"scale": -1e13}, ValueError, ["scale=-1", "at most 1e+12"]),
        ({"scale": "much"}, TypeError, ["scale='much'", "finite number"]),
        ({"scale": torch.ones(1)}, TypeError, ["scale is a torch.float32", "0-d"]),
        ({"tokens": TOKENS[:2]}, ValueError, ["tokens has shape [2]", "[3]"]),
        ({"tokens": TOKENS.int()}, TypeError, ["tokens is torch.int32", "torch.int64"]),
        ({"tokens": None}, TypeError, ["tokens is NoneType", "[3]"]),
        ({"grad": E[:2]}, ValueError, ["grad has shape [2, 4]", "[3, 4]"]),
        ({"grad": None}, TypeError, ["grad is NoneType", "[N, D]"]),
        ({"table": E[:5]}, ValueError, ["table has 5 rows", "7 columns"]),
        ({"logits": X[:, :0]}, ValueError, ["logits has shape [3, 0]", "V >= 1"]),
        ({"logits": X.clone().requires_grad_()}, ValueError, ["logits require grad", "no_grad"]),
        ({"logits": X[:1].expand(3, 7)}, ValueError, ["logits of shape [3, 7]", "clone an expanded one"]),
        ({"backend": "cutlass"}, ValueError, ["backend='cutlass'", "'eager'"]),
    ],
    ids=lambda x: "-".join(x) if isinstance(x, dict) else "",
)
def test_bad_arguments_name_what_was_given(changes, error, words):
    arguments = {"logits": X.clone(), "grad": ref.table(3, 4), "table": E, "tokens": TOKENS, "scale": 1.0} | changes
    with pytest.raises(error) as caught:
        ops.first_order_update_(**arguments)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_logits_that_share_memory_with_what_is_read_are_refused():
    square = ref.table(4, 4)
    with pytest.raises(ValueError, match="logits shares memory with table"):
        ops.first_order_update_(square, ref.table(4, 4), square, torch.zeros(4, dtype=torch.int64), scale=1.0)


def test_a_tensor_holds_the_scale(backend):
    x, e, tokens = problem(3, 7, 4, torch.float32)
    ref.served(backend, x)
    after = [x.clone(), x.clone()]
    for one, scale in zip(after, (0.75, torch.tensor(0.75)), strict=True):
        ops.first_order_update_(one, e[:3] + 1, e, tokens, scale=scale, backend=backend)
    assert torch.equal(*after) and not torch.equal(after[0], x)


def test_compiled_without_a_break_and_new_sizes_are_no_new_graphs(backend):
    x, e, _ = problem(2, 63, 4)
    ref.served(backend, x)
    counter = CompileCounterWithBackend("aot_eager")

    def step(x, grad, e, tokens, scale):
        ops.first_order_update_(x, grad, e, tokens, scale=scale, backend=backend)
        return ops.sample_tokens(x, temperature=0.7, seed=3, backend=backend)

    compiled, graphs = torch.compile(step, backend=counter, fullgraph=True), []
    for n, scale in ((5, 0.5), (6, 0.25), (11, -1.0), (64, 2.0), (3, 0.0)):
        x, _, tokens = problem(n, 63, 4)
        arguments = ref.table(n, 4, seed=n), e, tokens, torch.tensor(scale)
        expected = x.clone()
        assert torch.equal(compiled(x, *arguments), step(expected, *arguments))
        torch.testing.assert_close(x, expected, rtol=1e-12, atol=1e-12)
        graphs.append(counter.frame_count)
    assert graphs[0] == 1 and graphs[1] <= 2 and graphs[-1] == graphs[1]
