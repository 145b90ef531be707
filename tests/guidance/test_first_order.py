"""method="first_order": one gradient a denoising step, the reward's linear part added to the logits."""

from __future__ import annotations

import pytest
import torch

from entrgi_kernels import ops
from entrgi_kernels.guidance import GuidanceConfig, GuidedSampler, NonFiniteLogitsError, NonFiniteRewardError
from entrgi_kernels.guidance.canvas import OpenSlots
from entrgi_kernels.guidance.inner import InnerLoop
from entrgi_kernels.guidance.memory import Memory
from entrgi_kernels.guidance.scoring import Scorer

R, L, V, D, GAMMA = 3, 4, 41, 5, 0.8
ROWS, SLOTS = torch.tensor([2, 0, 0, 1, 2, R, R]), torch.tensor([3, 1, 0, 2, 0, 0, 0])  # the last two reach no reward
OPENED, REAL = OpenSlots(ROWS, SLOTS, torch.arange(len(ROWS)), [2, 1, 2]), ROWS < R
RNGS = torch.tensor([[7, 0]])


class Curved:
    """A reward of the embeddings alone."""

    def __init__(self, probe: torch.Tensor) -> None:
        self.probe = probe

    def score_embeddings(self, prepared, index, response, alive):
        return ((torch.tanh(response) * self.probe) - 0.1 * response.square()).sum((1, 2))


class Linear(Curved):
    def score_embeddings(self, prepared, index, response, alive):
        return (response * self.probe).sum((1, 2))


def loop_of(reward, table, v: int = V, **settings) -> InnerLoop:
    config = GuidanceConfig(**{"method": "first_order", "guidance_scale": GAMMA, "top_p": 0.9} | settings)
    return InnerLoop(Scorer(reward, None, None, config, v - 1, v - 2, None, v), table, config, Memory())


