"""Small random models and word tokenizers with a real vocabulary's size, for whole guided generations.

The diffusion LM and the reward model are Qwen3-shaped (Dream is Qwen2-shaped) and by default nearly free; the
vocabulary (151,936) is a real model's. The diffusion LM's head is scaled so that its logits have deviation 4, which
gives rows of about four nats: a trained model's are peaked as well.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from benchmarks.harness.inputs import VOCABULARY

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|mask|>", "<|unk|>")
TEMPLATE = (
    "{% for message in messages %}<|im_start|> {{ message['role'] }} {{ message['content'] }} <|im_end|> {% endfor %}"
    "{% if add_generation_prompt %}<|im_start|> assistant {% endif %}"
)


@dataclass
class World:
    """A diffusion LM, a reward model and their tokenizers."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    reward_model: PreTrainedModel
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


@dataclass(frozen=True)
class Network:
    """A decoder's shape. `kv_heads`: of grouped-query attention; `family`: "qwen2" (as Dream) or "qwen3"."""

    width: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    family: str = "qwen3"

    @classmethod
    def plain(cls, width: int, layers: int, expansion: float = 2.0) -> Network:
        """Heads of 64 without grouping (two heads where the width is less than 128)."""
        heads = max(2, width // 64)
        return cls(width, layers, int(expansion * width), heads, heads, width // heads)

    def build(self, kind: str, v: int, pad: int, dtype: torch.dtype, device: str) -> Any:
        """The random network, frozen. `kind`: "ForCausalLM" or "ForSequenceClassification" (with one label)."""
        prefix = self.family.capitalize()
        config = getattr(transformers, f"{prefix}Config")(
            vocab_size=v,
            hidden_size=self.width,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            num_labels=1,
            tie_word_embeddings=False,
            pad_token_id=pad,
            dtype=dtype,
        )
        with torch.device(device):
            model = getattr(transformers, prefix + kind)._from_config(config, dtype=dtype)
        return model.eval().requires_grad_(False)


# Of their published configurations.
DREAM_7B = Network(3584, 28, 18944, 28, 4, 128, "qwen2")
QWEN3_1_7B = Network(2048, 28, 6144, 16, 8, 128)
QWEN3_8B = Network(4096, 36, 12288, 32, 8, 128)  # SDAR-8B's too


def make_world(
    *,
    v: int = VOCABULARY,
    d: int = 1024,
    width: int = 64,
    diffusion: Network | None = None,
    reward: Network | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> World:
    """Random models.

    Args:
        v: both vocabularies' size.
        d: the reward model's embedding width D, where `reward` is None: one layer.
        width: the diffusion LM's, where `diffusion` is None: two layers.
        diffusion, reward: the networks' shapes.
        dtype: of both models.
    """
    torch.manual_seed(seed)
    tokenizer, reward_tokenizer = word_tokenizer(v), word_tokenizer(v, skip=100)
    diffusion = diffusion or Network.plain(width, 2)
    model = diffusion.build("ForCausalLM", v, tokenizer.pad_token_id, dtype, device)
    with torch.no_grad():
        model.lm_head.weight.normal_(0, 4.0 / diffusion.width**0.5)
        for name, weight in model.named_parameters():
            if weight.dim() > 1 and "lm_head" not in name:
                weight.normal_(0, 2.4 / diffusion.width**0.5)
    reward = reward or Network.plain(d, 1, expansion=1)
    reward_model = reward.build("ForSequenceClassification", v, tokenizer.pad_token_id, dtype, device)
    return World(model, tokenizer, reward_model, reward_tokenizer)
