"""The compiled CUDA kernels on a GPU: against float64, token for token, bit for bit run to run, in a captured graph.

Tests with "small" in their names are what compute-sanitizer is run over by `make gpu`.
"""

from __future__ import annotations

import math

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)

from entrgi_kernels import ops  # noqa: E402
from entrgi_kernels.backends import cuda, eager, philox  # noqa: E402
from entrgi_kernels.backends.arguments import Draw  # noqa: E402
from entrgi_kernels.names import SCORED_ALGS  # noqa: E402

_REASON = cuda.why_not(torch.device("cuda", 0), torch.float32)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(_REASON is not None, reason=str(_REASON))]
V = 151_936
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
FILTERS = [(0, 0.95), (0, 1.0), (50, 1.0), (20, 0.9), (20_000, 0.999)]


def make(n: int, v: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Logits peaked like a model's: a Zipf bias, wide noise, a few strong candidates."""
    generator = torch.Generator("cuda").manual_seed(seed)
    logits = torch.randn(n, v, device="cuda", generator=generator) * 2
    logits -= torch.arange(1, v + 1, device="cuda").log()
    logits[:, torch.randint(0, v, (min(v, 16),), device="cuda", generator=generator)] += 8
    return logits.to(dtype)


def keys(n: int) -> torch.Tensor:
    return torch.arange(n, device="cuda") * (1 << 33)


def rng(step: int = 4) -> torch.Tensor:
    return torch.tensor([3, step], device="cuda")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "v"), [(1, 1), (3, 7), (5, 50_257), (1, 262_144), (7, V), (512, V)])