def tensors(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    g = torch.Generator().manual_seed(4)
    return [torch.randn(*shape, generator=g, dtype=dtype) for shape in shapes]


@pytest.mark.parametrize("backend", [name for name, info in ops.backends().items() if "cpu" in info.devices])
def test_a_step_is_gamma_times_the_gradient_where_the_slots_hold_drawn_tokens(backend):
    if backend == "triton":
        pytest.skip("serves no float64")
    phi, table, probe = tensors((len(ROWS), V), (V, D), (R, L, D))
    response, reward = torch.randint(V, (R, L), generator=torch.Generator().manual_seed(5)), Curved(probe)
    tokens = ops.sample_tokens(phi, temperature=0.7, top_p=0.9, seed=RNGS[0], keys=OPENED.keys)
    canvas = response.index_put((ROWS[REAL], SLOTS[REAL]), tokens[REAL])
    hot = torch.nn.functional.one_hot(canvas, V).double().requires_grad_()
    value = reward.score_embeddings(None, None, hot @ table, None)
    (slope,) = torch.autograd.grad(value.sum(), hot)
    slope = slope[ROWS[REAL], SLOTS[REAL]]
    expected = phi[REAL] + GAMMA * (slope - slope.gather(1, tokens[REAL, None]))
    moved, rows = phi.clone(), torch.tensor([3, 0, 4])
    guided = loop_of(reward, table, backend=backend).run(moved, OPENED, response, RNGS, None, True)
    assert torch.equal(moved, phi)
    torch.testing.assert_close(guided.finish(rows), expected[rows], rtol=0, atol=1e-12)
    torch.testing.assert_close(guided.rewards, value[None].detach(), rtol=0, atol=1e-12)
    assert guided.weights.shape == (1, len(ROWS)) and (guided.weights == 1).all()
    moved = phi.clone()
    guided = loop_of(reward, table, backend=backend).run(moved, OPENED, response, RNGS, None, False)
    torch.testing.assert_close(moved[REAL], expected, rtol=0, atol=1e-12)
    assert torch.equal(guided.before, guided.after)


def test_the_reward_sees_what_straight_through_shows_it_first():
    phi, table, probe = tensors((len(ROWS), V), (V, D), (R, L, D))
    response = torch.zeros(R, L, dtype=torch.int64)
    values = [
        loop_of(Curved(probe), table, method=method, guidance_steps=1).run(
            phi.clone(), OPENED, response, RNGS, None, False
        ).rewards
        for method in ("first_order", "aps")
    ]  # fmt: skip
    torch.testing.assert_close(*values, rtol=0, atol=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_a_linear_reward_is_guided_exactly(temperature):
    """Draws follow softmax(phi / tau) exp(gamma R / tau): chi-square over 20,000 slots that are drawn independently."""
    count, v = 20_000, 12
    row, table, probe = tensors((1, v), (v, D), (1, 1, D))
    opened = OpenSlots(torch.arange(count), torch.zeros(count, dtype=torch.int64), torch.arange(count), [1] * count)
    moved = row.expand(count, v).clone()
    loop = loop_of(Linear(probe), table, v, temperature=temperature, top_p=None)
    loop(moved, opened, torch.zeros(count, 1, dtype=torch.int64), 0)
    gain = (table * probe[0]).sum(-1)
    tilted = torch.softmax(row[0] / temperature, -1) * (GAMMA * gain / temperature).exp()
    tilted /= tilted.sum()
    torch.testing.assert_close(torch.softmax(moved / temperature, -1), tilted.expand(count, v), rtol=0, atol=1e-12)
    drawn = ops.sample_tokens(moved, temperature=temperature, seed=11, counter=3).bincount(minlength=v)
    assert ((drawn - count * tilted).square() / (count * tilted)).sum() < 31.3  # 11 degrees of freedom, one in 1,000
    plain = torch.softmax(row[0] / temperature, -1)
    assert ((drawn - count * plain).square() / (count * plain)).sum() > 1000


SHORT = dict(num_samples=2, max_new_tokens=6, steps=6, temperature=1.0, seed=3)
PROMPTS = ["Why?", "A longer question."]


@pytest.fixture
def sampler(diffusion, reward, tokenizer) -> GuidedSampler:
    return GuidedSampler(diffusion.double(), reward.double(), tokenizer, shift=True, method="first_order", **SHORT)


def tokens_of(sampler, **settings):
    return [sample.tokens for result in sampler.generate(PROMPTS, **settings) for sample in result.samples]


def test_one_evaluation_a_step_and_only_the_scale_counts(sampler):
    expected = tokens_of(sampler, guidance_scale=4.0)
    assert sampler.stats.reward_evaluations == sampler.stats.steps > 0 and sampler.stats.mean_weight == 1
    assert tokens_of(sampler, guidance_scale=4.0, guidance_steps=5, learning_rate=7.0, betas=(0.1, 0.2)) == expected
    assert tokens_of(sampler, guidance_scale=1.0) != expected
    unguided = tokens_of(sampler, method="none")
    assert tokens_of(sampler, guidance_scale=0.0) == unguided != expected
    assert tokens_of(sampler, guidance_steps=0) == unguided


def test_traces_show_the_reward_before_and_change_nothing(sampler):
    plain = tokens_of(sampler)
    traced = sampler.generate(PROMPTS, trace=True)
    assert [sample.tokens for result in traced for sample in result.samples] == plain
    for step in (step for result in traced for sample in result.samples for step in sample.trace):
        assert step.reward_before == step.reward_after is not None


def test_guidance_raises_the_reward(sampler):
    prompts = [f"Tell me about {i}." for i in range(6)]
    settings = dict(num_samples=4, max_new_tokens=8, steps=8, temperature=1.0, top_p=None, seed=1)
    means = [
        sum(result.mean for result in sampler.generate(prompts, guidance_scale=scale, **settings))
        for scale in (0.0, 5.0)
    ]
    assert means[1] > means[0]


def test_faults_are_told_apart(sampler, monkeypatch):
    def spoiled(value):
        def score(*args, **kwargs):
            rewards = type(sampler.reward).score_embeddings(sampler.reward, *args, **kwargs)
            return rewards + torch.full_like(rewards, value)

        return score

    monkeypatch.setattr(sampler.reward, "score_embeddings", spoiled(float("nan")))
    with pytest.raises(NonFiniteRewardError, match="the reward is nan at denoising step 1"):
        tokens_of(sampler)
    monkeypatch.undo()
    with pytest.raises(NonFiniteLogitsError, match="step 1.*guidance scale"):
        sampler.model.module.half()
        tokens_of(sampler, guidance_scale=1e12)


@pytest.mark.parametrize(
    ("given", "error"),
    [(-1.0, ValueError), (float("nan"), ValueError), ("1", TypeError), (torch.tensor(1.0), TypeError)],
)
def test_bad_scales(given, error):
    with pytest.raises(error, match="guidance_scale=.*expected"):
        GuidanceConfig(guidance_scale=given)
