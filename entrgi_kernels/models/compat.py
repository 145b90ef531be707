"""What older remote code needs under transformers 5; done only to models that need it, and said in a warning."""

from __future__ import annotations

import sys
import warnings
from typing import Any

import torch
from torch import nn


def provide_default_rope() -> None:
    """Give transformers its ``"default"`` rotary initialiser back.

    The code of Dream, SDAR, LLaDA2 and Fast-dLLM v2 looks it up in ``ROPE_INIT_FUNCTIONS``, where transformers 5 no
    longer has it, so that the model cannot even be built. The entry is added for the whole process; nothing that is
    there is changed.
    """
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    if "default" not in ROPE_INIT_FUNCTIONS:
        ROPE_INIT_FUNCTIONS["default"] = default_rope
        warnings.warn(
            "this version of transformers lacks the 'default' rotary initialiser that the code of diffusion language "
            "models asks for; entrgi_kernels added it to ROPE_INIT_FUNCTIONS",
            stacklevel=3,
        )


def default_rope(
    config: Any, device: torch.device | None = None, seq_len: int | None = None, **_: Any
) -> tuple[torch.Tensor, float]:
    """Inverse frequencies [rotated width / 2] of plain rotary embeddings, theta^(-2i / width), and the scaling 1."""
    theta = getattr(config, "rope_theta", None)
    if theta is None:
        theta = (getattr(config, "rope_parameters", None) or {}).get("rope_theta", 10000.0)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width = int(width * (getattr(config, "partial_rotary_factor", None) or 1.0))  # LLaDA2 rotates half of a head
    exponents = torch.arange(0, width, 2, dtype=torch.int64).to(device=device, dtype=torch.float32) / width
    return 1.0 / (theta**exponents), 1.0


def provide_older_names() -> None:
    """Give transformers the names back that the code of SDAR and LLaDA2 imports and transformers 5 no longer has.

    ``transformers.utils.LossKwargs``, an empty set of keyword arguments in annotations, and
    ``import_utils.is_torch_fx_available``, a question. They are added for the whole process.
    """
    from typing import TypedDict

    from transformers import utils
    from transformers.utils import import_utils

    class LossKwargs(TypedDict, total=False):
        """No keyword arguments."""

    added = []
    if not hasattr(utils, "LossKwargs"):
        vars(utils)["LossKwargs"] = LossKwargs
        added.append("utils.LossKwargs")
    if not hasattr(import_utils, "is_torch_fx_available"):
        # Asked only to have a function be a leaf when traced.
        vars(import_utils)["is_torch_fx_available"] = lambda: False
        added.append("utils.import_utils.is_torch_fx_available")
    if added:
        warnings.warn(
            f"this version of transformers lacks {' and '.join(added)}, which the code of SDAR and LLaDA2 imports; "
            "entrgi_kernels added them",
            stacklevel=3,
        )


def repair_rotary(module: nn.Module) -> None:
    """Recompute rotary frequencies that loading has left uninitialised.

    transformers 5 builds models without memory and fills in what the checkpoint holds. The frequencies of Dream, SDAR,
    LLaDA2 and Fast-dLLM v2 are in no checkpoint (a buffer that is not persistent) and stay whatever was in memory: the
    logits are wrong and nothing says so. Modules that know how to compute their frequencies (``rope_init_fn``) are
    checked, and mended where they differ from it. Kinds that rescale them while they run are mended only where their
    own copy shows that they were never computed.
    """
    repaired = 0
    for part in module.modules():
        frequencies, copy = getattr(part, "inv_freq", None), getattr(part, "original_inv_freq", None)
        initialise, reset = getattr(part, "rope_init_fn", None), getattr(part, "reset_parameters", None)
        unset = isinstance(copy, torch.Tensor) and copy.is_meta
        if not isinstance(frequencies, torch.Tensor) or frequencies.is_meta or not callable(initialise):
            continue
        if not (unset or getattr(part, "rope_type", None) in (None, "default")) or not hasattr(part, "config"):
            continue
        expected, scaling = initialise(part.config, frequencies.device, **getattr(part, "rope_kwargs", {}))
        close = frequencies.shape == expected.shape and torch.allclose(
            frequencies.float(), expected.float(), rtol=1e-2, atol=0.0
        )
        if not close and callable(reset):
            reset()
        elif not close or unset:
            part.inv_freq, part.attention_scaling = expected if not close else frequencies, scaling
            part.original_inv_freq = part.inv_freq
        repaired += not close
    if repaired:
        warnings.warn(
            f"{type(module).__name__} was loaded with uninitialised rotary frequencies in {repaired} of its modules (a "
            "known effect of transformers 5 on older remote code); entrgi_kernels recomputed them from its config",
            stacklevel=3,
        )


