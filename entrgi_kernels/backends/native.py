"""The compiled CPU kernels (csrc/cpu) behind the raw functions of :mod:`entrgi_kernels.backends.eager`.

The extension ``entrgi_kernels._C`` is built by setup.py; importing it registers ``torch.ops.entrgi_native``. Where it
was not built, or cannot be loaded, :func:`why_not` says why and nothing else of the package is affected. docs/native.md
describes the algorithms, the instruction sets and how to run the sanitisers.
"""

from __future__ import annotations

from types import ModuleType

import torch

from . import extension
from .arguments import Adam, Draw, Placement

NAME = "native"
_MODULE = "entrgi_kernels._C"
INTERFACE = 3  # that of csrc/cpu/bindings.cpp; a checkout may be newer than what was built from it
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why this backend cannot serve a device and dtype; None when it can."""
    module = extension.load(_MODULE)
    if isinstance(module, str):
        if device.type == "cpu":
            extension.warn_of_loss(_MODULE)
        return module
    if getattr(module, "INTERFACE", 1) != INTERFACE:
        return f"{_MODULE} was built from other sources: run 'python setup.py build_ext --inplace', or install again"
    if device.type != "cpu":
        return f"it runs on CPU tensors, not on {device.type}"
    if dtype not in _DTYPES:
        return f"it serves {', '.join(str(d).removeprefix('torch.') for d in _DTYPES)}, not {dtype}"
    return None


def build_info() -> dict[str, object]:
    """Facts about the extension: compiler, instruction sets compiled in and supported here, the one in use.

    Raises:
        RuntimeError: the extension cannot be loaded; the message says why.
    """
    return dict(_loaded().build_info())


def set_isa(name: str) -> None:
    """Force an instruction set, "" for the best one; for tests and measurements.

    Args:
        name: "baseline", "avx2", "avx512", "avx512_bf16" or "amx".

    Raises:
        ValueError: this machine cannot run it.
        RuntimeError: the extension cannot be loaded; the message says why.
    """
    _loaded().set_isa(name)


def _loaded() -> ModuleType:
    module = extension.load(_MODULE)
    if isinstance(module, str):
        raise RuntimeError(module)
    return module


def softmax_entropy(logits: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(log-sum-exp [N], entropy [N] in nats) of softmax(logits / temperature), both acc."""
    return torch.ops.entrgi_native.softmax_entropy(logits, temperature)


def softmax_entropy_backward(
    logits: torch.Tensor,
    lse: torch.Tensor,
    entropy: torch.Tensor,
    grad_lse: torch.Tensor,
    grad_entropy: torch.Tensor,
    temperature: float,
) -> torch.Tensor:
    """d lse/d logits = p / tau, d H/d logits = -p (log p + H) / tau; [N, V] of the logits' dtype."""
    return torch.ops.entrgi_native.softmax_entropy_backward(logits, lse, entropy, grad_lse, grad_entropy, temperature)


def sample_tokens(logits: torch.Tensor, draw: Draw) -> torch.Tensor:
    """Tokens [N] int64 drawn from the filtered softmax(logits / temperature); argmax at temperature 0; -1 if bad."""
    return torch.ops.entrgi_native.sample_tokens(logits, *draw)


def soft_embedding(logits: torch.Tensor, table: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(softmax(logits / temperature) @ table [N, D] in acc, log-sum-exp [N] in acc)."""
    return torch.ops.entrgi_native.soft_embedding(logits, table, temperature)


def soft_embedding_backward(
    logits: torch.Tensor,
    table: torch.Tensor,
    grad: torch.Tensor,
    soft: torch.Tensor,
    lse: torch.Tensor,
    temperature: float,
) -> torch.Tensor:
    """d loss/d logits [N, V] of the logits' dtype, from `grad` = d loss/d soft embedding [N, D]."""
    return torch.ops.entrgi_native.soft_embedding_backward(logits, table, grad, soft, lse, temperature)


def soft_embedding_grad_table(
    logits: torch.Tensor, grad: torch.Tensor, lse: torch.Tensor, temperature: float, dtype: torch.dtype
) -> torch.Tensor:
    """d loss/d table = p^T grad [V, D] of `dtype`."""
    return torch.ops.entrgi_native.soft_embedding_grad_table(logits, grad, lse, temperature, dtype)


def entrgi_embedding(
    logits: torch.Tensor,
    table: torch.Tensor,
    draw: Draw,
    tokens: torch.Tensor | None,
    weight: torch.Tensor | None,
    weight_mode: str,
    placement: Placement | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The whole forward: soft + weight (E[token] - soft); see the eager twin for arguments and returns."""
    if placement is None:
        index, out = None, table.new_empty((logits.shape[0], table.shape[1]))
    else:
        out, index = placement
    rng, keys, *rest = draw
    return out, *torch.ops.entrgi_native.entrgi_embedding(
        logits, table, rng, keys, tokens, weight, weight_mode, *rest, out, index
    )


def guidance_update_(
    logits: torch.Tensor,
    grad: torch.Tensor,
    table: torch.Tensor,
    soft: torch.Tensor,
    lse: torch.Tensor,
    temperature: float,
    adam: Adam,
) -> None:
    """One Adam step on the logits, in place, from `grad` = d loss/d embedding [N, D]; see the eager twin."""
    torch.ops.entrgi_native.guidance_update_(logits, grad, table, soft, lse, *adam[:3], temperature, *adam[3:])


def first_order_update_(
    logits: torch.Tensor, grad: torch.Tensor, table: torch.Tensor, tokens: torch.Tensor, scale: float
) -> None:
    """logits += scale (grad . E - grad . E[token]), in place; see the eager twin."""
    torch.ops.entrgi_native.first_order_update_(logits, grad, table, tokens, scale)


def unmask_confidence(
    logits: torch.Tensor, tokens: torch.Tensor, alg: str, temperature: float, top_k: int, top_p: float
) -> torch.Tensor:
    """Confidence [N] in acc of each row's token; NaN for a bad row; see the eager twin for `alg`."""
    return torch.ops.entrgi_native.unmask_confidence(logits, tokens, alg, temperature, top_k, top_p)
