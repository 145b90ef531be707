"""Compatibility with older remote code: applied where needed, said once, and nowhere else."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from entrgi_kernels.models import compat

CONFIG = SimpleNamespace(hidden_size=32, num_attention_heads=4, rope_theta=10000.0)


class Rotary(nn.Module):
    """Keeps its frequencies as Dream's does."""

    def __init__(self, rope_type: str = "default") -> None:
        super().__init__()
        self.config, self.rope_type, self.rope_kwargs = CONFIG, rope_type, {}
        self.rope_init_fn = compat.default_rope
        self.reset_parameters()

    def reset_parameters(self) -> None:
        frequencies, self.attention_scaling = self.rope_init_fn(self.config, None, **self.rope_kwargs)
        self.register_buffer("inv_freq", frequencies, persistent=False)


def test_frequencies_are_those_of_transformers():
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = LlamaConfig(hidden_size=32, num_attention_heads=4)
    torch.testing.assert_close(compat.default_rope(CONFIG)[0], LlamaRotaryEmbedding(config).inv_freq)
    torch.testing.assert_close(compat.default_rope(config)[0], LlamaRotaryEmbedding(config).inv_freq)


@pytest.mark.parametrize("damage", [1e23, 0.0, float("nan")])
def test_uninitialised_frequencies_are_recomputed_and_it_is_said(damage):
    module = nn.Sequential(Rotary(), Rotary())
    expected = module[0].inv_freq.clone()
    module[1].inv_freq.fill_(damage)
    with pytest.warns(UserWarning, match="1 of its modules"):
        compat.repair_rotary(module)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compat.repair_rotary(module)
    assert torch.equal(module[1].inv_freq, expected)


def test_sound_and_scaled_frequencies_are_left_alone():
    module = nn.Sequential(Rotary(), Rotary("dynamic"))
    module[0].inv_freq = module[0].inv_freq.bfloat16()  # a cast model
    module[1].inv_freq.mul_(0.5)
    before = [part.inv_freq for part in module]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compat.repair_rotary(module)
    assert all(part.inv_freq is kept for part, kept in zip(module, before, strict=True))


def test_default_initialiser_is_added_once(monkeypatch):
    from transformers import modeling_rope_utils

    monkeypatch.setattr(modeling_rope_utils, "ROPE_INIT_FUNCTIONS", {})
    with pytest.warns(UserWarning, match="'default'"):
        compat.provide_default_rope()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compat.provide_default_rope()
    assert modeling_rope_utils.ROPE_INIT_FUNCTIONS == {"default": compat.default_rope}
