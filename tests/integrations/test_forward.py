"""Loops that call model(x).logits: LLaDA's own code and its stand-in, and what the hook makes of single calls."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

import entrgi_kernels
from entrgi_kernels.integrations.steering import Steering

SETTINGS = dict(learning_rate=5.0, temperature=1.0, top_p=None, seed=3)


@pytest.fixture
def call(llada, chat, tokenizer):
    """LLaDA's generate on the two prompts; returns the sequences."""

    def run(model, seed=0, **settings):
        torch.manual_seed(seed)
        arguments = dict(steps=8, gen_length=8, block_length=4, temperature=0.8, mask_id=tokenizer.mask_token_id)
        return llada[1](model, chat.input_ids, chat.attention_mask, **{**arguments, **settings})

    return run


@pytest.mark.parametrize("settings", [{}, {"cfg_scale": 0.7}, {"remasking": "random", "block_length": 8}])
def test_llada_generate_is_guided_and_given_back(llada, call, reward, tokenizer, settings):
    never, model = llada[0](), llada[0]()
    plain = call(never, **settings)
    before = dict(model.__dict__)
    scale = {"cfg_scale": settings["cfg_scale"]} if "cfg_scale" in settings else {}
    entrgi_kernels.guide(model, reward, tokenizer, **scale, **SETTINGS)
    guided = call(model, **settings)
    handle = model.entrgi
    up = handle.score(guided)
    assert handle.integration == "forward" and handle.rewards == up and len(up) == 2
    assert not (guided == tokenizer.mask_token_id).any()
    assert handle.stats.steps == 8 and handle.stats.reward_evaluations == 24
    with handle.paused():
        assert torch.equal(call(model, **settings), plain)
    assert torch.equal(call(model, **settings), guided)
    up, base = (sum(sum(handle.score(call(which, seed, **settings))) for seed in range(3)) for which in (model, never))
    assert up > base
    handle.remove()
    assert torch.equal(call(model, **settings), plain)
    assert model.__dict__.keys() == before.keys() and not model._forward_hooks


def test_callers_in_inference_mode_are_served(llada, call, reward, tokenizer):
    model = llada[0]()
    entrgi_kernels.guide(model, reward, tokenizer, **SETTINGS)
    guided = call(model)
    with torch.inference_mode():
        assert torch.equal(call(model), guided)


def test_from_text_is_not_guided_twice(make_network, reward, tokenizer):
    model = make_network()
    alone = entrgi_kernels.GuidedSampler(model, reward, tokenizer).generate("Why?", steps=4, max_new_tokens=4, seed=1)
    entrgi_kernels.guide(model, reward, tokenizer)
    assert model.entrgi.generate("Why?", steps=4, max_new_tokens=4, seed=1)[0].samples == alone[0].samples


def canvas(chat, mask, slots=6):
    tokens = torch.nn.functional.pad(chat.input_ids, (0, slots), value=mask)
    return tokens, torch.nn.functional.pad(chat.attention_mask, (0, slots), value=1)


def steered(model, reward, tokenizer, logits, tokens, attention, **settings):
    """What guidance makes of the masked rows of logits, without any hook."""
    steering = Steering(entrgi_kernels.GuidedSampler(model, reward, tokenizer, **settings))
    mask = tokens == tokenizer.mask_token_id
    start = int(mask[0].nonzero()[0])
    prompts = [ids[:start][keep[:start] > 0].tolist() for ids, keep in zip(tokens, attention, strict=True)]
    steering.begin(prompts, [start] * len(tokens), seed=settings["seed"])
    return steering(logits[mask].clone(), tokens[:, start:], mask[:, start:])


@pytest.mark.parametrize("in_place", [True, False])
@torch.no_grad()
def test_masked_rows_alone_are_moved_to_where_guidance_moves_them(make_network, reward, tokenizer, chat, in_place):
    model = make_network(in_place)
    tokens, attention = canvas(chat, tokenizer.mask_token_id)
    tokens[:, -3] = 40  # committed
    plain = model(tokens, attention_mask=attention).logits
    entrgi_kernels.guide(model, reward, tokenizer, **SETTINGS)
    guided = model(tokens, attention_mask=attention).logits
    model.entrgi.remove()
    if not in_place:
        plain, guided = (torch.cat([x[:, :1], x[:, :-1]], dim=1) for x in (plain, guided))
    mask = tokens == tokenizer.mask_token_id
    assert torch.equal(guided[~mask], plain[~mask])
    assert torch.equal(guided[mask], steered(model, reward, tokenizer, plain, tokens, attention, **SETTINGS))
    assert (guided[mask] - plain[mask])[..., :256].abs().mean() > 1
    assert (guided[mask][:, tokenizer.mask_token_id] == -torch.inf).all()


