"""Log-probability of given tokens under a vocabulary head, without the N x V logits.

    z = hidden @ head^T + bias        log p = z_target - log sum_v exp z_v

Backward, with g = d loss/d log p, p = softmax(z), y the one-hot target:  d z = g (y - p),  d hidden = d z @ head,
d head = d z^T @ hidden,  d bias = sum over rows of d z.

Where the head is frozen (LoRA) the slope  head[target] - p @ head  is formed in the forward's own walk over the
vocabulary, as flash attention forms its output, and the backward is a product of it with g: two products in all. Where
the head learns too, the backward walks the vocabulary again.

Source: the cross-entropy of a linear head (Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models",
arXiv 2411.09009, keep its logits out of memory the same way); used for the per-token log-probabilities of RGRL and
diffu-GRPO.
"""

from __future__ import annotations

import math
from types import ModuleType

import torch

from .. import backends
from ..backends import eager
from . import _common, _vocabulary_head
from ._operator import operator, refuse_double_backward


def _kernels(hidden: torch.Tensor, head: torch.Tensor, backend: str) -> ModuleType | None:
    """The backend whose passes over a chunk's logits serve; None for eager, which has the whole, in one walk."""
    module = backends.resolve(backend, hidden, "soft_embedding")
    wide = head.dtype == torch.float64 and hidden.dtype != torch.float64  # sums wider than hidden's backend may have
    return None if module.NAME == backends.EAGER or wide else module


@operator()
def _token_log_prob(
    hidden: torch.Tensor,
    head: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    slope: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    kernels = _kernels(hidden, head, backend)
    if kernels is None:
        return eager.token_log_prob(hidden, head, bias, targets, slope)
    passes = kernels.softmax_entropy, kernels.soft_embedding
    return _vocabulary_head.token_log_prob(*passes, hidden, head, bias, targets, slope)


@_token_log_prob.register_fake
def _(hidden, head, bias, targets, slope, backend):
    log_prob = hidden.new_empty((hidden.shape[0],), dtype=_common.accumulation_dtype(hidden, head))
    shape = (hidden.shape[0] if slope else 0, hidden.shape[1])
    return log_prob, torch.empty_like(log_prob), log_prob.new_empty(shape)


@operator()
def _token_log_prob_backward(
    hidden: torch.Tensor,
    head: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    lse: torch.Tensor,
    grad: torch.Tensor,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    # A row of no token leaves nothing anywhere, whatever its hidden state, value and incoming gradient hold.
    ignored = eager.legal_targets(targets, head.shape[0])[1]
    hidden, grad = hidden.masked_fill(ignored[:, None], 0), grad.masked_fill(ignored, 0)
    lse = lse.masked_fill(ignored, math.inf)
    kernels = _kernels(hidden, head, backend)
    if kernels is None:
        return eager.token_log_prob_backward(hidden, head, bias, targets, lse, grad)
    passes = kernels.soft_embedding, kernels.soft_embedding_grad_table
    return _vocabulary_head.token_log_prob_backward(*passes, hidden, head, bias, targets, lse, grad)


@_token_log_prob_backward.register_fake
def _(hidden, head, bias, targets, lse, grad, backend):
    grad_bias = head.new_empty((0,)) if bias is None else bias.new_empty(bias.shape)
    return hidden.new_empty(hidden.shape), head.new_empty(head.shape), grad_bias


def _setup_context(ctx, inputs, output):
    hidden, head, bias, targets, ctx.has_slope, ctx.backend = inputs
    _, lse, slope = output
    ctx.mark_non_differentiable(lse, slope)
    ctx.dtype = hidden.dtype
    if ctx.has_slope:
        ctx.save_for_backward(slope)
    else:
        ctx.save_for_backward(hidden, head, bias, targets, lse)


def _backward(ctx, grad, _grad_lse, _grad_slope):
    if ctx.has_slope:
        (slope,) = ctx.saved_tensors
        return (grad[:, None] * slope).to(ctx.dtype), None, None, None, None, None
    hidden, head, bias, targets, lse = ctx.saved_tensors
    gradients = _token_log_prob_backward(hidden, head, bias, targets, lse, grad, ctx.backend)
    wanted = [g if need else None for g, need in zip(gradients, ctx.needs_input_grad[:3], strict=True)]
    return *wanted, None, None, None


_token_log_prob.register_autograd(_backward, setup_context=_setup_context)
refuse_double_backward("token_log_prob", _token_log_prob_backward)


def token_log_prob(
    hidden: torch.Tensor,
    head: torch.Tensor,
    targets: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """log softmax(hidden @ head^T + bias) at one target a row. Differentiable once, in hidden, head and bias.

    The logits exist a chunk at a time: beyond its arguments and gradients a call needs a few tens of megabytes,
    whatever N x V is.

    Args:
        hidden: [N, D], float64/float32/bfloat16/float16, any strides: what the model feeds to its vocabulary head.
        head: [V, D], the head's weight, float64/float32/bfloat16/float16.
        targets: [N] int64, ids in [0, V); any other id, as the -100 of ignored labels, makes its row NaN, with gradient
            0: select the others with torch.where.
        bias: [V], the head's bias, or None.
        backend: "auto" or the name of a backend.

    Returns:
        [N] log-probabilities in nats, float32 (float64 where hidden or head are). NaN for a row whose logits hold a NaN
        or +inf, or nothing finite, and for a target outside [0, V).

    Raises:
        ValueError, TypeError: bad shape, dtype or device.
        BackendUnavailableError: an explicit backend that cannot serve.
    """
    _common.check_matrix(hidden, "hidden", "[N, D] with D >= 1")
    _common.check_matrix(head, "head", "[V, D] with D >= 1")
    if head.shape[0] == 0 or head.shape[1] != hidden.shape[1]:
        raise ValueError(
            f"head has shape {list(head.shape)} but hidden {list(hidden.shape)}: expected [V, D] with V >= 1 and the "
            "same D"
        )
    if bias is not None:
        if not isinstance(bias, torch.Tensor):
            raise TypeError(
                f"bias is {type(bias).__name__}: expected None or a torch.Tensor of shape [{head.shape[0]}]"
            )
        if bias.layout is not torch.strided or bias.is_nested:
            _common.refuse_kind(bias, "bias")
        if bias.shape != head.shape[:1]:
            raise ValueError(f"bias has shape {list(bias.shape)}: expected [{head.shape[0]}], one entry a token")
        _common.check_dtype(bias, "bias")
    _common.check_vector(hidden, targets, "targets", torch.int64, called="hidden")
    _common.check_same_device(hidden, "hidden", head=head, bias=bias)
    head_learns = head.requires_grad or (bias is not None and bias.requires_grad)
    slope = torch.is_grad_enabled() and hidden.requires_grad and not head_learns
    return _token_log_prob(hidden, head, bias, targets, slope, _common.check_backend(backend))[0]
