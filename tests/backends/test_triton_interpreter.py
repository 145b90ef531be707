"""The Triton kernels against the eager oracle on a CPU, through Triton's interpreter.

The interpreter has to be chosen before the kernels are decorated, and other tests of the same run may have imported
them already: so the file runs itself once more in processes of its own, with the variable set.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from entrgi_kernels.names import SCORED_ALGS

pytest.importorskip("triton")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


# Two shares of the tests that take about as long, by their names: the interpreter uses one core.
_SHARE = "gradients or guidance_update or mixed_dtypes or draws or least_finite"


@pytest.mark.slow
@pytest.mark.skipif(INTERPRETED, reason="this is an inner process")
def test_parity_with_eager_in_interpreting_processes():
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--tb=short", "-p", "no:cacheprovider", __file__, "-k"]
    options = {"env": environment, "cwd": Path(__file__).parents[2], "text": True, "stderr": subprocess.STDOUT}
    inner = [
        subprocess.Popen([*command, share], stdout=subprocess.PIPE, **options) for share in (_SHARE, f"not ({_SHARE})")
    ]
    try:
        printed = [process.communicate(timeout=1500)[0] for process in inner]
    finally:
        for process in inner:
            process.kill()
    for process, text in zip(inner, printed, strict=True):
        assert process.returncode == 0, text[-6000:]
        assert " passed" in text and " failed" not in text


if INTERPRETED:
    import triton
    import triton.language as tl

    from entrgi_kernels import backends, ops
    from entrgi_kernels.backends import eager
    from entrgi_kernels.backends import philox as reference
    from entrgi_kernels.backends import triton as kernels
    from entrgi_kernels.backends.arguments import Adam, Draw, Placement
    from entrgi_kernels.backends.triton import config, filters, launch, philox, statistics
    from entrgi_kernels.ops import _vocabulary_head

    warnings.filterwarnings("ignore", category=RuntimeWarning)  # numpy's opinion of inf - inf

inner = pytest.mark.skipif(not INTERPRETED, reason="runs in an inner process")
TOLERANCE = {torch.float32: 4e-6, torch.float16: 3e-3}
DTYPES = [torch.float32, torch.float16]
ALL_DTYPES = [*DTYPES, torch.bfloat16]  # what multiplies no matrices is interpreted rightly in bfloat16 too
# (N, V, D): V no multiple of any tile; rows split over programs; every tile of the tables, by pointers and (N = 7) by
# descriptors, and where those are refused (N = 18); the chunked engine (N > 20).
SHAPES = [(1, 1, 3), (3, 300, 20), (7, 152, 40), (18, 63, 17), (22, 130, 16), (64, 37, 9)]
ADAM = (0.7, 0.5, 0.9, 0.999, 1e-8)


@pytest.fixture(autouse=True)
def _poisoned_buffers(monkeypatch):
    """torch.empty gives NaN and a number no index has, so that an entry nobody writes shows."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        tensor = empty(*args, **kwargs)
        return tensor.fill_(math.nan if tensor.is_floating_point() else -77)

    monkeypatch.setattr(torch, "empty", poisoned)