@pytest.mark.parametrize("scale", [0.5, 3.0])
@torch.no_grad()
def test_a_given_scale_guides_the_combined_logits(make_network, reward, tokenizer, chat, scale):
    model = make_network()
    tokens, attention = canvas(chat, tokenizer.mask_token_id)
    mask = tokens == tokenizer.mask_token_id
    both = torch.cat([tokens, torch.full_like(tokens, tokenizer.mask_token_id)])
    cond, free = model(both, attention_mask=attention.repeat(2, 1)).logits.chunk(2)
    combined = free + (scale + 1) * (cond - free)
    entrgi_kernels.guide(model, reward, tokenizer, cfg_scale=scale, **SETTINGS)
    cond, free = model(both, attention_mask=attention.repeat(2, 1)).logits.chunk(2)
    model.entrgi.remove()
    seen = (free + (scale + 1) * (cond - free))[mask]
    expected = steered(model, reward, tokenizer, combined, tokens, attention, **SETTINGS)
    assert torch.equal(seen, expected.clamp(min=torch.finfo(seen.dtype).min))


@torch.no_grad()
def test_an_unknown_scale_gets_one_shift_whatever_it_is(make_network, reward, tokenizer, chat, caplog):
    model = make_network()
    tokens, attention = canvas(chat, tokenizer.mask_token_id)
    mask = tokens == tokenizer.mask_token_id
    both = torch.cat([tokens, torch.full_like(tokens, tokenizer.mask_token_id)])
    plain = model(both, attention_mask=attention.repeat(2, 1)).logits.chunk(2)
    entrgi_kernels.guide(model, reward, tokenizer, **SETTINGS)
    with caplog.at_level("WARNING", "entrgi_kernels"):
        guided = model(both, attention_mask=attention.repeat(2, 1)).logits.chunk(2)
    assert "cfg_scale" in caplog.text
    model.entrgi.remove()
    alone = plain[0][mask]
    shift = steered(model, reward, tokenizer, plain[0], tokens, attention, **SETTINGS) - alone
    drawable = torch.isfinite(shift)
    for scale in (0.0, 1.5):
        one, two = ((u + (scale + 1) * (c - u))[mask] for c, u in (plain, guided))
        torch.testing.assert_close((two - one)[drawable], shift[drawable], atol=1e-3, rtol=1e-3)
        assert torch.isfinite(two).all() and (two[~drawable] < -1e30).all()


@torch.no_grad()
def test_rows_may_be_right_padded_and_blocks_may_grow(make_network, reward, tokenizer, chat):
    model = make_network()
    mask, pad = tokenizer.mask_token_id, tokenizer.pad_token_id
    prompts = [ids[keep > 0] for ids, keep in zip(chat.input_ids, chat.attention_mask, strict=True)]
    width = max(map(len, prompts)) + 4
    tokens = torch.full((2, width), pad)
    attention = torch.zeros(2, width, dtype=torch.long)
    for row, ids in enumerate(prompts):
        tokens[row, : len(ids)] = ids
        tokens[row, len(ids) : len(ids) + 4] = mask
        attention[row, : len(ids) + 4] = 1
    entrgi_kernels.guide(model, reward, tokenizer, **SETTINGS)
    together = model(tokens, attention_mask=attention).logits
    for row, ids in enumerate(prompts):
        alone = model(tokens[row : row + 1, : len(ids) + 4]).logits[0]
        torch.testing.assert_close(together[row, len(ids) : len(ids) + 4], alone[len(ids) :], atol=1e-3, rtol=1e-3)
    assert model.entrgi.stats.steps == 1  # another prompt, another call
    # A second block appears once the first is filled: the same run.
    one = tokens[:1, : len(prompts[0]) + 4]
    model(one)
    filled = torch.nn.functional.pad(one.masked_fill(one == mask, 65), (0, 4), value=mask)
    model(filled)
    assert model.entrgi.stats.steps == 2
    # The same shape, but the columns added hold a second turn: another run.
    longer = torch.cat([filled[:, :-4].masked_fill(filled[:, :-4] == mask, 65), one], dim=1)
    model(longer)
    assert model.entrgi.stats.steps == 1


