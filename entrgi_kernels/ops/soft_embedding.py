"""Soft embedding: the expected embedding under softmax(logits / temperature), without the N x V probabilities.

    p = softmax(phi / tau)        soft = p @ E

Backward, with g = d loss/d soft:  d phi_v = p_v (g . E_v - g . soft) / tau,  d E = p^T g.

Source: arXiv 2602.05000, the soft half of the interpolation; the backward is the softmax's, with sum_v p_v (g . E_v)
written as g . soft.
"""

from __future__ import annotations

import torch

from . import _common
from ._operator import operator, refuse_double_backward


@operator(numbers={"temperature": _common.distribution_temperature})
def _soft_embedding(
    logits: torch.Tensor, table: torch.Tensor, temperature: float, backend: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    soft, lse = _common.run("soft_embedding", backend, logits)(logits, table, temperature)
    # A second tensor even where no rounding is needed: outputs of an operator may not alias one another.
    return soft.to(table.dtype, copy=True), soft, lse


@_soft_embedding.register_fake
def _(logits, table, temperature, backend):
    acc = _common.accumulation_dtype(logits, table)
    out = table.new_empty((logits.shape[0], table.shape[1]))
    return out, torch.empty_like(out, dtype=acc), logits.new_empty((logits.shape[0],), dtype=acc)


@operator(numbers={"temperature": _common.distribution_temperature})
def _soft_embedding_backward(
    logits: torch.Tensor,
    table: torch.Tensor,
    grad: torch.Tensor,
    soft: torch.Tensor,
    lse: torch.Tensor,
    temperature: float,
    backend: str,
) -> torch.Tensor:
    return _common.run("soft_embedding_backward", backend, logits)(logits, table, grad, soft, lse, temperature)


@_soft_embedding_backward.register_fake
def _(logits, table, grad, soft, lse, temperature, backend):
    return logits.new_empty(logits.shape)


@operator(numbers={"temperature": _common.distribution_temperature})
def _soft_embedding_grad_table(
    logits: torch.Tensor,
    table: torch.Tensor,
    grad: torch.Tensor,
    lse: torch.Tensor,
    temperature: float,
    backend: str,
) -> torch.Tensor:
    run = _common.run("soft_embedding_grad_table", backend, logits)
    return run(logits, grad, lse, temperature, table.dtype)


@_soft_embedding_grad_table.register_fake
def _(logits, table, grad, lse, temperature, backend):
    return table.new_empty(table.shape)


def _setup_context(ctx, inputs, output):
    logits, table, ctx.temperature, ctx.backend = inputs
    _, soft, lse = output
    ctx.mark_non_differentiable(soft, lse)
    ctx.save_for_backward(logits, table, soft, lse)


def _backward(ctx, grad, _grad_soft, _grad_lse):
    logits, table, soft, lse = ctx.saved_tensors
    grad_logits = grad_table = None
    if ctx.needs_input_grad[0]:
        grad_logits = _soft_embedding_backward(logits, table, grad, soft, lse, ctx.temperature, ctx.backend)
    if ctx.needs_input_grad[1]:
        grad_table = _soft_embedding_grad_table(logits, table, grad, lse, ctx.temperature, ctx.backend)
    return grad_logits, grad_table, None, None


_soft_embedding.register_autograd(_backward, setup_context=_setup_context)
refuse_double_backward("soft_embedding", _soft_embedding_backward, _soft_embedding_grad_table)


def soft_embedding(
    logits: torch.Tensor, table: torch.Tensor, *, temperature: _common.Number = 1.0, backend: str = "auto"
) -> torch.Tensor:
    """softmax(logits / temperature) @ table. Differentiable once, in both.

    Args:
        logits: [N, V], float64/float32/bfloat16/float16, any strides; -inf entries have probability 0.
        table: [V, D], float64/float32/bfloat16/float16.
        temperature: tau, from 1e-12 to 1e12; a number or a 0-d tensor on the CPU; 0 stands for 1 here.
        backend: "auto" or the name of a backend.

    Returns:
        [N, D] of the table's dtype, accumulated in float32 or wider; NaN for a row that holds a NaN or +inf, or
        no finite entry.

    Raises:
        ValueError, TypeError: bad shape, dtype, device or temperature.
        BackendUnavailableError: an explicit backend that cannot serve.
    """
    _common.check_logits(logits)
    _common.check_table(logits, table)
    temperature = _common.distribution_temperature(temperature)
    return _soft_embedding(logits, table, temperature, _common.check_backend(backend))[0]
