"""The native backend at the edges: bad rows, extreme logits, strides, poison, determinism, memory, refusals."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from entrgi_kernels.backends import eager, native
from entrgi_kernels.backends.arguments import Adam, Draw
from entrgi_kernels.names import SCORED_ALGS

_REASON = native.why_not(torch.device("cpu"), torch.float32)
pytestmark = pytest.mark.skipif(_REASON is not None, reason=str(_REASON))

ISAS = list(native.build_info()["supported_isas"]) if _REASON is None else ["none"]
RNG = torch.tensor([99, 3])


@pytest.fixture(params=ISAS)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    native.set_isa(request.param)
    yield request.param
    native.set_isa("")


def step(x: torch.Tensor, table: torch.Tensor, grad: torch.Tensor) -> list[torch.Tensor]:
    """Everything that a guidance step and its neighbours compute, from a copy of x."""
    rows = torch.arange(len(x))
    phi, m, v = x.clone(), torch.zeros_like(x), torch.zeros_like(x)
    out = list(native.entrgi_embedding(phi, table, Draw(RNG, rows, 0.7, 0, 0.9), None, None, "entropy"))
    native.guidance_update_(phi, grad, table, out[4], out[5], 0.7, Adam(m, v, 1, 0.5, 0.9, 0.999, 1e-8))
    out += [phi, m, v, *native.softmax_entropy(x, 0.7), native.sample_tokens(x, Draw(RNG, rows, 0.7, 7, 0.9))]
    out.append(native.soft_embedding_backward(x, table, grad, out[4], out[5], 0.7))
    out.append(native.soft_embedding_grad_table(x, grad, out[5], 0.7, table.dtype))
    out += [native.unmask_confidence(x, out[1], alg, 0.7, 0, 0.9) for alg in ("entropy", "topk_margin")]
    return out


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x.nan_to_num(12345.0), y.nan_to_num(12345.0)) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("n", (5, 20))  # fewer than the tiles of bf16 tables take, and more
def test_bad_rows(isa: str, n: int) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        x = torch.randn(n, 200).to(dtype)
        x[0, 150], x[1, 3], x[2] = math.nan, math.inf, -math.inf
        x[3] = -math.inf
        x[3, 77] = -5.0
        table, rows, grad = torch.randn(200, 40).to(dtype), torch.arange(n), torch.randn(n, 40).to(dtype)
        for top_k, top_p in ((0, 1.0), (3, 1.0), (0, 0.9)):
            assert native.sample_tokens(x, Draw(RNG, rows, 0.7, top_k, top_p))[:4].tolist() == [-1, -1, -1, 77]
        assert native.sample_tokens(x, Draw(RNG, rows, 0.0, 0, 1.0))[:4].tolist() == [-1, -1, -1, 77]
        ours = native.entrgi_embedding(x, table, Draw(RNG, rows, 0.7, 0, 0.9), None, None, "entropy")
        for i in (0, 2, 3, 4, 5):
            assert ours[i][:3].isnan().all() and ours[i][3:].isfinite().all()
        assert torch.equal(ours[0][3], table[77]) and ours[3][3] == 0
        for alg in SCORED_ALGS:
            got = native.unmask_confidence(x, torch.full((n,), 77), alg, 0.7, 0, 0.9)
            assert got[:3].isnan().all() and got[3:].isfinite().all()
        gradient = native.soft_embedding_backward(x, table, grad, ours[4], ours[5], 0.7)
        assert gradient[:3].isnan().all() and gradient[3].abs().max() < 1e-3
        assert gradient[3].count_nonzero() <= 1  # the one token with mass: two dot products that should cancel
        phi = x.clone()
        native.guidance_update_(phi, grad, table, ours[4], ours[5], 0.7, Adam(None, None, 1, 0.5, 0.9, 0.999, 1e-8))
        assert torch.equal(phi[3] == -math.inf, x[3] == -math.inf) and not phi[3:].isnan().any()


def test_extreme_logits(isa: str) -> None:
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        x = torch.randint(0, 2, (6, 500)).to(dtype) * 2e4 - 1e4
        x[0] = 1e4
        x[1] = -1e4
        truth = eager.softmax_entropy(x.double(), 0.7)
        ours = native.softmax_entropy(x, 0.7)
        torch.testing.assert_close(ours[0].double(), truth[0], rtol=1e-6, atol=0)
        torch.testing.assert_close(ours[1].double(), truth[1], rtol=1e-5, atol=1e-6)
        table = torch.randn(500, 24)
        soft, _ = native.soft_embedding(x, table, 0.7)
        torch.testing.assert_close(soft.double(), eager.soft_embedding(x.double(), table, 0.7)[0], rtol=1e-4, atol=1e-5)
        rows = torch.arange(6)
        got = native.sample_tokens(x, Draw(RNG, rows, 0.7, 0, 0.9))
        assert torch.equal(got, eager.sample_tokens(x, Draw(RNG, rows, 0.7, 0, 0.9)))


def test_denormals(isa: str) -> None:
    """The caller's arithmetic keeps them after a call; float16's are normal float32 and count inside one, too."""
    table = torch.full((7, 5), 3e-6, dtype=torch.float16)  # five columns: less than a vector
    soft, _ = native.soft_embedding(torch.zeros(2, 7), table, 0.7)
    torch.testing.assert_close(soft, table[:2].float(), rtol=1e-5, atol=0.0)
    assert (torch.full((64,), 1e-40) * 1.0 > 0).all()


@pytest.mark.parametrize("n, dtype", ((6, torch.float32), (6, torch.bfloat16), (20, torch.bfloat16)))
def test_strides(isa: str, n: int, dtype: torch.dtype) -> None:
    v, d = 333, 40
    base, table, grad = (torch.randn(s).to(dtype) for s in ((n, v), (v, d), (n, d)))
    expected = step(base, table, grad)
    sliced = torch.full((2 * n, v + 50), math.nan, dtype=dtype)
    sliced[::2, 17 : 17 + v] = base
    wide_table = torch.full((v, 2 * d), math.nan, dtype=dtype)
    wide_table[:, ::2] = table
    rows_apart = torch.full((v, d + 7), math.nan, dtype=dtype)  # a table that is read where it lies
    rows_apart[:, 3 : 3 + d] = table
    grad_apart = torch.full((n, d + 3), math.nan, dtype=dtype)
    grad_apart[:, 1 : 1 + d] = grad
    variants = {
        "transposed": (base.t().contiguous().t(), table.t().contiguous().t(), grad.t().contiguous().t()),
        "sliced": (sliced[::2, 17 : 17 + v], wide_table[:, ::2], grad),
        "rows apart": (base, rows_apart[:, 3 : 3 + d], grad_apart[:, 1 : 1 + d]),
    }
    for x, e, g in variants.values():
        assert torch.equal(x, base)
        assert same(expected, step(x, e, g))
    rows = torch.arange(n)
    one = base[:1].expand(n, v)  # stride 0
    ours = native.entrgi_embedding(one, table[:1].expand(v, d), Draw(RNG, rows, 0.7, 0, 0.9), None, None, "entropy")
    other = native.entrgi_embedding(
        one.contiguous(), table[:1].expand(v, d).contiguous(), Draw(RNG, rows, 0.7, 0, 0.9), None, None, "entropy"
    )
    assert same(list(ours), list(other))
    flat = grad.sum().expand(n, d)  # what autograd hands over after .sum()
    lse = expected[5]
    assert torch.equal(
        native.soft_embedding_backward(base, table, flat, expected[4], lse, 0.7),
        native.soft_embedding_backward(base, table, flat.contiguous(), expected[4], lse, 0.7),
    )


@pytest.mark.parametrize("n, dtype", ((5, torch.float32), (20, torch.bfloat16)))
def test_update_in_place_on_strided(isa: str, n: int, dtype: torch.dtype) -> None:
    v, d = 130, 33
    table, grad, start = (torch.randn(s).to(dtype) for s in ((v, d), (n, d), (n, v)))
    soft, lse = native.soft_embedding(start, table, 0.7)
    expected = [start.clone(), torch.zeros_like(start), torch.zeros_like(start)]
    native.guidance_update_(expected[0], grad, table, soft, lse, 0.7, Adam(*expected[1:], 1, 0.5, 0.9, 0.999, 1e-8))
    assert not torch.equal(expected[0], start)
    outer = torch.full((2 * n, v + 9), 7.0, dtype=dtype)
    moments = torch.zeros(v, n, dtype=dtype).t(), torch.zeros(n, 2 * v, dtype=dtype)[:, ::2]
    views = [outer[1::2, 4 : 4 + v], *moments]
    views[0].copy_(start)
    native.guidance_update_(views[0], grad, table, soft, lse, 0.7, Adam(*views[1:], 1, 0.5, 0.9, 0.999, 1e-8))
    assert all(torch.equal(a, b) for a, b in zip(views, expected, strict=True))
    assert (outer[::2] == 7).all() and (outer[:, :4] == 7).all() and (outer[:, 4 + v :] == 7).all()


def test_every_output_is_written(isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh memory holds NaN here: an entry that nobody wrote would show."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        for n, v, d in ((3, 1, 1), (17, 1000, 45), (33, 77, 64), (16, 64, 32), (20, 50, 0)):
            for dtype in (torch.float32, torch.bfloat16):
                x, table, grad = (torch.randn(s).to(dtype) for s in ((n, v), (v, d), (n, d)))
                assert all(t.isfinite().all() for t in step(x, table, grad) if t.is_floating_point())
    finally:
        torch.use_deterministic_algorithms(False)


def test_empty() -> None:
    x, table, rows = torch.empty(0, 12), torch.randn(12, 5), torch.empty(0, dtype=torch.int64)
    assert native.sample_tokens(x, Draw(RNG, rows, 0.7, 0, 0.9)).shape == (0,)
    out = step(x, table, torch.empty(0, 5))
    assert out[0].shape == (0, 5) and out[-3].shape == (12, 5) and (out[-3] == 0).all()


@pytest.mark.parametrize(
    "dtype, table_dtype, n, v, d, counts",
    (
        (torch.float32, torch.float32, 37, 9001, 200, (1, 2, 2, 5)),
        (torch.bfloat16, torch.bfloat16, 37, 9001, 200, (1, 2, 2, 5)),
        (torch.float32, torch.bfloat16, 64, 3000, 1024, (1, 8)),  # eight groups of columns
        (torch.bfloat16, torch.bfloat16, 64, 3000, 1024, (1, 8)),
    ),
)
def test_same_bits(
    isa: str, dtype: torch.dtype, table_dtype: torch.dtype, n: int, v: int, d: int, counts: tuple[int, ...]
) -> None:
    """Run to run, and at every number of threads."""
    x, table, grad = torch.randn(n, v).to(dtype), torch.randn(v, d).to(table_dtype), torch.randn(n, d).to(table_dtype)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in counts:
            torch.set_num_threads(count)
            results.append(step(3 * x, table, grad))
    finally:
        torch.set_num_threads(threads)
    assert all(same(results[0], r) for r in results[1:])


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_few_rows_are_as_precise_as_many(isa: str, dtype: torch.dtype) -> None:
    """Kernels of few rows add in another order, and round nothing else."""
    x, table = (3 * torch.randn(40, 5000)).to(dtype), torch.randn(5000, 96).to(torch.bfloat16)
    many = native.soft_embedding(x, table, 0.7)[0]
    for n in (1, 7, 12, 13, 16, 17):
        few = native.soft_embedding(x[:n], table, 0.7)[0]
        torch.testing.assert_close(few, many[:n], rtol=1e-5, atol=2e-6)


def test_draws_do_not_depend_on_the_batch() -> None:
    x, rows = 3 * torch.randn(40, 700), torch.randint(0, 1 << 60, (40,))
    together = native.sample_tokens(x, Draw(RNG, rows, 0.7, 0, 0.9))
    alone = torch.cat([native.sample_tokens(x[i : i + 1], Draw(RNG, rows[i : i + 1], 0.7, 0, 0.9)) for i in range(40)])
    assert torch.equal(together, alone)


@pytest.mark.slow
def test_vocabulary_of_a_real_model() -> None:
    v = 151_936
    x, table, grad = 3 * torch.randn(3, v), torch.randn(v, 16), torch.randn(3, 16)
    x[0] = 0.5  # flat: the nucleus is the whole row, by ties
    x[1] = torch.linspace(-1, 1, v)[torch.randperm(v)]  # a nucleus too large for the candidate list
    rows = torch.arange(3)
    for top_k, top_p in ((0, 1.0), (0, 0.95), (50, 1.0), (100_000, 1.0), (20_000, 0.9)):
        ours = native.sample_tokens(x, Draw(RNG, rows, 0.7, top_k, top_p))
        assert torch.equal(ours, eager.sample_tokens(x, Draw(RNG, rows, 0.7, top_k, top_p)))
    truth = eager.entrgi_embedding(x.double(), table, Draw(RNG, rows, 0.7, 0, 0.95), None, None, "entropy")
    out = step(x, table, grad)
    for i in (2, 3, 4, 5):
        torch.testing.assert_close(out[i].double(), truth[i], rtol=2e-5, atol=2e-5)


_MEMORY = """
import sys, threading, time
import psutil, torch
from entrgi_kernels.backends import native
from entrgi_kernels.backends.arguments import Adam, Draw
dtype = getattr(torch, sys.argv[1])
assert native.why_not(torch.device("cpu"), dtype) is None  # loads the extension, as the registry does
torch.set_num_threads(2)
n, v, d = 128, 151_936, 512
phi, table, grad = ((3 * torch.randn(s)).to(dtype) for s in ((n, v), (v, d), (n, d)))
m, s, rows, rng = torch.zeros_like(phi), torch.zeros_like(phi), torch.arange(n), torch.tensor([1, 2])
m.fill_(0), s.fill_(0)

