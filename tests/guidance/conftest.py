"""Small real models: random Qwen3 networks over a byte-level vocabulary with a ChatML template."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, Qwen3ForSequenceClassification

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|im_start|>", "<|im_end|>", "<|mask|>"]


def make_tokenizer(special: list[str] = SPECIAL, chat_template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer without merges: 256 bytes and the special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|im_end|>", pad_token="<|im_end|>", additional_special_tokens=special
    )
    if "<|mask|>" in special:
        tokenizer.mask_token = "<|mask|>"
    tokenizer.chat_template = chat_template
    return tokenizer


def make_config(vocab_size: int, **changes) -> Qwen3Config:
    settings = dict(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=512,
        tie_word_embeddings=False,
    )
    return Qwen3Config(**{**settings, **changes})


def make_diffusion(vocab_size: int, seed: int = 1, scale: float = 8.0, **changes) -> Qwen3ForCausalLM:
    """A random network whose logits are spread like a real one's, not all alike."""
    torch.manual_seed(seed)
    model = Qwen3ForCausalLM(make_config(vocab_size, **changes)).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(scale)
    return model


def make_reward(vocab_size: int, seed: int = 2, **changes) -> Qwen3ForSequenceClassification:
    """A random reward model whose value depends visibly on the response."""
    torch.manual_seed(seed)
    config = make_config(vocab_size, num_labels=1, pad_token_id=0, **changes)
    model = Qwen3ForSequenceClassification(config).eval()
    with torch.no_grad():
        model.score.weight.mul_(30)
        model.model.embed_tokens.weight.mul_(20)
    return model


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return make_tokenizer()


@pytest.fixture(scope="session", name="make_diffusion")
def make_diffusion_fixture():
    return make_diffusion


@pytest.fixture(scope="session", name="make_reward")
def make_reward_fixture():
    return make_reward


@pytest.fixture
def diffusion(tokenizer) -> Qwen3ForCausalLM:
    return make_diffusion(len(tokenizer))


@pytest.fixture
def reward(tokenizer) -> Qwen3ForSequenceClassification:
    return make_reward(len(tokenizer))


@pytest.fixture
def padded_diffusion(tokenizer) -> Qwen3ForCausalLM:
    """A head with more rows than the tokenizer has tokens, as many published checkpoints have."""
    return make_diffusion(len(tokenizer) + 40)
