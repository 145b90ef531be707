"""The backward product g @ E^T with a plain epilogue: logits += scale (g . E_v - g . E_x), x each row's token.

The kernels are :mod:`.guidance_update`'s; what is here is g . E_x. The compiled Hopper products have no such epilogue.
"""

from __future__ import annotations

import torch
import triton.language as tl

from .. import eager
from ..ranges import ranged
from .chunked import Step
from .guidance_update import product, product_dtype
from .launch import Matrix, Vector, kernel, launch, rows_of, vector


@kernel()
def _picked_kernel(
    grad_ptr: Matrix,
    table_ptr: Matrix,
    tokens_ptr: Vector,
    out_ptr: Vector,
    v,
    d,
    stride_g,
    stride_e,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(tokens_ptr + row)
    legal = (token >= 0) & (token < v)
    lanes = tl.arange(0, BLOCK_D)
    acc = tl.zeros([BLOCK_D], tl.float32)  # [BD]
    for start in range(0, d, BLOCK_D):
        index = start + lanes
        g = tl.load(grad_ptr + row * stride_g + index, mask=index < d, other=0.0).to(tl.float32)
        e = tl.load(table_ptr + token * stride_e + index, mask=legal & (index < d), other=0.0).to(tl.float32)
        acc += g * e
    # What is no token leaves no number: the row becomes NaN.
    tl.store(out_ptr + row, tl.where(legal, tl.sum(acc, axis=0), float("nan")))


@ranged
def first_order_update_(
    logits: torch.Tensor, grad: torch.Tensor, table: torch.Tensor, tokens: torch.Tensor, scale: float
) -> None:
    """In place; see :func:`entrgi_kernels.backends.eager.first_order_update_`."""
    if table.dtype == torch.float64:
        eager.first_order_update_(logits, grad, table, tokens, scale)
        return
    (n, v), d = logits.shape, table.shape[1]
    if n == 0:
        return
    dense, table, tokens = rows_of(logits), rows_of(table), vector(tokens)
    grad = rows_of(grad.to(product_dtype(grad.dtype, table.dtype)))
    delta = torch.empty(n, dtype=torch.float32, device=logits.device)
    picked = grad, table, tokens, delta, v, d, grad.stride(0), table.stride(0)
    launch(_picked_kernel, (n,), *picked, num_warps=4, BLOCK_D=512)
    # The distribution takes no part: its log-sum-exp is not read.
    product(dense, grad, table, delta, delta, 1.0, dense, None, Step.linear(scale))
    if dense is not logits:
        logits.copy_(dense)
