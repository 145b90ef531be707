"""Responses filled block by block: what is seen, what is stopped, and that keeping finished blocks changes no token."""

from __future__ import annotations

import pytest
import torch

from entrgi_kernels.guidance import GuidanceConfig, GuidedSampler
from entrgi_kernels.guidance.canvas import Canvas
from entrgi_kernels.models import BlockCausal
from entrgi_kernels.models.forwards import WholeCanvas
from entrgi_kernels.rewards import CallableReward

PROMPTS = ["Why?", "A rather longer question than that.", "So"]
SETTINGS = dict(num_samples=2, max_new_tokens=8, steps=8, guidance_steps=2, temperature=1.0, learning_rate=2.0, seed=3)
BLOCK = 4


class Plain(BlockCausal):
    """Whole canvases at every step: the oracle."""

    def forwards(self, tokens, attention, start, repeats=1):
        return WholeCanvas(self, attention)


def samples_of(sampler, prompts=PROMPTS, **settings):
    return [[(s.tokens, s.reward) for s in result.samples] for result in sampler.generate(prompts, **settings)]


def tokens_of(sampler, prompts=PROMPTS, **settings):
    return [[tokens for tokens, _ in result] for result in samples_of(sampler, prompts, **settings)]


@pytest.fixture(scope="module")
def parts(make_diffusion, make_reward, tokenizer):
    diffusion = make_diffusion(len(tokenizer)).double()
    return diffusion, make_reward(len(tokenizer)).double(), tokenizer


@pytest.fixture
def bidirectional(parts):
    return GuidedSampler(*parts, shift=True, **SETTINGS)


def block_causal(parts, kind=BlockCausal, shift=False, **settings):
    diffusion, reward, tokenizer = parts
    model = kind(diffusion, tokenizer.mask_token_id, BLOCK, shift=shift)
    return GuidedSampler(model, reward, tokenizer, **{**SETTINGS, **settings})


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"method": "none", "num_samples": 3},
        {"alg": "maskgit_plus", "threshold": 0.3, "schedule": "even"},
        {"confidence": "guided", "exact_savings": "none"},
        {"deprioritize_eos": False, "steps": 24, "max_new_tokens": 16},
    ],
    ids=str,
)
def test_kept_blocks_change_no_token(parts, shift, settings):
    expected = tokens_of(block_causal(parts, Plain, shift), **settings)
    sampler = block_causal(parts, BlockCausal, shift)
    assert sampler.model.keeps_blocks
    assert tokens_of(sampler, **settings) == expected
    # Neither the batch nor its order changes a prompt's tokens.
    assert tokens_of(sampler, batch_size=1, **settings) == expected
    assert len({tuple(tokens) for result in expected for tokens in result}) > 3


def test_a_block_that_is_the_response_is_no_block(bidirectional):
    assert tokens_of(bidirectional, block_length=8, deprioritize_eos=False) == tokens_of(
        bidirectional, deprioritize_eos=False
    )


