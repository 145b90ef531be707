"""The Triton kernels on a GPU: against float64, beyond 2^31 entries, captured in graphs, compiled, bit for bit."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch

triton = pytest.importorskip("triton")
if not torch.cuda.is_available():
    pytest.skip("needs a CUDA GPU", allow_module_level=True)

from benchmarks.tools import gate  # noqa: E402
from entrgi_kernels import ops  # noqa: E402
from entrgi_kernels.backends import eager  # noqa: E402
from entrgi_kernels.backends import triton as kernels  # noqa: E402
from entrgi_kernels.backends.arguments import Adam, Draw, Placement  # noqa: E402
from entrgi_kernels.backends.triton import config  # noqa: E402
from entrgi_kernels.backends.triton.soft_embedding import forward  # noqa: E402

pytestmark = pytest.mark.gpu
V = 151_936
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
LEAST = {torch.bfloat16: 4e-3, torch.float16: 1e-3, torch.float32: 2e-5}
ADAM = (0.7, 0.5, 0.9, 0.999, 1e-8)


def make(n, v, d, dtype, seed=0):
    """Logits peaked like a model's (a Zipf bias, wide noise, a few strong candidates), a table, a gradient."""
    generator = torch.Generator("cuda").manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, device="cuda", generator=generator)

    logits = normal(n, v) * 2 - torch.arange(1, v + 1, device="cuda").log()
    logits[:, torch.randint(0, v, (min(v, 16),), device="cuda", generator=generator)] += 8 + normal(n, min(v, 16))
    return logits.to(dtype), (normal(v, d) * 0.02).to(dtype), normal(n, d).to(dtype)


def error(value, exact):
    """Largest absolute error over the largest absolute exact value; infinite when an entry is not finite."""
    if not bool(value.isfinite().all()):
        return math.inf
    return float((value.double() - exact).abs().max() / exact.abs().max().clamp(min=1e-30))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "v", "d"), gate.CHECKED)
def test_every_operator_against_float64(n, v, d, dtype):
    logits, table, grad = make(n, v, d, dtype)
    x, e, g = logits.double(), table.double(), grad.double()
    soft, lse = kernels.soft_embedding(logits, table, 0.7)
    exact, exact_lse = eager.soft_embedding(x, e, 0.7)
    plain = torch.softmax(logits / 0.7, dim=-1) @ table
    assert error(soft, exact) <= 3 * error(plain, exact) + LEAST[dtype]
    assert error(lse, exact_lse) <= 1e-6
    assert error(kernels.softmax_entropy(logits, 1.0)[1], eager.softmax_entropy(x, 1.0)[1]) <= 1e-5
    ours = kernels.soft_embedding_backward(logits, table, grad, soft, lse, 0.7)
    p = torch.softmax(logits / 0.7, dim=-1)
    truth = eager.soft_embedding_backward(x, e, g, exact, exact_lse, 0.7)
    plain = p * (grad @ table.T - (grad * (p @ table)).sum(-1, keepdim=True)) / 0.7
    assert error(ours, truth) <= 3 * error(plain, truth) + LEAST[dtype]
    ours = kernels.soft_embedding_grad_table(logits, grad, lse, 0.7, dtype)
    truth = eager.soft_embedding_grad_table(x, g, exact_lse, 0.7, torch.float64)
    assert error(ours, truth) <= 3 * error(p.T @ grad, truth) + LEAST[dtype]
    phi, wanted = logits.clone(), x.clone()
    kernels.guidance_update_(phi, grad, table, soft, lse, ADAM[0], Adam(None, None, 1, *ADAM[1:]))
    eager.guidance_update_(wanted, g, e, exact, exact_lse, ADAM[0], Adam(None, None, 1, *ADAM[1:]))
    moved, exact_move = (phi.double() - x), (wanted - x)
    told = exact_move.abs() > 0.05
    flips = ((moved * exact_move <= 0) & told).sum() / told.sum().clamp(min=1)
    assert float(flips) <= (1e-2 if dtype != torch.float32 else 1e-3)


