"""Row statistics: log-sum-exp and entropy of softmax(logits / temperature) in one pass.

    lse = log sum_v exp(phi_v / tau)        p_v = exp(phi_v / tau - lse)        H = -sum_v p_v log p_v   (nats)

Backward:  d lse / d phi_v = p_v / tau,  d H / d phi_v = -p_v (log p_v + H) / tau.

Source: arXiv 2602.05000, the entropy of the interpolation weight (there at temperature 1).
"""

from __future__ import annotations

import torch

from . import _common
from ._operator import operator, refuse_double_backward


@operator(numbers={"temperature": _common.distribution_temperature})
def _softmax_entropy(logits: torch.Tensor, temperature: float, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    return _common.run("softmax_entropy", backend, logits)(logits, temperature)


@_softmax_entropy.register_fake
def _(logits, temperature, backend):
    lse = logits.new_empty((logits.shape[0],), dtype=_common.accumulation_dtype(logits))
    return lse, torch.empty_like(lse)


@operator(numbers={"temperature": _common.distribution_temperature})
def _softmax_entropy_backward(
    logits: torch.Tensor,
    lse: torch.Tensor,
    entropy: torch.Tensor,
    grad_lse: torch.Tensor,
    grad_entropy: torch.Tensor,
    temperature: float,
    backend: str,
) -> torch.Tensor:
    run = _common.run("softmax_entropy_backward", backend, logits)
    return run(logits, lse, entropy, grad_lse, grad_entropy, temperature)


@_softmax_entropy_backward.register_fake
def _(logits, lse, entropy, grad_lse, grad_entropy, temperature, backend):
    return logits.new_empty(logits.shape)


def _setup_context(ctx, inputs, output):
    logits, ctx.temperature, ctx.backend = inputs
    ctx.save_for_backward(logits, *output)


def _backward(ctx, grad_lse, grad_entropy):
    logits, lse, entropy = ctx.saved_tensors
    grad = _softmax_entropy_backward(logits, lse, entropy, grad_lse, grad_entropy, ctx.temperature, ctx.backend)
    return grad, None, None


_softmax_entropy.register_autograd(_backward, setup_context=_setup_context)
refuse_double_backward("softmax_entropy", _softmax_entropy_backward)


def softmax_entropy(
    logits: torch.Tensor, temperature: _common.Number = 1.0, *, backend: str = "auto"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-sum-exp and entropy of each row of softmax(logits / temperature). Differentiable once.

    Args:
        logits: [N, V], float64/float32/bfloat16/float16, any strides; -inf entries have probability 0.
        temperature: tau, from 1e-12 to 1e12; a number or a 0-d tensor on the CPU; 0 stands for 1 here.
        backend: "auto" or the name of a backend.

    Returns:
        (logsumexp [N], entropy [N] in nats), float32 (float64 for float64 logits). NaN for a row that holds a NaN or
        +inf, or no finite entry.

    Raises:
        ValueError, TypeError: bad shape, dtype or temperature.
        BackendUnavailableError: an explicit backend that cannot serve.
    """
    _common.check_logits(logits)
    return _softmax_entropy(logits, _common.distribution_temperature(temperature), _common.check_backend(backend))
