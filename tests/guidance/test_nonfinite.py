"""A reward that is no finite number: it never is the best, and while it guides it stops the run in its own name."""

from __future__ import annotations

import json
import logging
import math

import pytest
import torch

from entrgi_kernels import ops
from entrgi_kernels.guidance import (
    GenerationResult,
    GuidanceConfig,
    GuidedSampler,
    NonFiniteLogitsError,
    NonFiniteRewardError,
    Sample,
)
from entrgi_kernels.guidance.canvas import OpenSlots
from entrgi_kernels.guidance.inner import InnerLoop
from entrgi_kernels.guidance.memory import Memory
from entrgi_kernels.guidance.scoring import Scorer
from entrgi_kernels.integrations.steering import Steering

PROMPTS = ["Why?", "A longer question."]
SETTINGS = dict(num_samples=2, max_new_tokens=5, steps=4, guidance_steps=2, temperature=1.0)
FAULTS = {
    "reward": lambda value, row: value + math.nan,
    "infinite": lambda value, row: value - math.inf,
    "gradient": lambda value, row: value + 0 * (row - row.detach()).abs().sum().sqrt(),  # 0 * d sqrt(0)
}


@pytest.fixture
def sampler(diffusion, reward, tokenizer):
    return GuidedSampler(diffusion, reward, tokenizer, shift=True, **SETTINGS)


@pytest.fixture
def poison(sampler, monkeypatch):
    """Spoils what guides the last trajectory, by the name of the fault, from some inner step on."""

    def patch(fault: str, since: int = 0) -> None:
        score, calls = sampler.reward.score_embeddings, []

        def spoiled(prepared, index, response, alive, **given):
            value = score(prepared, index, response, alive, **given)
            calls.append(value)
            if len(calls) <= since:
                return value
            return torch.cat([value[:-1], FAULTS[fault](value[-1], response[-1])[None]])

        monkeypatch.setattr(sampler.reward, "score_embeddings", spoiled)

    return patch


@pytest.mark.parametrize("settings", [{}, {"guidance_steps": 1}, {"method": "expectation"}, {"alg": "origin"},
                                      {"confidence": "guided"}], ids=str)  # fmt: skip
@pytest.mark.parametrize("fault", FAULTS)
def test_the_reward_is_named_not_the_logits(sampler, poison, fault, settings):
    poison(fault)
    what = {"reward": "the reward is nan", "infinite": "the reward is -inf", "gradient": "the gradient of the reward"}
    where = "at denoising step 0, sample 1 of prompt 'A longer question.'"
    with pytest.raises(NonFiniteRewardError, match=f"{what[fault]}.*{where}") as caught:
        sampler.generate(PROMPTS, **settings)
    assert "logits" not in str(caught.value) and "diffusion" not in str(caught.value)
    assert math.isfinite(caught.value.reward) == (fault == "gradient")
    assert len(sampler.generate(PROMPTS, method="none")) == 2  # what guides nothing stops nothing


def test_the_step_is_the_first_at_fault(sampler, poison):
    poison("gradient", since=3)  # the second inner step of the second denoising step
    with pytest.raises(NonFiniteRewardError, match="step 1, sample 1 of prompt 'A longer"):
        sampler.generate(PROMPTS)


def test_bad_logits_are_not_laid_to_the_reward(sampler, diffusion):
    def spoil(module, arguments, output):
        output.logits.view(-1, output.logits.shape[-1])[-1] = math.nan
        return output

    handle = diffusion.register_forward_hook(spoil)
    try:
        with pytest.raises(NonFiniteLogitsError, match="step 0, sample 1 of prompt 'A longer"):
            sampler.generate(PROMPTS, exact_savings="none", alg="maskgit_plus")
    finally:
        handle.remove()


