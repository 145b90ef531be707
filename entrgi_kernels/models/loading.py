"""Recognising a diffusion language model, and loading one by name."""

from __future__ import annotations

import contextlib
import inspect
import logging
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..shortage import is_out_of_memory
from .base import BackboneModel, DiffusionModel, mask_token_error
from .block_causal import BlockCausal
from .compat import loadable_llada, provide_default_rope, provide_older_names
from .damage import damaged_file, file_of
from .dream import Dream
from .llada import LLaDA
from .masked_diffusion import MaskedDiffusion

logger = logging.getLogger("entrgi_kernels")

_NUMBER = re.compile(r"\.\d+(?=\.)")

# model_type of a config (lower case) -> (adapter, whether its logits are shifted right by one)
_BY_TYPE: dict[str, tuple[type[BackboneModel], bool]] = {"dream": (Dream, True), "llada": (LLaDA, False)}
_NEMOTRON = "nemotron_labs_diffusion"  # its finished tokens are run causally
# Those trained with block-causal attention -> whether their logits are shifted.
_BLOCKS = {"sdar": False, "sdar_moe": False, "llada2_moe": False, "fast_dllm_qwen": True, _NEMOTRON: False}
# What configs call the length of a block; the latter two mean other things in configs that transformers knows.
_BLOCK_NAMES = ("block_length", "block_size", "bd_size")


class UnknownBlockLengthError(ValueError):
    """A model that was trained with blocks, and nothing tells of what length."""


def wrap(
    model: Any,
    tokenizer: Any = None,
    *,
    mask_token_id: int | None = None,
    shift: bool | None = None,
    block_length: int | None = None,
) -> DiffusionModel:
    """Wrap a network in the adapter that knows how it wants to be called.

    Args:
        model: a network (Dream's and LLaDA's are recognised by their config; one with a block length is run as
            :class:`BlockCausal`, everything else bidirectionally as :class:`MaskedDiffusion`), or something that
            already follows the :class:`DiffusionModel` protocol, which is returned as it is.
        tokenizer: asked for its mask token when the config names none.
        mask_token_id: id of the mask token, against whatever config and tokenizer say.
        shift: True when slot i's logits are read at position i - 1. None: what the config says
            (``config.entrgi["shift"]``), else the architecture's own way: True for Dream and Fast-dLLM v2, False
            otherwise.
        block_length: tokens of a block of a model trained with block-causal attention (SDAR, TraDo, LLaDA2, Fast-dLLM
            v2, Nemotron diffusion). None: what the config says (``config.entrgi["block_length"]``, ``block_length``, in
            remote code also ``block_size`` and ``bd_size``), else what the model's own ``generate`` takes when it is
            told nothing. 0: every position sees every other, whatever the config says.

    Raises:
        TypeError: ``model`` is neither a network nor a wrapped one.
        ValueError: no mask token is known, or no block length of a model that was trained with blocks; or one of the
            checks of :class:`BackboneModel` or :class:`BlockCausal` fails.
    """
    if isinstance(model, BackboneModel):
        return _unchanged(model, mask_token_id, shift, block_length)
    if not isinstance(model, nn.Module):
        if isinstance(model, DiffusionModel):
            return _unchanged(model, mask_token_id, shift, block_length)
        if isinstance(model, str):
            raise TypeError(f"model={model!r}: expected a loaded network (models.load({model!r}) loads it)")
        raise TypeError(
            f"model is {type(model).__name__}: expected a torch.nn.Module, or what follows "
            "entrgi_kernels.models.DiffusionModel"
        )
    config = getattr(model, "config", None)
    mark = _mark(config)
    kind = str(getattr(config, "model_type", "")).lower()
    adapter, natural_shift = _BY_TYPE.get(kind, (MaskedDiffusion, _BLOCKS.get(kind, False)))
    if shift is None:
        shift = bool(mark.get("shift", natural_shift))
    if mask_token_id is None:
        mask_token_id = _mask_token(model, tokenizer, mark)
    if block_length is None:
        block_length = _block_length(model, mark)
    if block_length != 0:
        return BlockCausal(model, mask_token_id, block_length, shift, causal_context=kind == _NEMOTRON)
    return adapter(model, mask_token_id, shift)


