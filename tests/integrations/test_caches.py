"""Loops that call the model on top of a key/value cache: small ones of each kind, and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache

import entrgi_kernels
from entrgi_kernels.integrations.steering import Steering

SETTINGS = dict(learning_rate=5.0, temperature=1.0, top_p=None, seed=3)
LENGTH, BLOCK, SLOTS = 18, 4, 12


@pytest.fixture
def prompt(tokenizer):
    """Two prompts of the same length."""
    ids = torch.arange(70, 70 + 2 * LENGTH).view(2, LENGTH)
    ids[:, 0] = tokenizer.convert_tokens_to_ids("<|im_start|>")
    return ids


def draw(logits, open_slots, generator):
    """Gumbel draws, and the surest open slot of each row that has one."""
    noise = -(-torch.rand(logits.shape, generator=generator).double().log()).log()
    tokens = (logits.double() + noise).argmax(dim=-1)
    sure = logits.softmax(dim=-1).gather(-1, tokens[..., None])[..., 0].masked_fill(~open_slots, -1)
    return tokens, open_slots & (sure == sure.amax(dim=1, keepdim=True))


def grow_and_crop(model, ids, mask, generator):
    """A cache object that every call fills, cropped behind it."""
    x = torch.nn.functional.pad(ids, (0, SLOTS), value=mask)
    cache = DynamicCache()
    model(ids, past_key_values=cache, use_cache=True)
    for begin in range(LENGTH, x.shape[1], BLOCK):
        block = x[:, begin : begin + BLOCK]
        while (open_slots := block == mask).any():
            tokens, commit = draw(model(block, past_key_values=cache, use_cache=True).logits, open_slots, generator)
            block[commit] = tokens[commit]
            cache.crop(-BLOCK)
        model(block, past_key_values=cache, use_cache=True)
    return x


def prefix_of_tuples(model, ids, mask, generator):
    """Fast-dLLM's prefix cache: the whole canvas once a block, then its tail on the keys before the block."""
    x = torch.nn.functional.pad(ids, (0, SLOTS), value=mask)
    for begin in range(LENGTH, x.shape[1], BLOCK):
        past, seen = None, x
        while (open_slots := x[:, begin : begin + BLOCK] == mask).any():
            output = model(seen, past_key_values=past, use_cache=True)
            logits = output.logits[:, -(x.shape[1] - begin) :][:, :BLOCK]
            tokens, commit = draw(logits, open_slots, generator)
            x[:, begin : begin + BLOCK][commit] = tokens[commit]
            if past is None:
                past = tuple((k[:, :, :begin], v[:, :, :begin]) for k, v in output.past_key_values)
            seen = x[:, begin:]
    return x


def dual_cache(model, ids, mask, generator):
    """Fast-dLLM's dual cache: the whole canvas once a block, then the block alone, its keys replaced."""
    x = torch.nn.functional.pad(ids, (0, SLOTS), value=mask)
    for begin in range(LENGTH, x.shape[1], BLOCK):
        output = model(x, use_cache=True)
        logits, past = output.logits[:, begin : begin + BLOCK], output.past_key_values
        place = torch.zeros_like(x, dtype=torch.bool)
        place[:, begin : begin + BLOCK] = True
        block = x[:, begin : begin + BLOCK]
        while (open_slots := block == mask).any():
            tokens, commit = draw(logits, open_slots, generator)
            block[commit] = tokens[commit]
            logits = model(block, past_key_values=past, use_cache=True, replace_position=place).logits
    return x