def test_calls_that_are_no_denoising_step_are_left_alone(make_network, reward, tokenizer, chat):
    model = make_network()
    tokens, attention = canvas(chat, tokenizer.mask_token_id)
    plain = model(tokens, attention_mask=attention).logits
    entrgi_kernels.guide(model, reward, tokenizer, **SETTINGS)
    assert torch.equal(model(tokens, attention_mask=attention).logits, plain)  # gradients are on: a loss, perhaps
    with torch.no_grad():
        unmasked = model(chat.input_ids).logits  # nothing to decide
    model.entrgi.remove()
    assert torch.equal(model(chat.input_ids).logits, unmasked)


class Cached(torch.nn.Module):
    """A network that is handed one block on top of a cache, as Fast-dLLM's samplers do."""

    def __init__(self, network):
        super().__init__()
        self.network, self.config = network, network.config

    def forward(self, input_ids, attention_mask=None, past_key_values=None, cache=None, **kwargs):
        return self.network(input_ids)

    def get_input_embeddings(self):
        return self.network.get_input_embeddings()


class OwnCache:
    """A loop's own class, with keys and values in it and no word of how many."""

    def update(self, key, value, layer):
        return key, value


def grown(filled: bool) -> DynamicCache:
    cache = DynamicCache()
    if filled:
        cache.update(torch.zeros(1, 1, 3, 4), torch.zeros(1, 1, 3, 4), 0)
    return cache


LEGACY = ((torch.zeros(1), torch.zeros(1)),)
HIDING = {
    "past_key_values": LEGACY,  # before transformers 5.24
    "cache": grown(True),  # since then
    "layer_past": list(LEGACY),
    "kv": dict(enumerate(LEGACY)),
    "state": OwnCache(),
}
HARMLESS = {
    "cache": grown(False),
    "past_key_values": (),
    "position_embeddings": LEGACY[0],
    "masks": {"full_attention": torch.ones(1, 1, 1, 1)},
}


@torch.no_grad()
@pytest.mark.parametrize("name", HIDING)
def test_a_hidden_canvas_is_refused_or_given(name, make_network, reward, tokenizer, chat):
    network = make_network()
    model = Cached(network)
    mask = tokenizer.mask_token_id
    tokens = torch.nn.functional.pad(chat.input_ids, (0, 6), value=mask)
    block, past = tokens[:, -6:-2], {name: HIDING[name]}
    entrgi_kernels.guide(model, reward, tokenizer, **SETTINGS)
    with pytest.raises(ValueError, match="canvas="):
        model(block, **past)
    model.entrgi.remove()
    plain = model(block, **past).logits
    start = tokens.shape[1] - 6
    entrgi_kernels.guide(model, reward, tokenizer, canvas=lambda ids, arguments: (tokens, start), **SETTINGS)
    guided = model(block, **past).logits
    assert (guided - plain)[..., :256].abs().mean() > 1
    assert model.entrgi.score(tokens) is model.entrgi.rewards


@torch.no_grad()
def test_a_whole_canvas_beside_an_empty_cache_is_guided(make_network, reward, tokenizer, chat):
    model = Cached(make_network())
    tokens = torch.nn.functional.pad(chat.input_ids, (0, 6), value=tokenizer.mask_token_id)
    plain = model(tokens).logits
    entrgi_kernels.guide(model, reward, tokenizer, **SETTINGS)
    guided = model(tokens, **HARMLESS).logits
    assert (guided - plain)[:, -6:, :256].abs().mean() > 1


def test_a_network_is_guided_through_one_handle_only(make_network, reward, tokenizer):
    model = make_network()
    entrgi_kernels.guide(model, reward, tokenizer)
    with pytest.raises(ValueError, match="guided already"):
        entrgi_kernels.guide(model, reward, tokenizer)
    with pytest.raises(ValueError, match="integration='nobody'"):
        entrgi_kernels.guide(make_network(), reward, tokenizer, integration="nobody")
    with pytest.raises(TypeError, match="reward_model"):
        entrgi_kernels.guide(make_network(), tokenizer=tokenizer)
    with pytest.raises(RuntimeError, match="guided call"):
        model.entrgi.score(torch.zeros(1, 4, dtype=torch.long))
