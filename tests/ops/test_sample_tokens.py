"""sample_tokens: the race of docs/philox.md, its frequencies, its filters and what a draw may depend on."""

from __future__ import annotations

import ops_reference as ref
import pytest
import torch

from entrgi_kernels import ops
from entrgi_kernels.backends import philox

SETTINGS = [(1.0, None, None), (0.7, None, 0.9), (1.3, 3, None), (0.7, 4, 0.8), (0.5, None, 0.3), (1.0, 1, None)]


def race(logits: torch.Tensor, seed: int, step: int, rows: torch.Tensor, temperature: float) -> torch.Tensor:
    """Scores [N, V] in float64 before any filter."""
    e = philox.exponential(torch.tensor([seed, step]), rows[:, None], torch.arange(logits.shape[1]), torch.float64)
    return logits.double() / temperature - e.log()


def chi_square_p(observed: torch.Tensor, expected: torch.Tensor) -> float:
    """p value of observed counts; cells expecting fewer than 5 are pooled."""
    rare = expected < 5
    counts, means = (torch.cat([t[~rare], t[rare].sum()[None]]).double() for t in (observed, expected))
    counts, means = counts[means > 0], means[means > 0]
    statistic = ((counts - means) ** 2 / means).sum()
    return torch.special.gammaincc(torch.tensor((len(means) - 1) / 2).double(), statistic / 2).item()


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("v", [2, 7, 63])
def test_frequencies_and_nothing_outside_the_allowed_set(backend, v, setting):
    temperature, top_k, top_p = setting
    row = ref.peaked(1, v, torch.float32, seed=v, spread=1.5)
    row[0, 0] = -torch.inf
    n = 20_000
    x = row.expand(n, v)
    ref.served(backend, x)
    tokens = ops.sample_tokens(x, temperature=temperature, top_k=top_k, top_p=top_p, seed=7, counter=v, backend=backend)
    p = ref.filtered(row, temperature, top_k, top_p)[0]
    observed = torch.bincount(tokens, minlength=v)
    assert observed[p == 0].sum() == 0
    if (p > 0).sum() > 1:
        assert chi_square_p(observed, n * p) > 1e-3