@pytest.mark.parametrize("backend", [name for name, info in ops.backends().items() if "cpu" in info.devices])
@pytest.mark.parametrize("fault", FAULTS)
def test_other_trajectories_are_not_touched(fault, backend):
    rows, slots, steps, width = torch.tensor([0, 0, 1, 2, 2]), torch.tensor([0, 2, 1, 0, 1]), 3, 41
    g = torch.Generator().manual_seed(4)
    phi, table = torch.randn(len(rows), width, generator=g), torch.randn(width, 5, generator=g)
    response, rngs = torch.randint(width, (3, 3), generator=g), torch.tensor([[7, m] for m in range(steps)])
    config = GuidanceConfig(guidance_steps=steps, temperature=0.7, backend=backend)

    class Curved:
        fault = None

        def score_embeddings(self, prepared, index, response, alive):
            value = torch.tanh(response).sum((1, 2))
            bad = FAULTS[self.fault](value[1], response[1]) if self.fault else value[1]
            return torch.stack([value[0], bad, value[2]])

    found, opened = [], OpenSlots(rows, slots, torch.arange(len(rows)), rows.bincount().tolist())
    for Curved.fault in (None, fault):
        loop = InnerLoop(Scorer(Curved(), None, None, config, -1, -2, None, width), table, config, Memory())
        moved = phi.clone()
        guided = loop.run(moved, opened, response, rngs, None, False)
        bad, rewards = guided.faults(rows)
        found.append((moved, guided.weights, guided.after, bad.tolist(), rewards))
    (clean, spoiled), others = found, rows != 1
    assert clean[3] == [False] * 3 and spoiled[3] == [False, True, False]
    assert torch.equal(spoiled[0][others], clean[0][others]) and torch.equal(spoiled[1][:, others], clean[1][:, others])
    assert torch.equal(spoiled[2][[0, 2]], clean[2][[0, 2]])
    assert bool(spoiled[4][1].isfinite()) == (fault == "gradient")


@pytest.mark.parametrize("fault", FAULTS)
def test_a_loop_that_is_steered_is_told(sampler, poison, fault):
    ids = [sampler.tokenizer(f"{prompt}").input_ids for prompt in PROMPTS]
    steering = Steering(sampler)
    steering.begin(ids, list(map(len, ids)), seed=0)
    poison(fault, since=1)  # the last inner step: only the logits that it returns would show
    phi, response = torch.randn(4, sampler.model.vocab_size), torch.zeros(2, 2, dtype=torch.int64)
    with pytest.raises(NonFiniteRewardError, match="step 0, trajectory 1 of the batch, prompt 'A longer question.'"):
        steering(phi, response, torch.ones_like(response, dtype=torch.bool))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("place", range(3))
def test_a_reward_that_is_not_finite_is_never_the_best(place, bad):
    rewards = [1.0, 3.0]
    rewards.insert(place, bad)
    result = GenerationResult("Why?", [Sample(str(k), [k], r) for k, r in enumerate(rewards)], GuidanceConfig())
    assert (result.best.reward, result.top1, result.mean) == (3.0, 3.0, 2.0)
    assert [sample.reward for sample in result.rewarded] == [1.0, 3.0]
    content = json.loads(result.to_json(), parse_constant=pytest.fail)  # no bare NaN
    assert content["samples"][place]["reward"] is None and (content["top1"], content["mean"]) == (3.0, 2.0)


def test_no_reward_at_all_names_the_prompt():
    turns = [{"role": "user", "content": "Why?"}]
    result = GenerationResult(turns, [Sample("a", [0], math.nan), Sample("b", [1], math.inf)], GuidanceConfig())
    with pytest.raises(ValueError, match=r"no sample of prompt 'Why\?' has a finite reward: they are \[nan, inf\]"):
        result.best  # noqa: B018
    assert math.isnan(result.top1) and math.isnan(result.mean)
    content = json.loads(result.to_json(), parse_constant=pytest.fail)
    assert content["top1"] is None and content["mean"] is None


def test_final_rewards_without_a_number_are_warned_of(sampler, monkeypatch, caplog):
    score = sampler.reward.score_texts
    monkeypatch.setattr(sampler.reward, "score_texts", lambda *a, **k: [*score(*a, **k)[:-1], math.nan])
    with caplog.at_level(logging.WARNING, "entrgi_kernels"):
        results = sampler.generate(PROMPTS)
    assert math.isnan(results[1].rewards[1]) and results[1].best is results[1].samples[0]
    (message,) = [record.getMessage() for record in caplog.records]
    assert "nan for sample 1 of prompt 'A longer question.'" in message
