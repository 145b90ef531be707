"""Recognising a diffusion language model, and loading one by name."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn

from entrgi_kernels.models.base import BackboneModel, DiffusionModel, mask_token_error
from entrgi_kernels.models.compat import loadable_llada, provide_default_rope
from entrgi_kernels.models.dream import Dream
from entrgi_kernels.models.llada import LLaDA
from entrgi_kernels.models.masked_diffusion import MaskedDiffusion

logger = logging.getLogger("entrgi_kernels")

# model_type of a config (lower case) -> (adapter, whether its logits are shifted right by one)
_BY_TYPE: dict[str, tuple[type[BackboneModel], bool]] = {"dream": (Dream, True), "llada": (LLaDA, False)}


def wrap(
    model: Any, tokenizer: Any = None, *, mask_token_id: int | None = None, shift: bool | None = None
) -> DiffusionModel:
    """Wrap a network in the adapter that knows how it wants to be called.

    Args:
        model: a network (Dream's and LLaDA's are recognised by their config, everything else is run bidirectionally
            as :class:`MaskedDiffusion`), or something that already follows the :class:`DiffusionModel` protocol,
            which is returned as it is.
        tokenizer: asked for its mask token when the config names none.
        mask_token_id: id of the mask token, against whatever config and tokenizer say.
        shift: True when slot i's logits are read at position i - 1. None: what the config says
            (``config.entrgi["shift"]``), else the architecture's own way: True for Dream, False otherwise.

    Raises:
        TypeError: ``model`` is neither a network nor a wrapped one.
        ValueError: no mask token is known; or one of the checks of :class:`BackboneModel` fails.
    """
    if isinstance(model, BackboneModel):
        return _unchanged(model, mask_token_id, shift)
    if not isinstance(model, nn.Module):
        if isinstance(model, DiffusionModel):
            return _unchanged(model, mask_token_id, shift)
        if isinstance(model, str):
            raise TypeError(
                f"model must be a loaded network, got the string {model!r}; models.load({model!r}) loads it"
            )
        raise TypeError(
            "model must be a torch.nn.Module or follow entrgi_kernels.models.DiffusionModel, "
            f"got {type(model).__name__}"
        )
    config = getattr(model, "config", None)
    mark = _mark(config)
    adapter, natural_shift = _BY_TYPE.get(str(getattr(config, "model_type", "")).lower(), (MaskedDiffusion, False))
    if shift is None:
        shift = bool(mark.get("shift", natural_shift))
    if mask_token_id is None:
        mask_token_id = _mask_token(model, tokenizer, mark)
    return adapter(model, mask_token_id, shift)


def load(
    path: str,
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str | None = None,
    trust_remote_code: bool = False,
    mask_token_id: int | None = None,
    shift: bool | None = None,
    quantization_config: Any = None,
) -> tuple[DiffusionModel, Any]:
    """Load a diffusion language model and its tokenizer from a folder or the Hub.

    Args:
        path: a folder or a repository name.
        dtype: a torch dtype, or ``"auto"`` for the one the weights are stored in.
        device: where to put the model; None is the CPU.
        trust_remote_code: run the modelling code that comes with the checkpoint. Dream and LLaDA need it; never done
            unless asked for.
        mask_token_id, shift: see :func:`wrap`.
        quantization_config: of transformers, as in ``BitsAndBytesConfig(load_in_4bit=True)``.

    Returns:
        The wrapped model, in evaluation mode, and its tokenizer.

    Raises:
        ValueError: the checkpoint needs remote code and ``trust_remote_code`` is False; or see :func:`wrap`.
        OSError: there is no such checkpoint.
    """
    import transformers

    if not isinstance(path, str) and not hasattr(path, "__fspath__"):
        raise TypeError(f"path must be a folder or a repository name, got {type(path).__name__}")
    if not isinstance(trust_remote_code, bool):
        raise TypeError(f"trust_remote_code must be True or False, got {trust_remote_code!r}")
    path = str(path)
    check_source(path)
    described, _ = transformers.PreTrainedConfig.get_config_dict(path)
    model_type = described.get("model_type")
    remote = described.get("auto_map") or {}
    known = model_type in transformers.CONFIG_MAPPING
    if not known and not trust_remote_code:
        # Asked before transformers does, which would put the question on a terminal and wait.
        needs = "comes with its own modelling code" if remote else "is of no type that transformers knows"
        raise ValueError(
            f"{path!r} (model_type {model_type!r}) {needs}; read that code, then pass trust_remote_code=True to run it"
        )
    config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    if str(model_type).lower() == "dream":
        provide_default_rope()
    auto = _auto_class(transformers, config, remote if not known else {})
    if str(model_type).lower() == "llada" and not known:
        from transformers.dynamic_module_utils import get_class_from_dynamic_module

        auto = loadable_llada(get_class_from_dynamic_module(remote[auto.__name__], path))
    options: dict[str, Any] = {"config": config, "dtype": dtype, "trust_remote_code": trust_remote_code}
    if quantization_config is not None:  # quantised weights are made where they stay
        options |= {"quantization_config": quantization_config, "device_map": {"": device or "cpu"}}
    model = auto.from_pretrained(path, **options)
    model.eval()
    if device is not None and quantization_config is None:
        model.to(device)
    tokenizer = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    return wrap(model, tokenizer, mask_token_id=mask_token_id, shift=shift), tokenizer


def check_source(path: str) -> None:
    """Refuse a folder that is not there or holds no checkpoint, which the Hub's client would take for a bad name.

    Args:
        path: a folder or a repository's name.

    Raises:
        FileNotFoundError: it is a path, and there is no folder with a config.json.
    """
    folder = Path(path)
    if folder.is_dir():
        if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
            raise FileNotFoundError(f"{path!r} has no config.json: expected a folder that save_pretrained wrote")
    elif folder.is_absolute() or path.startswith((".", "~")) or path.count("/") > 1 or folder.exists():
        raise FileNotFoundError(f"there is no folder {path!r}: expected one, or a repository's name (owner/name)")


def _auto_class(transformers: Any, config: Any, remote: dict[str, str]) -> Any:
    """The transformers auto class that gives this config's network with its vocabulary head."""
    names = ("AutoModelForMaskedLM", "AutoModelForCausalLM", "AutoModel")
    for name in names:
        if name in remote:
            return getattr(transformers, name)
    architecture = (getattr(config, "architectures", None) or [""])[0] or ""
    for name, mark in (("AutoModelForMaskedLM", "MaskedLM"), ("AutoModelForCausalLM", "CausalLM")):
        if mark in architecture and type(config) in getattr(transformers, name)._model_mapping:
            return getattr(transformers, name)
    for name in ("AutoModelForCausalLM", "AutoModelForMaskedLM"):
        if type(config) in getattr(transformers, name)._model_mapping:
            return getattr(transformers, name)
    return transformers.AutoModel


