"""The ends of every number's range: logits, temperatures and Adam's eps, against formulas in float64."""

from __future__ import annotations

import math
from collections.abc import Iterator

import ops_reference as ref
import pytest
import torch

from entrgi_kernels import ops
from entrgi_kernels.backends import native
from entrgi_kernels.guidance import GuidanceConfig, LogitOptimizer

TEMPERATURES = (1e-12, 1e-9, 1e-3, 0.7, 1.0, 1e3, 1e12)


def instruction_sets(backend: str) -> Iterator[str]:
    """Makes each of the native backend's the one in use; one pass for another backend."""
    if backend != "native":
        yield ""
        return
    try:
        for name in native.build_info()["supported_isas"]:
            native.set_isa(name)
            yield name
    finally:
        native.set_isa("")


def extreme_rows(dtype: torch.dtype, v: int) -> torch.Tensor:
    """A row a kind of extreme: equal ones, the dtype's ends, what masks write, offsets, -inf among them."""
    low, high = torch.finfo(dtype).min, torch.finfo(dtype).max
    far = -1e31 if high > 1e32 else low / 2
    x = 3 * torch.randn(13, v, dtype=torch.float64, generator=torch.Generator().manual_seed(v))
    x[0], x[1], x[2], x[3], x[4], x[5], x[6] = 2.0, low, low, far, high, high, -math.inf
    x[2, 1] = 1.0
    x[5, 0] = low
    x[6, 2] = x[6, 4] = low
    x[7, ::2] = -math.inf
    x[8] = far
    x[8, 3] *= 1.5
    x[9] *= 1e4
    x[10] = low
    x[10, 3:] = high
    x[11], x[12] = 0.0, x[12] + 6e4
    x[11, 1] = -math.inf
    return x.clamp(max=high).to(dtype)


