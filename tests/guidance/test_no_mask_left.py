"""Every slot is filled: no mask token is returned as text, whatever the settings."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

from entrgi_kernels.guidance import GuidedSampler, denoising, schedules
from entrgi_kernels.guidance.canvas import Canvas
from entrgi_kernels.guidance.keys import row_keys
from entrgi_kernels.names import ALGS, SCHEDULES

CHAT = [{"role": "user", "content": "Why?"}]
SIZES = [(1, 1), (1, 7), (8, 19), (8, 8), (7, 3), (5, 64), (12, 13)]
VARIANTS = [
    {},
    {"alg_temp": 0.3, "deprioritize_eos": False},
    {"suppress_undrawable": False, "temperature": 0.0},
    {"suppress_undrawable": False, "alg_temp": 1.0, "confidence": "guided", "exact_savings": "none"},
]


class Reluctant:
    """A diffusion model whose every slot wants the mask token most, an end of sequence next, then anything."""

    def __init__(self, tokenizer) -> None:
        self.module, self.shift = nn.Linear(1, 1), False
        self.mask_token_id, self.vocab_size = tokenizer.mask_token_id, len(tokenizer)
        self.device, self.dtype = torch.device("cpu"), torch.float32
        torch.manual_seed(0)
        self._logits = torch.randn(64, self.vocab_size)
        self._logits[:, tokenizer.eos_token_id] += 5
        self._logits[:, tokenizer.mask_token_id] += 6

    def masked_logits(self, canvas, attention_mask, masked):
        return self._logits[masked.nonzero()[:, 1]].clone()


@pytest.fixture
def sampler(reward, tokenizer) -> GuidedSampler:
    return GuidedSampler(Reluctant(tokenizer), reward, tokenizer, method="none")


def unequal_canvas(sampler, slots: int) -> Canvas:
    """Four rows: all slots open, every other one, the last, none. What is not open holds a token; one is an EOS."""
    mask = sampler.model.mask_token_id
    masked = torch.ones(4, slots, dtype=torch.bool)
    masked[1, 1::2] = masked[2, :-1] = masked[3] = False
    tokens = torch.where(masked, mask, 65)
    tokens[2, 0] = torch.where(masked[2, 0], mask, sampler.eos_token_id)  # the open slot behind it is dead
    prompt = torch.full((4, 3), 66)
    prompt[0, 1] = mask  # a prompt may hold the mask token
    keys = row_keys([1, 2, 3, 4], 1, slots, torch.device("cpu"))
    return Canvas(torch.cat([prompt, tokens], dim=1), torch.ones(4, 3 + slots, dtype=torch.bool), 3, masked, keys)


def filled(sampler, slots, **settings) -> torch.Tensor:
    canvas = unequal_canvas(sampler, slots)
    before, opened = canvas.response.clone(), canvas.masked.clone()
    config = sampler.config.replace(max_new_tokens=slots, **settings)
    response = sampler.denoise(canvas, [CHAT], torch.zeros(4, dtype=torch.int64), config)
    assert torch.equal(response[~opened], before[~opened]) and not canvas.masked.any()
    return response


@pytest.mark.parametrize("variant", VARIANTS[:3])
def test_a_head_without_a_row_for_the_mask(reward, tokenizer, variant):
    model = Reluctant(tokenizer)
    model.vocab_size = model.mask_token_id  # the last id
    model._logits = model._logits[:, : model.mask_token_id]
    response = filled(GuidedSampler(model, reward, tokenizer, method="none"), 7, steps=3, **variant)
    assert (response < model.vocab_size).all()


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("alg", ALGS)
def test_no_mask_is_left_whatever_the_settings(sampler, alg, schedule):
    for (slots, steps), variant in itertools.product(SIZES, VARIANTS):
        response = filled(sampler, slots, alg=alg, schedule=schedule, steps=steps, **variant)
        assert not (response == sampler.model.mask_token_id).any(), (slots, steps, variant)


def test_every_schedule_ends_with_all_that_is_left():
    for schedule, n, steps in itertools.product(SCHEDULES, (1, 2, 7, 8, 33), (1, 2, 3, 8, 19, 65)):
        plan = schedules.plan(schedule, [n, n // 2, 0], steps)
        assert [sum(column) for column in zip(*plan.counts, strict=True)] == [n, n // 2, 0]
        assert plan.shares[-1] == (1, 1, 1) and min(map(min, plan.shares)) >= 0
        assert len(plan) == len(plan.shares) == len(plan.counts) <= steps


def test_origin_commits_evenly_where_even_drops_steps(sampler):
    """Eight slots, nineteen steps: eight are taken, and each slot is as likely to be filled in any of them."""
    plan = schedules.plan("even", [8], 19)
    left, chances = 1.0, []
    for (share,) in plan.shares:
        chances.append(left * share)
        left *= 1 - share
    assert chances == pytest.approx([1 / 8] * 8)


def test_what_a_step_leaves_open_is_an_error_not_a_text(sampler, monkeypatch):
    short = schedules.Plan(((1, 1, 0, 0),) * 2, ((0.1,) * 4, (0.2,) * 4))
    monkeypatch.setattr(denoising, "plan", lambda *_: short)
    with pytest.raises(RuntimeError, match="6 slots of trajectory 0 are still masked"):
        filled(sampler, 8)