def make(n, v, d, dtype, seed=0, bad=True):
    """Logits with awkward rows where there is room for them, a table and a gradient."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, v, generator=generator) * 3
    if v > 20 and n > 2:
        logits[0, 3:9] = -math.inf
        logits[1, 10:20] = logits[1].max()
    if bad and n > 6:
        logits[2] = -math.inf
        logits[2, v // 2] = 1.0
        logits[3], logits[4, 5], logits[5, v - 1] = -math.inf, math.nan, math.inf
    table, grad = torch.randn(v, d, generator=generator), torch.randn(n, d, generator=generator)
    return logits.to(dtype), table.to(dtype), grad.to(dtype)


def close(ours, theirs, dtype, what=""):
    """Same dtype, shape, NaN and infinities; finite entries within the tolerance of the largest."""
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape, what
    if not ours.is_floating_point():
        assert torch.equal(ours, theirs), what
        return
    finite = theirs.isfinite()
    assert torch.equal(ours.isnan(), theirs.isnan()), f"{what}: NaN elsewhere"
    assert torch.equal(ours[~finite & ~ours.isnan()], theirs[~finite & ~theirs.isnan()]), what
    if finite.any():
        scale = theirs[finite].double().abs().max().clamp(min=1e-6)
        error = float((ours[finite].double() - theirs[finite].double()).abs().max() / scale)
        assert error <= TOLERANCE[dtype], f"{what}: relative error {error:.2e}"


@inner
def test_what_it_serves():
    cpu = torch.device("cpu")
    assert kernels.why_not(cpu, torch.float32) is None
    assert "float64" in kernels.why_not(cpu, torch.float64)
    assert "meta" in kernels.why_not(torch.device("meta"), torch.float32)
    with pytest.raises(backends.BackendUnavailableError, match="float64"):
        ops.softmax_entropy(torch.zeros(1, 2, dtype=torch.float64), backend="triton")


@inner
def test_philox_words_are_the_specification():
    @triton.jit
    def kernel(rng, out, key, B: tl.constexpr):
        pair = tl.arange(0, B)
        x0, x1, x2, x3 = philox.words_of_pairs(pair, rng, tl.load(key))
        tl.store(out + pair * 4, x0.to(tl.int64))
        tl.store(out + pair * 4 + 1, x1.to(tl.int64))
        tl.store(out + pair * 4 + 2, x2.to(tl.int64))
        tl.store(out + pair * 4 + 3, x3.to(tl.int64))

    for seed, step, key in ((0, 0, 0), (-(1 << 62) + 12345, (1 << 40) + 7, -(1 << 50) + 3)):
        rng = torch.tensor([seed, step])
        out = torch.zeros(32, 4, dtype=torch.int64)
        kernel[(1,)](rng, out, torch.tensor([key]), B=32)
        high, low = reference.words(rng, torch.tensor(key), torch.arange(64))
        assert torch.equal(out.view(-1, 2), torch.stack([high, low], dim=1))


@inner
def test_noise_keeps_both_tails():
    """log E at words near 0 and near 2^64, where a careless logarithm or a rounded uniform would be off."""

    @triton.jit
    def kernel(high, low, out, B: tl.constexpr):
        lanes = tl.arange(0, B)
        tl.store(
            out + lanes, philox.log_exponential(tl.load(high + lanes).to(tl.uint32), tl.load(low + lanes).to(tl.uint32))
        )

    top = (1 << 32) - 1
    words = [(0, 0), (0, 1), (0, top), (1, 0), (1 << 20, 5), ((1 << 31) - 1, top), (1 << 31, 0), (top, top)]
    high, low = (torch.tensor([pair[i] for pair in words]) for i in (0, 1))
    out = torch.zeros(len(words))
    kernel[(1,)](high, low, out, B=len(words))
    for (a, b), value in zip(words, out.tolist(), strict=True):
        w = (a << 32) + b
        exact = (
            math.log(-math.log1p(-(w + 0.5) / 2**64))
            if w < 1 << 63
            else math.log(-math.log(((2**64 - 1 - w) + 0.5) / 2**64))
        )
        assert abs(value - exact) <= 4e-7 * max(1.0, abs(exact))


@inner
@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("shape", SHAPES[:4])
def test_statistics(shape, dtype):
    logits, _, _ = make(*shape, dtype)
    found = statistics.row_statistics(logits, 1.0, second=0.7, argmax=True)
    lse, entropy = eager.softmax_entropy(logits, 1.0)
    close(found.lse, lse, torch.float32, "lse")
    close(found.entropy, entropy, torch.float32, "entropy")
    close(found.lse2, eager.softmax_entropy(logits, 0.7)[0], torch.float32, "lse2")
    assert torch.equal(found.argmax, logits.argmax(dim=-1))


@inner
@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize("together", [True, False], ids=["whole rows", "split rows"])
def test_statistics_wherever_the_maximum_rises(dtype, together):
    """Two full tiles and a partial one: which of them raises a lane's maximum, ties, and what is not finite."""
    logits = (torch.randn(11, 300, generator=torch.Generator().manual_seed(8)) * 2).to(dtype)
    logits[0, 299] = 20  # in the last, partial tile alone
    logits[1, [5, 130, 290]], logits[2, [130, 131, 290]], logits[3, [13, 77]] = 20, 20, 20
    logits[4, 290] = math.nan
    logits[5, :256], logits[6, :299] = -math.inf, -math.inf
    logits[7], logits[7, 140:150] = torch.finfo(dtype).min, 1.0
    logits[8] = torch.linspace(-30, 30, 300)  # in every tile
    logits[9, 270] = math.inf
    logits[10] = 0.0
    logits[10, ::2] = -0.0
    calls = [logits] if together else logits.split(2)
    found = [statistics.row_statistics(rows, 1.0, second=0.5, argmax=True) for rows in calls]
    lse, entropy, lse2, argmax = (
        torch.cat([getattr(f, name) for f in found]) for name in ("lse", "entropy", "lse2", "argmax")
    )
    assert argmax.tolist() == logits.float().argmax(dim=-1).tolist()
    for ours, theirs in zip((lse, entropy), eager.softmax_entropy(logits, 1.0), strict=True):
        close(ours, theirs, torch.float32)
    close(lse2, eager.softmax_entropy(logits, 0.5)[0], torch.float32)


