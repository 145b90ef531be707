"""The native backend against the eager oracle and float64 truth, at every instruction set this machine can run."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import pytest
import torch

from entrgi_kernels.backends import eager, native
from entrgi_kernels.backends.arguments import Adam, Draw
from entrgi_kernels.names import SCORED_ALGS

_REASON = native.why_not(torch.device("cpu"), torch.float32)
pytestmark = pytest.mark.skipif(_REASON is not None, reason=str(_REASON))

ISAS = list(native.build_info()["supported_isas"]) if _REASON is None else ["none"]
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
FILTERS = ((0, 1.0), (0, 0.9), (5, 1.0), (40, 0.5), (0, 0.999), (3, 0.95))
RNG = torch.tensor([(1 << 40) + 12345, 77])


def pairwise(*factors: Sequence[object], extra: Sequence[tuple[object, ...]] = ()) -> list[tuple[object, ...]]:
    """`extra`, and as few more combinations as it takes (greedily) for every pair of values of two factors to occur."""

    def pairs(case: tuple[object, ...]) -> set[tuple[int, object, int, object]]:
        return {(i, case[i], j, case[j]) for i, j in itertools.combinations(range(len(case)), 2)}

    cases, product = list(dict.fromkeys(extra)), list(itertools.product(*factors))
    missing = set().union(*map(pairs, product)).difference(*map(pairs, cases))
    while missing:
        cases.append(max(product, key=lambda case: len(pairs(case) & missing)))
        missing -= pairs(cases[-1])
    return cases


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    native.set_isa(request.param)
    yield request.param
    native.set_isa("")


def peaked(n: int, v: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Gaussian logits with a few high entries a row."""
    high = torch.where(torch.rand(n, v) < 0.002, 12 * torch.rand(n, v), torch.zeros(()))
    return (3 * torch.randn(n, v) + high).to(dtype)


def row_keys(n: int) -> torch.Tensor:
    return torch.randint(0, 1 << 62, (n,))


def worst(ours: torch.Tensor, truth: torch.Tensor, floor: float) -> float:
    """Largest error, relative to the largest entry of the truth or `floor`; NaN must be in the same places."""
    assert torch.equal(ours.isnan(), truth.isnan())
    good = truth.isfinite()
    assert torch.equal(ours.double()[~good & ~truth.isnan()], truth.double()[~good & ~truth.isnan()])
    if not good.any():
        return 0.0
    scale = max(truth[good].abs().max().item(), floor)
    return (ours.double() - truth.double())[good].abs().max().item() / scale


def assert_close(
    ours: torch.Tensor, torchs: torch.Tensor, truth: torch.Tensor, factor: float, eps: float, floor: float = 1e-30
) -> None:
    """Our error is within `factor` times torch's in the same dtype, plus eps."""
    mine, theirs = worst(ours, truth, floor), worst(torchs, truth, floor)
    assert mine <= factor * theirs + eps, f"error {mine:.3g}, torch's {theirs:.3g}"


def eps_of(*dtypes: torch.dtype) -> float:
    """A few roundings of the coarsest dtype."""
    return 4 * max(torch.finfo(d).eps for d in dtypes)


SHAPES = ((3, 1), (2, 7), (5, 63), (17, 1003), (2, 20011))
# (N, V, D): up to 16 rows have kernels of their own
PRODUCTS = ((3, 1, 5), (2, 7, 32), (5, 63, 33), (16, 90, 35), (20, 1003, 70), (33, 2100, 70), (0, 9, 4))
# Instruction sets with kernels of their own for bfloat16 tables: all logits meet these.
TILED = [isa for isa in ISAS if isa in ("amx", "avx512_bf16")]
BF16_TABLES = [(isa, dtype, torch.bfloat16) for isa in TILED for dtype in DTYPES]
# Theirs take up to 352 columns of more than 64 rows at a time in the backward, 256 rows and 32 columns in the forward.
TILED_PRODUCTS = ((66, 257, 703), (272, 130, 360), (300, 65, 1024))