def once(phi, table, grad, m, s, rows):
    out = native.entrgi_embedding(phi, table, Draw(rng, rows, 0.7, 0, 0.95), None, None, "entropy")
    native.guidance_update_(phi, grad, table, out[4], out[5], 0.7, Adam(m, s, 1, 0.5, 0.9, 0.999, 1e-8))

once(phi[:2, :300], table[:300], grad[:2], m[:2, :300], s[:2, :300], rows[:2])  # libraries load, threads start
process, peak, stop = psutil.Process(), 0, False
def watch():
    global peak
    while not stop:
        peak = max(peak, process.memory_info().rss)
        time.sleep(0.001)
before = process.memory_info().rss
thread = threading.Thread(target=watch)
thread.start()
once(phi, table, grad, m, s, rows)
stop = True
thread.join()
print((peak - before) / (n * v * phi.element_size()))
"""


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_memory_of_a_step(dtype: str) -> None:
    """The resident set grows by at most a tenth of the logits' bytes while a guidance step runs."""
    pytest.importorskip("psutil")
    run = subprocess.run([sys.executable, "-c", _MEMORY, dtype], capture_output=True, text=True, check=True)
    share = float(run.stdout)
    assert 0 < share <= 0.10, f"a step grew the process by {share:.1%} of the logits"


def test_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    assert native.why_not(torch.device("cpu"), torch.bfloat16) is None
    assert "CPU" in str(native.why_not(torch.device("cuda"), torch.float32))
    assert "int64" in str(native.why_not(torch.device("cpu"), torch.int64))
    with pytest.raises(ValueError, match="cannot run"):
        native.set_isa("mmx")
    assert native.build_info()["isa"] in ISAS
    monkeypatch.setattr(native, "INTERFACE", 0)
    assert "other sources" in str(native.why_not(torch.device("cpu"), torch.float32))


def test_reason_when_not_built() -> None:
    code = (
        "import sys; sys.modules['entrgi_kernels._C'] = None\n"
        "import torch, entrgi_kernels\nfrom entrgi_kernels.backends import native\n"
        "print(native.why_not(torch.device('cpu'), torch.float32))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "entrgi_kernels._C" in run.stdout


def test_tokens_outside_the_table_are_refused() -> None:
    x, table = torch.randn(2, 9), torch.randn(9, 4)
    with pytest.raises(IndexError):
        native.entrgi_embedding(x, table, Draw(RNG, torch.arange(2), 0.7, 0, 1.0), torch.tensor([1, 9]), None, "one")
