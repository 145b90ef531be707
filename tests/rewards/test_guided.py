"""Guided generation by every kind of reward: savings change neither tokens nor rewards, and rewards go up."""

from __future__ import annotations

import pytest
import torch

from entrgi_kernels import GuidedSampler
from entrgi_kernels.rewards import CallableReward, JudgeReward, LikelihoodReward, SequenceClassifierReward

PROMPTS = ["Hello", "Why is the food tasty?"]
SETTINGS = dict(num_samples=2, max_new_tokens=8, steps=5, guidance_steps=2, temperature=0.7, top_p=0.95, seed=3)


def mean_square(inputs_embeds, attention_mask, position_ids):
    return (inputs_embeds.square().mean(-1) * attention_mask).sum(1) / attention_mask.sum(1)


@pytest.fixture
def make(build, tokenizer, causal_lm, classifier, in_double):
    """Builds a reward of a kind, in float64, over another tokenizer than the diffusion LM's."""
    theirs = build["metaspace"]()
    theirs.add_tokens(["yes", "no"])

    def reward(kind: str, name: str = "Qwen3"):
        module = (classifier if kind == "classifier" else causal_lm)(len(theirs), name, dtype=torch.float64)
        in_double(module)
        if kind == "sum":
            judge = JudgeReward(module, theirs, "Is it?", unmatched="pieces")
            square = CallableReward(mean_square, torch.randn(len(tokenizer), 8, dtype=torch.float64), tokenizer)
            return 0.5 * judge + LikelihoodReward(module, theirs, unmatched="pieces") - 0.2 * square
        options = {"unmatched": "pieces"}
        if kind == "judge":
            return JudgeReward(module, theirs, "Is it?", **options)
        return (SequenceClassifierReward if kind == "classifier" else LikelihoodReward)(module, theirs, **options)

    return reward


@pytest.fixture
def diffusion(tokenizer, causal_lm, in_double):
    model = causal_lm(len(tokenizer), dtype=torch.float64, seed=5)
    in_double(model)
    return model


@pytest.mark.parametrize(
    "kind, name",
    [("classifier", "Qwen3"), ("judge", "Llama"), ("sum", "Qwen2")]
    + [("likelihood", name) for name in ("Qwen2", "Qwen3", "Llama", "Gemma", "Mistral")],
)
def test_savings_change_neither_tokens_nor_rewards(diffusion, tokenizer, make, kind, name):
    sampler = GuidedSampler(diffusion, make(kind, name), tokenizer, **SETTINGS)
    runs = [sampler.generate(PROMPTS, exact_savings=savings) for savings in ("all", "none")]
    tokens = [[sample.tokens for result in run for sample in result.samples] for run in runs]
    assert tokens[0] == tokens[1]
    found = [[value for result in run for value in result.rewards] for run in runs]
    assert found[0] == pytest.approx(found[1], rel=1e-9)
    assert len(set(found[0])) > 1


@pytest.mark.parametrize("kind", ["judge", "likelihood", "sum"])
def test_guidance_raises_the_reward_it_sees(diffusion, tokenizer, make, kind):
    """Within a denoising step, from the first inner step to the last, on average over a run."""
    sampler = GuidedSampler(diffusion, make(kind), tokenizer, **SETTINGS | {"guidance_steps": 4, "learning_rate": 0.3})
    steps = [
        step
        for result in sampler.generate(PROMPTS, trace=True, method="expectation")
        for sample in result.samples
        for step in sample.trace
        if step.reward_before is not None
    ]
    gains = [step.reward_after - step.reward_before for step in steps]
    assert len(gains) > 10 and sum(gains) / len(gains) > 0
