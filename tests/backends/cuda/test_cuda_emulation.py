"""The CUDA kernels' own text, run on a CPU block by block, against the oracle and the vectors of docs/philox.md."""

from __future__ import annotations

import ctypes
import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from entrgi_kernels.backends import cuda, eager
from entrgi_kernels.backends.arguments import Draw
from entrgi_kernels.names import SCORED_ALGS

VECTORS = json.loads((Path(__file__).parents[2] / "data" / "philox_vectors.json").read_text(encoding="utf-8"))
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FILTERS = [(0, 1.0), (0, 0.9), (5, 1.0), (40, 0.5), (0, 0.999), (3, 0.95), (700, 0.99), (900, 1.0)]
# Lists of 512 candidates: the longer rows overflow them. The last is split over blocks in the statistics.
SHAPES = [(3, 1), (2, 7), (5, 63), (6, 1003), (3, 3000), (2, 70_001)]
RNG = torch.tensor([(1 << 40) + 12345, 77])


@pytest.fixture(autouse=True)
def _order(emulated: ctypes.CDLL) -> Iterator[None]:
    yield
    emulated.set_order(0)


@pytest.fixture(autouse=True)
def _poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN and huge integers: an entry that a kernel forgets to write is seen."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def peaked(n: int, v: int, dtype: torch.dtype = torch.float32, spread: float = 3.0) -> torch.Tensor:
    """Gaussian logits with a few high entries a row."""
    high = torch.where(torch.rand(n, v) < 0.002, 12 * torch.rand(n, v), torch.zeros(()))
    return (spread * torch.randn(n, v) + high).to(dtype)


def keys(n: int) -> torch.Tensor:
    return torch.randint(0, 1 << 62, (n,))


