"""Log-sum-exp and entropy of rows, from the pass of :mod:`.statistics`; and their gradient, entry by entry."""

from __future__ import annotations

import torch
import triton.language as tl

from ..ranges import ranged
from . import config
from .launch import Matrix, Vector, cdiv, kernel, launch, rows_of, vector
from .statistics import row_statistics


@kernel()
def _backward_kernel(
    logits_ptr: Matrix,
    stride_n,
    lse_ptr: Vector,
    entropy_ptr: Vector,
    grad_lse_ptr: Vector,
    grad_entropy_ptr: Vector,
    out_ptr: Matrix,
    v,
    inverse,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    index = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    mask = index < v
    x = tl.load(logits_ptr + row * stride_n + index, mask=mask, other=float("-inf")).to(tl.float32)  # [BV]
    log_p = x * inverse - tl.load(lse_ptr + row)
    p = tl.exp(log_p)
    surprise = tl.where(p > 0, log_p, 0.0) + tl.load(entropy_ptr + row)
    grad = p * (tl.load(grad_lse_ptr + row) - tl.load(grad_entropy_ptr + row) * surprise) * inverse
    tl.store(out_ptr + row * v + index, grad.to(out_ptr.dtype.element_ty), mask=mask)


@ranged
def softmax_entropy(logits: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(log-sum-exp [N], entropy [N] in nats) of softmax(logits / temperature), float32."""
    statistics = row_statistics(logits, temperature)
    return statistics.lse, statistics.entropy


@ranged
def softmax_entropy_backward(
    logits: torch.Tensor,
    lse: torch.Tensor,
    entropy: torch.Tensor,
    grad_lse: torch.Tensor,
    grad_entropy: torch.Tensor,
    temperature: float,
) -> torch.Tensor:
    """Gradient for the logits [N, V], of their dtype."""
    logits = rows_of(logits)
    n, v = logits.shape
    entry = config.target(logits.device).architecture.elementwise
    out = torch.empty((n, v), dtype=logits.dtype, device=logits.device)
    vectors = [vector(x.float()) for x in (lse, entropy, grad_lse, grad_entropy)]
    launch(
        _backward_kernel,
        (n, cdiv(v, entry.block)),
        logits,
        logits.stride(0),
        *vectors,
        out,
        v,
        1.0 / temperature,
        num_warps=entry.num_warps,
        BLOCK_V=entry.block,
    )
    return out