@inner
@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_rows_masked_with_the_least_finite_number(dtype):
    """As transformers masks: whole tiles, whole slices and the row's beginning, far below -inf's safety."""
    logits = torch.randn(4, 300, generator=torch.Generator().manual_seed(6)).to(dtype)
    least = torch.finfo(dtype).min
    logits[0, :270], logits[1, 120:], logits[2, 50:280], logits[3, 1:] = least, least, least, least
    rng, rows = torch.tensor([1, 2]), torch.arange(4)
    for temperature in (1.0, 0.7):
        ours, theirs = (module.softmax_entropy(logits, temperature) for module in (kernels, eager))
        close(ours[0], theirs[0], torch.float32, "lse")
        close(ours[1], theirs[1], torch.float32, "entropy")
    for top_k, top_p in ((0, 1.0), (0, 0.9), (200, 1.0)):
        ours = kernels.sample_tokens(logits, Draw(rng, rows, 0.7, top_k, top_p))
        assert torch.equal(ours, eager.sample_tokens(logits, Draw(rng, rows, 0.7, top_k, top_p)))
    for alg in ("entropy", "topk_margin"):
        ours, theirs = (m.unmask_confidence(logits, rows, alg, 0.7, 0, 0.9) for m in (kernels, eager))
        close(ours, theirs, torch.float32, alg)


def kept_by(keys, logits):
    """Which entries thresholds as ordered keys keep."""
    bits = torch.where(logits == 0, 0.0, logits.float()).view(torch.int32)
    return ((bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> filters.KEY_SHIFT[logits.dtype]) >= keys[:, None]


def oracle_keeps(logits, temperature, top_k, top_p):
    return logits >= eager.filter_threshold(logits.float(), temperature, top_k, top_p)[:, None]


@inner
@pytest.mark.parametrize("dtype", ALL_DTYPES)
def test_top_k_below_the_cut_off(dtype):
    """More entries than the list of candidates holds or the cut-off lets pass: searched from the dtype's least key."""
    logits = (torch.randn(3, 300, generator=torch.Generator().manual_seed(7)) * 30).to(dtype)
    logits[2, 40:] = -math.inf  # fewer finite entries than k
    found = statistics.row_statistics(logits, 1.0)
    for top_k in (60, 200, 299):
        keys = filters.filter_thresholds(logits, found, 1.0, top_k, 1.0)
        assert torch.equal(kept_by(keys, logits), oracle_keeps(logits, 1.0, top_k, 1.0))


@inner
@pytest.mark.parametrize("dtype", ALL_DTYPES)
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (0, 0.9), (5, 1.0), (40, 0.5), (3, 0.99), (0, 0.05)])
def test_draws_are_the_oracles(dtype, top_k, top_p):
    rng = torch.tensor([11, 5])
    for shape in ((1, 1, 1), (8, 150, 1), (3, 300, 1)):
        logits, _, _ = make(*shape, dtype)
        rows = torch.arange(shape[0]) * (1 << 40) - 9
        ours = kernels.sample_tokens(logits, Draw(rng, rows, 0.7, top_k, top_p))
        assert torch.equal(ours, eager.sample_tokens(logits, Draw(rng, rows, 0.7, top_k, top_p)))


