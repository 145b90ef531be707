"""GPU kernels in Triton, with the raw functions of :mod:`entrgi_kernels.backends.eager`.

A file goes by the operator that it serves. What several share: :mod:`.statistics` of rows, :mod:`.filters` (top-k and
top-p), :mod:`.chunked` and :mod:`.hopper` (other engines of the products), :mod:`.philox`, :mod:`.config` and
:mod:`.launch`. ``token_log_prob`` has no kernel of its own.

Serves float32, bfloat16 and float16 logits on CUDA (and ROCm) devices; sums are float32. Under ``TRITON_INTERPRET=1``,
set before the first import, it also serves CPU tensors, for tests: float32 and float16 only in products, since Triton's
interpreter computes a bfloat16 ``tl.dot`` wrongly and says nothing.

Nothing here waits for the device: calls can be captured in a CUDA graph, and the random state is read from the device
tensor at replay. Importing the package needs triton; the registry in :mod:`entrgi_kernels.backends` copes without it.
"""

from __future__ import annotations

import os

import torch
import triton  # noqa: F401  a missing triton has to show here, as the registry expects, not at the first call

from .entrgi_embedding import entrgi_embedding
from .first_order_update import first_order_update_
from .guidance_update import guidance_update_
from .sample_tokens import sample_tokens
from .soft_embedding import soft_embedding, soft_embedding_backward, soft_embedding_grad_table
from .softmax_entropy import softmax_entropy, softmax_entropy_backward
from .unmask_confidence import unmask_confidence

__all__ = [
    "NAME",
    "entrgi_embedding",
    "first_order_update_",
    "guidance_update_",
    "sample_tokens",
    "soft_embedding",
    "soft_embedding_backward",
    "soft_embedding_grad_table",
    "softmax_entropy",
    "softmax_entropy_backward",
    "unmask_confidence",
    "why_not",
]

NAME = "triton"
# Fixed at import, as it is for the kernels: triton.jit looks at the variable when it decorates.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on")
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this backend cannot serve a device and a dtype of logits; None when it can."""
    if dtype == torch.float64:
        return "its sums are float32; float64 is served by the eager backend (on a CPU also by the native one)"
    if dtype not in _DTYPES:
        return f"it serves float32, bfloat16 and float16 logits, not {dtype}"
    if device.type == "cpu":
        return None if INTERPRETED else "it needs a GPU (or TRITON_INTERPRET=1, set before the import, for tests)"
    if device.type != "cuda":
        return f"it serves CUDA and ROCm devices, not {device.type}"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if torch.version.hip is None and torch.cuda.get_device_capability(device)[0] < 8:
        return "it needs compute capability 8.0 or newer"
    return None
