"""Logits of two forwards combined: classifier-free guidance and a reference model, against the formulas written out."""

from __future__ import annotations

import pytest
import torch

from entrgi_kernels.guidance import GuidedSampler
from entrgi_kernels.models import BlockCausal, MaskedDiffusion
from entrgi_kernels.models.combined import combine

PROMPTS = ["Why?", "A rather longer question than that."]
SETTINGS = dict(num_samples=2, max_new_tokens=8, steps=8, guidance_steps=1, temperature=1.0, seed=3)


@pytest.fixture(scope="module")
def parts(make_diffusion, make_reward, tokenizer):
    return make_diffusion(len(tokenizer)).double(), make_reward(len(tokenizer)).double(), tokenizer


class Reference(MaskedDiffusion):
    """LLaDA's own way: the prompt masked, a second forward, u + (w + 1)(c - u)."""

    def masked_logits(self, canvas, attention_mask, masked, **given):
        own = super().masked_logits(canvas, attention_mask, masked)
        prompt = attention_mask & (torch.arange(canvas.shape[1]) < canvas.shape[1] - 8)
        other = super().masked_logits(canvas.masked_fill(prompt, self.mask_token_id), attention_mask, masked)
        return other + (1.5 + 1) * (own - other)


def tokens_of(sampler, **settings):
    return [[s.tokens for s in result.samples] for result in sampler.generate(PROMPTS, **settings)]


@pytest.mark.parametrize("settings", [{}, {"method": "none"}, {"block_length": 4}], ids=str)
def test_classifier_free_guidance_is_lladas(parts, settings):
    diffusion, reward, tokenizer = parts
    oracle = GuidedSampler(Reference(diffusion, tokenizer.mask_token_id), reward, tokenizer, **SETTINGS)
    sampler = GuidedSampler(diffusion, reward, tokenizer, shift=False, **SETTINGS)
    plain, found = tokens_of(sampler, **settings), tokens_of(sampler, **settings, cfg_scale=1.5)
    assert found == tokens_of(oracle, **settings) and found != plain
    assert tokens_of(sampler, **settings, cfg_scale=1.5, batch_size=1) == found


def test_both_forwards_are_one_batch(parts, monkeypatch):
    diffusion, reward, tokenizer = parts
    sampler = GuidedSampler(diffusion, reward, tokenizer, shift=False, **{**SETTINGS, "num_samples": 1})
    rows, forward = [], sampler.model.masked_logits

    def watched(canvas, attention_mask, masked):
        rows.append(len(canvas))
        return forward(canvas, attention_mask, masked)

    monkeypatch.setattr(sampler.model, "masked_logits", watched)
    tokens_of(sampler, cfg_scale=0.5)
    assert set(rows) == {4} and len(rows) >= 4


def test_kept_blocks_and_classifier_free_guidance(parts):
    diffusion, reward, tokenizer = parts

    def sampler(keeps):
        model = BlockCausal(diffusion, tokenizer.mask_token_id, 4)
        assert model.keeps_blocks
        model.keeps_blocks = keeps
        return GuidedSampler(model, reward, tokenizer, **SETTINGS)

    found = tokens_of(sampler(True), cfg_scale=1.0)
    assert found == tokens_of(sampler(False), cfg_scale=1.0) != tokens_of(sampler(True))


def test_a_reference_model(parts, make_diffusion, monkeypatch):
    diffusion, reward, tokenizer = parts
    other = make_diffusion(len(tokenizer), seed=7).double()
    sampler = GuidedSampler(diffusion, reward, tokenizer, shift=False, reference_model=other, **SETTINGS)
    found = tokens_of(sampler, cfg_scale=0.7)
    assert found != tokens_of(sampler)
    theirs = MaskedDiffusion(other, tokenizer.mask_token_id)
    by_hand = GuidedSampler(diffusion, reward, tokenizer, shift=False, **SETTINGS)
    forward = by_hand.model.masked_logits

    def combined(canvas, attention_mask, masked):
        own, reference = (
            model(canvas, attention_mask, masked).log_softmax(-1) for model in (forward, theirs.masked_logits)
        )
        return (1 + 0.7) * own - 0.7 * reference

    monkeypatch.setattr(by_hand.model, "masked_logits", combined)
    assert tokens_of(by_hand) == found
    with pytest.raises(ValueError, match="the reference model has vocab_size"):
        smaller = make_diffusion(len(tokenizer) + 3)
        GuidedSampler(diffusion, reward, tokenizer, shift=False, reference_model=smaller)


def test_logits_of_minus_infinity_stay_what_they_are():
    own, other = torch.tensor([[1.0, -torch.inf, 2.0, -torch.inf]]), torch.tensor([[0.5, -torch.inf, -torch.inf, 1.0]])
    assert combine(own, other, 2.0).tolist() == [[2.0, -torch.inf, 2.0, -torch.inf]]
    out = torch.empty(1, 4)
    assert combine(own, other, 2.0, out) is out
