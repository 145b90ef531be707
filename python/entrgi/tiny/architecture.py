"""The architecture that all tiny models share: a small Qwen3 backbone with tied embeddings."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, Qwen3Config


def small_qwen3(tokenizer: PreTrainedTokenizerBase, *, layers: int, width: int, intermediate: int) -> Qwen3Config:
    """The configuration of a backbone with heads of width 32, for the vocabulary of `tokenizer`.

    Args:
        tokenizer: gives the size of the vocabulary, the padding and the end-of-text token.
        layers: decoder layers.
        width: of the hidden states, a multiple of 32.
        intermediate: width inside the feed-forward blocks.
    """
    from transformers import Qwen3Config

    heads = width // 32
    return Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        use_cache=False,
    )