@pytest.mark.parametrize("isa, dtype, temperature", pairwise(ISAS, DTYPES, (1.0, 0.7)), indirect=["isa"])
def test_statistics(isa: str, dtype: torch.dtype, temperature: float) -> None:
    for n, v in SHAPES:
        x = peaked(n, v, dtype)
        truth = eager.softmax_entropy(x.double(), temperature)
        ours = native.softmax_entropy(x, temperature)
        theirs = eager.softmax_entropy(x, temperature)
        for a, b, c in zip(ours, theirs, truth, strict=True):
            assert a.dtype == b.dtype
            assert_close(a, b, c, 2, eps_of(a.dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_statistics_gradient(isa: str, dtype: torch.dtype) -> None:
    for n, v in SHAPES:
        x = peaked(n, v, dtype)
        if v > 7:
            x[:, 3] = -math.inf
        acc = torch.float64 if dtype == torch.float64 else torch.float32
        lse, h = eager.softmax_entropy(x, 0.7)
        grads = torch.randn(2, n).to(acc)
        exact = eager.softmax_entropy(x.double(), 0.7)
        truth = eager.softmax_entropy_backward(x.double(), *exact, *grads.double(), 0.7)
        ours = native.softmax_entropy_backward(x, lse, h, *grads, 0.7)
        assert ours.dtype == dtype
        theirs = eager.softmax_entropy_backward(x, lse, h, *grads, 0.7)
        assert_close(ours, theirs, truth, 2, eps_of(dtype) + (1e-5 if acc == torch.float32 else 1e-12))


@pytest.mark.parametrize("isa, dtype, filters", pairwise(ISAS, DTYPES, FILTERS), indirect=["isa"])
def test_same_tokens_as_eager(isa: str, dtype: torch.dtype, filters: tuple[int, float]) -> None:
    top_k, top_p = filters
    for n, v in ((3, 1), (2, 7), (5, 63), (17, 1003), (3, 20011), (64, 300)):
        x, rows = peaked(n, v, dtype), row_keys(n)
        if v > 7:
            x[0, 1] = -math.inf
            x[1] = torch.full((v,), 2.0, dtype=dtype)  # all tied
            x[2] = x[2].round()  # many ties at the threshold
        for temperature in (1.0, 0.7, 0.0):
            ours = native.sample_tokens(x, Draw(RNG, rows, temperature, top_k, top_p))
            assert torch.equal(ours, eager.sample_tokens(x, Draw(RNG, rows, temperature, top_k, top_p)))


def test_many_draws_equal_eager() -> None:
    """Of 1e5 draws at most one may differ (a score that ties within rounding)."""
    x = peaked(1, 60).expand(100_000, 60)
    rows = torch.arange(100_000)
    for top_p in (0.9, 1.0):
        ours = native.sample_tokens(x, Draw(RNG, rows, 0.7, 0, top_p))
        theirs = [
            eager.sample_tokens(x[i], Draw(RNG, rows[i], 0.7, 0, top_p)) for i in torch.arange(100_000).split(5000)
        ]
        assert (ours != torch.cat(theirs)).sum() <= 1


def test_frequencies_and_wide_tail() -> None:
    p = torch.tensor([0.5, 0.3, 0.15, 0.05 - 1e-3, 1e-3])
    x = p.log().repeat(200_000, 1)
    drawn = native.sample_tokens(x, Draw(RNG, torch.arange(200_000), 1.0, 0, 1.0))
    frequency = torch.bincount(drawn, minlength=5) / 200_000
    assert (frequency - p).abs().max() < 4 * math.sqrt(0.25 / 200_000)
    kept = native.sample_tokens(x[:20_000], Draw(RNG, torch.arange(20_000), 1.0, 0, 0.6))
    assert kept.unique().tolist() == [0, 1]
    # 1e6 tokens of probability about 1e-8 beside one of 0.99: noise cut at float32's resolution would hardly draw them.
    tail = torch.full((1, 1_000_000), math.log(1e-8))
    tail[0, 0] = math.log(0.99)
    drawn = native.sample_tokens(tail.expand(500, -1), Draw(RNG, torch.arange(500), 1.0, 0, 1.0))
    assert 1 <= (drawn != 0).sum() <= 18  # 5 are expected


@pytest.mark.parametrize("isa, dtype, table_dtype", pairwise(ISAS, DTYPES, DTYPES, extra=BF16_TABLES), indirect=["isa"])
def test_embedding(isa: str, dtype: torch.dtype, table_dtype: torch.dtype) -> None:
    tiled = isa in TILED and table_dtype == torch.bfloat16
    for n, v, d in (*PRODUCTS, (1, 20011, 64), *(TILED_PRODUCTS if tiled else ())):
        x, table, rows = peaked(n, v, dtype), torch.randn(v, d).to(table_dtype), row_keys(n)
        for mode in ("entropy", "one", "zero", "given"):
            weight = torch.rand(n)
            draw = Draw(RNG, rows, 0.7, 0, 0.95)
            ours = native.entrgi_embedding(x, table, draw, None, weight, mode)
            theirs = eager.entrgi_embedding(x, table, draw, None, weight, mode)
            truth = eager.entrgi_embedding(x.double(), table.double(), draw, theirs[1], weight, mode)
            assert torch.equal(ours[1], theirs[1]) and torch.equal(ours[6], theirs[6])
            for i in (0, 2, 3, 4, 5):
                assert ours[i].dtype == theirs[i].dtype and ours[i].shape == theirs[i].shape
                # With 16-bit logits and a bf16 table AMX and dot products round p to bf16, as torch does.
                rounded = tiled and dtype in (torch.bfloat16, torch.float16)
                coarse = torch.bfloat16 if rounded and i in (0, 4) else theirs[i].dtype
                slack = 1e-12 if theirs[i].dtype == torch.float64 else 2e-6
                assert_close(ours[i], theirs[i], truth[i], 2, eps_of(coarse) + slack)


@pytest.mark.parametrize("isa, dtype, table_dtype", pairwise(ISAS, DTYPES, DTYPES, extra=BF16_TABLES), indirect=["isa"])
def test_gradients(isa: str, dtype: torch.dtype, table_dtype: torch.dtype) -> None:
    tiled = isa in TILED and table_dtype == torch.bfloat16
    for n, v, d in (*PRODUCTS, (1, 2011, 64), (150, 300, 48), (600, 45, 40), *(TILED_PRODUCTS if tiled else ())):
        x, table = peaked(n, v, dtype), torch.randn(v, d).to(table_dtype)
        if v > 7:
            x[:, 2] = -math.inf
        soft, lse = eager.soft_embedding(x, table, 0.7)
        slack = 1e-12 if soft.dtype == torch.float64 else 2e-5
        for grad_dtype in (table_dtype, soft.dtype):
            grad = torch.randn(n, d).to(grad_dtype)
            wide = [t.double() for t in (x, table, grad)]
            wide_soft, wide_lse = eager.soft_embedding(*wide[:2], 0.7)
            truth = eager.soft_embedding_backward(*wide, wide_soft, wide_lse, 0.7)
            ours = native.soft_embedding_backward(x, table, grad, soft, lse, 0.7)
            theirs = eager.soft_embedding_backward(x, table, grad, soft, lse, 0.7)
            assert ours.dtype == dtype
            # V = 1: two equal dot products cancel to 0, or to their rounding
            assert_close(ours, theirs, truth, 2, eps_of(dtype) + slack, floor=1.0 if v == 1 else 1e-30)
            truth = eager.soft_embedding_grad_table(wide[0], wide[2], wide_lse, 0.7, torch.float64)
            ours = native.soft_embedding_grad_table(x, grad, lse, 0.7, table_dtype)
            theirs = eager.soft_embedding_grad_table(x, grad, lse, 0.7, table_dtype)
            assert ours.dtype == table_dtype and ours.shape == theirs.shape
            assert_close(ours, theirs, truth, 2, eps_of(table_dtype) + slack)


STATES = (None, torch.float64, torch.float32, torch.bfloat16)


@pytest.mark.parametrize(
    "isa, dtype, table_dtype, state_dtype",
    pairwise(
        ISAS,
        DTYPES,
        (torch.float64, torch.float32, torch.bfloat16),
        STATES,
        extra=[(*case, state) for case, state in zip(BF16_TABLES, itertools.cycle(STATES))],
    ),
    indirect=["isa"],
)
def test_update(isa: str, dtype: torch.dtype, table_dtype: torch.dtype, state_dtype: torch.dtype | None) -> None:
    for n, v, d in ((3, 7, 5), (5, 63, 33), (20, 1003, 64), (40, 300, 70)):  # V = 1: the gradient is rounding alone
        start, table = peaked(n, v, dtype), torch.randn(v, d).to(table_dtype)
        if v > 7:
            start[:, 2] = -math.inf
        soft, lse = eager.soft_embedding(start, table, 0.7)
        grad = torch.randn(n, d).to(table_dtype)
        results = []
        for backend in (native, eager):
            x = start.clone()
            state = [None, None] if state_dtype is None else [torch.zeros(n, v, dtype=state_dtype) for _ in range(2)]
            for step in (1,) if state_dtype is None else (1, 2, 3):
                backend.guidance_update_(x, grad, table, soft, lse, 0.7, Adam(*state, step, 0.5, 0.9, 0.999, 1e-8))
            results.append((x, *(s for s in state if s is not None)))
        for ours, theirs in zip(*results, strict=True):
            assert ours.dtype == theirs.dtype
            finite = theirs.isfinite()
            assert torch.equal(ours[~finite], theirs[~finite])
            # Where |gradient| is near eps or near rounding the normalised step is not determined; elsewhere it is.
            far = (ours[finite].double() - theirs[finite].double()).abs() > 0.01 + 0.01 * theirs[finite].double().abs()
            assert far.float().mean() <= (0.01 if finite.sum() > 100 else 0.1)
        if v > 7:
            assert (results[0][0][:, 2] == -math.inf).all()
            assert all((s[:, 2] == 0).all() for s in results[0][1:])


@pytest.mark.parametrize("table_dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_first_order_update(isa: str, dtype: torch.dtype, table_dtype: torch.dtype) -> None:
    for n, v, d in ((1, 1, 1), (3, 7, 5), (5, 63, 33), (20, 1003, 64), (150, 257, 40)):
        start, table = peaked(n, v, dtype), torch.randn(v, d).to(table_dtype)
        start[:, 2:3] = -math.inf
        tokens, grad = torch.randint(v, (n,)), torch.randn(n, d).to(table_dtype)
        tokens[0] = -1
        ours, theirs = start.clone(), start.double()
        native.first_order_update_(ours, grad, table, tokens, 0.7)
        eager.first_order_update_(theirs, grad, table, tokens, 0.7)
        rough = 1e-12 if torch.float64 in (dtype, table_dtype) else 1e-4
        torch.testing.assert_close(
            ours.double(), theirs, rtol=torch.finfo(dtype).eps, atol=rough, equal_nan=True
        )  # fmt: skip
        assert theirs[0].isnan().all()


@pytest.mark.parametrize(
    "isa, alg, dtype, filters",
    pairwise(ISAS, SCORED_ALGS, DTYPES, FILTERS),
    indirect=["isa"],
)
def test_confidence(isa: str, alg: str, dtype: torch.dtype, filters: tuple[int, float]) -> None:
    for n, v in SHAPES:
        x = peaked(n, v, dtype)
        tokens = eager.sample_tokens(x, Draw(RNG, row_keys(n), 0.7, 0, 1.0))  # some lie outside the filter
        ours = native.unmask_confidence(x, tokens, alg, 0.7, *filters)
        theirs = eager.unmask_confidence(x, tokens, alg, 0.7, *filters)
        truth = eager.unmask_confidence(x.double(), tokens, alg, 0.7, *filters)
        assert ours.dtype == theirs.dtype
        slack = 0.0 if ours.dtype == torch.float64 else 2e-6  # SSE2 has no fused multiply-add: 1.6e-6 was seen
        assert_close(ours, theirs, truth, 2, eps_of(ours.dtype) + slack)
