"""Exact savings: with and without them, the same tokens and the same rewards."""

from __future__ import annotations

import logging
import random

import pytest
import torch
import transformers
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from entrgi_kernels.guidance import GuidanceConfig, GuidedSampler
from entrgi_kernels.guidance.savings import SAVINGS, check_savings

PROMPTS = ["Why?", "A rather longer question than that.", "Hm"]


@pytest.fixture
def double(diffusion, reward, tokenizer) -> GuidedSampler:
    """Double precision, and a network that likes EOS: postponing it is where the savings could go wrong."""
    with torch.no_grad():
        diffusion.lm_head.weight[tokenizer.eos_token_id] += 2
    return GuidedSampler(diffusion.double(), reward.double(), tokenizer, shift=True)


def outcome(sampler, **settings):
    results = sampler.generate(PROMPTS[: settings.pop("prompts")], **settings)
    return [[s.tokens for s in r.samples] for r in results], [r.rewards for r in results]


def settings_of(case: int) -> dict:
    """Twenty configurations over everything that the loop branches on."""
    pick = random.Random(case).choice
    return dict(
        prompts=pick([1, 2, 3]),
        method=pick(["entrgi", "entrgi", "aps", "expectation", "none"]),
        guidance_steps=pick([1, 3]),
        num_samples=pick([1, 4]),
        max_new_tokens=7,
        steps=pick([3, 7, 12]),
        temperature=pick([0.7, 1.0, 0.0]),
        top_p=pick([None, 0.9]),
        top_k=pick([None, 20]),
        alg=pick(["entropy"] * 4 + ["maskgit_plus", "origin"]),
        alg_temp=pick([None, None, 0.5]),
        confidence=pick(["base", "base", "guided"]),
        schedule=pick(["linspace", "even"]),
        deprioritize_eos=pick([True, True, False]),
        seed=case,
    )


@pytest.mark.parametrize("case", range(20))
def test_all_savings_together_change_nothing(double, case):
    settings = settings_of(case)
    tokens, rewards = outcome(double, **settings)
    plain_tokens, plain_rewards = outcome(double, **settings, exact_savings="none")
    assert tokens == plain_tokens
    for ours, theirs in zip(rewards, plain_rewards, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-9)


@pytest.mark.parametrize("case", range(6))
def test_nor_do_they_by_blocks(double, case):
    """Finished blocks are the reward's to keep, also where trajectories end and leave the batch."""
    settings = {**settings_of(case), "max_new_tokens": 8, "block_length": (2, 4)[case % 2], "method": "entrgi"}
    assert outcome(double, **settings)[0] == outcome(double, **settings, exact_savings="none")[0]


@pytest.mark.parametrize("case", range(4))
def test_all_savings_together_change_nothing_of_first_order_guidance(double, case):
    settings = settings_of(case) | {"method": "first_order", "alg": "entropy", "confidence": "base"}
    tokens, rewards = outcome(double, **settings, guidance_scale=2.0)
    plain_tokens, plain_rewards = outcome(double, **settings, guidance_scale=2.0, exact_savings="none")
    assert tokens == plain_tokens
    for ours, theirs in zip(rewards, plain_rewards, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-9)


def test_the_configurations_reach_every_case():
    cases = [settings_of(case) for case in range(20)]
    for name, values in {"num_samples": {1, 4}, "guidance_steps": {1, 3}, "prompts": {1, 2, 3}}.items():
        assert {case[name] for case in cases} == values
    lengths = {(case["steps"] > case["max_new_tokens"]) - (case["steps"] < case["max_new_tokens"]) for case in cases}
    assert lengths == {-1, 0, 1}
    everything = {(case["num_samples"], case["guidance_steps"], case["prompts"] > 1) for case in cases}
    assert {(4, 3, True), (1, 1, True), (4, 1, True), (1, 3, True)} <= everything