def load(
    path: str,
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str | None = None,
    trust_remote_code: bool = False,
    mask_token_id: int | None = None,
    shift: bool | None = None,
    block_length: int | None = None,
    quantization_config: Any = None,
) -> tuple[DiffusionModel, Any]:
    """Load a diffusion language model and its tokenizer from a folder or the Hub.

    Args:
        path: a folder or a repository name.
        dtype: a torch dtype, or ``"auto"`` for the one the weights are stored in.
        device: where to put the model; None is the CPU.
        trust_remote_code: run the modelling code that comes with the checkpoint. Dream, LLaDA and most models with
            blocks need it; never done unless asked for.
        mask_token_id, shift, block_length: see :func:`wrap`.
        quantization_config: of transformers, as in ``BitsAndBytesConfig(load_in_4bit=True)``.

    Returns:
        The wrapped model, in evaluation mode, and its tokenizer.

    Raises:
        ValueError: the checkpoint needs remote code and ``trust_remote_code`` is False; it is an adapter; a file is
            damaged or lacks tensors (the message names both); or see :func:`wrap`.
        OSError, ImportError: there is no such checkpoint, or a package that it needs is missing.
        MemoryError, torch.OutOfMemoryError: there is too little memory, of the machine's and of the device's.
    """
    import transformers

    if not isinstance(path, str) and not hasattr(path, "__fspath__"):
        raise TypeError(f"path is {type(path).__name__}: expected a folder or a repository name")
    if not isinstance(trust_remote_code, bool):
        raise TypeError(f"trust_remote_code={trust_remote_code!r}: expected True or False")
    path = str(path)
    check_source(path)
    if is_adapter(path):
        merged = Path(path, "merged")
        raise ValueError(f"{path} is an adapter, expected a whole model: use {merged} (`entrgi train --save-merged`)")
    with reading(path):
        described, _ = transformers.PreTrainedConfig.get_config_dict(path)
        model_type = described.get("model_type")
    remote = described.get("auto_map") or {}
    known = model_type in transformers.CONFIG_MAPPING
    if model_type is None and not remote:
        raise ValueError(f"the config.json of {path!r} names no model_type: expected a file that save_pretrained wrote")
    if not known and not trust_remote_code:
        # Asked before transformers does, which would put the question on a terminal and wait.
        needs = "comes with its own modelling code" if remote else "is of no type that transformers knows"
        raise ValueError(
            f"{path!r} (model_type {model_type!r}) {needs}; read that code, then pass trust_remote_code=True to run it"
        )
    with reading(path):
        config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    if str(model_type).lower() in ("dream", *_BLOCKS) and not known:
        provide_default_rope()
        provide_older_names()
    auto = _auto_class(transformers, config, remote if not known else {})
    if str(model_type).lower() == "llada" and not known:
        from transformers.dynamic_module_utils import get_class_from_dynamic_module

        with reading(path):
            auto = loadable_llada(get_class_from_dynamic_module(remote[auto.__name__], path))
    options: dict[str, Any] = {"config": config, "dtype": dtype, "trust_remote_code": trust_remote_code}
    if quantization_config is not None:  # quantised weights are made where they stay
        options |= {"quantization_config": quantization_config, "device_map": {"": device or "cpu"}}
    model = load_network(auto, path, **options)
    if device is not None and quantization_config is None:
        model.to(device)
    tokenizer = load_tokenizer(path, trust_remote_code=trust_remote_code)
    wrapped = wrap(model, tokenizer, mask_token_id=mask_token_id, shift=shift, block_length=block_length)
    return wrapped, tokenizer