def seeded_blocks(model, ids, mask, generator):
    """A shifting model by its forward (Fast-dLLM v2): each block begins with the token the last call predicts."""
    x, past = ids, DynamicCache()
    output = model.forward(ids, past_key_values=past, use_cache=True, update_past_key_values=True)
    for _ in range(SLOTS // BLOCK):
        x = torch.cat([x, output.logits[:, -1:].argmax(dim=-1), x.new_full((len(x), BLOCK - 1), mask)], dim=1)
        block = x[:, -BLOCK:]
        while (open_slots := block == mask).any():
            logits = model.forward(block, past_key_values=past, use_cache=True, update_past_key_values=False).logits
            tokens, commit = draw(torch.cat([logits[:, :1], logits[:, :-1]], dim=1), open_slots, generator)
            block[commit] = tokens[commit]
        output = model.forward(block, past_key_values=past, use_cache=True, update_past_key_values=True)
    return x


def block_cache(model, ids, mask, generator):
    """Fast-dLLM v2's second cache: of the block at hand, a part of which is computed anew at most steps."""
    x, past = torch.nn.functional.pad(ids, (0, SLOTS), value=mask), DynamicCache()
    model.forward(ids, past_key_values=past, use_cache=True, update_past_key_values=True)
    for begin in range(LENGTH, x.shape[1], BLOCK):
        block, told = x[:, begin : begin + BLOCK], dict(past_key_values=past, use_block_cache=True, use_cache=True)
        for start in range(0, BLOCK, BLOCK - 1):
            half, inner = block[:, start : start + BLOCK - 1], None
            while (open_slots := half == mask).any():
                if inner is None:
                    output = model.forward(block, update_past_key_values=False, **told)
                    logits, inner = output.logits[:, start : start + BLOCK - 1], output.block_past_key_values
                else:
                    place = dict(block_past_key_values=inner, replace_position=start)
                    logits = model.forward(half, update_past_key_values=False, **place, **told).logits
                tokens, commit = draw(logits, open_slots, generator)
                half[commit] = tokens[commit]
        model.forward(block, past_key_values=past, use_cache=True, update_past_key_values=True)
    return x


def scaled(model, ids, mask, generator):
    """Classifier-free guidance with a cache for each of its two canvases (BD3LM): copies, filled anew."""
    x = ids
    for _ in range(SLOTS // BLOCK):
        pair = x, x.masked_fill(torch.arange(x.shape[1]) < LENGTH, mask)
        caches = [model(canvas, use_cache=True, past_key_values=DynamicCache()).past_key_values for canvas in pair]
        x = torch.cat([x, x.new_full((len(x), BLOCK), mask)], dim=1)
        block = x[:, -BLOCK:]
        while (open_slots := block == mask).any():
            cond, free = (model(block, past_key_values=copy.deepcopy(cache)).logits for cache in caches)
            combined = free + 1.5 * (cond - free)
            assert not combined.isnan().any()
            tokens, commit = draw(combined, open_slots, generator)
            block[commit] = tokens[commit]
    return x


def stored(model, ids, mask, generator, attention=None):
    """SDAR's flag, on the prompt's whole blocks: the rest of the prompt stands in the first block."""
    seed = int(torch.randint(1 << 30, (), generator=generator))
    torch.manual_seed(seed)
    return model.block_generate(model, ids, mask, SLOTS, BLOCK, 0.8, threshold=2.0, attention_mask=attention)


LOOPS = {
    loop.__name__: loop
    for loop in (grow_and_crop, prefix_of_tuples, dual_cache, seeded_blocks, block_cache, scaled, stored)
}


@pytest.fixture
def make(make_cached, standins):
    def build(loop, seed=1):
        model = make_cached(in_place=loop is not seeded_blocks, seed=seed)
        model.__dict__["block_generate"] = standins.block_generate
        return model

    return build


@torch.no_grad()
@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_is_guided_and_given_back(name, make, prompt, tokenizer, liking):
    loop, (reward, count), mask = LOOPS[name], liking, tokenizer.mask_token_id
    never, model = make(loop), make(loop)

    def call(which, seed=0):
        return loop(which, prompt, mask, torch.Generator().manual_seed(seed))

    plain = call(never)
    before = dict(vars(model))
    entrgi_kernels.guide(model, reward, tokenizer, **SETTINGS)
    guided = call(model)
    assert guided.shape[1] >= LENGTH + SLOTS and not (guided == mask).any()
    free = SLOTS - SLOTS // BLOCK if loop is seeded_blocks else SLOTS
    assert count(guided[:, LENGTH:]) >= 0.9 * 2 * free > 2 * count(plain[:, LENGTH:])
    assert model.entrgi.stats.steps == model.entrgi.stats.model_forwards >= (BLOCK - 1) * SLOTS / BLOCK
    assert torch.equal(call(model), guided)
    handle = model.entrgi
    scores = handle.score(guided)
    assert len(scores) == 2 and min(scores) > 3
    with handle.paused():
        assert torch.equal(call(model), plain)
    assert torch.equal(call(model), guided)
    with torch.inference_mode():
        assert torch.equal(call(model), guided)
    handle.remove()
    assert torch.equal(call(model), plain)
    assert vars(model).keys() == before.keys()


@torch.no_grad()
def test_prompts_of_different_lengths(make, chat, tokenizer, liking):
    model, (reward, count), mask = make(stored), liking, tokenizer.mask_token_id
    entrgi_kernels.guide(model, reward, tokenizer, **SETTINGS)
    both = stored(model, chat.input_ids, mask, torch.Generator().manual_seed(0), chat.attention_mask)
    assert count(both[:, chat.input_ids.shape[1] :]) >= 0.9 * 2 * SLOTS
    prompts = [ids[keep > 0].tolist() for ids, keep in zip(chat.input_ids, chat.attention_mask, strict=True)]
    texts = [tokenizer.decode(ids) for ids in prompts]
    assert [tokenizer.decode(ids) for ids in model.entrgi.steering.prompts] == texts


@torch.no_grad()
@pytest.mark.parametrize("kind", ["appended", "replaced", "positions", "cache_position"])
def test_a_block_is_guided_as_on_its_whole_canvas(kind, make, prompt, reward, tokenizer):
    model, mask = make(grow_and_crop), tokenizer.mask_token_id
    canvas = torch.nn.functional.pad(prompt, (0, 8), value=mask)
    canvas[:, LENGTH : LENGTH + 5] = torch.tensor([[40, 41, 42, 43, 44], [50, 51, 52, 53, 54]])
    block, begin = canvas[:, LENGTH + 4 :], LENGTH + 4
    first = torch.nn.functional.pad(prompt, (0, 4 if kind == "appended" else 8), value=mask)

    def run():
        model(first)  # the call begins here, with its prompt
        if kind == "appended":
            cache = DynamicCache()
            model(canvas[:, :begin], past_key_values=cache, use_cache=True)
            return model(block, past_key_values=cache).logits
        past = model(canvas, use_cache=True).past_key_values
        place = torch.zeros_like(canvas, dtype=torch.bool)
        place[:, begin:] = True
        told = dict(replace_position=place)
        if kind == "positions":
            told = dict(position_ids=torch.arange(begin, begin + 4)[None])
        elif kind == "cache_position":
            told = dict(cache_position=torch.arange(begin, begin + 4))
        return model(block, past_key_values=past, **told).logits

    plain = run()
    entrgi_kernels.guide(model, reward, tokenizer, **SETTINGS)
    guided = run()
    steps = model.entrgi.stats.steps
    model.entrgi.remove()
    opened = canvas == mask
    rows = opened[:, begin:]
    assert torch.equal(guided[~rows], plain[~rows])
    steering = Steering(entrgi_kernels.GuidedSampler(model, reward, tokenizer, **SETTINGS))
    steering.begin([row[:LENGTH].tolist() for row in canvas], [LENGTH] * 2, seed=3)
    for _ in range(steps):  # draws go by the step
        expected = steering(plain[rows].clone(), canvas[:, LENGTH:], opened[:, LENGTH:])
    # Of another shape the same products add in another order, and Adam divides a small gradient by its own size: on a
    # Zen 5 five of 1,554 entries are off by a ten-thousandth of the learning rate. The others must agree as numbers do.
    torch.testing.assert_close(guided[rows], expected, rtol=0, atol=1e-3 * SETTINGS["learning_rate"])
    assert torch.isclose(guided[rows], expected, rtol=1.3e-6, atol=1e-5).float().mean() > 0.99


@torch.no_grad()
def test_a_batch_may_lose_rows_and_prompts_may_reach_into_later_blocks(make, tokenizer, liking):
    model, (reward, count), mask = make(grow_and_crop), liking, tokenizer.mask_token_id
    entrgi_kernels.guide(model, reward, tokenizer, **SETTINGS)
    x = torch.arange(70, 70 + 3 * 16).view(3, 16)
    x[0, 8:], x[1, 14:], x[2, 10:] = mask, mask, mask  # prompts of 8, 14 and 10 tokens
    cache = DynamicCache()
    model(x[:, :8], past_key_values=cache, use_cache=True)
    for begin, keep in ((8, [0, 1, 2]), (12, [1, 2])):
        cache.batch_select_indices(torch.tensor(keep))
        block = x[keep, begin : begin + 4]
        while (open_slots := block == mask).any():
            logits = model(block, past_key_values=cache, use_cache=True, store_kv=False).logits
            tokens, commit = draw(logits, open_slots, torch.Generator().manual_seed(begin))
            block[commit] = tokens[commit]
        model(block, past_key_values=cache, use_cache=True)
        x[keep, begin : begin + 4] = block
        prompts = [[70 + 16 * row + step for step in range((8, 14, 10)[row])] for row in keep]
        told = model.entrgi.steering.prompts
        assert told[-1] == prompts[-1] and (begin == 8 or told == prompts)
    assert count(x[0, 8:12]) == 4 and count(x[1, 14:]) == 2 and count(x[2, 10:]) == 6


class Silent:
    """A cache of a loop's own that tells nothing of its keys."""

    def update(self, key, value, layer):
        return key, value

    def get_seq_length(self):
        return 18


@torch.no_grad()
def test_what_cannot_be_known_is_refused(make, prompt, reward, tokenizer):
    model, mask = make(grow_and_crop), tokenizer.mask_token_id
    block = torch.full((2, 4), mask)

    def filled(ids=prompt):
        cache = DynamicCache()
        model(ids, past_key_values=cache, use_cache=True)
        return cache

    def windowed():
        cache = DynamicCache()
        for layer in range(2):  # 20 positions, of which a sliding window holds four; heads are no positions
            cache.update(torch.ones(2, 20, 4, 8), torch.ones(2, 20, 4, 8), layer)
        cache.get_seq_length = lambda: 20
        return cache

    early = filled(prompt.flip(1))
    plain = model(block, past_key_values=early).logits
    entrgi_kernels.guide(model, reward, tokenizer, **SETTINGS)
    assert not model(prompt[:, :4], past_key_values=early).logits.isnan().any()  # nothing to decide
    for told, words in (
        (dict(past_key_values=early), "before guide"),
        (dict(past_key_values=Silent()), "cannot be read"),
        (dict(past_key_values=filled(), position_ids=torch.arange(30, 34)[None]), "position_ids begin at"),
        (dict(past_key_values=filled(), replace_position=torch.ones(2, LENGTH)), "replace_position"),
        (dict(past_key_values=filled(), replace_position=40), "beyond the 18"),
        (dict(position_ids=torch.arange(18, 22)[None]), "no cache is handed over"),
        (dict(past_key_values=windowed()), "cannot be read"),
    ):
        with pytest.raises(ValueError, match=words) as caught:
            model(block, **told)
        assert "canvas=" in str(caught.value)
    changed = filled()
    changed.layers[0].keys[:, :, 5] += 1
    with pytest.raises(ValueError, match="behind the model's back"):
        model(block, past_key_values=changed)
    grown = filled()
    with model.entrgi.paused():
        model(prompt[:, :4], past_key_values=grown, use_cache=True)
    with pytest.raises(ValueError, match="22 positions"):
        model(block, past_key_values=grown)
    grown.crop(-4)  # what it held before is known
    assert not torch.equal(model(block, past_key_values=grown).logits, plain)
    whole = torch.cat([prompt.flip(1), block], dim=1)
    model.entrgi.remove()
    entrgi_kernels.guide(model, reward, tokenizer, canvas=lambda ids, told: (whole, LENGTH), **SETTINGS)
    assert not torch.equal(model(block, past_key_values=early).logits, plain)


@torch.no_grad()
def test_a_response_that_is_masked_again_is_no_unconditional_copy(make, prompt, reward, tokenizer):
    model, mask = make(dual_cache), tokenizer.mask_token_id
    x = torch.nn.functional.pad(prompt, (0, 4), value=mask)
    done, again = x.masked_fill(x == mask, 65), x.clone()
    again[:, -4:-2] = 65
    plain = model(again, use_cache=True).logits
    entrgi_kernels.guide(model, reward, tokenizer, **SETTINGS)
    for canvas in (x, done, again):
        guided = model(canvas, use_cache=True).logits
    assert (guided - plain)[:, -2:, :256].abs().mean() > 1 and torch.equal(guided[:, :-2], plain[:, :-2])


@torch.no_grad()
def test_a_loop_may_know_blocks_that_the_config_does_not_tell(make, prompt, tokenizer, liking):
    model, (reward, count), mask = make(stored), liking, tokenizer.mask_token_id
    model.config.model_type = "sdar"
    entrgi_kernels.guide(model, reward, tokenizer, **SETTINGS)
    assert count(stored(model, prompt, mask, torch.Generator().manual_seed(0))[:, LENGTH:]) >= 0.9 * 2 * SLOTS
    with pytest.raises(TypeError, match="its own loop alone"):
        model.entrgi.generate("Why?")


@torch.no_grad()
def test_a_refused_call_leaves_the_cache_as_it_was(make, prompt, reward, tokenizer):
    model = make(grow_and_crop)
    cache = DynamicCache()
    model(prompt, past_key_values=cache, use_cache=True)
    entrgi_kernels.guide(model, reward, tokenizer, **SETTINGS)
    with pytest.raises(ValueError, match="canvas="):
        model(torch.full((2, 4), tokenizer.mask_token_id), past_key_values=cache, use_cache=True)
    assert cache.get_seq_length() == LENGTH


def test_edits_of_committed_tokens_are_guided_and_moving_slots_refused(make_cached, liking, tokenizer):
    model, (reward, count), mask = make_cached(), liking, tokenizer.mask_token_id

    @torch.no_grad()
    def generate(inputs, block_length=4, editing_threshold=0.9):
        x = torch.nn.functional.pad(inputs, (0, block_length), value=mask)
        x[:, -block_length:] = model.forward(x).logits[:, -block_length:].argmax(dim=-1)
        if editing_threshold:
            x[:, -block_length:] = model.forward(x).logits[:, -block_length:].argmax(dim=-1)
        return x

    model.__dict__["generate"] = generate
    ids = torch.arange(70, 90)[None]
    entrgi_kernels.guide(model, reward, tokenizer, **SETTINGS)
    assert count(model.generate(ids)[:, 20:]) == 4 and model.entrgi.stats.steps == 2
    model.generate(ids, editing_threshold=None)
    assert model.entrgi.stats.steps == 1
    model.entrgi.remove()
    assert model.generate is generate
    model.config.delete_token_id, model.config.split_token_id = 7, 8
    with pytest.raises(ValueError, match="LLaDA2.2"):
        entrgi_kernels.guide(model, reward, tokenizer, **SETTINGS)
