"""Tiny random networks to make rewards of, over the tokenizers of tests/text."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
import transformers

# Fixtures of that folder, used here too.
from tests.text.conftest import build, no_system_template, templates, tokenizer, tokenizers_by_kind  # noqa: F401


def network(
    head: str, vocab_size: int, name: str = "Qwen3", dtype: torch.dtype = torch.float32, seed: int = 0, **changes
) -> torch.nn.Module:
    """A tiny random network of an architecture, by the prefix and the head of its transformers class."""
    settings = dict(
        vocab_size=vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, num_labels=1, initializer_range=0.3,
        bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    if name in ("Qwen3", "Gemma", "Gemma2", "Gemma3Text"):
        settings["head_dim"] = 8
    if name == "GPT2":
        settings.update(n_embd=32, n_layer=2, n_head=4, n_positions=256)
    settings.update(changes)
    torch.manual_seed(seed)
    config = getattr(transformers, f"{name}Config")(**settings)
    prefix = name.removesuffix("Text") if head == "ForCausalLM" else name
    kinds = [kind for kind in (f"{prefix}{head}", f"{prefix}LMHeadModel") if hasattr(transformers, kind)]
    return getattr(transformers, kinds[0])(config).to(dtype).eval()


@pytest.fixture(scope="session")
def classifier() -> Callable[..., torch.nn.Module]:
    """Builds a tiny random sequence classifier of an architecture, by the prefix of its transformers classes."""
    return functools.partial(network, "ForSequenceClassification")


@pytest.fixture(scope="session")
def causal_lm() -> Callable[..., torch.nn.Module]:
    """Builds a tiny random causal LM likewise."""
    return functools.partial(network, "ForCausalLM")


@pytest.fixture(scope="session")
def in_double() -> Callable[[torch.nn.Module], None]:
    """Puts a network's norms into float64: transformers' own compute in float32 whatever the network's dtype."""

    def change(module: torch.nn.Module) -> None:
        for norm in module.modules():
            if type(norm).__name__.endswith("RMSNorm"):

                def forward(x, norm=norm):
                    return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * (0.5 + norm.weight)

                norm.forward = forward

    return change
