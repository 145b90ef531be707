"""Caches that are not exact: the same where nothing has changed, and refused where a network does not bear them."""

from __future__ import annotations

import pytest
import torch

from entrgi_kernels.guidance import GuidedSampler
from entrgi_kernels.models import BlockCausal, MaskedDiffusion
from entrgi_kernels.models.cached_canvas import CachedCanvas

PROMPTS = ["Why?", "A rather longer question than that."]
SETTINGS = dict(num_samples=2, max_new_tokens=8, steps=8, guidance_steps=1, temperature=1.0, seed=3)
KINDS = ("prefix", "dual")


@pytest.fixture(scope="module")
def parts(make_diffusion, make_reward, tokenizer):
    return make_diffusion(len(tokenizer)).double(), make_reward(len(tokenizer)).double(), tokenizer


def canvases(mask):
    tokens = torch.randint(0, 200, (3, 14), generator=torch.Generator().manual_seed(1))
    tokens[:, 6:] = mask
    attention = torch.ones_like(tokens, dtype=torch.bool)
    attention[1, :3] = False
    masked = tokens == mask
    masked[:, 10:] = False
    return tokens, attention, masked


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_run_again_is_what_changed(parts, kind, shift):
    """Exact while nothing changes; then as attention to the old keys elsewhere says, and exact again in a new block."""
    diffusion, _, tokenizer = parts
    model = MaskedDiffusion(diffusion, tokenizer.mask_token_id, shift=shift)
    tokens, attention, masked = canvases(tokenizer.mask_token_id)
    forwards = CachedCanvas(model, attention, kind, 4)
    forwards.open(tokens, torch.tensor([6, 6, 6]))
    lengths = []
    handle = diffusion.model.register_forward_pre_hook(
        lambda _module, _args, given: lengths.append(given["input_ids"].shape[1]), with_kwargs=True
    )
    try:
        for _ in range(2):
            torch.testing.assert_close(
                forwards.masked_logits(tokens, masked), model.masked_logits(tokens, attention, masked)
            )
        del lengths[1::2]  # the plain ones
        assert lengths == [14, (8 if kind == "prefix" else 4) + shift]
        changed = tokens.clone()
        changed[:, 6] = 5
        masked[:, 6] = False
        found, exact = forwards.masked_logits(changed, masked), model.masked_logits(changed, attention, masked)
        assert not torch.allclose(found, exact) and (found - exact).norm() < 0.5 * exact.norm()
        forwards.open(changed, torch.tensor([6, 6, 6]))
        torch.testing.assert_close(forwards.masked_logits(changed, masked), exact)
        # Rows may go on in part; what is kept is made anew.
        forwards.open(changed[[2, 0]], torch.tensor([6, 6]), torch.tensor([2, 0]))
        some = model.masked_logits(changed[[2, 0]], attention[[2, 0]], masked[[2, 0]])
        torch.testing.assert_close(forwards.masked_logits(changed[[2, 0]], masked[[2, 0]]), some)
    finally:
        handle.remove()
    with pytest.raises(ValueError, match=r"blocks begin at columns \[6, 7\]: expected one column"):
        forwards.open(changed[:2], torch.tensor([6, 7]))


@pytest.mark.parametrize("kind", KINDS)
def test_a_single_step_a_block_is_exact(parts, kind):
    """Only the forwards after a block's first differ."""
    diffusion, reward, tokenizer = parts
    sampler = GuidedSampler(diffusion, reward, tokenizer, shift=True, **SETTINGS)

    def tokens(**settings):
        return [[s.tokens for s in r.samples] for r in sampler.generate(PROMPTS, block_length=2, **settings)]

    assert tokens(steps=4, model_cache=kind) == tokens(steps=4)
    several = tokens(model_cache=kind, num_samples=1)
    assert tokens(model_cache=kind, num_samples=1, batch_size=1) == several
    assert not any(tokenizer.mask_token_id in sample for result in several for sample in result)


def test_networks_that_bear_no_cache_are_refused(parts):
    diffusion, reward, tokenizer = parts

    class NoCache(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.config = diffusion, diffusion.config

        def get_input_embeddings(self):
            return self.inner.get_input_embeddings()

        def forward(self, input_ids, attention_mask=None, position_ids=None):
            return self.inner(input_ids, attention_mask=attention_mask, position_ids=position_ids)

    class WrongCache(NoCache):
        """Forgets what it was told to keep."""

        def forward(self, input_ids, attention_mask=None, position_ids=None, past_key_values=None, use_cache=None):
            whole = attention_mask[..., -input_ids.shape[1] :] if past_key_values is not None else attention_mask
            return self.inner(input_ids, attention_mask=whole, position_ids=position_ids)

    for network, why in (
        (NoCache(), "takes no past_key_values"),
        (WrongCache(), "does not run|logits on one are others"),
    ):
        sampler = GuidedSampler(network, reward, tokenizer, mask_token_id=tokenizer.mask_token_id, **SETTINGS)
        with pytest.raises(ValueError, match=f"model_cache='dual': not for {type(network).__name__}, .*({why})"):
            sampler.generate("Why?", model_cache="dual")
    blocks = GuidedSampler(BlockCausal(diffusion, tokenizer.mask_token_id, 4), reward, tokenizer, **SETTINGS)
    with pytest.raises(ValueError, match="finished blocks are kept already, and exactly"):
        blocks.generate("Why?", model_cache="prefix")