@inner
def test_a_flat_row_keeps_more_than_its_list_holds_and_is_searched_in_full():
    logits = torch.randn(2, 300, generator=torch.Generator().manual_seed(3)) * 0.05
    rng, rows = torch.tensor([1, 2]), torch.arange(2)
    entry = config.target(logits.device).architecture.sample
    assert entry.capacity_share > 2  # all entries pass the cut-off: more than twice what the lists hold
    for top_k, top_p in ((0, 0.6), (250, 1.0), (100, 0.9)):
        draw = Draw(rng, rows, 1.0, top_k, top_p)
        assert torch.equal(kernels.sample_tokens(logits, draw), eager.sample_tokens(logits, draw))


def spy_on_lists(launched):
    """A launch that notes (how often cut-offs were raised, entries in the lists, room in a list) of every draw."""

    def spy(function, grid, *args, **options):
        launch.launch(function, grid, *args, **options)
        if function.fn.__name__ == "_cut_kernel":
            launched.append((args[4].tolist(),))
        if function.fn.__name__ == "_collect_kernel":
            launched[-1] += args[5].tolist(), args[9]

    return spy


@inner
def test_a_list_that_overflows_is_not_believed(monkeypatch):
    """What passes the cut-off lies where the sample does not look (32 to 63, 240 to 271): in both slices, in one."""
    logits = torch.full((2, 300), -30.0)
    logits[0, 64:240] = torch.randn(176, generator=torch.Generator().manual_seed(4)) * 0.05
    for start in (64, 128, 192):  # stretches of 32 entries, every second one in the first slice
        logits[1, start : start + 32] = logits[0, start : start + 32]
    logits, launched = logits.half(), []

    monkeypatch.setattr(filters, "launch", spy_on_lists(launched))
    for top_k, top_p in ((0, 0.6), (70, 1.0)):
        keys = filters.filter_thresholds(logits, statistics.row_statistics(logits, 1.0), 1.0, top_k, top_p)
        assert torch.equal(kept_by(keys, logits), oracle_keeps(logits, 1.0, top_k, top_p))
    assert launched == [([0, 0], [[96, 80], [96, 0]], 64)] * 2  # raised never; in each slice; room for


@inner
@pytest.mark.parametrize(("dtype", "together"), [(torch.float16, True), (torch.bfloat16, False)])
def test_a_raised_cut_off_serves_or_is_found_out(dtype, together, monkeypatch):
    """Thirty high entries above 270 lower ones: with the gap, what is left out weighs nothing, little, too much."""
    logits = torch.randn(5, 300, generator=torch.Generator().manual_seed(9)) * 0.1
    logits[:, ::10] += torch.tensor([9.0, 4.5, 3.0, 0.5, 5.0])[:, None]
    logits, launched = logits.to(dtype), []

    monkeypatch.setattr(filters, "launch", spy_on_lists(launched))
    rng = torch.tensor([3, 4])
    for top_k, top_p in ((0, 0.9), (25, 1.0)):
        launched.clear()
        for rows in [torch.arange(5)] if together else torch.arange(5).split(2):  # fewer rows are split over programs
            ours = kernels.sample_tokens(logits[rows], Draw(rng, rows, 1.0, top_k, top_p))
            assert torch.equal(ours, eager.sample_tokens(logits[rows], Draw(rng, rows, 1.0, top_k, top_p)))
            found = statistics.row_statistics(logits[rows], 1.0)
            keys = filters.filter_thresholds(logits[rows], found, 1.0, top_k, top_p)
            assert torch.equal(kept_by(keys, logits[rows]), oracle_keeps(logits[rows], 1.0, top_k, top_p))
        if together and top_p < 1.0:
            raises, counts, _ = launched[0]
            assert raises[0] == 0 < raises[1] and counts[:2] == [[30], [30]]


@inner
def test_a_cut_off_between_two_values_of_the_dtype_keeps_neither_more_nor_less():
    """One entry reaches the cut-off 1.3513; 299 lie at the value of bfloat16 just below it, and share its key."""
    logits = torch.full((1, 300), 1.34375, dtype=torch.bfloat16)
    logits[0, 7] = 10.0
    keys = filters.filter_thresholds(logits, statistics.row_statistics(logits, 1.0), 1.0, 0, 0.9)
    assert kept_by(keys, logits).nonzero().tolist() == [[0, 7]]


