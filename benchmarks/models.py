"""Small random models and word tokenizers with a real vocabulary's size, for whole guided generations.

The diffusion LM and the reward model are Qwen3-shaped and nearly free; the vocabulary (151,936) and the reward
embedding's width are a real model's, so that what is measured is the guidance. The diffusion LM's head is scaled so
that its logits have deviation 4, which gives rows of about four nats: a trained model's are peaked as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, Qwen3ForSequenceClassification

from benchmarks.inputs import VOCABULARY

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|mask|>", "<|unk|>")
TEMPLATE = (
    "{% for message in messages %}<|im_start|> {{ message['role'] }} {{ message['content'] }} <|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)


@dataclass
class World:
    """A diffusion LM, a reward model and their tokenizers."""

    model: Qwen3ForCausalLM
    tokenizer: PreTrainedTokenizerFast
    reward_model: Qwen3ForSequenceClassification
    reward_tokenizer: PreTrainedTokenizerFast


def word_tokenizer(v: int, skip: int = 0) -> PreTrainedTokenizerFast:
    """A tokenizer of `v` words "w0", "w1", ... after the special tokens and two roles; `skip` shifts the numbering.

    Tokenizers with different `skip` share most words under different ids, as two models' vocabularies do.
    """
    words = [*SPECIAL, "user", "assistant"]
    words += [f"w{i}" for i in range(skip, skip + v - len(words))]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words[:v])}, unk_token="<|unk|>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        eos_token=SPECIAL[0],
        pad_token=SPECIAL[0],
        mask_token="<|mask|>",
        unk_token="<|unk|>",
        chat_template=TEMPLATE,
    )


def make_world(
    *,
    v: int = VOCABULARY,
    d: int = 1024,
    width: int = 64,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> World:
    """Random models: a 2-layer diffusion LM of `width` with `v` tokens, a 1-layer reward model of width `d`.

    Args:
        v: both vocabularies' size.
        d: the reward model's embedding width D.
        width: the diffusion LM's.
        dtype: of both models.
    """
    torch.manual_seed(seed)
    tokenizer, reward_tokenizer = word_tokenizer(v), word_tokenizer(v, skip=100)
    common: dict[str, Any] = {"vocab_size": v, "tie_word_embeddings": False, "pad_token_id": tokenizer.pad_token_id}
    config = Qwen3Config(
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=width // 2,
        **common,
    )
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.normal_(0, 4.0 / width**0.5)
        for name, weight in model.named_parameters():
            if weight.dim() > 1 and "lm_head" not in name:
                weight.normal_(0, 0.3)
    heads = max(1, d // 64)
    reward_config = Qwen3Config(
        hidden_size=d,
        intermediate_size=d,
        num_hidden_layers=1,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=d // heads,
        num_labels=1,
        **common,
    )
    reward_model = Qwen3ForSequenceClassification(reward_config)
    for part in (model, reward_model):
        part.to(device=device, dtype=dtype).eval().requires_grad_(False)
    return World(model, tokenizer, reward_model, reward_tokenizer)
