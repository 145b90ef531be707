"""The compiled CUDA kernels (csrc/cuda) behind raw functions of :mod:`entrgi_kernels.backends.eager`.

The extension ``entrgi_kernels._C_cuda`` is built by setup.py where torch has CUDA and nvcc is there; importing it
registers ``torch.ops.entrgi_cuda``. Where it was not built, or cannot be loaded, :func:`why_not` says why and nothing
else of the package is affected.

Served are the operators on rows of logits alone: statistics, draw, confidence. The products with the table of
embeddings have no CUDA kernels yet; :data:`LACKING` says so to whoever asks for one by name. Nothing waits for the
device, and the random state is read on it: calls can be captured in a CUDA graph. docs/cuda.md describes the kernels
and how they are checked.
"""

from __future__ import annotations

import torch

from . import extension
from .arguments import Draw
from .ranges import ranged

NAME = "cuda"
_MODULE = "entrgi_kernels._C_cuda"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

LACKING = (
    "it has kernels for softmax_entropy, sample_tokens and unmask_confidence only; the products with an embedding "
    "table or a vocabulary head are served by backend='triton' and backend='eager'"
)


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this backend cannot serve a device and a dtype of logits; None when it can."""
    if torch.version.cuda is None:
        return f"this torch ({torch.__version__}) is built without CUDA"
    module = extension.load(_MODULE)
    if isinstance(module, str):
        return module
    if device.type != "cuda":
        return f"it runs on CUDA devices, not on {device.type}"
    if dtype not in _DTYPES:
        return f"it serves float32, bfloat16 and float16 logits, not {dtype}"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if torch.cuda.get_device_capability(device)[0] < 8:
        return "it needs compute capability 8.0 or newer"
    return None


def build_info() -> dict[str, object]:
    """Facts about the extension: CUDA version and host compiler.

    Raises:
        RuntimeError: the extension cannot be loaded; the message says why.
    """
    module = extension.load(_MODULE)
    if isinstance(module, str):
        raise RuntimeError(module)
    return dict(module.build_info())


@ranged
def softmax_entropy(logits: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(log-sum-exp [N], entropy [N] in nats) of softmax(logits / temperature), float32."""
    statistics, _ = torch.ops.entrgi_cuda.row_statistics(logits, temperature, 0.0, 0)
    return statistics[1].clone(), statistics[2].clone()


@ranged
def softmax_entropy_backward(
    logits: torch.Tensor,
    lse: torch.Tensor,
    entropy: torch.Tensor,
    grad_lse: torch.Tensor,
    grad_entropy: torch.Tensor,
    temperature: float,
) -> torch.Tensor:
    """d lse/d logits = p / tau, d H/d logits = -p (log p + H) / tau; [N, V] of the logits' dtype."""
    return torch.ops.entrgi_cuda.softmax_entropy_backward(logits, lse, entropy, grad_lse, grad_entropy, temperature)


@ranged
def sample_tokens(logits: torch.Tensor, draw: Draw) -> torch.Tensor:
    """Tokens [N] int64 drawn from the filtered softmax(logits / temperature); argmax at temperature 0; -1 if bad."""
    if draw.temperature == 0:
        return torch.ops.entrgi_cuda.row_statistics(logits, 1.0, 0.0, -1)[1]
    return torch.ops.entrgi_cuda.draw(logits, *draw, False)[0]


@ranged
def unmask_confidence(
    logits: torch.Tensor, tokens: torch.Tensor, alg: str, temperature: float, top_k: int, top_p: float
) -> torch.Tensor:
    """Confidence [N] float32 of each row's token; NaN for a bad row; see the eager twin for `alg`."""
    return torch.ops.entrgi_cuda.unmask_confidence(logits, tokens, alg, temperature, top_k, top_p)
