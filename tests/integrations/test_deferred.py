"""Deferred logits give what the tensor they stand for gives, whatever is asked."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.distributions import Categorical

from entrgi_kernels.integrations.deferred import Arithmetic, Deferred

TOKENS = torch.tensor([3, 0, 6, 2, 2, 1])[:, None]
# Of logits [2, 3, 7]: what the loops ask, then what nobody has thought of.
KNOWN = {
    "argmax": lambda x: x.argmax(dim=-1),
    "argmax, of torch": lambda x: torch.argmax(x / 0.5, dim=-1, keepdim=True),
    "entropy": lambda x: Categorical(logits=x.float()).entropy(),
    "entropy, colder": lambda x: Categorical(logits=x / 0.3).entropy(),
    "probability": lambda x: torch.gather(torch.softmax(x.reshape(-1, 7).float(), dim=-1), -1, TOKENS),
    "probability, warmer": lambda x: torch.gather(torch.softmax(x.view(-1, 7) / 2 / 1.5, dim=-1), -1, TOKENS),
    "shape": lambda x: torch.tensor([*x.shape, *x.size(), x.size(-1), x.ndim, x.dim(), *x.reshape(6, 7).shape]),
    "log-sum-exp": lambda x: x.logsumexp(dim=-1, keepdim=True),
}
OTHERS = {
    "log-probabilities": lambda x: Categorical(logits=x).logits + 0,
    "probabilities": lambda x: F.softmax(x / 0.7, dim=-1) + 0,
    "log-likelihood": lambda x: Categorical(logits=x).log_prob(TOKENS.view(2, 3)),
    "another softmax": lambda x: torch.softmax(x, dim=0, dtype=torch.float64),
    "log-softmax": lambda x: torch.log_softmax(x, -1),
    "largest": lambda x: torch.topk(x, 2, dim=-1).values,
    "masked": lambda x: x.masked_fill(x < 0, 0),
    "sums": lambda x: (
        x.sum() + x.sum(-1).max() + (2 * x - x * x / x.abs().amax())[0, 1, 2] + (x - 1).mean() - -x[0, 0, 0]
    ),
    "dtype": lambda x: x.double().to(torch.bfloat16),
    "all": lambda x: torch.argmax(x) + x.argmax(dim=0).sum(),
    "same": lambda x: torch.cat([(x == x + 0).float(), (x >= 0).float(), (0.5 > x).float()]),
    "mixed": lambda x: torch.where(torch.tensor([True, False])[:, None, None], torch.ones(()), x).softmax(-1) * 2,
    "flat": lambda x: x.reshape(-1).std(),
}


@pytest.fixture
def logits():
    x = 2 * torch.randn(2, 3, 7, generator=torch.Generator().manual_seed(0))
    x[0, 1, 2:] = -torch.inf
    return x


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("name", [*KNOWN, *OTHERS])
def test_it_answers_as_the_tensor_does(logits, name, backend, monkeypatch):
    ask = {**KNOWN, **OTHERS}[name]
    if name in OTHERS:
        logits = logits.clamp(min=-9)  # no 0 * inf in what is compared
    expected = ask(logits)
    if name in KNOWN:
        monkeypatch.setattr(Deferred, "formed", lambda self: pytest.fail("the tensor was formed"))
    found = ask(Deferred(logits, Arithmetic(backend=backend)))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_draws_have_the_distribution(logits):
    rows = logits[0, :1].expand(20_000, 7)
    for x, scale in ((rows, 1.0), (rows / 0.5, 0.5)):
        g = torch.Generator().manual_seed(1)
        deferred = Deferred(rows, Arithmetic()) / scale
        drawn = torch.multinomial(torch.softmax(deferred, dim=-1), num_samples=1, generator=g)
        share = torch.bincount(drawn[:, 0], minlength=7) / len(rows)
        assert drawn.shape == (20_000, 1) and (share - x[0].softmax(-1)).abs().max() < 0.015
    g.manual_seed(1)
    assert torch.equal(torch.multinomial(torch.softmax(deferred, dim=-1), 1, generator=g), drawn)
    torch.manual_seed(2)
    same = Deferred(rows, Arithmetic("torch")).softmax(-1).multinomial(1)
    torch.manual_seed(2)
    assert torch.equal(same, rows.softmax(-1).multinomial(1))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, None])
def test_rows_without_a_distribution_are_errors(logits, bad):
    logits[1, 2, 3] = bad or 0.0
    if bad is None:
        logits[1, 2] = -torch.inf
    x = Deferred(logits, Arithmetic())
    with pytest.raises(ValueError, match="satisfy the constraint"):
        Categorical(logits=x, validate_args=True)  # torch.compile turns the default off for good
    for ask in (lambda: x.argmax(dim=-1), lambda: torch.multinomial(torch.softmax(x.view(-1, 7), dim=-1), 1)):
        with pytest.raises(RuntimeError, match="hold a NaN or"):
            ask()
