"""Networks that have learned a number of positions: longer texts are refused, with both numbers, before they run."""

from __future__ import annotations

import pytest
import torch
import transformers

from entrgi_kernels import GuidedSampler, rewards
from entrgi_kernels.rewards import CallableReward, JudgeReward, LikelihoodReward, SimilarityReward
from entrgi_kernels.text import template

SHORT, LONG = [{"role": "user", "content": "Hello"}], [{"role": "user", "content": "Why is the food tasty? " * 9}]
DEBERTA = {"position_biased_input": True}


def longest(reward, conversation) -> int:
    """Response slots for which there is just room."""
    prefix, suffix = reward.split(conversation)
    return reward.position_limit - len(prefix) - len(suffix)


@pytest.mark.parametrize(
    ("name", "limit", "changes"),
    [
        ("Bert", 48, {}), ("Roberta", 43, {"pad_token_id": 4}), ("GPT2", 48, {}), ("DebertaV2", 48, DEBERTA),
        ("DebertaV2", None, {"position_biased_input": False}), ("Qwen3", None, {}), ("OPT", 48, {"ffn_dim": 48}),
    ],
)  # fmt: skip
def test_the_limit_is_the_networks_and_is_kept(tokenizer, classifier, name, limit, changes):
    module = classifier(len(tokenizer), name, max_position_embeddings=48, n_positions=48, **changes)
    reward = rewards.wrap(module, tokenizer)
    assert reward.position_limit == limit
    if limit is None:
        assert len(reward.score_texts([LONG], ["x"])) == 1
        reward.check_length([LONG], 1000)
        return
    room = longest(reward, SHORT)
    prepared, index = reward.prepare([SHORT]), torch.tensor([0])

    def score(slots: int) -> torch.Tensor:
        return reward.score_embeddings(prepared, index, torch.randn(1, slots, 32), torch.ones(1, slots).bool())

    assert score(room).isfinite().all()
    reward.check_length([SHORT], room)
    calls = []
    module.register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(ValueError, match=f"text 1 with its prompt takes {len(reward.encode(LONG, 'x'))}"):
        reward.score_texts([SHORT, LONG], ["x", "x"])
    for run in (score, lambda slots: reward.check_length([SHORT], slots)):
        with pytest.raises(ValueError, match=f"learned {limit} positions.* takes {limit + 1} tokens.*at most {limit}"):
            run(room + 1)
    assert not calls


def test_causal_models_too(tokenizer, causal_lm):
    tokenizer.add_tokens(["yes", "no"])
    module = causal_lm(len(tokenizer), "GPT2", n_positions=64, max_position_embeddings=64)
    for reward in (LikelihoodReward(module, tokenizer), JudgeReward(module, tokenizer, "Is it?", yes="yes", no="no")):
        assert reward.position_limit == 64
        with pytest.raises(ValueError, match="learned 64 positions, and text 0 with its prompt takes"):
            reward.score_texts([LONG], ["x " * 40])


def test_similarities_cut_what_is_too_long(build):
    words = build["wordpiece"](chat_template=None)
    for kind, length in (("Bert", 16), ("Roberta", 12), ("DistilBert", 16), ("GPT2", 16)):
        torch.manual_seed(0)
        config = getattr(transformers, f"{kind}Config")(
            vocab_size=len(words), hidden_size=32, dim=32, n_embd=32, intermediate_size=48, hidden_dim=48,
            num_hidden_layers=1, n_layers=1, n_layer=1, num_attention_heads=4, n_heads=4, n_head=4,
            max_position_embeddings=16, n_positions=16, pad_token_id=3,
        )  # fmt: skip
        module = getattr(transformers, f"{kind}Model")(config).eval()
        reward = SimilarityReward(module, words, "The food was tasty. " * 9)
        assert reward.max_length == length
        assert reward.score_texts([SHORT], ["The waiter was friendly. " * 9])[0] <= 1
        given = torch.randn(1, 40, 32)
        value = reward.score_embeddings(reward.prepare([SHORT]), torch.tensor([0]), given, torch.ones(1, 40).bool())
        assert value.isfinite().all()


def test_the_sampler_says_so_before_anything_runs(tokenizer, causal_lm, classifier):
    prompt = "Hello, hello, hello"
    settings = dict(num_samples=1, steps=2, guidance_steps=1, batch_size=1)
    diffusion = causal_lm(len(tokenizer), seed=5)
    module = classifier(len(tokenizer), "GPT2", n_positions=48, max_position_embeddings=48)
    square = CallableReward(lambda e, m, p: e.square().mean((1, 2)), torch.randn(len(tokenizer), 8), tokenizer)
    reward = rewards.wrap(module, tokenizer)
    calls = []
    diffusion.register_forward_pre_hook(lambda *_: calls.append(1))
    for scored in (reward, reward + square):
        sampler = GuidedSampler(diffusion, scored, tokenizer, **settings)
        calls.clear()
        room = longest(reward, [{"role": "user", "content": prompt}])
        with pytest.raises(ValueError, match=f"prompt 1 with {room + 1} response slots takes 49 tokens"):
            sampler.generate(["x", prompt], max_new_tokens=room + 1)
        assert not calls
    # A prompt that leaves no room at all is refused unguided as well; one that may is run.
    with pytest.raises(ValueError, match="prompt 0 with 0 response slots takes"):
        sampler.generate([LONG], max_new_tokens=4, method="none")
    narrow = causal_lm(len(tokenizer), "GPT2", n_positions=48, max_position_embeddings=48, seed=5)
    sampler = GuidedSampler(narrow, square, tokenizer, **settings)
    slots = 49 - len(template.encode_prompt(tokenizer, [{"role": "user", "content": prompt}]))
    with pytest.raises(ValueError, match=f"GPT2LMHeadModel has learned 48 positions, and prompt 1 with {slots} resp"):
        sampler.generate(["x", prompt], max_new_tokens=slots)
    assert len(sampler.generate(["x"], max_new_tokens=8)) == 1