def reference(x: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(log p, entropy, log-sum-exp) in float64; halves, so that float64's own ends have a difference."""
    x = x.double()
    top = x.amax(-1, keepdim=True)
    shifted = (x / 2 - top / 2) / temperature * 2
    logsum = shifted.exp().sum(-1, keepdim=True).log()
    log_p = shifted - logsum
    p = log_p.exp()
    return log_p, -torch.where(p > 0, p * log_p, 0).sum(-1), (top / temperature + logsum)[:, 0]


def close(ours: torch.Tensor, truth: torch.Tensor, rtol: float, atol: float) -> None:
    torch.testing.assert_close(ours.double(), truth.to(ours.dtype).double(), rtol=rtol, atol=atol)


@pytest.mark.parametrize("v", [7, 40])
@pytest.mark.parametrize("dtype", ref.DTYPES, ids=str)
def test_statistics(backend, dtype, v):
    x = extreme_rows(dtype, v)
    ref.served(backend, x)
    fine = 1e-11 if dtype == torch.float64 else 2e-5
    rounding = 4 * torch.finfo(dtype).eps
    for _ in instruction_sets(backend):
        for temperature in TEMPERATURES:
            log_p, entropy, lse = reference(x, temperature)
            p = log_p.exp()
            leaf = x.clone().requires_grad_()
            found = ops.softmax_entropy(leaf, temperature, backend=backend)
            close(found[0].detach(), lse, max(fine / 100, 2 * torch.finfo(found[0].dtype).eps), fine)
            close(found[1].detach(), entropy, fine, fine)
            (of_lse,) = torch.autograd.grad(found[0].sum(), leaf, retain_graph=True)
            close(of_lse, p / temperature, fine + rounding, fine / temperature)
            (of_entropy,) = torch.autograd.grad(found[1].sum(), leaf)
            expected = -torch.where(p > 0, p * (log_p + entropy[:, None]), 0) / temperature
            close(of_entropy, expected, 10 * fine + rounding, 10 * fine / temperature)


@pytest.mark.parametrize("v", [7, 40])
@pytest.mark.parametrize("dtype", ref.DTYPES, ids=str)
def test_embeddings(backend, dtype, v):
    x = extreme_rows(dtype, v)
    ref.served(backend, x)
    n, d = len(x), 9
    for kind in (dtype,) if dtype == torch.float64 else (torch.float32, torch.bfloat16):
        table, grad = ref.table(v, d, kind, seed=1), ref.table(n, d, kind, seed=2)
        fine = 1e-10 if dtype == torch.float64 else 1e-4 + 4 * torch.finfo(kind).eps
        rounding = 4 * torch.finfo(dtype).eps
        for _ in instruction_sets(backend):
            for temperature in TEMPERATURES:
                p = reference(x, temperature)[0].exp()
                soft = p @ table.double()
                pulled = grad.double() @ table.double().T - (grad.double() * soft).sum(-1, keepdim=True)
                slope = p * pulled / temperature
                leaves = x.clone().requires_grad_(), table.clone().requires_grad_()
                found = ops.soft_embedding(*leaves, temperature=temperature, backend=backend)
                close(found.detach(), soft, fine, fine)
                of_logits, of_table = torch.autograd.grad(found, leaves, grad.to(found.dtype))
                close(of_table, p.T @ grad.double(), fine, 10 * fine)
                blend = ops.entrgi_embedding(x, table, temperature=temperature, top_p=0.87, backend=backend)
                close(blend.entropy, reference(x, 1.0)[1], fine, fine)
                hard = table[blend.tokens].double()
                close(blend.embedding, torch.lerp(soft, hard, blend.weight.double()[:, None]), fine, 2 * fine)
                if dtype != torch.float16 or temperature > 1e-5:  # else its rounding of 0 / temperature is infinite
                    close(of_logits, slope, 10 * fine + rounding, 10 * fine / temperature)
                if temperature >= 0.1:  # below it the first step follows the sign of rounding
                    phi = x.clone()
                    ops.guidance_update_(phi, grad, table, blend.state, lr=0.5, eps=1e-3, backend=backend)
                    close(phi, x.double() - 0.5 * slope / (slope.abs() + 1e-3), 10 * fine + 2 * rounding, 1e-2)


@pytest.mark.parametrize("v", [7, 40])
@pytest.mark.parametrize("dtype", ref.DTYPES, ids=str)
def test_draws_and_confidences(backend, dtype, v):
    x = extreme_rows(dtype, v)
    ref.served(backend, x)
    fine = 1e-11 if dtype == torch.float64 else 2e-5
    for _ in instruction_sets(backend):
        for temperature in (1e-12, 1e-3, 1.0, 1e12):
            for filters in ({}, {"top_k": 3}, {"top_p": 0.87}):
                settings = {"temperature": temperature, **filters}
                tokens = ops.sample_tokens(x, seed=5, backend=backend, **settings)
                assert torch.equal(tokens, ops.sample_tokens(x.double(), seed=5, backend="eager", **settings))
                for alg in ("entropy", "maskgit_plus", "topk_margin"):
                    ours = ops.unmask_confidence(x, tokens, alg=alg, backend=backend, **settings)
                    truth = ops.unmask_confidence(x.double(), tokens, alg=alg, backend="eager", **settings)
                    close(ours, truth, fine, fine)


@pytest.mark.parametrize("eps", [1e-12, 1e-8, 1e12])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_adams_first_step_has_no_more_than_the_learning_rate(backend, dtype, eps):
    """Gradients whose squares vanish are divided by an eps that they are far below."""
    x, table = torch.zeros(9, 33, dtype=dtype), ref.table(33, 5, dtype)
    ref.served(backend, x)
    size = torch.logspace(-38, 8, 9, dtype=torch.float64)[:, None]
    grad = (size * ref.table(9, 5)).to(dtype)
    soft = table.double().mean(0)
    slope = (grad.double() @ table.double().T - (grad.double() * soft).sum(-1, keepdim=True)) / 33
    for _ in instruction_sets(backend):
        phi = x.clone()
        state = ops.entrgi_embedding(phi, table, backend=backend).state
        ops.guidance_update_(phi, grad, table, state, lr=0.5, eps=eps, backend=backend)
        close(phi, -0.5 * slope / (slope.abs() + eps), 1e-3, 1e-6)


@pytest.mark.parametrize(
    ("name", "value", "accepted"),
    [("temperature", value, ["0 (", "from 1e-12 to 1e+12"]) for value in (1e-40, 9e-13, 1.1e12, 1e30, -1e-12)]
    + [("eps", value, ["from 1e-12 to 1e+12"]) for value in (0, 1e-30, 9e-13, 1e13)]
    + [("learning_rate", 1e13, [">= 0", "at most 1e+12"])],
)
def test_settings_and_operators_refuse_the_same(name, value, accepted):
    phi, table = torch.zeros(2, 7), torch.ones(7, 3)

    def update():
        kept = {"temperature": value} if name == "temperature" else {}
        state = ops.entrgi_embedding(phi, table, **kept).state
        ops.guidance_update_(phi, torch.ones(2, 3), table, state, **({"lr": 0.5} | given))

    given = {"lr" if name == "learning_rate" else name: value}
    calls = [lambda: GuidanceConfig(**{name: value}), lambda: LogitOptimizer(phi, table, **given), update]
    if name == "temperature":
        calls += [
            lambda: GuidanceConfig(alg_temp=value),
            lambda: ops.softmax_entropy(phi, value),
            lambda: ops.sample_tokens(phi, temperature=value),
            lambda: ops.soft_embedding(phi, table, temperature=value),
            lambda: ops.unmask_confidence(phi, torch.zeros(2, dtype=torch.int64), temperature=value),
        ]
    for call in calls:
        with pytest.raises(ValueError) as caught:
            call()
        assert all(words in str(caught.value) for words in [f"={value}", *accepted]), str(caught.value)
