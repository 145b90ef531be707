"""The host waits for the device once a denoising step at most, counted on a simulated one."""

from __future__ import annotations

import functools
import importlib.util
from pathlib import Path

import pytest
import torch

from entrgi_kernels.guidance import GuidedSampler, commits

# pytest imports tests one by one (importmode=importlib), so that a helper beside them is loaded by its path.
_spec = importlib.util.spec_from_file_location("simulated_device", Path(__file__).with_name("simulated_device.py"))
simulated = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(simulated)

PROMPTS = ["Why?", "A longer question."]
SETTINGS = dict(num_samples=2, max_new_tokens=5, steps=4, guidance_steps=2, temperature=1.0, backend="eager")
VARIANTS = [
    {},
    {"deprioritize_eos": False},
    {"confidence": "guided"},
    {"alg": "maskgit_plus", "schedule": "even"},
    {"alg": "origin"},
    {"alg_temp": 0.5, "steps": 7},
    {"suppress_undrawable": False},
    {"method": "none"},
    {"method": "first_order"},
    {"guidance_steps": 1, "num_samples": 1},
]


def tokens_of(sampler, **settings):
    results = sampler.generate(PROMPTS, **{**SETTINGS, **settings})
    return [[sample.tokens for sample in result.samples] for result in results]


@pytest.fixture(scope="module")
def samplers(make_diffusion, make_reward, tokenizer):
    """The same sampler on the CPU and on the simulated device, and that device."""

    def models():
        diffusion = make_diffusion(len(tokenizer), num_hidden_layers=1).double()
        with torch.no_grad():
            diffusion.lm_head.weight[tokenizer.eos_token_id] += 2  # postponed EOS are to be replaced
        return diffusion, make_reward(len(tokenizer)).double()

    device = simulated.SimulatedDevice()
    here = GuidedSampler(*models(), tokenizer, shift=True)
    with device:
        there = GuidedSampler(*map(simulated.to_device, models()), tokenizer, shift=True)
        tokens_of(there)  # what a first run finds out once
    assert {"reward_prefix", "reward_committed", "reward_last_layer"} == set(there.reward.savings)
    return here, there, device


@pytest.mark.parametrize("settings", VARIANTS, ids=lambda s: "-".join(f"{k}={v}" for k, v in s.items()) or "defaults")
def test_one_wait_a_step_and_the_same_tokens(samplers, settings, monkeypatch):
    here, there, device = samplers
    expected, waits, forward = tokens_of(here, **settings), [], there.model.masked_logits

    @functools.wraps(forward)
    def counted(*args, **kwargs):  # a step begins
        waits.append(sum(device.waits.values()))
        return forward(*args, **kwargs)

    monkeypatch.setattr(there.model, "masked_logits", counted)
    with device, device.counting():
        assert tokens_of(there, **settings) == expected
    between = [after - before for before, after in zip(waits, waits[1:], strict=False)]
    # The first two steps also look, once a batch, at attention masks and at which rows belong to which prompt.
    assert len(between) >= 3 and max(between[2:]) <= 1 and sum(between[:2]) <= 2 + 3, (between, dict(device.places))


@pytest.mark.parametrize("edited", [False, True])
def test_finished_blocks_are_taken_at_the_loops_word(samplers, edited):
    """A reward on a device keeps them without looking, so that a hook that changes one must be noticed."""
    here, there, device = samplers
    settings = {**SETTINGS, "max_new_tokens": 16, "steps": 16, "block_length": 2, "learning_rate": 30.0}
    turns = [[{"role": "user", "content": text}] for text in PROMPTS]

    def hook(step, tokens):
        if not edited or step != 3:
            return None
        tokens[:, -16:-14] = 70  # in the first block, after the second
        return tokens

    def run(sampler):
        of = sampler.model.device
        canvas = sampler.canvas([[65, 66], [67]], [1, 2], 2, 16, of)
        index = torch.tensor([0, 0, 1, 1]).to(of)
        return sampler.denoise(canvas, turns, index, sampler.config.replace(**settings), on_step=hook).tolist()

    expected = run(here)
    with device:
        assert run(there) == expected


@pytest.mark.parametrize(
    "search",
    [
        {"search": "smc", "search_every": 1, "search_temperature": 0.05, "resample_below": 1.0},
        {"search": "svdd", "candidates": 2},
    ],
    ids=lambda search: search["search"],
)
def test_what_is_kept_follows_resampled_rows(samplers, search):
    """Off the CPU committed slots are taken at the loop's word: keys of another trajectory would go unnoticed."""
    here, there, device = samplers
    settings = dict(**search, num_samples=4, max_new_tokens=8, steps=8, learning_rate=2.0)
    expected = tokens_of(here, **settings)
    with device:
        assert tokens_of(there, **settings) == expected


def test_a_wait_too_many_is_seen(samplers, monkeypatch):
    _, there, device = samplers
    original, totals = commits.sample_tokens, []

    def leaky(*args, **kwargs):
        drawn = original(*args, **kwargs)
        assert int(drawn.sum()) >= 0 and len(drawn[drawn >= 0]) == len(drawn)
        return drawn

    for draw in (original, leaky):
        monkeypatch.setattr(commits, "sample_tokens", draw)
        with device, device.counting() as found:
            tokens_of(there, deprioritize_eos=False)
        totals.append(sum(found.values()))
    assert totals[1] == totals[0] + 2 * SETTINGS["steps"] and found["index by a mask"] == SETTINGS["steps"]


def test_what_the_simulated_device_counts():
    with simulated.SimulatedDevice() as device:
        there = torch.arange(6, device=simulated.DEVICE)
        assert there.device.type == "cuda" and there.sum().item() == 15
        with device.counting() as found:
            there.tolist()
            torch.tensor([1, 2], device=there.device)
            torch.tensor([1, 2]).pin_memory().to(there.device, non_blocking=True)
            there[there > 3]
            bool((there > 3).any())
            there.nonzero()
            there.repeat_interleave(there)
            there.repeat_interleave(there, output_size=15)
        assert found == {
            "copy to the host": 1,
            "copy from memory that is not pinned": 1,
            "index by a mask": 1,
            "_local_scalar_dense": 1,
            "nonzero": 1,
            "repeat_interleave without its size": 1,
        }