def test_float32_logits_beside_a_bfloat16_table():
    logits, table, grad = make(130, 50_272, 576, torch.float32)
    table, grad = table.bfloat16(), grad.bfloat16()
    x, e, g = logits.double(), table.double(), grad.double()
    soft, lse = kernels.soft_embedding(logits, table, 0.7)
    exact, exact_lse = eager.soft_embedding(x, e, 0.7)
    assert error(soft, exact) <= 1e-2 and error(lse, exact_lse) <= 1e-6
    ours = kernels.soft_embedding_backward(logits, table, grad, soft, lse, 0.7)
    assert error(ours, eager.soft_embedding_backward(x, e, g, exact, exact_lse, 0.7)) <= 2e-2
    ours = kernels.soft_embedding_grad_table(logits, grad, lse, 0.7, torch.bfloat16)
    assert error(ours, eager.soft_embedding_grad_table(x, g, exact_lse, 0.7, torch.float64)) <= 2e-2


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_masked_with_the_least_finite_number(dtype):
    logits, _, _ = make(3, V, 1, dtype)
    logits[0, :100_000], logits[1, 300:], logits[2, 1000:150_000] = (torch.finfo(dtype).min,) * 3
    for ours, theirs in zip(kernels.softmax_entropy(logits, 0.7), eager.softmax_entropy(logits, 0.7), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_a_new_number_of_rows_compiles_nothing(monkeypatch):
    made = []
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", lambda **told: made.append(told["repr"]))
    logits, table, grad = make(64, 4096, 64, torch.bfloat16)
    rng, keys = torch.tensor([3, 4], device="cuda"), torch.arange(65, device="cuda")
    inputs = torch.empty(65, 64, dtype=torch.bfloat16, device="cuda")
    for n in (64, 33, 34, 35, 48):
        phi = logits[:n].clone()
        own = keys[1 : n + 1]
        out = kernels.entrgi_embedding(phi, table, Draw(rng, own, 0.7, 0, 0.9), None, None, "entropy")
        kernels.entrgi_embedding(phi, table, Draw(rng, own, 0.7, 0, 0.9), None, None, "entropy", Placement(inputs, own))
        assert torch.equal(inputs[own], out[0])
        kernels.guidance_update_(phi, grad[:n], table, out[4], out[5], ADAM[0], Adam(None, None, 1, *ADAM[1:]))
        if n == 64:
            made.clear()
    assert made == []


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 0.95), (0, 1.0), (50, 1.0), (20, 0.9)])
def test_draws_are_the_oracles(dtype, top_k, top_p):
    logits, _, _ = make(512, V, 1, dtype)
    rng, rows = torch.tensor([3, 4], device="cuda"), torch.arange(512, device="cuda") * (1 << 33)
    ours = kernels.sample_tokens(logits, Draw(rng, rows, 0.7, top_k, top_p))
    assert int((ours != eager.sample_tokens(logits, Draw(rng, rows, 0.7, top_k, top_p))).sum()) <= 1


@pytest.mark.parametrize("scale", [0.01, 1.0])
def test_flat_rows(scale):
    logits = torch.randn(16, V, device="cuda") * scale
    rng, rows = torch.tensor([3, 4], device="cuda"), torch.arange(16, device="cuda")
    for top_k, top_p in ((0, 0.9), (100_000, 1.0)):
        ours = kernels.sample_tokens(logits, Draw(rng, rows, 1.0, top_k, top_p))
        assert int((ours != eager.sample_tokens(logits, Draw(rng, rows, 1.0, top_k, top_p))).sum()) <= 1


def test_bad_rows():
    logits, table, _ = make(8, V, 64, torch.bfloat16)
    logits[1, 77], logits[2, V - 1], logits[3] = math.nan, math.inf, -math.inf
    logits[4] = -math.inf
    logits[4, 1234] = 0.5
    rng, rows = torch.tensor([3, 4], device="cuda"), torch.arange(8, device="cuda")
    out = kernels.entrgi_embedding(logits, table, Draw(rng, rows, 0.7, 0, 0.95), None, None, "entropy")
    assert out[1][1:4].tolist() == [-1, -1, -1] and int(out[1][4]) == 1234
    assert bool(out[0][1:4].isnan().all()) and bool(out[0][[0, 4, 5, 6, 7]].isfinite().all())
    assert float(out[3][4]) == 0.0