def test_the_chi_square_test_can_fail():
    p = torch.tensor([0.5, 0.3, 0.2])
    assert chi_square_p(torch.tensor([10_000, 6_000, 4_000]), 20_000 * p) > 0.99
    assert chi_square_p(torch.tensor([10_300, 5_850, 3_850]), 20_000 * p) < 1e-3


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
@pytest.mark.parametrize("shape", [(0, 7), (1, 1), (5, 1), (1, 7), (301, 63), (3, 1001)], ids=str)
@pytest.mark.parametrize("dtype", ref.DTYPES, ids=str)
def test_the_winner_of_the_race(backend, dtype, shape, setting):
    temperature, top_k, top_p = setting
    x = ref.peaked(*shape, dtype, seed=3)
    if shape[1] > 100:
        x = x[:1]
    ref.served(backend, x)
    rows = torch.arange(len(x)) * 1_000_003 - 7
    tokens = ops.sample_tokens(
        x, temperature=temperature, top_k=top_k, top_p=top_p, seed=-3, counter=9, keys=rows, backend=backend
    )
    assert tokens.dtype == torch.int64 and tokens.shape == (len(x),)
    scores = race(x, -3, 9, rows, temperature).masked_fill(~ref.kept(x, temperature, top_k, top_p), -torch.inf)
    best = scores.amax(dim=-1) if len(x) else scores[:, 0]
    # The winner, but for scores that tie within float32's rounding.
    assert (scores.gather(-1, tokens[:, None])[:, 0] >= best - 1e-4).all()
    assert (tokens == scores.argmax(dim=-1)).float().mean() > 0.99 or not len(x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_vocabulary(backend, dtype):
    x = ref.peaked(1, 151_936, dtype, seed=8)
    ref.served(backend, x)
    free = race(x, 1, 0, torch.arange(1), 0.7)
    ranked = x.double().sort(dim=-1, descending=True)
    mass = torch.softmax(ranked.values / 0.7, dim=-1).cumsum(dim=-1)
    for top_k, top_p in ((None, None), (50, None), (None, 0.95), (50, 0.9)):
        tokens = ops.sample_tokens(x, temperature=0.7, top_k=top_k, top_p=top_p, seed=1, backend=backend)
        threshold = torch.full((1,), -torch.inf, dtype=torch.float64)
        if top_p is not None:  # the first rank at which the mass passes p, its ties included
            threshold = ranked.values.gather(-1, (mass <= top_p).sum(dim=-1, keepdim=True))[:, 0]
        if top_k is not None:
            threshold = torch.maximum(threshold, ranked.values[:, top_k - 1])
        scores = free.masked_fill(x.double() < threshold[:, None], -torch.inf)
        assert tokens.tolist() == scores.argmax(dim=-1).tolist()


def test_ties_at_a_threshold_are_all_kept(backend):
    x = torch.tensor([[3.0, 2.0, 2.0, 2.0, 1.0]]).expand(4000, 5)
    ref.served(backend, x)

    def drawn(**filters):
        return set(ops.sample_tokens(x, seed=2, backend=backend, **filters).tolist())

    assert drawn(top_k=1) == {0}
    assert drawn(top_k=2) == drawn(top_k=4) == {0, 1, 2, 3}
    assert drawn(top_k=5) == drawn(top_k=50) == drawn() == {0, 1, 2, 3, 4}
    p = torch.softmax(x[0].double(), dim=-1)
    assert drawn(top_p=float(p[0]) - 1e-3) == {0}
    assert drawn(top_p=float(p[0]) + 1e-3) == {0, 1, 2, 3}  # one of the three ties would do for the mass
    assert drawn(top_p=float(p[:4].sum()) - 1e-3) == {0, 1, 2, 3}
    assert drawn(top_p=float(p[:4].sum()) + 1e-3) == {0, 1, 2, 3, 4}
    assert drawn(top_p=1e-9) == {0}  # rank 0 always


@pytest.mark.parametrize("filters", [{"top_p": 1.0}, {"top_k": 63}, {"top_k": 1000}, {"top_p": 1, "top_k": 64}])
def test_filters_that_keep_all_are_the_identity(backend, filters):
    x = ref.peaked(400, 63, torch.float32, spread=1.0)
    ref.served(backend, x)
    draws = [ops.sample_tokens(x, seed=4, backend=backend, **f) for f in ({}, filters)]
    assert torch.equal(*draws)


def test_a_kept_winner_wins_filtered_too(backend):
    """The noise belongs to (seed, step, row, v), so a filter changes the draws of dropped winners alone."""
    x = ref.peaked(300, 31, torch.float64, spread=1.0)
    ref.served(backend, x)
    free, filtered = (ops.sample_tokens(x, top_k=k, seed=4, backend=backend) for k in (None, 6))
    stays = ref.kept(x, 1.0, 6, None).gather(-1, free[:, None])[:, 0]
    assert stays.any() and not stays.all()
    assert torch.equal(free[stays], filtered[stays])


def test_temperature_0_is_argmax_of_lowest_index(backend):
    x = torch.tensor([[0.0, 5.0, 5.0, -1.0], [2.0, 2.0, 2.0, 2.0], [-torch.inf, -torch.inf, -9.0, -torch.inf]])
    ref.served(backend, x)
    for seed in range(3):
        assert ops.sample_tokens(x, temperature=0, top_p=0.5, seed=seed, backend=backend).tolist() == [1, 0, 2]
    bad, good = ref.good_and_bad(63)
    assert torch.equal(ops.sample_tokens(bad, temperature=0.0, backend=backend) < 0, ~good)


def test_a_draw_depends_on_its_own_row_alone(backend):
    x = ref.peaked(200, 63, torch.float32, spread=1.0)
    ref.served(backend, x)
    keys = torch.randperm(10**6, generator=torch.Generator().manual_seed(0))[:200] - 500_000

    def sample(index: torch.Tensor, **more) -> torch.Tensor:
        return ops.sample_tokens(
            x[index], temperature=0.8, top_p=0.95, seed=6, keys=keys[index], backend=backend, **more
        )

    everything = sample(torch.arange(200))
    order = torch.randperm(200, generator=torch.Generator().manual_seed(1))
    assert torch.equal(sample(order), everything[order])
    assert torch.equal(sample(order[:17]), everything[order[:17]])
    assert torch.equal(torch.cat([sample(i[None]) for i in order[:5]]), everything[order[:5]])
    # And it does depend on each part of its own key.
    default = ops.sample_tokens(x, temperature=0.8, top_p=0.95, seed=6, backend=backend)
    for other in (sample(torch.arange(200), counter=1), default):
        assert (other != everything).float().mean() > 0.2
    one = x[:1].expand(200, 63)
    for keys_of_one, distinct in ((torch.arange(200), True), (torch.full((200,), 3), False)):
        drawn = ops.sample_tokens(one, keys=keys_of_one, backend=backend).unique()
        assert (len(drawn) > 1) == distinct


@pytest.mark.parametrize("bit", [0, 31, 32, 62])
def test_every_part_of_the_keys_counts(backend, bit):
    x = torch.zeros(100, 63)
    ref.served(backend, x)
    zero = ops.sample_tokens(x, seed=0, keys=torch.zeros(100, dtype=torch.int64) + torch.arange(100), backend=backend)
    seed = ops.sample_tokens(x, seed=1 << bit, backend=backend)
    rows = ops.sample_tokens(x, keys=torch.arange(100) ^ (1 << bit), backend=backend)
    assert (seed != zero).float().mean() > 0.8 and (rows != zero).float().mean() > 0.8
    if bit < 32:
        assert (ops.sample_tokens(x, counter=1 << bit, backend=backend) != zero).float().mean() > 0.8


def test_seed_as_tensors(backend):
    x = ref.peaked(50, 63, torch.float32)
    ref.served(backend, x)
    expected = ops.sample_tokens(x, seed=-5, counter=77, backend=backend)
    pair = torch.tensor([-5, 77])
    assert torch.equal(ops.sample_tokens(x, seed=pair, backend=backend), expected)
    assert torch.equal(ops.sample_tokens(x, seed=pair[0], counter=pair[1], backend=backend), expected)
    pair[1] = 78  # what a CUDA graph does between replays
    expected = ops.sample_tokens(x, seed=-5, counter=78, backend=backend)
    assert torch.equal(ops.sample_tokens(x, seed=pair, backend=backend), expected)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16], ids=str)
