"""Reward guidance for discrete diffusion language models (EntRGi, arXiv 2602.05000), with fused kernels.

Importing this package needs neither a GPU, nor triton, nor the compiled extension, and imports torch only when one of
the names below is first used::

    model = entrgi_kernels.guide(model, reward_model, tokenizer, reward_tokenizer)
    sampler = entrgi_kernels.GuidedSampler(model, reward_model, tokenizer, reward_tokenizer)
"""

from __future__ import annotations

import importlib
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import guidance, integrations, models, ops, rewards, text
    from .guidance import (
        GenerationResult,
        GuidanceConfig,
        GuidedSampler,
        LogitOptimizer,
        Sample,
        StepTrace,
    )
    from .integrations import accelerate, guide  # type: ignore[no-redef]

__version__ = "0.1.0"  # the only place where the version is written

# Public name -> module that defines it. Resolved on first use (PEP 562).
_EXPORTS = {
    "GenerationResult": "entrgi_kernels.guidance",
    "GuidanceConfig": "entrgi_kernels.guidance",
    "GuidedSampler": "entrgi_kernels.guidance",
    "LogitOptimizer": "entrgi_kernels.guidance",
    "Sample": "entrgi_kernels.guidance",
    "StepTrace": "entrgi_kernels.guidance",
    "accelerate": "entrgi_kernels.integrations",
    "guide": "entrgi_kernels.integrations",
}
_SUBMODULES = ("guidance", "integrations", "models", "ops", "rewards", "text")

__all__ = [
    "GenerationResult",
    "GuidanceConfig",
    "GuidedSampler",
    "LogitOptimizer",
    "Sample",
    "StepTrace",
    "__version__",
    "accelerate",
    "guidance",
    "guide",
    "integrations",
    "models",
    "ops",
    "rewards",
    "text",
]

# A library stays silent unless the application configures logging.
logging.getLogger("entrgi_kernels").addHandler(logging.NullHandler())


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        value = getattr(importlib.import_module(_EXPORTS[name]), name)
    elif name in _SUBMODULES:
        value = importlib.import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