@inner
def test_the_cut_off_is_never_raised_above_the_maximum():
    """Two neighbouring values, half of the row each: the sample asks for more raises than there is room for."""
    logits = torch.tensor([5.0, 4.96875], dtype=torch.bfloat16).repeat(1, 150)
    found = statistics.row_statistics(logits, 1.0)
    for top_k, top_p, kept in ((0, 0.4, 150), (20, 1.0, 150), (0, 0.6, 300)):
        assert kept_by(filters.filter_thresholds(logits, found, 1.0, top_k, top_p), logits).sum() == kept


@inner
@pytest.mark.parametrize("scale", [0.5, 300.0])
def test_a_race_leaves_out_no_tile_that_would_have_won(scale):
    """Six tiles a row, of which the later ones often hold a slightly better score."""
    logits = torch.randn(32, 700, generator=torch.Generator().manual_seed(12)) * scale
    draw = Draw(torch.tensor([5, 6]), torch.arange(32), 1.0, 0, 1.0)
    assert torch.equal(kernels.sample_tokens(logits, draw), eager.sample_tokens(logits, draw))


@inner
def test_the_threshold_keeps_exactly_the_oracles_set():
    logits = torch.randn(5, 140, generator=torch.Generator().manual_seed(4)).mul(2).round()  # ties, and -0.0
    for top_k, top_p in ((0, 0.7), (9, 1.0), (20, 0.9), (0, 0.999)):
        found = statistics.row_statistics(logits, 0.8)
        keys = filters.filter_thresholds(logits, found, 0.8, top_k, top_p)
        assert torch.equal(kept_by(keys, logits), oracle_keeps(logits, 0.8, top_k, top_p))


@inner
def test_draws_at_temperature_zero_and_of_empty_batches():
    logits, table, _ = make(8, 150, 4, torch.float32)
    rng, rows = torch.tensor([1, 2]), torch.arange(8)
    ours = kernels.sample_tokens(logits, Draw(rng, rows, 0.0, 0, 1.0))
    assert torch.equal(ours, eager.sample_tokens(logits, Draw(rng, rows, 0.0, 0, 1.0)))
    draw = Draw(rng, rows[:0], 0.7, 0, 0.9)
    none = kernels.entrgi_embedding(logits[:0], table, draw, None, None, "entropy")
    assert [tuple(t.shape) for t in none] == [(0, 4), (0,), (0,), (0,), (0, 4), (0,), (0,)]
    out = torch.full((3, 4), math.nan)
    kernels.entrgi_embedding(logits[:0], table, draw, None, None, "one", Placement(out, rows[:0]))
    outside = Placement(out, torch.tensor([3, 1, -1, 1 << 40]))
    kernels.entrgi_embedding(logits[:4], table, Draw(rng, rows[:4], 0.7, 0, 1.0), None, None, "zero", outside)
    assert out.isnan().all(dim=-1).tolist() == [True, False, True]  # what has no place there is left out
    embedding, tokens, _, entropy, soft, lse, _ = none
    kernels.guidance_update_(logits[:0], embedding, table, soft, lse, ADAM[0], Adam(None, None, 1, *ADAM[1:]))
    assert [t.shape[0] for t in kernels.soft_embedding(logits[:0], table, 0.7)] == [0, 0]
    assert kernels.soft_embedding_backward(logits[:0], table, embedding, soft, lse, 0.7).shape == (0, 150)
    assert torch.equal(kernels.soft_embedding_grad_table(logits[:0], embedding, lse, 0.7, torch.float32), table * 0)
    assert kernels.softmax_entropy_backward(logits[:0], lse, entropy, lse, lse, 0.7).shape == (0, 150)
    assert kernels.softmax_entropy(logits[:0], 0.7)[1].shape == (0,)
    for alg in ("entropy", "anchor", "maskgit_plus"):
        assert kernels.unmask_confidence(logits[:0], tokens, alg, 0.7, 0, 0.9).shape == (0,)