def load_network(auto: Any, path: str, *, spared: Sequence[str] = (), **options: Any) -> nn.Module:
    """A network of a checkpoint, in evaluation mode, of which every tensor comes from its files.

    transformers fills in noise for what the files lack, and says so in a warning only.

    Args:
        auto: the class to load by, of transformers or of remote code.
        path: a folder or a repository's name.
        spared: modules that files may lack, since nothing reads them or they come from elsewhere.
        options: of ``from_pretrained``.

    Raises:
        ValueError: a file is damaged, or tensors are missing or of another shape than the config's.
        OSError, ImportError: there is no such checkpoint, or a package that it needs is missing.
        MemoryError, torch.OutOfMemoryError: there is too little memory, of the machine's and of the device's.
    """
    from transformers.utils import logging as verbosity

    level = verbosity.get_verbosity()
    verbosity.set_verbosity_error()  # its table of what is missing or left over; the same is said here, in one line
    try:
        with reading(path):
            model, report = auto.from_pretrained(
                path, output_loading_info=True, ignore_mismatched_sizes=True, **options
            )
    finally:
        verbosity.set_verbosity(level)
    name = type(model).__name__
    for key, found, expected in sorted(report["mismatched_keys"]):
        raise ValueError(
            f"{key} in {file_of(path, key)} is {list(found)}, but {list(expected)} in a {name} by its config.json"
        )
    tensors = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    missing = set(report["missing_keys"])
    loaded = {id(tensor) for key, tensor in tensors.items() if key not in missing}
    # What is tied to a tensor that was loaded is that tensor.
    lacking = sorted(
        key for key in missing if id(tensors.get(key)) not in loaded and not set(spared) & set(key.split("."))
    )
    if lacking:
        raise ValueError(f"the files of {path} lack {_some(lacking)} of {name}, which would be left random")
    # A layer of a kind that is there: the config.json has too few. Other surplus is of no use to this network.
    kinds = {_NUMBER.sub(".N", key) for key in tensors if _NUMBER.search(key)}
    deeper = sorted(key for key in report["unexpected_keys"] if _NUMBER.sub(".N", key) in kinds)
    if deeper:
        raise ValueError(f"the files of {path} hold {_some(deeper)}, but {name} has fewer layers by its config.json")
    if report["unexpected_keys"]:
        logger.warning("%s holds tensors that %s has not: %s", path, name, _some(sorted(report["unexpected_keys"])))
    return model.eval()


def load_tokenizer(path: str, **options: Any) -> Any:
    """The tokenizer of a checkpoint.

    Raises:
        ValueError: a file is damaged, or there is none: transformers then makes a tokenizer without a vocabulary.
        OSError, ImportError: there is no such checkpoint, or a package that it needs is missing.
        MemoryError: there is too little memory.
    """
    import transformers

    nothing = f"{path} holds no vocabulary of a tokenizer: expected tokenizer.json or the like"
    try:
        with reading(path):
            tokenizer = transformers.AutoTokenizer.from_pretrained(path, **options)
    except ValueError as error:
        if "instantiate the backend tokenizer" in str(error):
            raise ValueError(nothing) from error
        raise
    if not set(tokenizer.get_vocab()) - set(tokenizer.get_added_vocab()) - set(tokenizer.all_special_tokens):
        raise ValueError(nothing)
    return tokenizer


