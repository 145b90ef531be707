"""Post-training of diffusion language models on reward-guided samples (RGRL), and diffu-GRPO beside it.

On transformers.Trainer, accelerate and peft (``pip install 'entrgi_kernels[train]'``); docs/training.md tells how to
use it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .arguments import PUBLISHED_SAMPLING, GuidedTrainingArguments
    from .methods import METHODS
    from .trainer import GuidedTrainer

__all__ = ["METHODS", "PUBLISHED_SAMPLING", "GuidedTrainer", "GuidedTrainingArguments"]
_HOME = {"GuidedTrainer": "trainer", "METHODS": "methods"}


def __getattr__(name: str) -> Any:
    # Imported when asked for: `entrgi train --help` and `entrgi plot` need none of it.
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(f".{_HOME.get(name, 'arguments')}", __name__), name)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"training needs the package {error.name!r}: pip install 'entrgi_kernels[train]'", name=error.name
        ) from error
