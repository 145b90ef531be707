"""What GuidanceConfig promises of a prompt alone and in a batch: equal draws; equal numbers up to rounding."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from entrgi_kernels import ops
from entrgi_kernels.guidance import GuidedSampler
from entrgi_kernels.names import ALGS, METHODS, SCHEDULES, SCORED_ALGS

PROMPTS = ["Why?", "A much longer question than the other one.", "Why?", "Hm."]
SHORT = dict(num_samples=2, max_new_tokens=5, steps=3, seed=3)


class Exact:
    """A diffusion model that rounds nothing: a slot's logits are a row that the tokens before it pick."""

    def __init__(self, tokenizer) -> None:
        self.module, self.shift = nn.Linear(1, 1), False
        self.mask_token_id, self.vocab_size = tokenizer.mask_token_id, len(tokenizer)
        self.device, self.dtype = torch.device("cpu"), torch.float32
        torch.manual_seed(0)
        self._rows = 2 * torch.randn(97, self.vocab_size)

    def masked_logits(self, canvas, attention_mask, masked):
        real = canvas * attention_mask
        picked = 31 * real.sum(dim=1, keepdim=True) + 7 * real.roll(1, 1)
        return self._rows[picked[masked] % 97]


def tokens_of(sampler, **settings):
    return [sample.tokens for result in sampler.generate(PROMPTS, **{**SHORT, **settings}) for sample in result.samples]


@pytest.mark.parametrize("backend", ["eager", "auto"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("temperature", [0.7, 1e-3])
def test_statistics_and_draws_of_a_row_do_not_depend_on_the_others(backend, dtype, temperature):
    torch.manual_seed(0)
    logits, keys = (3 * torch.randn(40, 1003)).to(dtype), torch.arange(40) * 7 + 5
    logits[:, 3] = -torch.inf

    def found(rows):
        x, common = logits[rows], dict(temperature=temperature, backend=backend)
        tokens = ops.sample_tokens(x, top_p=0.9, seed=1, keys=keys[rows], **common)
        confidences = [ops.unmask_confidence(x, tokens, alg=alg, top_p=0.9, **common) for alg in SCORED_ALGS]
        return tokens, *ops.softmax_entropy(x, **common), *confidences

    together = found(torch.arange(40))
    for rows in ([0], [39], [3, 4], list(range(5, 22)), list(range(0, 40, 3))):
        for one, other in zip(found(rows), together, strict=True):
            assert torch.equal(one, other[rows])


@pytest.mark.parametrize("temperature", [0.0, 1e-3, 0.1, 0.7])
def test_where_networks_round_nothing_unguided_tokens_are_equal_in_float32(reward, tokenizer, temperature):
    sampler = GuidedSampler(Exact(tokenizer), reward, tokenizer, method="none", temperature=temperature)
    for alg, alg_temp in (*((alg, None) for alg in ALGS), ("entropy", 0.5)):
        expected = tokens_of(sampler, alg=alg, alg_temp=alg_temp, batch_size=1)
        assert tokens_of(sampler, alg=alg, alg_temp=alg_temp, batch_size=3) == expected


class InBlocks(Exact):
    """The same by blocks that are counted from the prompt's first token, so that responses begin within one."""

    block_length = 4

    def block_offsets(self, lengths):
        return [length % 4 for length in lengths]


@pytest.mark.parametrize("masks", [False, True], ids=["", "masks drawn"])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("alg", ALGS)
def test_responses_that_begin_within_a_block_have_a_plan_of_their_own(reward, tokenizer, alg, schedule, masks):
    model = InBlocks(tokenizer)
    if masks:
        model._rows[:, model.mask_token_id] += 5
    sampler = GuidedSampler(model, reward, tokenizer, method="none", temperature=1.0, alg=alg, schedule=schedule)
    for steps in (5, 12, 30):
        settings = dict(max_new_tokens=12, steps=steps, deprioritize_eos=False, suppress_undrawable=not masks)
        expected = tokens_of(sampler, **settings, batch_size=1)
        assert tokens_of(sampler, **settings, batch_size=4) == expected


@pytest.mark.parametrize(("method", "backend"), [("aps", "eager"), *((method, "auto") for method in METHODS)])
def test_in_float64_tokens_are_equal_at_any_temperature(make_diffusion, make_reward, tokenizer, method, backend):
    networks = (make(len(tokenizer), num_hidden_layers=1).double() for make in (make_diffusion, make_reward))
    sampler = GuidedSampler(*networks, tokenizer, shift=True, method=method, backend=backend)
    small = dict(num_samples=1, max_new_tokens=4, steps=2)
    for temperature in (0.0, 1e-3, 0.1, 0.7):
        expected = tokens_of(sampler, **small, temperature=temperature, batch_size=1)
        assert tokens_of(sampler, **small, temperature=temperature, batch_size=4) == expected
