"""Soft embedding: the expected embedding under softmax(logits / temperature), without the N x V probabilities.

    p = softmax(phi / tau)        soft = p @ E

Backward, with g = d loss/d soft:  d phi_v = p_v (g . E_v - g . soft) / tau,  d E = p^T g.

Source: arXiv 2602.05000, the soft half of the interpolation; the backward is the softmax's, with sum_v p_v (g . E_v)
written as g . soft.
"""

from __future__ import annotations

import torch

from . import _common


@torch.library.custom_op("entrgi::soft_embedding", mutates_args=())
def _soft_embedding(
    logits: torch.Tensor, embedding: torch.Tensor, temperature: float, backend: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    soft, lse = _common.run("soft_embedding", backend, logits)(logits, embedding, temperature)
    # A second tensor even where no rounding is needed: outputs of an operator may not alias one another.
    return soft.to(embedding.dtype, copy=True), soft, lse


@_soft_embedding.register_fake
def _(logits, embedding, temperature, backend):
    acc = _common.accumulation_dtype(logits, embedding)
    out = embedding.new_empty((logits.shape[0], embedding.shape[1]))
    return out, torch.empty_like(out, dtype=acc), logits.new_empty((logits.shape[0],), dtype=acc)


@torch.library.custom_op("entrgi::soft_embedding_backward", mutates_args=())
def _soft_embedding_backward(
    logits: torch.Tensor,
    embedding: torch.Tensor,
    grad: torch.Tensor,
    soft: torch.Tensor,
    lse: torch.Tensor,
    temperature: float,
    backend: str,
) -> torch.Tensor:
    return _common.run("soft_embedding_backward", backend, logits)(logits, embedding, grad, soft, lse, temperature)


@_soft_embedding_backward.register_fake
def _(logits, embedding, grad, soft, lse, temperature, backend):
    return logits.new_empty(logits.shape)


@torch.library.custom_op("entrgi::soft_embedding_grad_table", mutates_args=())
def _soft_embedding_grad_table(
    logits: torch.Tensor,
    embedding: torch.Tensor,
    grad: torch.Tensor,
    lse: torch.Tensor,
    temperature: float,
    backend: str,
) -> torch.Tensor:
    run = _common.run("soft_embedding_grad_table", backend, logits)
    return run(logits, grad, lse, temperature, embedding.dtype)


@_soft_embedding_grad_table.register_fake
def _(logits, embedding, grad, lse, temperature, backend):
    return embedding.new_empty(embedding.shape)


def _setup_context(ctx, inputs, output):
    logits, embedding, ctx.temperature, ctx.backend = inputs
    _, soft, lse = output
    ctx.mark_non_differentiable(soft, lse)
    ctx.save_for_backward(logits, embedding, soft, lse)


def _backward(ctx, grad, _grad_soft, _grad_lse):
    logits, embedding, soft, lse = ctx.saved_tensors
    grad_logits = grad_embedding = None
    if ctx.needs_input_grad[0]:
        grad_logits = _soft_embedding_backward(logits, embedding, grad, soft, lse, ctx.temperature, ctx.backend)
    if ctx.needs_input_grad[1]:
        grad_embedding = _soft_embedding_grad_table(logits, embedding, grad, lse, ctx.temperature, ctx.backend)
    return grad_logits, grad_embedding, None, None


_soft_embedding.register_autograd(_backward, setup_context=_setup_context)
_common.refuse_double_backward("soft_embedding", _soft_embedding_backward, _soft_embedding_grad_table)


def soft_embedding(
    logits: torch.Tensor, embedding: torch.Tensor, *, temperature: float = 1.0, backend: str = "auto"
) -> torch.Tensor:
    """softmax(logits / temperature) @ embedding. Differentiable once, in both.

    Args:
        logits: [N, V], float64/float32/bfloat16/float16, any strides; -inf entries have probability 0.
        embedding: [V, D], float64/float32/bfloat16/float16.
        temperature: tau >= 0; 0 stands for 1 here.
        backend: "auto" or the name of a backend.

    Returns:
        [N, D] of the embedding's dtype, accumulated in float32 or wider; NaN for a row that holds a NaN or +inf, or
        no finite entry.

    Raises:
        ValueError, TypeError: bad shape, dtype, device or temperature.
        BackendUnavailableError: an explicit backend that cannot serve.
    """
    _common.check_logits(logits)
    _common.check_embedding(logits, embedding)
    temperature = _common.distribution_temperature(temperature)
    return _soft_embedding(logits, embedding, temperature, _common.check_backend(backend))[0]
