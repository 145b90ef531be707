"""unmask_confidence against its definitions in float64."""

from __future__ import annotations

import ops_reference as ref
import pytest
import torch

from entrgi_kernels import ops
from entrgi_kernels.names import SCORED_ALGS

FILTERS = [(None, None), (None, 0.9), (4, None), (5, 0.8)]


@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("alg", SCORED_ALGS)
@pytest.mark.parametrize("shape", [(0, 7), (1, 1), (3, 1), (1, 7), (9, 63)], ids=str)
@pytest.mark.parametrize("dtype", ref.DTYPES, ids=str)
def test_values(backend, dtype, shape, alg, filters):
    x = ref.peaked(*shape, dtype, spread=1.5)
    ref.served(backend, x)
    tokens = ops.sample_tokens(x, temperature=0.7, top_k=filters[0], top_p=filters[1], backend="eager")
    ours = ops.unmask_confidence(
        x, tokens, alg=alg, temperature=0.7, top_k=filters[0], top_p=filters[1], backend=backend
    )
    assert ours.dtype == ref.accumulation(x) and ours.shape == (shape[0],) and not ours.requires_grad
    truth = ref.confidence(x, tokens, alg, 0.7, *filters)
    tolerance = 1e-12 if dtype == torch.float64 else 2e-6
    torch.testing.assert_close(ours.double(), truth, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("alg", SCORED_ALGS)
def test_large_vocabulary(backend, alg):
    x = ref.peaked(2, 151_936, torch.float32)
    ref.served(backend, x)
    tokens = x.argmax(dim=-1) - 1
    p = ref.log_p(x, 0.7).exp()
    ranked = p.sort(dim=-1, descending=True).values
    truth = {
        "entropy": -ref.entropy(x, 0.7),
        "maskgit_plus": p.gather(-1, tokens[:, None])[:, 0],
        "topk_margin": ranked[:, 0] - ranked[:, 1],
        "anchor": x.double().gather(-1, tokens[:, None])[:, 0],
    }[alg]
    ours = ops.unmask_confidence(x, tokens, alg=alg, temperature=0.7, backend=backend)
    torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("alg", SCORED_ALGS)
def test_bad_rows_and_minus_1_tokens(backend, alg):
    x, good = ref.good_and_bad(63)
    ref.served(backend, x)
    tokens = ops.sample_tokens(x, backend="eager")
    for top_p in (None, 0.9):
        ours = ops.unmask_confidence(x, tokens, alg=alg, top_p=top_p, backend=backend)
        assert torch.equal(ours.isnan(), ~good)
        alone = ops.unmask_confidence(x[good], tokens[good], alg=alg, top_p=top_p, backend=backend)
        torch.testing.assert_close(ours[good], alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("layout", ["strided", "transposed", "sliced"])
@pytest.mark.parametrize("alg", SCORED_ALGS)
def test_strides(backend, alg, layout):
    x = ref.peaked(9, 63, torch.float32)
    ref.served(backend, x)
    tokens = torch.arange(18)[::2]
    ours = ops.unmask_confidence(ref.layouts(x)[layout], tokens, alg=alg, top_p=0.9, backend=backend)
    torch.testing.assert_close(ours, ops.unmask_confidence(x, tokens.clone(), alg=alg, top_p=0.9, backend=backend))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_extreme_rows(backend, dtype):
    x = torch.full((3, 63), -torch.inf, dtype=dtype)
    ref.served(backend, x)
    x[0, 17] = 2.0
    x[1], x[1, 9] = -1e4, 1e4
    x[2, 3:5] = 1e4
    tokens = torch.tensor([17, 9, 4])
    expected = {"entropy": [0, 0, -0.6931471805599453], "maskgit_plus": [1, 1, 0.5], "topk_margin": [1, 1, 0]}
    for alg, values in expected.items():
        for top_p in (None, 0.9):
            ours = ops.unmask_confidence(x, tokens, alg=alg, top_p=top_p, backend=backend)
            torch.testing.assert_close(ours.double(), torch.tensor(values).double(), rtol=1e-6, atol=1e-6)
    assert ops.unmask_confidence(x, tokens, alg="anchor", backend=backend).tolist() == [2, 1e4, 1e4]


def test_ties_have_no_margin_and_temperature_0_stands_for_1(backend):
    x = torch.tensor([[1.0, 1.0, 0.0]])
    ref.served(backend, x)
    token = torch.tensor([0])
    assert ops.unmask_confidence(x, token, alg="topk_margin", backend=backend).item() == 0
    for alg in SCORED_ALGS:
        assert torch.equal(*(ops.unmask_confidence(x, token, alg=alg, temperature=t, backend=backend) for t in (0, 1)))