def statistics(x: torch.Tensor, temperature: float, second: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ops.entrgi_cuda.row_statistics(x, temperature, second, 0)


@pytest.mark.parametrize("case", VECTORS["known_answers"], ids=["zeros", "ones", "pi"])
def test_known_answers_of_random123(emulated, case):
    counter, key = ([int(x, 16) for x in case[name]] for name in ("counter", "key"))
    out = (ctypes.c_uint32 * 4)()
    emulated.philox((ctypes.c_uint32 * 4)(*counter), (ctypes.c_uint32 * 2)(*key), out)
    assert [f"{x:08x}" for x in out] == case["words"]


@pytest.mark.parametrize("point", VECTORS["layout"] + VECTORS["tails"], ids=lambda p: f"{p['high']}{p['low']}")
def test_variates(emulated, point):
    exact = math.log(float(point["exponential"]))
    ours = emulated.log_variate(point["seed"], point["step"], point["row"], point["v"])
    assert abs(ours - exact) < 4e-7 + 1.2e-7 * abs(exact)


@pytest.mark.parametrize("case", VECTORS["draws"], ids=lambda c: f"t{c['temperature']}k{c['top_k']}p{c['top_p']}")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_draws_of_the_vectors(emulated, case, dtype):
    logits = torch.tensor([[float(x) for x in row] for row in VECTORS["logits"]], dtype=dtype)
    rng, rows = torch.tensor([case["seed"], case["step"]]), torch.tensor(case["rows"])
    tokens = cuda.sample_tokens(logits, Draw(rng, rows, case["temperature"], case["top_k"], case["top_p"]))
    assert tokens.tolist() == case["tokens"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_keys_are_ordered_like_values_and_lose_nothing(emulated, dtype):
    kind = DTYPES.index(dtype)
    values = torch.cat([torch.randn(300) * 10.0 ** torch.randint(-8, 5, (300,)), torch.tensor([0.0, math.inf])])
    values = torch.cat([values, -values]).to(dtype).float().unique().tolist()
    found = [emulated.key_of(x, kind) for x in values]
    assert all(a < b for a, b in zip(found, found[1:], strict=False))
    assert emulated.key_of(-0.0, kind) == emulated.key_of(0.0, kind)
    for x, key in zip(values, found, strict=True):
        least = emulated.value_of(key, kind)
        assert least <= x and emulated.key_of(least, kind) == key
    assert emulated.value_of(0, kind) == -math.inf


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("temperature", [1.0, 0.7, 0.05])
def test_statistics(emulated, dtype, temperature):
    for n, v in SHAPES:
        x = peaked(n, v, dtype)
        if v > 7:
            x[0, 2:5] = -math.inf
            x[1] += 1000
            x[1, 6] = x[1, 3] = x[1].max()
        out, argmax = statistics(x, 1.0, temperature)
        lse, entropy = eager.softmax_entropy(x.double(), 1.0)
        lse2, _ = eager.softmax_entropy(x.double(), temperature)
        top = x.amax(-1).double()
        truth = [top, lse, entropy, lse - top, lse2, lse2 - top / temperature]
        for ours, exact in zip(out.double(), truth, strict=True):
            torch.testing.assert_close(ours, exact, rtol=3e-6, atol=3e-6)
        assert torch.equal(argmax, x.float().argmax(-1))
        for ours, exact in zip(
            cuda.softmax_entropy(x, temperature), eager.softmax_entropy(x, temperature), strict=True
        ):
            torch.testing.assert_close(ours, exact, rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_same_tokens_as_eager(emulated, dtype, filters):
    for n, v in SHAPES:
        x, rows = peaked(n, v, dtype), keys(n)
        if v > 7:
            x[0, 1] = -math.inf
            x[1] = 2.0  # all tied
            x[2 % n] = x[2 % n].round()  # many ties at the threshold
        for temperature in (1.0, 0.7, 0.0) if v < 10_000 else (0.7,):
            ours = cuda.sample_tokens(x, Draw(RNG, rows, temperature, *filters))
            assert torch.equal(ours, eager.sample_tokens(x, Draw(RNG, rows, temperature, *filters))), (
                n,
                v,
                temperature,
            )


@pytest.mark.parametrize("spread", [0.01, 0.5, 3.0, 300.0])
def test_flat_and_steep_rows(emulated, spread):
    """From rows whose candidates overflow the list several times over to rows with a single candidate."""
    for dtype in (torch.float32, torch.bfloat16):
        x, rows = peaked(4, 6000, dtype, spread), keys(4)
        for filters in ((0, 0.6), (0, 0.95), (2000, 1.0), (5500, 0.999)):
            ours = cuda.sample_tokens(x, Draw(RNG, rows, 0.9, *filters))
            assert torch.equal(ours, eager.sample_tokens(x, Draw(RNG, rows, 0.9, *filters))), filters


def test_a_temperature_that_sends_the_cut_below_every_float(emulated):
    for dtype in DTYPES:
        x, rows = peaked(3, 300, dtype), keys(3)
        x[0, 5] = -math.inf
        for filters in ((0, 0.5), (9, 1.0)):
            ours = cuda.sample_tokens(x, Draw(RNG, rows, 1e38, *filters))
            assert torch.equal(ours, eager.sample_tokens(x, Draw(RNG, rows, 1e38, *filters))), filters


def test_many_draws_equal_eager(emulated):
    """Of 400 draws at most one may differ (a score that ties within rounding)."""
    x = peaked(1, 60).expand(400, 60)  # rows at distance zero
    rows = torch.arange(400)
    ours = cuda.sample_tokens(x, Draw(RNG, rows, 0.7, 0, 0.9))
    assert int((ours != eager.sample_tokens(x, Draw(RNG, rows, 0.7, 0, 0.9))).sum()) <= 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_masked_with_the_least_finite_number(emulated, dtype):
    """As attention and vocabularies are masked; its distance from the maximum overflows float32."""
    x = peaked(3, 40_000, dtype)
    x[0, :39_000] = x[1, 700:] = x[2, 5_000:39_990] = torch.finfo(dtype).min
    expected = eager.softmax_entropy(x, 0.7)
    assert expected[1].isfinite().all()
    torch.testing.assert_close(cuda.softmax_entropy(x, 0.7), expected, rtol=3e-6, atol=3e-6)
    rows = keys(3)
    assert torch.equal(
        cuda.sample_tokens(x, Draw(RNG, rows, 0.7, 0, 0.9)), eager.sample_tokens(x, Draw(RNG, rows, 0.7, 0, 0.9))
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_alignment_and_nothing_read_beyond_a_row(emulated, dtype):
    """Rows that begin at any entry, between NaN: one that were read would make the row bad."""
    for v in (1, 9, 40, 2051):
        for offset in range(9):
            field = torch.full((4, v + 23), math.nan, dtype=dtype)
            x = field[:, offset : offset + v]
            x.copy_(peaked(4, v, dtype))
            rows = keys(4)
            torch.testing.assert_close(
                cuda.softmax_entropy(x, 0.7), eager.softmax_entropy(x, 0.7), rtol=3e-6, atol=3e-6
            )
            assert torch.equal(
                cuda.sample_tokens(x, Draw(RNG, rows, 0.7, 0, 0.9)),
                eager.sample_tokens(x, Draw(RNG, rows, 0.7, 0, 0.9)),
            )
            gradient = [torch.ones(4), torch.rand(4)]
            state = [*eager.softmax_entropy(x, 0.7), *gradient, 0.7]
            close(cuda.softmax_entropy_backward(x, *state), eager.softmax_entropy_backward(x, *state))


def close(ours: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal but for the last bits of the dtype, of exponents around 20, and of float16's subnormals.

    The kernel takes the log-sum-exp that it is given, rounded by up to 1e-6; the oracle forms its own.
    """
    assert ours.dtype == expected.dtype and ours.shape == expected.shape
    torch.testing.assert_close(ours, expected, rtol=max(5e-6, 2 * torch.finfo(ours.dtype).eps), atol=1e-6)


def test_any_strides_and_no_rows(emulated):
    x = peaked(7, 50)
    transposed = x.T.contiguous().T
    rows = keys(7)
    assert torch.equal(
        cuda.sample_tokens(transposed, Draw(RNG, rows, 1.0, 0, 0.9)),
        cuda.sample_tokens(x, Draw(RNG, rows, 1.0, 0, 0.9)),
    )
    assert torch.equal(
        cuda.sample_tokens(x[::3], Draw(RNG, rows[::3], 1.0, 0, 0.9)),
        cuda.sample_tokens(x, Draw(RNG, rows, 1.0, 0, 0.9))[::3],
    )
    empty = x[:0]
    assert cuda.sample_tokens(empty, Draw(RNG, rows[:0], 1.0, 0, 0.9)).shape == (0,)
    assert [t.shape for t in cuda.softmax_entropy(empty, 1.0)] == [(0,), (0,)]
    assert cuda.unmask_confidence(empty, rows[:0], "entropy", 1.0, 0, 1.0).shape == (0,)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bad_rows_and_the_single_finite_entry(emulated, dtype):
    for v in (70, 3000, 70_001):
        x = peaked(6, v, dtype)
        x[1, v // 2], x[2, v - 1], x[3] = math.nan, math.inf, -math.inf
        x[4] = -math.inf
        x[4, 33] = 0.5
        x[5] *= 1e4 / float(x[5].float().abs().max())
        rows = keys(6)
        for filters in ((0, 1.0), (0, 0.95), (3, 1.0)):
            tokens = cuda.sample_tokens(x, Draw(RNG, rows, 0.7, *filters))
            assert tokens[1:4].tolist() == [-1, -1, -1] and int(tokens[4]) == 33
            assert torch.equal(tokens, eager.sample_tokens(x, Draw(RNG, rows, 0.7, *filters)))
        assert torch.equal(
            cuda.sample_tokens(x, Draw(RNG, rows, 0.0, 0, 1.0)), eager.sample_tokens(x, Draw(RNG, rows, 0.0, 0, 1.0))
        )
        out, _ = statistics(x, 1.0, 0.7)
        assert out[:, 1:4].isnan().all() and out[:, [0, 4, 5]].isfinite().all() and float(out[2, 4]) == 0.0
        for alg in SCORED_ALGS:
            confidence = cuda.unmask_confidence(x, tokens, alg, 0.7, 0, 0.95)
            torch.testing.assert_close(
                confidence, eager.unmask_confidence(x, tokens, alg, 0.7, 0, 0.95), rtol=2e-5, atol=2e-6, equal_nan=True
            )


@pytest.mark.parametrize("alg", SCORED_ALGS)
@pytest.mark.parametrize("filters", [(0, 1.0), (0, 0.8), (7, 1.0), (900, 0.95)], ids=str)
def test_confidence(emulated, alg, filters):
    for dtype in DTYPES:
        for n, v in SHAPES[:5]:
            x = peaked(n, v, dtype)
            if v > 7:
                x[1, :4] = x[1].max() + 1  # the two largest tie
                x[0, 5] = -math.inf
            tokens = torch.randint(0, v, (n,))
            tokens[0] = -1  # not drawn
            ours = cuda.unmask_confidence(x, tokens, alg, 0.7, *filters)
            exact = eager.unmask_confidence(x, tokens, alg, 0.7, *filters)
            torch.testing.assert_close(ours, exact, rtol=1e-5, atol=2e-6)


def test_one_launch_gives_the_draw_and_the_statistics(emulated):
    for v in (63, 3000):
        x, rows = peaked(4, v), keys(4)
        x[2, 7] = math.nan
        tokens, out, argmax = torch.ops.entrgi_cuda.draw(x, RNG, rows, 0.7, 0, 0.9, True)
        assert torch.equal(tokens, cuda.sample_tokens(x, Draw(RNG, rows, 0.7, 0, 0.9)))
        expected, place = statistics(x, 1.0, 0.7)
        torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6, equal_nan=True)
        assert torch.equal(argmax, place)


def test_nothing_hangs_on_the_order_of_threads_warps_and_blocks(emulated):
    """Missing barriers and sums in order of arrival show as other bits."""
    x = torch.cat([peaked(2, 70_001), peaked(2, 70_001, spread=0.1)])
    rows, tokens = keys(4), torch.tensor([1, 2, 3, 4])

    def everything() -> list[torch.Tensor]:
        drawn = torch.ops.entrgi_cuda.draw(x, RNG, rows, 0.7, 0, 0.95, True)
        limited = cuda.sample_tokens(x, Draw(RNG, rows, 0.7, 3000, 1.0))
        sums = [cuda.unmask_confidence(x, tokens, alg, 0.7, 0, 0.95) for alg in ("entropy", "topk_margin")]
        return [*drawn, limited, *sums, *statistics(x, 1.0, 0.7)]

    first = everything()
    for order in (1, 2, 3):
        emulated.set_order(order)
        for a, b in zip(first, everything(), strict=True):
            assert torch.equal(a, b), order


def test_the_order_shows_a_race(emulated):
    """The check above can fail: a kernel without its barrier gives other results in another order."""
    results = []
    for order in (0, 1):
        emulated.set_order(order)
        out = (ctypes.c_int * 64)()
        emulated.race(out)
        results.append(list(out))
    assert results[0] != results[1]


def test_what_the_bindings_refuse(emulated):
    with pytest.raises(TypeError, match="float64|Double"):
        cuda.softmax_entropy(torch.zeros(2, 3, dtype=torch.float64), 1.0)
    with pytest.raises(ValueError, match="unknown alg 'best'"):
        cuda.unmask_confidence(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64), "best", 1.0, 0, 1.0)
