"""Reward models that are an adapter of peft over a base model, as training with LoRA leaves them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from .errors import UsageError, require

# What adapter_config.json calls the kinds that are taken -> part of the name of transformers' class.
_KINDS = {"SEQ_CLS": "SequenceClassification", "CAUSAL_LM": "CausalLM"}

_HEADS = ("score.weight", "classifier.weight", "classifier.out_proj.weight")


def load_adapted(name: str, auto: Any, dtype: Any, *, trust_remote_code: bool = False) -> tuple[Any, Any]:
    """(model, tokenizer): the base that the adapter names, with the adapter on it, not merged, as it was trained.

    Args:
        name: a folder, or a repository's name, with adapter_config.json.
        auto: transformers' class of the base.
        dtype: of the base.
        trust_remote_code: run code that comes with the base.

    Raises:
        UsageError: without peft, or for a base that is no classifier and no causal LM.
        ValueError, OSError, ImportError: files that are missing, damaged or of another base.
    """
    if not any(kind in auto.__name__ for kind in _KINDS.values()):
        raise UsageError(f"{name} is an adapter: expected one of a classifier or a causal LM, else a merged model")
    peft = require("peft", f"the adapter {name}", "train")
    from transformers import AutoConfig

    from entrgi_kernels.models.loading import check_source, load_network, load_tokenizer, reading

    if os.path.isdir(name) and not any(Path(name).glob("adapter_model.*")):
        raise ValueError(f"{name} has no adapter_model.safetensors: expected what save_pretrained wrote")
    with reading(name):
        adapter = peft.PeftConfig.from_pretrained(name)
        stored = peft.utils.load_peft_weights(name, device="cpu")
    base: str | None = adapter.base_model_name_or_path
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code, "revision": adapter.revision}
    if not base:
        raise ValueError(f"the adapter_config.json of {name} names no base model")
    if _KINDS.get(adapter.task_type, "") not in auto.__name__:
        raise ValueError(f"it is an adapter of task_type {adapter.task_type}, which does not go with {auto.__name__}")
    try:
        check_source(base)
        with reading(base):
            config = AutoConfig.from_pretrained(base, **options)
        head = next((w for key, w in stored.items() if key.endswith(_HEADS)), None)
        if head is not None:
            config.num_labels = len(head)  # a base that is a causal LM says nothing of it
        own = [part for part in adapter.modules_to_save or () if any(f".{part}." in key for key in stored)]
        # The adapter brings the parts that it trained whole.
        network = load_network(auto, base, spared=own, config=config, dtype=dtype, **options)
    except (OSError, ValueError) as error:
        raise ValueError(f"its base model: {error}") from error
    with reading(name):
        model = peft.PeftModel.from_pretrained(network, name)
    lacking = sorted(set(peft.get_peft_model_state_dict(model)) - set(stored))
    if lacking:
        raise ValueError(f"the files of {name} lack {lacking[0]}, which would be left random")
    has_tokenizer = not os.path.isdir(name) or Path(name, "tokenizer_config.json").is_file()
    return model.eval(), load_tokenizer(name if has_tokenizer else base, trust_remote_code=trust_remote_code)