@inner
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_whole_forward(shape, dtype):
    logits, table, _ = make(*shape, dtype)
    n = shape[0]
    rng, rows, given = torch.tensor([5, 6]), torch.arange(n), torch.linspace(0, 1, n)
    wide, index = torch.full((n + 4, shape[2] + 7), math.nan).to(dtype), torch.randperm(n + 2).repeat(2)[n + 2 :][:n]
    out = wide[1:-1, 3:-4]
    for weight, mode, filters in ((None, "entropy", (0, 0.9)), (None, "zero", (0, 1.0)), (given, "given", (3, 1.0))):
        placed = [] if mode == "entropy" else [Placement(out, index)]
        ours = kernels.entrgi_embedding(logits, table, Draw(rng, rows, 0.7, *filters), None, weight, mode, *placed)
        if placed:
            ours = out[index], *ours[1:]
            out[index] = math.nan
            assert wide.isnan().all(), f"{mode}: written elsewhere"
        theirs = eager.entrgi_embedding(logits, table, Draw(rng, rows, 0.7, *filters), None, weight, mode)
        names = ("embedding", "tokens", "weight", "entropy", "soft", "lse", "argmax")
        for name, a, b in zip(names, ours, theirs, strict=True):
            close(a, b, dtype if name in ("embedding", "soft") else torch.float32, f"{mode} {name}")


@inner
def test_logits_far_below_zero_in_a_tile_that_ends_beyond_the_row():
    """The copy engine fills it with zeros, e^1500 above the row's maximum: they must not become infinity times zero."""
    logits, table, _ = make(7, 152, 40, torch.float32, bad=False)
    ours, theirs = (module.soft_embedding(logits - 1000, table, 0.7)[0] for module in (kernels, eager))
    close(ours, theirs, torch.float32)


@inner
def test_injected_tokens_strided_inputs_and_float64_tables():
    logits, table, _ = make(3, 130, 12, torch.float32)
    rng, rows, tokens = torch.tensor([5, 6]), torch.arange(3), torch.tensor([0, 129, 64])
    draw = Draw(rng, rows, 0.7, 0, 1.0)
    theirs = eager.entrgi_embedding(logits, table, draw, tokens, None, "one")
    wide = torch.full((3, 260), math.nan)
    wide[:, :130] = logits
    for strided in (logits.t().contiguous().t(), wide[:, :130]):
        ours = kernels.entrgi_embedding(strided, table.t().contiguous().t(), draw, tokens, None, "one")
        close(ours[0], theirs[0], torch.float32)
        assert torch.equal(ours[0], table[tokens])  # weight 1 gives the hard token's embedding, exactly
    expanded = logits[:1].expand(3, -1)
    close(kernels.softmax_entropy(expanded, 1.0)[1], eager.softmax_entropy(expanded, 1.0)[1], torch.float32)
    soft, lse = kernels.soft_embedding(logits, table.double(), 0.7)
    assert soft.dtype == lse.dtype == torch.float64
    close(soft, eager.soft_embedding(logits, table.double(), 0.7)[0], torch.float32)


@inner
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_gradients_through_the_operators(shape, dtype):
    logits, table, grad = make(*shape, dtype, bad=False)
    found = {}
    for backend in ("triton", "eager"):
        x, e = logits.clone().requires_grad_(), table.clone().requires_grad_()
        ops.soft_embedding(x, e, temperature=0.7, backend=backend).backward(grad)
        y = logits.clone().requires_grad_()
        lse, entropy = ops.softmax_entropy(y, 0.7, backend=backend)
        (lse.sum() + (entropy * torch.arange(1, len(entropy) + 1)).sum()).backward()
        z = logits.clone().requires_grad_()
        ops.entrgi_embedding(z, table, temperature=0.7, top_p=0.9, backend=backend).embedding.backward(grad)
        found[backend] = x.grad, e.grad, y.grad, z.grad
    for name, a, b in zip(("logits", "table", "statistics", "blend"), *found.values(), strict=True):
        close(a, b, dtype, name)