def test_more_than_2_to_the_31_entries():
    n = (1 << 31) // V + 70
    free, _ = torch.cuda.mem_get_info()
    if free < 14 << 30:
        pytest.skip("needs 14 GB of GPU memory")
    logits = torch.empty(n, V, dtype=torch.bfloat16, device="cuda")
    for part in logits.split(1024):
        part.normal_()
    logits[-3:] += torch.linspace(0, 9, V, device="cuda").bfloat16()
    _, table, _ = make(1, V, 64, torch.bfloat16)
    grad = torch.randn(n, 64, device="cuda").bfloat16()
    rng, rows = torch.tensor([3, 4], device="cuda"), torch.arange(n, device="cuda")
    out = kernels.entrgi_embedding(logits, table, Draw(rng, rows, 0.7, 0, 0.95), None, None, "entropy")
    last = logits[-3:].clone()
    alone = kernels.entrgi_embedding(last, table, Draw(rng, rows[-3:], 0.7, 0, 0.95), None, None, "entropy")
    for a, b in zip(out, alone, strict=True):
        torch.testing.assert_close(a[-3:], b, rtol=2e-2, atol=2e-3)
    assert torch.equal(out[1][-3:], alone[1])
    kernels.guidance_update_(logits, grad, table, out[4], out[5], ADAM[0], Adam(None, None, 1, *ADAM[1:]))
    kernels.guidance_update_(last, grad[-3:], table, alone[4], alone[5], ADAM[0], Adam(None, None, 1, *ADAM[1:]))
    assert float((logits[-3:] != last).float().mean()) < 1e-2


@pytest.mark.parametrize("loads", ["pointer", "descriptor"])
def test_every_tile_of_the_tables(monkeypatch, loads):
    """Tiles that the table would choose at other sizes, on this machine, at a size small enough to check in full."""
    target = config.target(torch.device("cuda", 0))
    if loads == "descriptor" and not target.architecture.bulk:
        pytest.skip("this GPU has no engine that copies tiles")
    for width, dtype in ((2, torch.bfloat16), (4, torch.float32)):
        logits, table, grad = make(200, 5008, 144, dtype)
        x, e, g = logits.double(), table.double(), grad.double()
        exact, lse = eager.soft_embedding(x, e, 0.7)
        truth = eager.soft_embedding_backward(x, e, g, exact, lse, 0.7)
        tables = target.architecture.forward[width], target.architecture.backward[width]
        for pair in itertools.product(*tables):
            if loads == "descriptor" and any(entry.loads != loads for entry in pair):
                continue
            forward, backward = (dataclasses.replace(entry, loads=loads) for entry in pair)
            only = dataclasses.replace(
                target.architecture,
                forward={width: (dataclasses.replace(forward, most_rows=None),)},
                backward={width: (dataclasses.replace(backward, most_rows=None),)},
            )
            monkeypatch.setattr(config, "override", dataclasses.replace(target, architecture=only, compiled=False))
            soft, got = kernels.soft_embedding(logits, table, 0.7)
            assert error(soft, exact) <= (1e-2 if width == 2 else 1e-5), forward
            ours = kernels.soft_embedding_backward(logits, table, grad, soft, got, 0.7)
            assert error(ours, truth) <= (2e-2 if width == 2 else 2e-5), backward


@pytest.fixture
def compiled():
    """This GPU's tables with the compiled products."""
    target = config.target(torch.device("cuda", 0))
    if not target.compiled:
        pytest.skip("this GPU, or this build, has no compiled products")
    return target


EXACT = [(64, V, 1024), (33, 50_272, 576), (100, 200, 144), (130, 50_272, 576), (200, 5008, 144), (1000, V, 2048)]


@pytest.mark.parametrize(("n", "v", "d"), EXACT)
@pytest.mark.parametrize("engine", ["compiled", "triton"])
def test_products_of_integers_are_exact(monkeypatch, compiled, engine, n, v, d):
    """Powers of two times small integers: every launch gives the exact sums, unless operands were overwritten."""
    monkeypatch.setattr(config, "override", dataclasses.replace(compiled, compiled=engine == "compiled"))
    generator = torch.Generator("cuda").manual_seed(1)
    logits = -torch.randint(0, 7, (n, v), device="cuda", generator=generator).bfloat16()
    table = torch.randint(-8, 9, (v, d), device="cuda", generator=generator).bfloat16()
    exact = torch.zeros(n, d, device="cuda", dtype=torch.float64)
    for first in range(0, v, 16384):
        some = slice(first, first + 16384)
        exact += torch.exp2(logits[:, some].double()) @ table[some].double()
    zero, wrong = torch.zeros(n, device="cuda"), torch.zeros((), dtype=torch.int64, device="cuda")
    for _ in range(50):
        wrong += (forward(logits, table, zero, zero, math.log2(math.e)).double() != exact).any()
    assert int(wrong) == 0