def mend_generation_config(module: nn.Module) -> None:
    """Let Dream's own ``diffusion_generate`` be called without a generation config again.

    It then makes one of the model's config, through a method that transformers 5 wrote for its own settings alone and
    that fails on Dream's. The class of those settings, part of the remote code, is given a method that takes the
    special tokens from the config, which is all that is in there for it.
    """
    method = getattr(type(module), "diffusion_generate", None)
    settings = getattr(sys.modules.get(getattr(method, "__module__", "")), "DreamGenerationConfig", None)
    if settings is None or "from_model_config" in vars(settings):
        return
    try:
        settings.from_model_config(module.config)
    except (AttributeError, TypeError):  # which of them, the version of transformers decides
        tokens = ("mask_token_id", "pad_token_id", "bos_token_id", "eos_token_id")

        def from_model_config(cls: Any, model_config: Any) -> Any:
            given = {name: getattr(model_config, name, None) for name in tokens}
            return cls(**{name: value for name, value in given.items() if value is not None}, _from_model_config=True)

        settings.from_model_config = classmethod(from_model_config)
        warnings.warn(
            f"{settings.__name__}.from_model_config fails under this version of transformers, and diffusion_generate "
            "with it; entrgi_kernels gave the class a method that takes the special tokens from the model's config",
            stacklevel=3,
        )


def loadable_llada(cls: Any) -> Any:
    """A subclass of LLaDA's remote ``LLaDAModelLM`` that transformers 5 can load.

    The remote code is left as it is; the subclass changes four things, each only in how the network is built:

    - the inner network is made on the device that the loader asks for; the code names ``"cuda"``, always;
    - ``all_tied_weights_keys`` exists, which transformers 5 fills in a ``post_init`` that the code does not call;
    - ``tie_weights`` takes the arguments that transformers 5 hands to it;
    - ``config.use_cache`` exists, which transformers 5 keeps from configs that are handed it.

    Args:
        cls: the remote class.

    Returns:
        The subclass, or `cls` itself where it needs nothing of this (it ties its weights as transformers 5 asks).
    """
    from inspect import Parameter, signature

    takes = signature(cls.tie_weights).parameters.values()
    if any(parameter.kind is Parameter.VAR_KEYWORD for parameter in takes):
        return cls
    code = sys.modules[cls.__module__]

    class LLaDAModelLM(cls):
        all_tied_weights_keys: dict[str, str] = {}

        def __init__(self, config: Any, model: Any = None, init_params: bool = False) -> None:
            if "use_cache" not in config.__dict__:
                config.use_cache = False
            if model is None:
                inner = code.create_model_config_from_pretrained_config(config)
                inner.init_device = None
                model = code.LLaDAModel(inner, init_params=init_params)
            super().__init__(config, model, init_params)

        def tie_weights(self, *args: Any, **kwargs: Any) -> None:
            super().tie_weights()

    LLaDAModelLM.__qualname__, LLaDAModelLM.__module__, LLaDAModelLM.__doc__ = (
        "LLaDAModelLM",
        cls.__module__,
        cls.__doc__,
    )
    warnings.warn(
        "LLaDA's modelling code was written for transformers 4; entrgi_kernels loads it through a subclass that builds "
        "it on the device asked for and fits transformers 5's loader (all_tied_weights_keys, tie_weights' arguments, "
        "config.use_cache)",
        stacklevel=3,
    )
    return LLaDAModelLM