@inner
def test_gradients_of_strided_inputs():
    """A column slice of something wider, a transpose, an expanded gradient: what callers hand over."""
    logits, table, grad = make(7, 150, 12, torch.float32, bad=False)
    wide, row = torch.full((7, 401), math.nan), grad[:1].expand(7, -1)
    wide[:, 3:153] = logits
    soft, lse = eager.soft_embedding(logits, table, 0.7)
    entropy = eager.softmax_entropy(logits, 0.7)[1]
    columns = torch.stack([lse, entropy], dim=1)
    for x, e in ((wide[:, 3:153], table), (logits.t().contiguous().t(), table.t().contiguous().t())):
        for name, arguments in (
            ("soft_embedding_backward", (x, e, row, soft, lse, 0.7)),
            ("soft_embedding_grad_table", (x, row, lse, 0.7, torch.float32)),
            ("softmax_entropy_backward", (x, columns[:, 0], columns[:, 1], lse, lse[:1].expand(7), 0.7)),
        ):
            ours, theirs = (getattr(module, name)(*arguments) for module in (kernels, eager))
            assert ours.is_contiguous()
            close(ours, theirs, torch.float32, name)


@inner
@pytest.mark.parametrize("dtypes", ["float32/float16/float16", "float16/float32/float32", "float32/float16/float32"])
def test_mixed_dtypes(dtypes):
    """float32 logits beside a 16-bit reward model, the reverse, and a gradient wider than its table; both engines."""
    for n in (7, 22):
        made = make(n, 150, 20, torch.float32, bad=False)
        logits, table, grad = (t.to(getattr(torch, name)) for t, name in zip(made, dtypes.split("/"), strict=True))
        ours, theirs = (module.soft_embedding(logits, table, 0.7) for module in (kernels, eager))
        close(ours[0], theirs[0], table.dtype, "soft")
        soft, lse = theirs
        for name, arguments in (
            ("soft_embedding_backward", (logits, table, grad, soft, lse, 0.7)),
            ("soft_embedding_grad_table", (logits, grad, lse, 0.7, table.dtype)),
        ):
            ours, theirs = (getattr(module, name)(*arguments) for module in (kernels, eager))
            close(ours, theirs, torch.float16, name)