def test_statistics_against_float64(n, v, dtype):
    x = make(n, v, dtype)
    for temperature in (1.0, 0.7):
        truth = eager.softmax_entropy(x.double(), temperature)
        for ours, exact in zip(cuda.softmax_entropy(x, temperature), truth, strict=True):
            torch.testing.assert_close(ours.double(), exact, rtol=3e-6, atol=1e-5)
    out, argmax = torch.ops.entrgi_cuda.row_statistics(x, 1.0, 0.7, 0)
    assert torch.equal(argmax, x.argmax(-1)) or torch.equal(x.gather(1, argmax[:, None]), x.amax(-1, keepdim=True))
    assert torch.equal(out[0], x.float().amax(-1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_draws_are_the_oracles(dtype, filters):
    x = make(512, V, dtype)
    ours = cuda.sample_tokens(x, Draw(rng(), keys(512), 0.7, *filters))
    assert int((ours != eager.sample_tokens(x, Draw(rng(), keys(512), 0.7, *filters))).sum()) <= 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_draws_are_those_of_triton(dtype):
    pytest.importorskip("triton")
    from entrgi_kernels.backends import triton

    for n in (7, 1024):
        x = make(n, V, dtype, seed=n)
        for filters in FILTERS[:3]:
            ours = cuda.sample_tokens(x, Draw(rng(), keys(n), 0.7, *filters))
            assert int((ours != triton.sample_tokens(x, Draw(rng(), keys(n), 0.7, *filters))).sum()) <= 1


@pytest.mark.parametrize("scale", [0.01, 0.3, 1.0])
def test_flat_rows(scale):
    """Far more candidates than the list on chip holds."""
    for dtype in (torch.float32, torch.bfloat16):
        x = (torch.randn(16, V, device="cuda") * scale).to(dtype)
        for filters in ((0, 0.5), (0, 0.9), (100_000, 1.0)):
            ours = cuda.sample_tokens(x, Draw(rng(), keys(16), 1.0, *filters))
            assert int((ours != eager.sample_tokens(x, Draw(rng(), keys(16), 1.0, *filters))).sum()) <= 1


@pytest.mark.parametrize("alg", SCORED_ALGS)
def test_confidence_against_float64(alg):
    for dtype in DTYPES:
        x = make(64, V, dtype)
        tokens = cuda.sample_tokens(x, Draw(rng(), keys(64), 0.7, 0, 0.95))
        for filters in ((0, 1.0), (0, 0.95)):
            ours = cuda.unmask_confidence(x, tokens, alg, 0.7, *filters)
            exact = eager.unmask_confidence(x.double(), tokens, alg, 0.7, *filters)
            # Among 152k entries one may lie within rounding of top-p: the nucleus then differs by that entry.
            filtered = filters != (0, 1.0) and alg != "anchor"
            torch.testing.assert_close(ours.double(), exact, rtol=1e-3 if filtered else 2e-5, atol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_against_float64(dtype):
    x = make(9, 50_257, dtype).requires_grad_()
    lse, entropy = ops.softmax_entropy(x, 0.7, backend="cuda")
    (lse.sum() + 2 * entropy.sum()).backward()
    y = x.detach().double().requires_grad_()
    lse, entropy = ops.softmax_entropy(y, 0.7, backend="eager")
    (lse.sum() + 2 * entropy.sum()).backward()
    error = (x.grad.double() - y.grad).abs().max() / y.grad.abs().max()
    assert float(error) < 4 * torch.finfo(dtype).eps + 1e-5


def test_small_shapes_at_every_alignment():
    """Rows that begin anywhere between NaN, lengths around a 16-byte load; every kernel."""
    for dtype in DTYPES:
        for v in (1, 9, 40, 2051, 20_011):
            for offset in (0, 1, 5):
                field = torch.full((4, v + 23), math.nan, dtype=dtype, device="cuda")
                x = field[:, offset : offset + v]
                x.copy_(make(4, v, dtype))
                state = cuda.softmax_entropy(x, 0.7)
                exact = eager.softmax_entropy(x, 0.7)
                torch.testing.assert_close(state, exact, rtol=3e-6, atol=1e-5)
                ones = torch.ones(4, device="cuda")
                torch.testing.assert_close(
                    cuda.softmax_entropy_backward(x, *exact, ones, ones, 0.7),
                    eager.softmax_entropy_backward(x, *exact, ones, ones, 0.7),
                    rtol=max(1e-5, 2 * torch.finfo(dtype).eps),
                    atol=1e-6,
                )
                for filters in ((0, 0.9), (5, 1.0), (0, 1.0)):
                    tokens = cuda.sample_tokens(x, Draw(rng(), keys(4), 0.7, *filters))
                    assert torch.equal(tokens, eager.sample_tokens(x, Draw(rng(), keys(4), 0.7, *filters)))
                    for alg in SCORED_ALGS:
                        torch.testing.assert_close(
                            cuda.unmask_confidence(x, tokens, alg, 0.7, *filters),
                            eager.unmask_confidence(x, tokens, alg, 0.7, *filters),
                            rtol=1e-3,
                            atol=2e-6,
                        )


def test_small_bad_rows():
    for dtype in DTYPES:
        x = make(8, 40_009, dtype)
        x[1, 77], x[2, 40_008], x[3] = math.nan, math.inf, -math.inf
        x[4] = -math.inf
        x[4, 1234] = 0.5
        for filters in FILTERS[:3]:
            tokens = cuda.sample_tokens(x, Draw(rng(), keys(8), 0.7, *filters))
            assert tokens[1:4].tolist() == [-1, -1, -1] and int(tokens[4]) == 1234
        assert cuda.sample_tokens(x, Draw(rng(), keys(8), 0.0, 0, 1.0))[1:4].tolist() == [-1, -1, -1]
        lse, entropy = cuda.softmax_entropy(x, 0.7)
        assert bool(lse[1:4].isnan().all()) and bool(entropy[1:4].isnan().all()) and float(entropy[4]) == 0.0


def test_same_bits_run_to_run_and_in_any_batch():
    for n in (1, 7, 300):
        x = make(n, V, torch.bfloat16)
        flat = torch.randn(n, V, device="cuda")
        results = []
        for _ in range(5):
            tokens, statistics, argmax = torch.ops.entrgi_cuda.draw(x, rng(), keys(n), 0.7, 0, 0.95, True)
            drawn = cuda.sample_tokens(flat, Draw(rng(), keys(n), 1.0, 0, 0.9))
            sums = [cuda.unmask_confidence(x, tokens, alg, 0.7, 0, 0.95) for alg in SCORED_ALGS]
            results.append((tokens, statistics, argmax, drawn, *sums, *cuda.softmax_entropy(x, 0.7)))
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
        alone = cuda.sample_tokens(x[-1:], Draw(rng(), keys(n)[-1:], 0.7, 0, 0.95))
        assert torch.equal(alone, results[0][0][-1:])


def test_a_captured_graph_draws_new_numbers(check_captured_draws):
    x, state = make(64, V, torch.bfloat16), rng(0)
    rows = keys(64)

    def step() -> torch.Tensor:
        cuda.softmax_entropy(x, 0.7)
        return cuda.sample_tokens(x, Draw(state, rows, 1.0, 0, 0.95))

    check_captured_draws(step, state)


def test_more_than_2_to_the_31_entries():
    n = (1 << 31) // V + 70
    if torch.cuda.mem_get_info()[0] < 10 << 30:
        pytest.skip("needs 10 GB of GPU memory")
    x = torch.empty(n, V, dtype=torch.bfloat16, device="cuda")
    for part in x.split(1024):
        part.normal_()
    last = x[-3:].clone()
    assert torch.equal(
        cuda.sample_tokens(x, Draw(rng(), keys(n), 0.7, 0, 0.95))[-3:],
        cuda.sample_tokens(last, Draw(rng(), keys(n)[-3:], 0.7, 0, 0.95)),
    )
    torch.testing.assert_close(
        cuda.softmax_entropy(x, 1.0)[1][-3:], eager.softmax_entropy(last, 1.0)[1], rtol=1e-5, atol=1e-5
    )


def test_frequencies_and_nothing_outside_the_nucleus():
    p = torch.tensor([0.5, 0.3, 0.15, 0.04, 0.01], device="cuda")
    n = 1 << 20
    drawn = cuda.sample_tokens(p.log().expand(n, 5), Draw(rng(), keys(n), 1.0, 0, 0.9))
    count = torch.bincount(drawn, minlength=5).double() / n
    expected = torch.tensor([0.5, 0.3, 0.15, 0, 0], device="cuda", dtype=torch.float64) / 0.95
    assert count[3:].tolist() == [0, 0]
    assert float((count - expected).abs().max()) < 4 * (0.25 / n) ** 0.5


def test_chosen_by_name_and_what_it_lacks():
    x = make(4, 1000, torch.bfloat16)
    table = torch.randn(1000, 8, device="cuda", dtype=torch.bfloat16)
    a = ops.sample_tokens(x, temperature=0.7, top_p=0.9, seed=5, backend="cuda")
    assert torch.equal(a, ops.sample_tokens(x, temperature=0.7, top_p=0.9, seed=5, backend="eager"))
    with pytest.raises(RuntimeError, match="entrgi_embedding .*backend='triton'"):
        ops.entrgi_embedding(x, table, backend="cuda")
    with pytest.raises(RuntimeError, match="float64"):
        ops.softmax_entropy(x.double(), backend="cuda")


def test_noise_is_the_projects():
    """Logits of one winner each: the token drawn unfiltered from flat rows is the one of the largest -log E."""
    x = torch.zeros(50, 4099, device="cuda")
    noise = philox.exponential(rng(), keys(50)[:, None], torch.arange(4099, device="cuda"), torch.float64)
    assert torch.equal(cuda.sample_tokens(x, Draw(rng(), keys(50), 1.0, 0, 1.0)), noise.argmin(-1))