@contextlib.contextmanager
def reading(path: str) -> Iterator[None]:
    """Have an error that arises while a checkpoint is read name the file at fault.

    Raises:
        ValueError: for a damaged file, and for errors of transformers that are none of the next line's.
        OSError, ValueError, ImportError: as they come, where all files can be read.
        MemoryError, torch.OutOfMemoryError: there is too little, of the machine's and of the device's.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        if is_out_of_memory(error):
            raise MemoryError(f"{path}: {' '.join(str(error).split()) or type(error).__name__}") from error
        fault = damaged_file(path)
        if fault is not None:
            raise ValueError(fault) from error
        if isinstance(error, (OSError, ValueError, ImportError)):
            raise
        raise ValueError(f"{path} cannot be read: {type(error).__name__}: {' '.join(str(error).split())}") from error


def is_adapter(path: str) -> bool:
    """Whether a folder or a repository holds an adapter of peft, and no whole model."""
    from transformers.utils import cached_file, find_adapter_config_file

    folder = Path(path)
    if folder.is_dir():
        whole = (*folder.glob("model*.safetensors"), *folder.glob("pytorch_model*.bin"))
        return (folder / "adapter_config.json").is_file() and not whole
    try:
        if cached_file(path, "config.json") is not None:
            return False
    except OSError:
        pass
    try:
        return find_adapter_config_file(path) is not None
    except (OSError, ValueError):
        return False


def _some(keys: list[str]) -> str:
    return ", ".join(keys[:3]) + (f" and {len(keys) - 3} more" if len(keys) > 3 else "")


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
        raise ValueError(f"config.entrgi={mark!r}: expected a dict of kind 'masked_diffusion' for a diffusion LM")
    return mark


def _mask_token(model: nn.Module, tokenizer: Any, mark: dict[str, Any]) -> int:
    """The mask token's id: from the mark, configs, the tokenizer, the model's own ``generate``, in this order."""
    config = getattr(model, "config", None)
    candidates = (
        mark.get("mask_token_id"),
        getattr(config, "mask_token_id", None),
        getattr(getattr(model, "generation_config", None), "mask_token_id", None),
        getattr(tokenizer, "mask_token_id", None),
        _own_default(model, "mask_id"),
    )
    found = next((int(c) for c in candidates if c is not None), None)
    if found is None:
        raise mask_token_error(type(model).__name__)
    return found


def _block_length(model: nn.Module, mark: dict[str, Any]) -> int:
    """Tokens of a block by the checkpoint's own mark, its config or the model's own ``generate``; 0 without blocks.

    Raises:
        UnknownBlockLengthError: it was trained with blocks, and nothing says how long they are.
    """
    import transformers

    config = getattr(model, "config", None)
    kind = str(getattr(config, "model_type", ""))
    names = _BLOCK_NAMES[:1] if kind in transformers.CONFIG_MAPPING else _BLOCK_NAMES
    limit = getattr(config, "max_position_embeddings", None) or math.inf  # nanoGPT calls that its block size
    candidates = [mark.get("block_length"), *(getattr(config, name, None) for name in names)]
    if kind.lower() not in _BY_TYPE:
        candidates.append(_own_default(model, "block_length"))
    found = next((c for c in candidates if isinstance(c, int) and not isinstance(c, bool) and 0 <= c < limit), None)
    if found is None and kind.lower() in _BLOCKS:
        raise UnknownBlockLengthError(
            f"{type(model).__name__} was trained with blocks, and its config names no length of them; pass "
            "block_length=, the one the checkpoint was trained with, or 0 to have every position see every other"
        )
    return found or 0


def _own_default(model: nn.Module, name: str) -> int | None:
    """What the model's own ``generate`` takes for an argument when it is told nothing; None where it has no such."""
    try:
        parameter = inspect.signature(getattr(type(model), "generate", None)).parameters.get(name)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return None
    default = None if parameter is None else parameter.default
    return default if isinstance(default, int) and not isinstance(default, bool) else None


def _unchanged(
    model: DiffusionModel, mask_token_id: int | None, shift: bool | None, block_length: int | None
) -> DiffusionModel:
    """A model that is wrapped already, unless the caller asks for something else than it was wrapped with."""
    wanted_length = block_length or None
    if block_length is not None and wanted_length != getattr(model, "block_length", None):
        raise ValueError(
            f"the model is already wrapped with block_length={getattr(model, 'block_length', None)!r}, got "
            f"block_length={block_length!r}; wrap the network itself (model.module) to change it"
        )
    for name, wanted in (("mask_token_id", mask_token_id), ("shift", shift)):
        if wanted is not None and wanted != getattr(model, name):
            raise ValueError(
                f"the model is already wrapped with {name}={getattr(model, name)!r}, got {name}={wanted!r}; "
                f"wrap the network itself (model.module) to change it"
            )
    return model
