"""Reward models of other classes than sequence classifiers: value heads, MLP scores, outputs of many kinds."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import nn
from transformers import Qwen2Config, Qwen2Model, Qwen2PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutputWithPast

from entrgi_kernels import rewards
from entrgi_kernels.rewards import SequenceClassifierReward
from entrgi_kernels.rewards.decoding.savings import ATTENTION, NAMES
from entrgi_kernels.text import template

SHORT = [{"role": "user", "content": "Hello"}]
LONG = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Why is the food tasty? " * 3}]
TEXTS = ["Fine.", "The waiter was friendly and the place tiny, again and again!"]
SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)


class ValueHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dropout, self.summary = nn.Dropout(0.1), nn.Linear(32, 1)

    def forward(self, states):
        states = self.dropout(states)
        return self.summary(states.to(self.summary.weight.dtype))


class WithValueHead(nn.Module):
    """A causal LM in a wrapper that exposes nothing, with a value for every token."""

    def __init__(self, causal) -> None:
        super().__init__()
        self.pretrained_model, self.v_head, self.config = causal, ValueHead(), causal.config

    def forward(self, input_ids=None, past_key_values=None, attention_mask=None, **kwargs):
        output = self.pretrained_model(
            input_ids=input_ids, attention_mask=attention_mask, output_hidden_states=True, **kwargs
        )
        return output.logits.float(), None, self.v_head(output.hidden_states[-1]).squeeze(-1)


class Pretrained(Qwen2PreTrainedModel):
    def __init__(self, config) -> None:
        super().__init__(config)
        self.model = Qwen2Model(config)
        self.build()

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, inputs_embeds=None, use_cache=None):
        states = self.model(input_ids, attention_mask, position_ids, inputs_embeds=inputs_embeds, use_cache=use_cache)
        return self.read(input_ids, attention_mask, states.last_hidden_state)


class OwnHeadForRewardModel(Pretrained):
    """Its head is called its output embedding, and the last attended token is read."""

    def build(self) -> None:
        self.v_head = nn.Linear(32, 1, bias=False)

    def get_output_embeddings(self):
        return self.v_head

    def read(self, input_ids, attention_mask, states):
        ends = attention_mask.cumsum(dim=1).argmax(dim=1)[:, None]
        return SequenceClassifierOutputWithPast(logits=self.v_head(states).squeeze(-1).gather(1, ends))


class MLPForRewardModel(Pretrained):
    """An MLP as score, read before the first padding token."""

    def build(self) -> None:
        self.score = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 1))

    def read(self, input_ids, attention_mask, states):
        logits, pad = self.score(states), self.config.pad_token_id
        last = torch.tensor([-1])
        if input_ids is not None and pad is not None:
            last = torch.eq(input_ids, pad).int().argmax(-1) - 1
        return SequenceClassifierOutputWithPast(logits=logits[torch.arange(len(logits)), last])


@dataclass
class Scores:
    scores: torch.Tensor
    end_scores: torch.Tensor


class TwoHeadsForScore(Pretrained):
    """Two heads of one number, of which the second counts, and scores of tokens beside that of the text."""

    def build(self) -> None:
        self.cost_head, self.score_head = nn.Linear(32, 1), nn.Linear(32, 1)

    def read(self, input_ids, attention_mask, states):
        assert attention_mask is not None
        scores = self.score_head(states)
        return Scores(scores, scores[:, -1])


class RewardModel(nn.Module):
    """A network of somebody's own that knows token ids alone and returns a tensor [B]."""

    def __init__(self, backbone) -> None:
        super().__init__()
        self.transformer, self.value_head = backbone, nn.Linear(32, 1)

    def forward(self, input_ids, attention_mask=None):
        states = self.transformer(input_ids, attention_mask=attention_mask).last_hidden_state
        return self.value_head(states)[:, -1, 0]


class Headless(nn.Module):
    """No module is its head, but it takes embeddings and returns a dict."""

    def __init__(self, backbone, embeddings: bool = True) -> None:
        super().__init__()
        self.encoder, self.direction = backbone, nn.Parameter(torch.randn(32))
        self.embeddings = embeddings

    def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None):
        if inputs_embeds is not None and not self.embeddings:
            raise ValueError("I want ids")
        states = self.encoder(input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds).last_hidden_state
        return {"rewards": torch.tanh(states[:, -1] @ self.direction / 20), "hidden": states}