def test_the_sampler_says_which_savings_are_in_use(diffusion, reward, tokenizer, caplog):
    with caplog.at_level(logging.INFO, logger="entrgi_kernels"):
        GuidedSampler(diffusion, reward, tokenizer, shift=True)
    assert (
        "savings in use: reward_prefix, reward_committed, reward_dead, reward_last_layer, reward_attention"
        in caplog.text
    )
    caplog.clear()
    reward.set_attn_implementation("eager")
    transformers.AttentionInterface.register("somebodys", sdpa_attention_forward)  # knows no mask of ours
    reward.config._attn_implementation = "somebodys"
    with caplog.at_level(logging.INFO, logger="entrgi_kernels"):
        sampler = GuidedSampler(diffusion, reward, tokenizer, shift=True)
    assert "savings in use: none" in caplog.text and "somebodys" in caplog.text
    assert sampler.reward.savings == () and "somebodys" in sampler.reward.savings_off["reward_prefix"]


EOS_RICH = dict(prompts=3, num_samples=4, max_new_tokens=8, steps=5, temperature=1.0, top_p=None, seed=7)


@pytest.mark.parametrize("name", SAVINGS)
def test_each_saving_alone_changes_nothing(double, name):
    extra = {"guidance_steps": 1} if name == "adam_state" else {"steps": 12}
    assert (
        outcome(double, **{**EOS_RICH, **extra}, exact_savings=(name,))[0]
        == outcome(double, **{**EOS_RICH, **extra}, exact_savings="none")[0]
    )


def test_the_test_model_does_draw_eos(double, tokenizer):
    tokens, _ = outcome(double, **EOS_RICH)
    drawn = sum(token == tokenizer.eos_token_id for result in tokens for sample in result for token in sample)
    assert 5 < drawn < 90


def test_savings_save(double, monkeypatch):
    """Rows of the vocabulary work and batches of forwards, counted."""
    rows = {"forward": 0, "drawn": 0, "moved": 0}
    from entrgi_kernels.guidance import commits, optimizer

    sample, update, logits = commits.sample_tokens, optimizer.guidance_update_, double.model.masked_logits

    def count(name, function, size):
        def counted(first, *args, **kwargs):
            rows[name] += size(first)
            return function(first, *args, **kwargs)

        return counted

    monkeypatch.setattr(commits, "sample_tokens", count("drawn", sample, len))
    monkeypatch.setattr(optimizer, "guidance_update_", count("moved", update, len))
    original = type(double.model).masked_logits

    def counted_logits(self, canvas, attention, masked, *, positions=None):
        rows["forward"] += len(canvas)
        return original(self, canvas, attention, masked, positions=positions)

    monkeypatch.setattr(type(double.model), "masked_logits", counted_logits)
    assert logits is not None
    counts = {}
    settings = dict(prompts=1, num_samples=4, max_new_tokens=8, steps=16, guidance_steps=3, deprioritize_eos=False)
    for savings in ("none", "all"):
        rows.update(forward=0, drawn=0, moved=0)
        outcome(double, **settings, exact_savings=savings)
        counts[savings] = dict(rows)
    plain, saved = counts["none"], counts["all"]
    assert saved["drawn"] == 4 * 8  # each slot of each trajectory, once
    assert saved["forward"] < plain["forward"] and saved["moved"] < 0.75 * plain["moved"]
    assert plain["drawn"] > 100


def test_the_rewards_own_choice_comes_back(double):
    double.reward.exact_savings = {"reward_prefix"}
    outcome(double, **{**EOS_RICH, "prompts": 1}, exact_savings="none")
    assert double.reward.exact_savings == {"reward_prefix"}


def test_the_rewards_savings_are_in_use(double):
    used = set()
    original = double.reward.score_embeddings

    def watched(*args, **kwargs):
        value = original(*args, **kwargs)
        used.update(double.reward.last_savings)
        return value

    double.reward.score_embeddings = watched
    outcome(double, **EOS_RICH)
    assert {"reward_prefix", "reward_last_layer"} <= used


def test_names_are_checked():
    assert check_savings("all") == frozenset(SAVINGS) and check_savings("none") == frozenset()
    with pytest.raises(ValueError, match="exact_savings=.*'magic'.*'idle_steps'"):
        GuidanceConfig(exact_savings=("magic",))
    assert not GuidanceConfig(exact_savings=("idle_steps",)).saves("shared_forward")