@pytest.mark.parametrize("moments", [torch.bfloat16, torch.float32, None])
@pytest.mark.parametrize(("n", "v", "d"), [(33, 50_272, 576), (130, 32_000, 1000), (300, 5008, 144), (1000, V, 1024)])
def test_compiled_update_is_tritons(monkeypatch, compiled, moments, n, v, d):
    logits, table, grad = make(n, v, d, torch.bfloat16)
    soft, lse = kernels.soft_embedding(logits, table, 0.7)
    for step, keep in ((1, True), (2, True), (3, False)) if moments else ((1, True),):
        results = []
        for engine in (True, False, True):
            monkeypatch.setattr(config, "override", dataclasses.replace(compiled, compiled=engine))
            phi, state = logits.clone(), (None, None)
            if moments is not None:
                torch.manual_seed(2)
                state = (
                    (torch.randn_like(phi) * 1e-3).to(moments),
                    (torch.rand_like(phi) * 1e-6).to(moments),
                )
            kernels.guidance_update_(phi, grad, table, soft, lse, ADAM[0], Adam(*state, step, *ADAM[1:], keep))
            results.append((phi, *state) if moments is not None else (phi,))
        ours, theirs, again = results
        assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))
        # An entry whose gradient is lost to rounding may move the other way at a first step, by twice the rate.
        apart = (ours[0].float() - theirs[0].float()).abs() > 0.02 + 0.01 * theirs[0].float().abs()
        assert float(apart.float().mean()) < 1e-4
        for a, b in zip(ours[1:], theirs[1:], strict=True):
            torch.testing.assert_close(a, b, rtol=2e-2, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(("n", "v", "d"), [(3, 50_272, 576), (130, 32_000, 1000), (1024, V, 1024)])
def test_first_order_update(n, v, d, dtype):
    logits, table, grad = make(n, v, d, dtype)
    tokens = torch.arange(n, device="cuda") * 7 % v
    runs = [logits.clone(), logits.clone()]
    for phi in runs:
        kernels.first_order_update_(phi, grad, table, tokens, 0.7)
    assert torch.equal(*runs)
    rows = torch.tensor([0, n // 2, n - 1], device="cuda")
    exact = logits[rows].double()
    eager.first_order_update_(exact, grad[rows], table, tokens[rows], 0.7)
    size = (0.7 * grad[rows].double().abs() @ table.double().abs().T).clamp(min=1)
    bound = torch.finfo(dtype).eps * exact.abs().nan_to_num(posinf=0) + 1e-5 * size
    wrong = ((runs[0][rows].double() - exact).abs() > bound) & exact.isfinite()
    assert int(wrong.sum()) == 0


def test_a_captured_graph_draws_new_numbers(check_captured_draws):
    logits, table, grad = make(64, V, 256, torch.bfloat16)
    rng, rows = torch.tensor([3, 0], device="cuda"), torch.arange(64, device="cuda")

    def step():
        out = kernels.entrgi_embedding(logits, table, Draw(rng, rows, 1.0, 0, 1.0), None, None, "entropy")
        return out[1]

    check_captured_draws(step, rng)


def test_same_bits_run_to_run():
    for n in (7, 300, 1100):
        logits, table, grad = make(n, V, 256, torch.bfloat16)
        rng, rows = torch.tensor([3, 4], device="cuda"), torch.arange(n, device="cuda")
        results = []
        for _ in range(3):
            phi = logits.clone()
            out = kernels.entrgi_embedding(phi, table, Draw(rng, rows, 0.7, 0, 0.95), None, None, "entropy")
            kernels.guidance_update_(phi, grad, table, out[4], out[5], ADAM[0], Adam(None, None, 1, *ADAM[1:]))
            results.append((*out, phi))
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_compiles_in_one_graph_and_not_again_for_another_n():
    torch._dynamo.reset()
    table = torch.randn(5000, 64, device="cuda", dtype=torch.bfloat16)

    @torch.compile(fullgraph=True, dynamic=True)
    def blend(logits):
        return ops.entrgi_embedding(logits, table, temperature=0.7, top_p=0.9, backend="triton").embedding * 2

    with torch._dynamo.config.patch(error_on_recompile=True):
        for n in (33, 34, 64):
            logits = torch.randn(n, 5000, device="cuda", dtype=torch.bfloat16)
            expected = ops.entrgi_embedding(logits, table, temperature=0.7, top_p=0.9, backend="triton").embedding * 2
            assert torch.equal(blend(logits), expected)


def test_float64_goes_elsewhere_under_auto():
    logits = torch.randn(3, 100, device="cuda", dtype=torch.float64)
    assert ops.softmax_entropy(logits)[0].dtype == torch.float64
    with pytest.raises(RuntimeError, match="float64"):
        ops.softmax_entropy(logits, backend="triton")
