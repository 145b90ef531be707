"""Built-in tiny models: a masked diffusion language model, a reward model and an independent judge.

A few megabytes, trained on a procedural grammar of short reviews by ``entrgi tiny train`` in about twenty minutes on
two CPU cores. They let every code path of the project run, and be measured, on any machine. What they are and are not
is said in ``weights/README.md``.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .grammar import gold_score, prompts

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase, Qwen3ForCausalLM, Qwen3ForSequenceClassification

__all__ = ["MODELS", "gold_score", "load_diffusion", "load_judge", "load_reward", "prompts", "weights_path"]

MODELS = ("diffusion", "reward", "judge")


def weights_path(name: str) -> Path:
    """The Hugging Face directory of a built-in model.

    Args:
        name: "diffusion", "reward" or "judge".

    Raises:
        ValueError: for another name.
        FileNotFoundError: where the weights are not there.
    """
    if name not in MODELS:
        raise ValueError(f"no built-in model is called {name!r}; there are {', '.join(MODELS)}")
    from .train import WEIGHTS

    path = WEIGHTS / name
    if not (path / "model.safetensors").is_file():
        raise FileNotFoundError(
            f"the weights of the built-in {name} model are missing ({path}); make them with: "
            f"entrgi tiny train --out {WEIGHTS}"
        )
    return path


def _load(name: str, auto_class: str, dtype: torch.dtype | None) -> tuple[Any, PreTrainedTokenizerBase]:
    import torch
    import transformers

    from entrgi_kernels.models.loading import load_network, load_tokenizer

    path = str(weights_path(name))
    model = load_network(getattr(transformers, auto_class), path, dtype=dtype or torch.float32)
    return model, load_tokenizer(path)


def load_diffusion(dtype: torch.dtype | None = None) -> tuple[Qwen3ForCausalLM, PreTrainedTokenizerBase]:
    """(model, tokenizer) of the diffusion language model, in evaluation mode.

    The model is a ``Qwen3ForCausalLM`` to be run bidirectionally (an explicit 4-D mask), with Dream's right shift: the
    logits of slot i come from position i - 1. ``model.config.entrgi`` says so.

    Args:
        dtype: of the weights; float32 by default, they are stored in bfloat16.
    """
    return _load("diffusion", "AutoModelForCausalLM", dtype)


def load_reward(
    dtype: torch.dtype | None = None,
) -> tuple[Qwen3ForSequenceClassification, PreTrainedTokenizerBase]:
    """(model, tokenizer) of the reward model, a ``Qwen3ForSequenceClassification`` of one label; float32 by default."""
    return _load("reward", "AutoModelForSequenceClassification", dtype)


def load_judge(
    dtype: torch.dtype | None = None,
) -> tuple[Qwen3ForSequenceClassification, PreTrainedTokenizerBase]:
    """(model, tokenizer) of the judge: another seed, other texts, another rater's taste; float32 by default."""
    return _load("judge", "AutoModelForSequenceClassification", dtype)