def build(name: str, size: int, pad: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    config = Qwen2Config(vocab_size=size, pad_token_id=pad, initializer_range=0.3, **SIZES)
    if name == "value head":
        from transformers import Qwen2ForCausalLM

        return WithValueHead(Qwen2ForCausalLM(config)).to(dtype).eval()
    if name in ("RewardModel", "Headless"):
        return {"RewardModel": RewardModel, "Headless": Headless}[name](Qwen2Model(config)).to(dtype).eval()
    classes = {kind.__name__: kind for kind in (OwnHeadForRewardModel, MLPForRewardModel, TwoHeadsForScore)}
    return classes[name](config).to(dtype).eval()


def own(name: str, module: nn.Module, ids: list[int]) -> float:
    tokens = torch.tensor([ids])
    with torch.no_grad():
        output = module(input_ids=tokens, attention_mask=torch.ones_like(tokens))
    read = {
        "value head": lambda: output[2][0, -1],
        "RewardModel": lambda: output[0],
        "Headless": lambda: output["rewards"][0],
        "TwoHeadsForScore": lambda: output.end_scores[0, 0],
    }
    return read.get(name, lambda: output.logits[0, 0])().item()


@pytest.mark.parametrize(
    "name",
    ["value head", "OwnHeadForRewardModel", "MLPForRewardModel", "TwoHeadsForScore", "RewardModel", "Headless"],
)
def test_served_as_its_own_forward_scores(tokenizer, name):
    pad = tokenizer.convert_tokens_to_ids("<|bos|>")
    module = build(name, len(tokenizer), pad)
    reward = rewards.wrap(module, tokenizer)
    assert isinstance(reward, SequenceClassifierReward)
    if name == "Headless":
        assert reward.pooling == "whole"
    else:
        assert reward.pooling == "last" and set(NAMES) - {ATTENTION} <= set(reward.savings)
    conversations = [SHORT, LONG]
    expected = [
        own(name, module, template.encode_answered(tokenizer, turns, text))
        for turns, text in zip(conversations, TEXTS, strict=True)
    ]
    assert abs(expected[0] - expected[1]) > 1e-3
    assert reward.score_texts(conversations, TEXTS) == pytest.approx(expected, abs=1e-4)
    response = tokenizer("Tasty food!", add_special_tokens=False)["input_ids"]
    given = reward.embedding_table(tokenizer, len(tokenizer))[torch.tensor([response] * 2)].clone().requires_grad_()
    prepared = reward.prepare(conversations)
    value = reward.score_embeddings(prepared, torch.tensor([1, 0]), given, torch.ones(2, len(response)).bool())
    expected = [own(name, module, prepared.prefix_ids[i] + response + prepared.suffix_ids[i]) for i in (1, 0)]
    assert value.tolist() == pytest.approx(expected, abs=1e-4)
    value.sum().backward()
    assert given.grad.abs().max() > 0 and all(parameter.grad is None for parameter in module.parameters())


def test_a_head_of_higher_precision(tokenizer):
    module = build("value head", len(tokenizer), 0, torch.bfloat16)
    module.v_head.float()
    reward = rewards.wrap(module, tokenizer)
    ids = template.encode_answered(tokenizer, SHORT, TEXTS[0])
    assert reward.pooling == "last"
    assert reward.score_texts([SHORT], TEXTS[:1]) == pytest.approx([own("value head", module, ids)], abs=0.1)


def test_a_pad_that_ends_texts_or_stands_inside(tokenizer):
    """This one reads before the *first* pad: served where a text holds one at its end, refused where inside."""
    pad = tokenizer.convert_tokens_to_ids("<|im_end|>")
    module = build("MLPForRewardModel", len(tokenizer), pad)
    ending = "{% for m in messages %}{{ m['content'] }}{% endfor %}<|im_end|>"
    reward = rewards.wrap(module, tokenizer, chat_template=ending)
    ids = template.encode_answered(tokenizer, SHORT, TEXTS[0], chat_template=ending)
    assert ids[-1] == pad
    assert reward.score_texts([SHORT], TEXTS[:1]) == pytest.approx([own("MLPForRewardModel", module, ids)], abs=1e-4)
    with pytest.raises(ValueError, match=r"writes the token '<\|im_end\|>' .*MLPForRewardModel does more than look up"):
        rewards.wrap(module, tokenizer).score_texts([SHORT], TEXTS[:1])
    with pytest.raises(ValueError, match=r"writes the token '<\|im_end\|>'"):
        rewards.wrap(module, tokenizer).prepare([SHORT])


def test_a_reward_token_that_the_template_does_not_write(tokenizer):
    module = build("OwnHeadForRewardModel", len(tokenizer), 0)
    module.config.reward_token_id = tokenizer.convert_tokens_to_ids("<|eot|>")
    with pytest.raises(ValueError, match=r"reward token \d+ \('<\|eot\|>', config.reward_token_id\).*chat_template="):
        rewards.wrap(module, tokenizer)
    assert rewards.wrap(module, tokenizer, chat_template=template.CHATML + "<|eot|>").pooling == "last"


def test_what_is_missing_is_said(tokenizer):
    config = Qwen2Config(vocab_size=len(tokenizer), **SIZES)
    torch.manual_seed(0)
    with pytest.raises(ValueError, match=r"takes inputs_embeds. Tried: its own forward: ValueError: I want ids"):
        rewards.wrap(Headless(Qwen2Model(config), embeddings=False), tokenizer)

    class Steps(RewardModel):
        def forward(self, input_ids, attention_mask=None):
            return self.transformer(input_ids).last_hidden_state[..., :2]

    with pytest.raises(ValueError, match=r"Steps returns Tensor with a tensor of shape \(1, 7, 2\).*one number a text"):
        rewards.wrap(Steps(Qwen2Model(config)), tokenizer)

    class Mean(Headless):
        def forward(self, input_ids=None, attention_mask=None, inputs_embeds=None):
            states = self.encoder(input_ids, inputs_embeds=inputs_embeds).last_hidden_state
            return states.mean(1) @ self.direction

    with pytest.raises(ValueError, match="Mean reads places that attention_mask leaves out"):
        rewards.wrap(Mean(Qwen2Model(config)), tokenizer)

    class Pairs(RewardModel):
        def forward(self, chosen, rejected):
            return self.value_head(self.transformer(chosen).last_hidden_state)[:, -1, 0]

    with pytest.raises(ValueError, match="Pairs does not run on token ids.*called with input_ids"):
        rewards.wrap(Pairs(Qwen2Model(config)), tokenizer)
    with pytest.raises(TypeError, match="Qwen2Model has no head.*target="):
        rewards.wrap(Qwen2Model(config), tokenizer)
