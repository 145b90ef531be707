"""Prompt masks, and log-probabilities against a direct computation in float64."""

from __future__ import annotations

import copy

import pytest
import torch

from entrgi.train.forward_process import CompletionLogProbs, derive_seed, mask_prompts
from entrgi_kernels import models as adapters
from entrgi_kernels.models.modules import output_head

MASK, PAD = 2045, 2044
START, SLOTS = 7, 5


def _batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(tokens [3, 12], attention, completion mask): prompts of 7, 4 and 1 tokens, completions of 5, 2 and 1."""
    tokens = torch.randint(0, 2000, (3, START + SLOTS), generator=torch.Generator().manual_seed(0))
    real = torch.arange(START) >= START - torch.tensor([7, 4, 1])[:, None]
    tokens[:, :START][~real] = PAD
    mask = torch.arange(SLOTS) < torch.tensor([5, 2, 1])[:, None]
    return tokens, torch.cat([real, mask], dim=1), mask


def _direct(network, canvas, attention, completions, mask, shift):
    """One forward as the issue words it: key padding mask, positions from the mask's running count, Dream's shift."""
    positions = (attention.long().cumsum(1) - 1).masked_fill(~attention, 1)
    keys = attention[:, None, None, :].expand(-1, 1, attention.shape[1], -1)
    bias = torch.zeros(keys.shape, dtype=torch.float64).masked_fill(~keys, torch.finfo(torch.float64).min)
    implementation = network.config._attn_implementation
    logits = network(
        canvas, attention_mask=bias if implementation == "eager" else keys, position_ids=positions, use_cache=False
    ).logits
    if shift:
        logits = torch.cat([logits[:, :1], logits[:, :-1]], dim=1)
    found = logits[:, START:].log_softmax(-1).gather(-1, completions[..., None])[..., 0]
    return torch.where(mask, found, torch.zeros_like(found))


@pytest.fixture
def network(models):
    return copy.deepcopy(models[0]).eval()


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("fused", [True, False])
def test_log_probs_and_their_gradients_are_those_of_a_direct_computation(network, fused, shift):
    reader = CompletionLogProbs(adapters.wrap(network, mask_token_id=MASK, shift=shift))
    assert reader.fused
    reader.fused = fused
    tokens, attention, mask = _batch()
    canvas = mask_prompts(tokens, attention, START, MASK, 0.3, 11, torch.arange(3))
    completions = tokens[:, START:]
    weights = torch.rand(3, SLOTS, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    results = []
    for found in (
        reader(network, canvas, attention, START, completions, mask),
        _direct(network, canvas, attention, completions, mask, shift),
    ):
        results.append((found.detach(), torch.autograd.grad((found * weights).sum(), list(network.parameters()))))
    (ours, our_gradients), (direct, gradients) = results
    assert ours.dtype == torch.float64 and (ours[~mask] == 0).all() and (ours[mask] < 0).all()
    torch.testing.assert_close(ours, direct, rtol=1e-9, atol=1e-10)
    for a, b in zip(our_gradients, gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


def test_padding_and_neighbours_change_nothing(network):
    reader = CompletionLogProbs(adapters.wrap(network, mask_token_id=MASK, shift=True))
    tokens, attention, mask = _batch()
    keys = torch.tensor([5, 6, 7])

    def read(tokens, attention, mask, start, keys):
        canvas = mask_prompts(tokens, attention, start, MASK, 0.3, 3, keys)
        return reader(network, canvas, attention, start, tokens[:, start:], mask)

    with torch.no_grad():
        together = read(tokens, attention, mask, START, keys)
        alone = read(tokens[1:2, 3:], attention[1:2, 3:], mask[1:2], START - 3, keys[1:2])
    torch.testing.assert_close(together[1:2], alone, rtol=1e-9, atol=1e-10)


def test_lora_and_training_mode(network):
    peft = pytest.importorskip("peft")
    adapter = adapters.wrap(network, mask_token_id=MASK, shift=True)
    reader = CompletionLogProbs(adapter)
    wrapped = peft.get_peft_model(
        network, peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], lora_dropout=0.5)
    )
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    tokens, attention, mask = _batch()
    completions = tokens[:, START:]
    wrapped.eval()
    found = reader(wrapped, tokens, attention, START, completions, mask)
    torch.testing.assert_close(
        found, _direct(network, tokens, attention, completions, mask, True), rtol=1e-6, atol=1e-7
    )
    found.sum().backward()
    assert all((p.grad is not None) == p.requires_grad for p in wrapped.parameters())
    wrapped.train()
    again = reader(wrapped, tokens, attention, START, completions, mask)
    assert not torch.allclose(again, found)  # dropout lives in training mode
    assert "forward" not in output_head(adapter.module).__dict__  # the head is as it was


def test_a_head_whose_output_is_changed_afterwards_is_left_alone(network):
    class Capped(type(network)):
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = 3 * torch.tanh(output.logits / 3)
            return output

    network.__class__ = Capped
    reader = CompletionLogProbs(adapters.wrap(network, mask_token_id=MASK, shift=True))
    assert not reader.fused
    tokens, attention, mask = _batch()
    found = reader(network, tokens, attention, START, tokens[:, START:], mask)
    torch.testing.assert_close(
        found, _direct(network, tokens, attention, tokens[:, START:], mask, True), rtol=1e-9, atol=1e-10
    )


def test_autocast_reads_in_its_dtype(network):
    network = network.float()
    reader = CompletionLogProbs(adapters.wrap(network, mask_token_id=MASK, shift=True))
    tokens, attention, mask = _batch()
    arguments = (network, tokens, attention, START, tokens[:, START:], mask)
    with torch.no_grad():
        exact = reader(*arguments)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = reader(*arguments)
    assert found.dtype == torch.float32
    assert 0 < (found - exact).abs().amax() < 0.3


def test_prompt_masks_follow_their_seed_and_rate():
    tokens = torch.randint(0, 2000, (400, 60), generator=torch.Generator().manual_seed(2))
    attention = torch.ones_like(tokens, dtype=torch.bool)
    attention[:, :10] = False
    keys = torch.arange(400) << 24

    def masked(probability: float, seed: int) -> torch.Tensor:
        return mask_prompts(tokens, attention, 50, MASK, probability, seed, keys) == MASK

    one = masked(0.3, 1)
    assert one[:, 50:].all() and not one[:, :10].any()
    rate = one[:, 10:50].double().mean()
    assert abs(rate - 0.3) < 5 * (0.21 / (400 * 40)) ** 0.5
    assert torch.equal(one, masked(0.3, 1)) and not torch.equal(one, masked(0.3, 2))
    assert not masked(0.0, 1)[:, :50].any() and masked(1.0, 1)[:, 10:].all()
    assert (masked(0.15, 1) & ~one).sum() == 0  # the same draws, another threshold


def test_seeds_are_apart_and_can_be_logged():
    seeds = {derive_seed("mask", 42, rollout, i) for rollout in range(20) for i in range(12)}
    assert len(seeds) == 240 and all(0 <= s < 2**31 and int(float(s)) == s for s in seeds)


def test_a_network_that_padding_disturbs_is_refused(network):
    adapter = adapters.wrap(network, mask_token_id=MASK, shift=True)
    adapter.pad_invariant = False
    with pytest.raises(ValueError, match="expected a network that honours its attention mask"):
        CompletionLogProbs(adapter)