@inner
@pytest.mark.parametrize("n", [3, 7, 12, 18, 22])  # every number of parts, and the other engine
@pytest.mark.parametrize("state", ["float32", "float16", "none"])
def test_guidance_update(n, state):
    logits, table, grad = make(n, 150, 20, torch.float32)
    soft, lse = eager.soft_embedding(logits, table, 0.7)
    dtype = getattr(torch, state, torch.float32)
    runs = []
    for backend in (kernels, eager):
        phi = logits.clone()
        # Never read at the first step, whatever they hold; not written at the last.
        moments = (None, None) if state == "none" else [torch.full_like(phi, math.nan, dtype=dtype) for _ in range(2)]
        for step in (1,) if state == "none" else (1, 2, 3):
            backend.guidance_update_(phi, grad, table, soft, lse, ADAM[0], Adam(*moments, step, *ADAM[1:], step < 3))
        linear = logits.clone()
        backend.first_order_update_(linear, grad, table, torch.arange(n) - 1, -0.7)
        runs.append((phi, linear, *(m for m in moments if m is not None)))
    for a, b in zip(*runs, strict=True):
        # Adam divides by |g|: where g is at the level of rounding its first steps amplify it. Bounded, and rare.
        agrees = (a == b) | (a.isnan() & b.isnan()) | ((a - b).abs() <= 1e-4 * b.abs().clamp(min=1e-3))
        assert int((~agrees).sum()) <= max(2, agrees.numel() // 500)
    assert torch.equal(runs[0][0] == -math.inf, runs[1][0] == -math.inf)


@inner
def test_guidance_update_of_float16_logits():
    """phi, moments and the product's operands in 16 bits: the same float16 but for a last digit, rarely."""
    for n in (7, 64):
        logits, table, grad = make(n, 37, 20, torch.float16, bad=False)
        soft, lse = eager.soft_embedding(logits, table, 0.7)
        phis = []
        for module in (kernels, eager):
            phi = logits.clone()
            moments = torch.zeros_like(phi), torch.zeros_like(phi)
            for step in (1, 2):
                module.guidance_update_(phi, grad, table, soft, lse, ADAM[0], Adam(*moments, step, *ADAM[1:]))
            phis.append(phi.float())
        finite = phis[1].isfinite()
        assert torch.equal(phis[0].isfinite(), finite)
        difference = (phis[0] - phis[1])[finite].abs()
        assert float((difference > 2e-3 * phis[1][finite].abs().clamp(min=1)).float().mean()) < 0.01


@inner
def test_guidance_update_in_place_on_strided_tensors():
    logits, table, grad = make(7, 150, 20, torch.float32, bad=False)
    soft, lse = eager.soft_embedding(logits, table, 0.7)
    expected, wide = logits.clone(), torch.full((7, 310), 5.0)
    eager.guidance_update_(expected, grad, table, soft, lse, ADAM[0], Adam(None, None, 1, *ADAM[1:]))
    wide[:, :150] = logits
    transposed = logits.t().contiguous().t()
    for phi in (wide[:, :150], transposed):
        kernels.guidance_update_(phi, grad, table, soft, lse, ADAM[0], Adam(None, None, 1, *ADAM[1:]))
        agrees = (phi == expected) | ((phi - expected).abs() <= 1e-4 * expected.abs().clamp(min=1e-2))
        assert agrees.float().mean() > 0.999
    assert bool((wide[:, 150:] == 5.0).all())


@inner
@pytest.mark.parametrize("alg", SCORED_ALGS)
def test_confidence(alg):
    for dtype, shape in ((torch.float32, (8, 150, 1)), (torch.float16, (3, 300, 1)), (torch.float32, (1, 1, 1))):
        logits, _, _ = make(*shape, dtype)
        tokens = torch.arange(shape[0]) * 3 % shape[1]
        for top_k, top_p in ((0, 1.0), (0, 0.9), (1, 1.0)):
            ours = kernels.unmask_confidence(logits, tokens, alg, 0.7, top_k, top_p)
            close(ours, eager.unmask_confidence(logits, tokens, alg, 0.7, top_k, top_p), torch.float32, alg)


@inner
def test_large_logits_keep_their_differences():
    """exp((x - max) / tau - log s), never exp(x / tau - lse): at 1e4 the latter is off by a thousandth."""
    logits = torch.randn(3, 130, generator=torch.Generator().manual_seed(1)) + torch.tensor([[1e4], [-1e4], [0.0]])
    table = torch.randn(130, 8, generator=torch.Generator().manual_seed(2))
    soft, _ = kernels.soft_embedding(logits, table, 0.7)
    exact = torch.softmax(logits.double() / 0.7, dim=-1) @ table.double()
    assert float((soft - exact).abs().max()) < 1e-5


@inner
def test_same_bits_twice():
    logits, table, grad = make(7, 150, 20, torch.float32, bad=False)
    rng, rows = torch.tensor([5, 6]), torch.arange(7)
    first, second = (
        kernels.entrgi_embedding(logits, table, Draw(rng, rows, 0.7, 0, 0.9), None, None, "entropy") for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@inner
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_token_log_prob(dtype, bias, monkeypatch):
    """Chunks of 256 entries, so that their log-sum-exps have to be put together; one chunk has no mass at all."""
    monkeypatch.setattr(_vocabulary_head, "CHUNK_BYTES", 1)
    g = torch.Generator().manual_seed(3)
    hidden, head = torch.randn(5, 20, generator=g).to(dtype), torch.randn(600, 20, generator=g).to(dtype) / 4
    b = torch.randn(600, generator=g).to(dtype) if bias else None
    if b is not None:
        b[256:512] = -math.inf
    targets, grad = torch.tensor([0, 599, 255, 512, 7]), torch.randn(5, generator=g)
    bounds = {"rtol": TOLERANCE[dtype] * 4, "atol": TOLERANCE[dtype] * 16}
    passes = kernels.softmax_entropy, kernels.soft_embedding, kernels.soft_embedding_grad_table
    for slope in (True, False):
        ours = _vocabulary_head.token_log_prob(*passes[:2], hidden, head, b, targets, slope)
        torch.testing.assert_close(ours, eager.token_log_prob(hidden, head, b, targets, slope), **bounds)
    args = hidden, head, b, targets, ours[1], grad
    theirs = eager.token_log_prob_backward(*args)
    torch.testing.assert_close(_vocabulary_head.token_log_prob_backward(*passes[1:], *args), theirs, **bounds)