def test_extreme_rows(backend, dtype):
    x = torch.full((4, 63), -torch.inf, dtype=dtype)
    ref.served(backend, x)
    x[0, 17] = -1e4
    x[1], x[1, 62] = -1e4, 1e4
    x[2, 5:7] = 1e4
    x[3, ::2] = -1e4
    for seed in range(20):
        for filters in ({}, {"top_p": 0.9}, {"top_k": 2}):
            tokens = ops.sample_tokens(x, temperature=0.7, seed=seed, backend=backend, **filters).tolist()
            assert tokens[:2] == [17, 62] and tokens[2] in (5, 6) and tokens[3] % 2 == 0


@pytest.mark.parametrize("filters", [{}, {"top_p": 0.9}, {"top_k": 3}, {"top_p": 0.9, "top_k": 3}], ids=str)
@pytest.mark.parametrize("dtype", ref.DTYPES, ids=str)
def test_bad_rows_give_minus_1_and_leave_the_others_alone(backend, dtype, filters):
    x, good = ref.good_and_bad(63, dtype)
    ref.served(backend, x)
    tokens = ops.sample_tokens(x, temperature=0.7, backend=backend, **filters)
    assert torch.equal(tokens == -1, ~good)
    rows = torch.arange(8)[good]
    assert torch.equal(tokens[good], ops.sample_tokens(x[good], temperature=0.7, keys=rows, backend=backend, **filters))


@pytest.mark.parametrize("layout", ["strided", "transposed", "sliced"])
def test_strides_of_logits_and_keys(backend, layout):
    x = ref.peaked(40, 63, torch.float32, spread=1.0)
    ref.served(backend, x)
    keys = torch.arange(80)[::2]
    view = ref.layouts(x)[layout]
    for filters in ({}, {"top_p": 0.9}, {"top_k": 5}):
        expected = ops.sample_tokens(x, keys=keys.clone(), backend=backend, **filters)
        assert torch.equal(ops.sample_tokens(view, keys=keys, backend=backend, **filters), expected)


def test_same_tokens_from_run_to_run_and_across_float_dtypes(backend):
    x = ref.peaked(500, 301, torch.bfloat16)
    ref.served(backend, x.float())
    first, second = (ops.sample_tokens(x.float(), temperature=0.7, top_p=0.9, backend=backend) for _ in range(2))
    assert torch.equal(first, second)
    ref.served(backend, x)
    assert (ops.sample_tokens(x, temperature=0.7, top_p=0.9, backend=backend) == first).float().mean() > 0.99


def test_a_draw_has_no_gradient(backend):
    x = ref.peaked(3, 7).requires_grad_()
    ref.served(backend, x)
    assert not ops.sample_tokens(x, backend=backend).requires_grad
