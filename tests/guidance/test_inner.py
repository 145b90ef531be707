"""The inner loop by itself: rows written where the reward reads them are rows copied there, bit for bit."""

from __future__ import annotations

import pytest
import torch

from entrgi_kernels import ops
from entrgi_kernels.guidance import GuidanceConfig, LogitOptimizer, optimizer
from entrgi_kernels.guidance.canvas import OpenSlots
from entrgi_kernels.guidance.inner import InnerLoop
from entrgi_kernels.guidance.memory import Memory
from entrgi_kernels.guidance.scoring import Scorer
from entrgi_kernels.guidance.weights import method_weight

R, L, V, D, M = 3, 4, 41, 5, 3
ROWS, SLOTS = torch.tensor([2, 0, 0, 1, 2, R, R]), torch.tensor([3, 1, 0, 2, 0, 0, 0])  # the last two reach no reward
OPENED = OpenSlots(ROWS, SLOTS, torch.arange(len(ROWS)), [2, 1, 2])


def scorer_of(reward, config) -> Scorer:
    return Scorer(reward, None, None, config, V - 1, V - 2, None, V)


class Curved:
    """A reward of the embeddings alone; notes where they lie."""

    def __init__(self, probe: torch.Tensor) -> None:
        self.probe, self.seen = probe, []

    def score_embeddings(self, prepared, index, response, alive):
        self.seen.append(response.data_ptr())
        return ((torch.tanh(response) * self.probe) - 0.1 * response.square()).sum((1, 2))


@pytest.mark.parametrize("backend", [name for name, info in ops.backends().items() if "cpu" in info.devices])
@pytest.mark.parametrize("method", ["entrgi", "aps", "expectation"])
def test_rows_in_place_are_rows_copied(method, backend):
    g = torch.Generator().manual_seed(4)
    phi, table, probe = (torch.randn(*shape, generator=g) for shape in ((len(ROWS), V), (V, D), (R, L, D)))
    response, rngs = torch.randint(V, (R, L), generator=g), torch.tensor([[7, m] for m in range(M)])
    config = GuidanceConfig(method=method, guidance_steps=M, temperature=0.7, top_p=0.9, backend=backend)
    reward, real = Curved(probe), ROWS < R
    loop = InnerLoop(scorer_of(reward, config), table, config, Memory())
    moved = phi.clone()
    guided = loop.run(moved, OPENED, response, rngs, None, True)
    assert len(set(reward.seen)) == 1  # nothing was copied for the reward

    weight, settings = method_weight(method, None), dict(lr=config.learning_rate, temperature=0.7, top_p=0.9)
    plain = LogitOptimizer(phi, table, weight=weight, seed=rngs, keys=OPENED.keys, backend=backend, **settings)
    values = []
    for inner in range(M):
        blend = plain.embed()
        filled = table[response].index_put((ROWS[real], SLOTS[real]), blend.embedding[real])
        values.append(reward.score_embeddings(None, None, filled, None))
        (gradient,) = torch.autograd.grad(-values[-1].sum(), blend.embedding)
        assert torch.equal(guided.weights[inner][real], blend.weight[real])
        if inner < M - 1:
            plain.step(gradient)
    assert torch.equal(moved[real], phi[real]) and torch.equal(guided.pending[real], gradient[real])
    assert torch.equal(guided.before, values[0]) and torch.equal(guided.after, values[-1])


def test_rewards_that_lie_in_the_input_outlast_it():
    """A reward may be a view of what it is given; the next inner step writes there."""

    class Corner:
        def score_embeddings(self, prepared, index, response, alive):
            seen.append(response[:, 0, 0].detach().clone())
            return response[:, 0, 0]

    g, seen = torch.Generator().manual_seed(4), []
    phi, table = torch.randn(len(ROWS), V, generator=g), torch.randn(V, D, generator=g)
    config = GuidanceConfig(guidance_steps=2, backend="eager")
    loop = InnerLoop(scorer_of(Corner(), config), table, config, Memory())
    rngs, response = torch.tensor([[7, 0], [7, 1]]), torch.zeros(R, L, dtype=torch.int64)
    guided = loop.run(phi, OPENED, response, rngs, None, False)
    assert torch.equal(guided.before, seen[0]) and torch.equal(guided.after, seen[1])
    assert not torch.equal(*seen)


def test_the_last_inner_step_leaves_no_moments(monkeypatch):
    """The saving is in use, and changes no bit."""
    g, moved, kept = torch.Generator().manual_seed(4), [], []
    phi, table, probe = (torch.randn(*shape, generator=g) for shape in ((len(ROWS), V), (V, D), (R, L, D)))
    update = optimizer.guidance_update_
    monkeypatch.setattr(
        optimizer, "guidance_update_", lambda *args, **given: (kept.append(given["keep"]), update(*args, **given))
    )
    rngs, response = torch.tensor([[7, m] for m in range(M)]), torch.zeros(R, L, dtype=torch.int64)
    for savings in ("none", ("adam_state",)):
        config = GuidanceConfig(guidance_steps=M, backend="eager", exact_savings=savings)
        scorer = scorer_of(Curved(probe), config)
        moved.append(phi.clone())
        InnerLoop(scorer, table, config, Memory()).run(moved[-1], OPENED, response, rngs, None, False)
    assert kept == [True] * M + [True] * (M - 1) + [False]
    assert torch.equal(moved[0][ROWS < R], moved[1][ROWS < R]) and not torch.equal(moved[0], phi)
