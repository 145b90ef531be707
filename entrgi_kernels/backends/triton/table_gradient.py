"""d loss/d E = p^T grad [V, D]: the table's gradient, with p recomputed inside the product, summed over rows."""

from __future__ import annotations

import torch
import triton.language as tl

from .. import eager
from ..ranges import ranged
from . import config
from .guidance_update import product_dtype
from .launch import cdiv, kernel, launch, rows_of, vector
from .soft_embedding import ended, scale_of


@kernel("n")
def _table_kernel(
    logits_ptr,
    stride_n,
    grad_ptr,
    stride_g,
    lse_ptr,
    out_ptr,
    n,
    v,
    d,
    inverse,
    log2_scale,
    scale_back,
    WAITS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    blocks_d = tl.cdiv(d, BLOCK_D)
    pid = tl.program_id(0)
    # Columns of the table's gradient vary fastest: a tile of logits is read from memory once.
    columns = (pid % blocks_d) * BLOCK_D + tl.arange(0, BLOCK_D)
    entries = (pid // blocks_d) * BLOCK_V + tl.arange(0, BLOCK_V)
    inside_d = columns < d
    inside_v = entries < v
    lanes = tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_V, BLOCK_D], tl.float32)
    for n0 in range(0, n, BLOCK_N):
        rows = tl.cast(n0 + lanes, tl.int64)
        inside_n = rows < n
        # Read transposed: the product's left operand is p^T, straight from memory, never a transposed accumulator.
        x = tl.load(
            logits_ptr + rows[None, :] * stride_n + entries[:, None],
            mask=inside_n[None, :] & inside_v[:, None],
            other=float("-inf"),
        ).to(tl.float32)
        g = tl.load(
            grad_ptr + rows[:, None] * stride_g + columns[None, :],
            mask=inside_n[:, None] & inside_d[None, :],
            other=0.0,
        )
        lse = tl.load(lse_ptr + rows, mask=inside_n, other=0.0)
        p = tl.exp2((x * inverse - lse[None, :]) * 1.4426950408889634 + log2_scale)
        acc = tl.dot(p.to(g.dtype), g, acc, input_precision=PRECISION)
        if WAITS:
            acc = ended(acc)
    place = entries.to(tl.int64)[:, None] * d + columns[None, :]
    value = (acc * scale_back).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + place, value, mask=inside_v[:, None] & inside_d[None, :])


@ranged
def soft_embedding_grad_table(
    logits: torch.Tensor, grad: torch.Tensor, lse: torch.Tensor, temperature: float, dtype: torch.dtype
) -> torch.Tensor:
    """p^T grad [V, D] of `dtype`."""
    if dtype == torch.float64:
        return eager.soft_embedding_grad_table(logits, grad, lse, temperature, dtype)
    logits = rows_of(logits)
    (n, v), d = logits.shape, grad.shape[1]
    grad = rows_of(grad.to(product_dtype(grad.dtype, dtype)))
    target = config.target(logits.device)
    entry = config.pick(target.architecture.table[grad.element_size()], n)
    out = torch.empty((v, d), dtype=dtype, device=logits.device)
    scale = scale_of(grad.dtype)
    launch(
        _table_kernel,
        (cdiv(v, entry.block_v) * cdiv(d, entry.block_d),),
        logits,
        logits.stride(0),
        grad,
        grad.stride(0),
        vector(lse.float()),
        out,
        n,
        v,
        d,
        1.0 / temperature,
        scale,
        2.0**-scale,
        num_warps=entry.num_warps,
        num_stages=entry.num_stages,
        WAITS=target.waits and grad.element_size() == 2,
        PRECISION=target.precision,
        BLOCK_N=entry.block_n,
        BLOCK_V=entry.block_v,
        BLOCK_D=entry.block_d,
    )
    return out