def test_blocks_are_filled_from_left_to_right(bidirectional):
    mask, seen = bidirectional.model.mask_token_id, []
    results = bidirectional.generate(PROMPTS, block_length=4, trace=True)
    for sample in (sample for result in results for sample in result.samples):
        for step in sample.trace:
            seen.append([slot // 4 for slot in step.committed])
            assert mask not in step.tokens[: 4 * min(seen[-1], default=0)]
            assert all(entropy is None for entropy in step.entropy[4 * (step.step // 4 + 1) :])
        assert mask not in sample.tokens
        numbers = [step.step for step in sample.trace]
        assert numbers == sorted(set(numbers)) and numbers[-1] < 8
    assert {0, 1} == {block for blocks in seen for block in blocks}


def test_nothing_is_computed_behind_an_end(parts, monkeypatch):
    """Rows that have ended are in no later forward, and pads fill what is left."""
    diffusion, reward, tokenizer = parts
    sampler = GuidedSampler(diffusion, reward, tokenizer, shift=True, **SETTINGS, deprioritize_eos=False)
    sizes, forward = [], sampler.model.masked_logits

    def watched(canvas, attention, masked):
        sizes.append(len(canvas))
        return forward(canvas, attention, masked)

    monkeypatch.setattr(sampler.model, "masked_logits", watched)
    more = torch.zeros(len(tokenizer), dtype=torch.float64)
    more[tokenizer.eos_token_id] = 5
    with diffusion.lm_head.register_forward_hook(lambda _module, _args, logits: logits + more):
        results = sampler.generate(PROMPTS, block_length=2, num_samples=4)
    ended = 0
    for tokens in (sample.tokens for result in results for sample in result.samples):
        if tokenizer.eos_token_id in tokens:
            last = tokens.index(tokenizer.eos_token_id) // 2 * 2 + 2
            assert set(tokens[last:]) <= {sampler.pad_token_id}
            ended += last < 8
    assert ended >= 2 and min(sizes[3:]) < 12 and sampler.stats.model_forwards == len(sizes)


def test_rewards_read_up_to_the_end_of_the_block(parts):
    diffusion, _, tokenizer = parts
    table, seen = torch.randn(len(tokenizer), 8, dtype=torch.float64), []

    def score(inputs_embeds, attention_mask, position_ids):
        seen.append(tuple(attention_mask.sum(1).tolist()))
        return (inputs_embeds * attention_mask[..., None]).square().sum((1, 2))

    reward = CallableReward(score, torch.nn.Embedding.from_pretrained(table), tokenizer)
    sampler = block_causal((diffusion, reward, tokenizer), num_samples=1, guidance_steps=1, deprioritize_eos=True)
    prompts = ["Why?", "Why not?!"]
    lengths = [len(tokenizer.apply_chat_template([{"role": "user", "content": p}], tokenize=False)) for p in prompts]
    assert lengths[0] % BLOCK != lengths[1] % BLOCK  # unequal beginnings within a block
    sampler.generate(prompts)
    pairs = [counts for counts in seen if len(counts) == 2]
    first, last = pairs[0], max(pairs)
    assert first[0] < last[0] and first[1] < last[1]
    assert first[0] - first[1] != last[0] - last[1]  # each up to its own block's end


def test_a_threshold_takes_fewer_steps_and_1_takes_all(bidirectional):
    settings = dict(alg="maskgit_plus", block_length=4, steps=8)
    counts = {}
    for threshold in (None, 1.0, 0.5, 1e-9):
        tokens_of(bidirectional, **settings, threshold=threshold)
        counts[threshold] = bidirectional.stats.steps
    assert counts[1e-9] < counts[0.5] <= counts[1.0] <= 8
    bidirectional.generate(["Why?"], **settings, threshold=1e-9, num_samples=1, deprioritize_eos=False)
    assert bidirectional.stats.steps == 2  # a step a block


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"block_length": 3}, "block_length=3: expected one that divides max_new_tokens=128"),
        ({"block_length": 0}, "block_length=0"),
        ({"threshold": 0.0, "alg": "maskgit_plus"}, "threshold=0.0"),
        ({"threshold": 1.1, "alg": "maskgit_plus"}, "threshold=1.1"),
        ({"threshold": 0.5}, "threshold=0.5 with alg='entropy'"),
        ({"cfg_scale": -1}, "cfg_scale=-1"),
        ({"model_cache": "all"}, "model_cache='all'"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        GuidanceConfig(**settings)


def test_blocks_that_the_model_was_not_trained_with(parts):
    sampler = block_causal(parts)
    with pytest.raises(ValueError, match="trained with blocks of 4, expected block_length=4 or None"):
        sampler.generate("Why?", block_length=2)
    with pytest.raises(ValueError, match="max_new_tokens=6: expected a multiple of 4"):
        sampler.generate("Why?", max_new_tokens=6)


@pytest.mark.parametrize("kind", [None, BlockCausal])
def test_a_row_whose_block_is_given_goes_on_behind_it(parts, tokenizer, kind):
    sampler = GuidedSampler(*parts, **SETTINGS) if kind is None else block_causal(parts, kind)
    turns, config = [[{"role": "user", "content": text}] for text in "ab"], sampler.config.replace(block_length=4)

    def canvas():
        made = sampler.canvas([[65, 66, 67, 68], [67, 68, 69, 70]], [1, 2], 1, 12, torch.device("cpu"))
        for row, begin in ((0, 0), (1, 4)):  # the first block of one, the second of the other
            made.tokens[row, 4 + begin : 8 + begin], made.masked[row, begin : begin + 4] = 70, False
        return made

    config = config.replace(max_new_tokens=12, steps=12, deprioritize_eos=True)
    together = sampler.denoise(canvas(), turns, torch.tensor([0, 1]), config)
    whole = canvas()
    for row in range(2):
        alone = Canvas(
            *(t[row : row + 1] for t in (whole.tokens, whole.attention)),
            4,
            whole.masked[row : row + 1],
            whole.keys[row : row + 1],
        )
        found = sampler.denoise(alone, turns[row : row + 1], torch.tensor([0]), config)
        assert torch.equal(found[0], together[row])
    assert (together == tokenizer.pad_token_id).sum() == 0


def test_an_end_that_is_given_behind_a_gap_ends_nothing_before_it(parts, tokenizer):
    """Infilling: the gap is filled; a trajectory ends by what its finished blocks hold."""
    sampler = GuidedSampler(*parts, shift=True, **SETTINGS)
    canvas = sampler.canvas([[65, 66, 67]], [1], 1, 8, torch.device("cpu"))
    canvas.tokens[0, -1], canvas.masked[0, -1] = tokenizer.eos_token_id, False
    config = sampler.config.replace(block_length=2, suppress_undrawable=True)
    turns = [[{"role": "user", "content": "a"}]]
    (response,) = sampler.denoise(canvas, turns, torch.tensor([0]), config.replace(alg="maskgit_plus")).tolist()
    drawn = response[:-1]
    filled = drawn.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in drawn else 7
    assert filled >= 2 and response[-1] == tokenizer.eos_token_id and tokenizer.mask_token_id not in response


def test_hooks_see_all_trajectories_and_may_change_them(parts, tokenizer):
    """What a hook masks within the block is filled again."""
    sampler = GuidedSampler(*parts, shift=True, **SETTINGS)
    encoded = [[65, 66], [67]]
    canvas = sampler.canvas(encoded, [1, 2], 2, 8, torch.device("cpu"))
    mask, shapes, again = sampler.model.mask_token_id, set(), []

    def hook(step, tokens):
        shapes.add(tuple(tokens.shape))
        if step == 2 and not again:
            again.append(tokens[0, canvas.start].item())
            tokens[0, canvas.start] = mask
            return tokens
        return None

    config = sampler.config.replace(block_length=4)
    turns = [[{"role": "user", "content": text}] for text in "ab"]
    response = sampler.denoise(canvas, turns, torch.tensor([0, 0, 1, 1]), config, on_step=hook)
    assert shapes == {(4, 10)} and again and not (response == mask).any()
