"""Compatibility with older remote code: applied where needed, said once, and nowhere else."""

from __future__ import annotations

import sys
import warnings
from types import ModuleType, SimpleNamespace

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


class Plain(nn.Module):
    """Keeps its frequencies as SDAR's, LLaDA2's and Fast-dLLM's do: nothing to reset, a copy beside them."""

    def __init__(self, rope_type: str = "default") -> None:
        super().__init__()
        self.config, self.rope_type, self.rope_init_fn = CONFIG, rope_type, compat.default_rope
        frequencies, self.attention_scaling = self.rope_init_fn(self.config, None)
        self.register_buffer("inv_freq", frequencies, persistent=False)
        self.original_inv_freq = self.inv_freq


@pytest.mark.parametrize("kind", ["default", "yarn"])
def test_what_was_built_without_memory_is_recomputed(kind):
    module, expected = Plain(kind), Plain().inv_freq
    module.original_inv_freq, module.attention_scaling = module.inv_freq.to("meta"), 7.0
    module.inv_freq = torch.full_like(expected, 1e23)
    with pytest.warns(UserWarning, match="1 of its modules"):
        compat.repair_rotary(module)
    assert torch.equal(module.inv_freq, expected) and module.original_inv_freq is module.inv_freq
    assert module.attention_scaling == 1.0 and "inv_freq" in dict(module.named_buffers())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compat.repair_rotary(module)


def test_a_part_of_a_head_is_rotated():
    config = SimpleNamespace(head_dim=16, partial_rotary_factor=0.5, rope_theta=10000.0)
    assert torch.equal(compat.default_rope(config)[0], compat.default_rope(SimpleNamespace(head_dim=8))[0])


def test_older_names_are_added_once(monkeypatch):
    from transformers import utils

    monkeypatch.delattr(utils, "LossKwargs", raising=False)
    monkeypatch.delattr(utils.import_utils, "is_torch_fx_available", raising=False)
    with pytest.warns(UserWarning, match="LossKwargs and utils.import_utils.is_torch_fx_available"):
        compat.provide_older_names()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compat.provide_older_names()

    class Taken(utils.LossKwargs, total=False):  # as the code does
        more: int

    assert utils.import_utils.is_torch_fx_available() is False


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


@pytest.fixture
def remote(monkeypatch):
    """A module as remote code is one: where classes look up their neighbours."""
    module = ModuleType("remote_code")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


def llada_code(module):
    class LLaDAModelLM(nn.Module):
        def __init__(self, config, model=None, init_params=False):
            super().__init__()
            if model is None:
                raise AssertionError("Torch not compiled with CUDA enabled")
            self.config, self.model = config, model

        def tie_weights(self):
            self.tied = True

    LLaDAModelLM.__module__ = module.__name__
    module.create_model_config_from_pretrained_config = lambda config: SimpleNamespace(init_device="cuda")
    module.LLaDAModel = lambda config, init_params: nn.Linear(2, 2, device=config.init_device)
    return LLaDAModelLM


def test_llada_is_built_where_the_loader_says(remote):
    cls = llada_code(remote)
    with pytest.warns(UserWarning, match="LLaDA's modelling code"):
        fixed = compat.loadable_llada(cls)
    assert issubclass(fixed, cls) and fixed.__name__ == "LLaDAModelLM" and fixed.all_tied_weights_keys == {}
    config = SimpleNamespace()
    with torch.device("meta"):
        model = fixed(config)
    assert model.model.weight.is_meta and config.use_cache is False
    model.tie_weights(missing_keys=set(), recompute_mapping=False)
    assert model.tied and "tie_weights" in vars(cls) and not hasattr(cls, "all_tied_weights_keys")


def test_llada_that_needs_nothing_is_left_alone(remote):
    cls = llada_code(remote)
    cls.tie_weights = lambda self, **kwargs: None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert compat.loadable_llada(cls) is cls


def test_dreams_settings_are_made_of_the_models_config_again(remote):
    class DreamGenerationConfig(SimpleNamespace):
        @staticmethod
        def broken(config):
            raise AttributeError("'GenerationConfig' object has no attribute 'eps'")

    base = type("Base", (DreamGenerationConfig,), {"from_model_config": DreamGenerationConfig.broken})
    remote.DreamGenerationConfig = type("DreamGenerationConfig", (base,), {})

    class Dream(nn.Module):
        config = SimpleNamespace(mask_token_id=7, pad_token_id=None, eos_token_id=3)

        def diffusion_generate(self):
            return remote.DreamGenerationConfig.from_model_config(self.config)

    Dream.diffusion_generate.__module__ = remote.__name__
    with pytest.warns(UserWarning, match="from_model_config"):
        compat.mend_generation_config(Dream())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        compat.mend_generation_config(Dream())
        compat.mend_generation_config(nn.Linear(1, 1))
    made = Dream().diffusion_generate()
    assert (made.mask_token_id, made.eos_token_id) == (7, 3) and not hasattr(made, "pad_token_id")
    assert "from_model_config" not in vars(DreamGenerationConfig)