def _mark(config: Any) -> dict[str, Any]:
    """What a checkpoint says of itself under ``config.entrgi``."""
    mark = getattr(config, "entrgi", None)
    if mark is None:
        return {}
    if not isinstance(mark, dict) or mark.get("kind", "masked_diffusion") != "masked_diffusion":
        raise ValueError(f"config.entrgi must be a dict of kind 'masked_diffusion' for a diffusion LM, got {mark!r}")
    return mark


def _mask_token(model: nn.Module, tokenizer: Any, mark: dict[str, Any]) -> int:
    """The mask token's id: from the checkpoint's own mark, its configs or the tokenizer, in this order."""
    config = getattr(model, "config", None)
    candidates = (
        mark.get("mask_token_id"),
        getattr(config, "mask_token_id", None),
        getattr(getattr(model, "generation_config", None), "mask_token_id", None),
        getattr(tokenizer, "mask_token_id", None),
    )
    found = next((int(c) for c in candidates if c is not None), None)
    if found is None:
        raise mask_token_error(type(model).__name__)
    return found


def _unchanged(model: DiffusionModel, mask_token_id: int | None, shift: bool | None) -> DiffusionModel:
    """A model that is wrapped already, unless the caller asks for something else than it was wrapped with."""
    for name, wanted in (("mask_token_id", mask_token_id), ("shift", shift)):
        if wanted is not None and wanted != getattr(model, name):
            raise ValueError(
                f"the model is already wrapped with {name}={getattr(model, name)!r}, got {name}={wanted!r}; "
                f"wrap the network itself (model.module) to change it"
            )
    return model
