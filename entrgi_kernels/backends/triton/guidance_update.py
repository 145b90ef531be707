"""The backward product g @ E^T with the softmax gradient, and Adam, in its epilogue: the N x V gradient never exists.

    d phi_v = p_v (g . E_v - g . soft) / tau        p_v = exp(phi_v / tau - lse)

A program owns one tile of the logits: it sums over D, recomputes p from the tile, takes the Adam step and writes the
tile back, so logits and moments are read and written once.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from .. import eager
from ..arguments import Adam
from ..ranges import ranged
from . import chunked, config, hopper
from .chunked import Step, adam
from .launch import Matrix, Vector, aligned, bulk, cdiv, kernel, launch, rows_of, tiles, vector

_MOST_PARTS = 16  # the backward kernel halves its tile four times at most


@kernel()
def _rowdot_kernel(grad_ptr: Matrix, soft_ptr: Matrix, out_ptr: Matrix, d, stride_g, stride_s, BLOCK_D: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK_D)
    acc = tl.zeros([BLOCK_D], tl.float32)  # [BD]
    for start in range(0, d, BLOCK_D):
        index = start + lanes
        g = tl.load(grad_ptr + row * stride_g + index, mask=index < d, other=0.0).to(tl.float32)
        acc += g * tl.load(soft_ptr + row * stride_s + index, mask=index < d, other=0.0).to(tl.float32)
    tl.store(out_ptr + row, tl.sum(acc, axis=0))


@triton.jit
def _halves(acc, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The left and the right half of the columns."""
    return tl.split(tl.permute(tl.reshape(acc, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))


@triton.jit
def _fetch(
    rows,
    inside_n,
    first,
    v,
    logits_ptr,
    stride_n,
    exp_avg_ptr,
    stride_m,
    exp_avg_sq_ptr,
    stride_v,
    READS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Logits and both moments of one part of the tile, in their own types; without moments the logits thrice."""
    columns = first + tl.arange(0, COLUMNS)
    mask = inside_n[:, None] & (columns < v)[None, :]
    x = tl.load(logits_ptr + rows[:, None] * stride_n + columns[None, :], mask=mask, other=float("-inf"))  # [BN, C]
    if READS:
        m = tl.load(exp_avg_ptr + rows[:, None] * stride_m + columns[None, :], mask=mask, other=0.0)
        s = tl.load(exp_avg_sq_ptr + rows[:, None] * stride_v + columns[None, :], mask=mask, other=0.0)
        return x, m, s
    else:
        return x, x, x


@triton.jit
def _finish(
    product,
    fetched,
    rows,
    inside_n,
    first,
    v,
    delta_ptr,
    lse_ptr,
    exp_avg_ptr,
    stride_m,
    exp_avg_sq_ptr,
    stride_v,
    out_ptr,
    stride_o,
    inverse,
    step_size,
    root_correction,
    beta1,
    beta2,
    eps,
    EPILOGUE: tl.constexpr,
    READS: tl.constexpr,
    WRITES: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """One part of the tile, from `product` = g . E_v and what :func:`_fetch` gave: its softmax gradient, and Adam in
    place or the gradient out; or the product added to the logits."""
    columns = first + tl.arange(0, COLUMNS)
    mask = inside_n[:, None] & (columns < v)[None, :]
    x = fetched[0].to(tl.float32)
    delta = tl.load(delta_ptr + rows)[:, None]
    out = out_ptr + rows[:, None] * stride_o + columns[None, :]
    if EPILOGUE == "linear":
        tl.store(out, (x + step_size * (product - delta)).to(out_ptr.dtype.element_ty), mask=mask)
        return
    # From the log-sum-exp alone, whose rounding moves a row's gradient by a common factor of up to
    # exp(|phi / tau| * 6e-8); it is NaN where phi / tau overflows float32. The CPU's kernels find maximum and sum anew.
    # exp2 flushes what is below 2^-126 to zero: three instructions less than exp, of forty.
    p = tl.exp2((x * inverse - tl.load(lse_ptr + rows)[:, None]) * 1.4426950408889634)  # [BN, C], C columns of a part
    if EPILOGUE == "adam":
        m = tl.zeros([ROWS, COLUMNS], tl.float32)
        s = tl.zeros([ROWS, COLUMNS], tl.float32)
        if READS:
            m = fetched[1].to(tl.float32)
            s = fetched[2].to(tl.float32)
        x, m, s = adam(x, p, product, delta, m, s, inverse, step_size, root_correction, beta1, beta2, eps)
        if WRITES:
            m_ptrs = exp_avg_ptr + rows[:, None] * stride_m + columns[None, :]
            tl.store(m_ptrs, m.to(exp_avg_ptr.dtype.element_ty), mask=mask)
            s_ptrs = exp_avg_sq_ptr + rows[:, None] * stride_v + columns[None, :]
            tl.store(s_ptrs, s.to(exp_avg_sq_ptr.dtype.element_ty), mask=mask)
        tl.store(out, x.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        tl.store(out, (p * (product - delta) * inverse).to(out_ptr.dtype.element_ty), mask=mask)


@kernel("n")
def _backward_kernel(
    logits_ptr: Matrix,
    stride_n,
    grad: Matrix,
    stride_g,
    table: Matrix,
    stride_e,
    delta_ptr: Vector,
    lse_ptr: Vector,
    exp_avg_ptr: Matrix,
    stride_m,
    exp_avg_sq_ptr: Matrix,
    stride_v,
    out_ptr: Matrix,
    stride_o,
    n,
    v,
    d,
    inverse,
    step_size,
    root_correction,
    beta1,
    beta2,
    eps,
    EPILOGUE: tl.constexpr,
    READS: tl.constexpr,
    WRITES: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    EVEN_D: tl.constexpr,
    PARTS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    # Rows vary fastest: a tile of E is read from memory once, and serves all rows from the cache.
    blocks_n = tl.cdiv(n, BLOCK_N)
    pid = tl.program_id(0)
    rows = (pid % blocks_n).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside_n = rows < n
    rows = tl.minimum(rows, n - 1)
    first = (pid // blocks_n) * BLOCK_V
    columns = first + tl.arange(0, BLOCK_V)
    lanes = tl.arange(0, BLOCK_D)
    if not DESCRIPTORS:
        g_ptrs = grad + rows[:, None] * stride_g + lanes[None, :]
        e_ptrs = table + tl.minimum(columns, v - 1).to(tl.int64)[None, :] * stride_e + lanes[:, None]
    acc = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)  # [BN, BV]
    for d0 in range(0, d, BLOCK_D):
        if DESCRIPTORS:
            g = grad.load([(pid % blocks_n) * BLOCK_N, d0])  # [BN, BD]
            e = table.load([first, d0]).T  # [BD, BV]
        elif EVEN_D:
            g = tl.load(g_ptrs + d0)
            e = tl.load(e_ptrs + d0)
        else:
            g = tl.load(g_ptrs + d0, mask=(d0 + lanes)[None, :] < d, other=0.0)
            e = tl.load(e_ptrs + d0, mask=(d0 + lanes)[:, None] < d, other=0.0)
        acc = tl.dot(g, e.to(g.dtype), acc, input_precision=PRECISION)
    # Part by part, so that logits and both moments of the whole tile never are in registers at once, the next part's
    # being read while one is worked on: at once, 464 bytes a thread are spilled at 128 x 128 on sm_90; in eighths it
    # takes 127 registers. The halves of an accumulator lie in the same threads: taking them apart moves
    # nothing.
    parts = (acc,)  # each [BN, BV / parts]
    for level in tl.static_range(4):
        if 1 << level < PARTS:
            halves = ()
            for i in tl.static_range(1 << level):
                halves = halves + _halves(parts[i], BLOCK_N, BLOCK_V >> level)
            parts = halves  # type: ignore[assignment]
    COLUMNS: tl.constexpr = BLOCK_V // PARTS
    fetched = _fetch(
        rows, inside_n, first, v, logits_ptr, stride_n, exp_avg_ptr, stride_m, exp_avg_sq_ptr, stride_v, READS, COLUMNS
    )
    for i in tl.static_range(PARTS):
        now = fetched
        if i + 1 < PARTS:
            fetched = _fetch(
                rows, inside_n, first + (i + 1) * COLUMNS, v, logits_ptr, stride_n, exp_avg_ptr, stride_m,
                exp_avg_sq_ptr, stride_v, READS, COLUMNS,
            )  # fmt: skip
        _finish(
            parts[i], now, rows, inside_n, first + i * COLUMNS, v, delta_ptr, lse_ptr, exp_avg_ptr, stride_m,
            exp_avg_sq_ptr, stride_v, out_ptr, stride_o, inverse, step_size, root_correction, beta1, beta2, eps,
            EPILOGUE, READS, WRITES, BLOCK_N, COLUMNS,
        )  # fmt: skip


def product_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """The operands' dtype of a product: theirs when they agree, else float32."""
    return dtypes[0] if len(set(dtypes)) == 1 else torch.float32


def backward(
    logits: torch.Tensor,
    grad: torch.Tensor,
    table: torch.Tensor,
    soft: torch.Tensor,
    lse: torch.Tensor,
    temperature: float,
    out: torch.Tensor,
    moments: tuple[torch.Tensor, torch.Tensor] | None,
    step: Step,
) -> None:
    """A step of Adam on `out` (the logits) and `moments`, or the logits' gradient into `out` [N, V].

    Matrices over V have dense rows.
    """
    n, d = logits.shape[0], table.shape[1]
    if n == 0:
        return
    table, soft, lse = rows_of(table), rows_of(soft), vector(lse.float())
    grad = rows_of(grad.to(product_dtype(grad.dtype, table.dtype)))
    delta = torch.empty(n, dtype=torch.float32, device=logits.device)
    launch(_rowdot_kernel, (n,), grad, soft, delta, d, grad.stride(0), soft.stride(0), num_warps=4, BLOCK_D=512)
    product(logits, grad, table, delta, lse, temperature, out, moments, step)


def product(
    logits: torch.Tensor,
    grad: torch.Tensor,
    table: torch.Tensor,
    delta: torch.Tensor,
    lse: torch.Tensor,
    temperature: float,
    out: torch.Tensor,
    moments: tuple[torch.Tensor, torch.Tensor] | None,
    step: Step,
) -> None:
    """:func:`backward`, and the first-order update, from `delta` [N] float32, what is taken from each row's product."""
    (n, v), d = logits.shape, table.shape[1]
    target = config.target(logits.device)
    if (
        target.compiled
        and step.epilogue == "adam"
        and n >= config.LEAST_COMPILED
        and hopper.serves(logits, grad, table)
        and (moments is None or hopper.serves_moments(*moments))
    ):
        torch.ops.entrgi_cuda.hopper_update_(
            *(logits, grad, table, delta, lse, *(moments or (None, None))),
            *(step.reads, step.writes, temperature, *step.scalars),
        )
        return
    even = aligned(logits, table, grad, out, *(moments or ()))
    whole = bulk(grad, table)
    entry = config.pick_product(target.architecture, "backward", grad.element_size(), n, even, whole)
    if entry.engine == "chunked":
        chunked.backward(logits, grad, table, delta, lse, temperature, out, moments, step)
        return
    exp_avg, exp_avg_sq = moments or (out, out)
    descriptors = entry.loads == "descriptor"
    # Narrower parts where logits or moments are wider than what the tables were made for.
    wide = max(logits.element_size(), exp_avg.element_size()) > grad.element_size()
    parts = min(_MOST_PARTS, 2 * entry.parts) if wide and entry.parts > 1 else entry.parts
    launch(
        _backward_kernel,
        (cdiv(n, entry.block_n) * cdiv(v, entry.block_v),),
        logits,
        logits.stride(0),
        tiles(grad, entry.block_n, entry.block_d) if descriptors else grad,
        grad.stride(0),
        tiles(table, entry.block_v, entry.block_d) if descriptors else table,
        table.stride(0),
        delta,
        lse,
        exp_avg,
        exp_avg.stride(0),
        exp_avg_sq,
        exp_avg_sq.stride(0),
        out,
        out.stride(0),
        n,
        v,
        d,
        1.0 / temperature,
        *step.scalars,
        num_warps=entry.num_warps,
        num_stages=entry.num_stages,
        **step.flags,
        DESCRIPTORS=descriptors,
        EVEN_D=descriptors or d % entry.block_d == 0,
        PARTS=parts,
        PRECISION=target.precision,
        BLOCK_N=entry.block_n,
        BLOCK_V=entry.block_v,
        BLOCK_D=entry.block_d,
    )


@ranged
def guidance_update_(
    logits: torch.Tensor,
    grad: torch.Tensor,
    table: torch.Tensor,
    soft: torch.Tensor,
    lse: torch.Tensor,
    temperature: float,
    adam: Adam,
) -> None:
    """One Adam step on the logits, in place; see :func:`entrgi_kernels.backends.eager.guidance_update_`."""
    if soft.dtype == torch.float64:  # of a float64 table
        eager.guidance_update_(logits, grad, table, soft, lse, temperature, adam)
        return
    exp_avg, exp_avg_sq, step, lr, beta1, beta2, eps, keep = adam
    moments = None if exp_avg is None or exp_avg_sq is None else (exp_avg, exp_avg_sq)
    reads, writes = moments is not None and step > 1, moments is not None and keep
    targets = (logits, *(moments or ()))
    dense = [rows_of(tensor) for tensor in targets]
    taken = Step(lr / (1 - beta1**step), 1 / math.sqrt(1 - beta2**step), beta1, beta2, eps, reads=reads, writes=writes)
    state = (dense[1], dense[2]) if reads or writes else None
    backward(dense[0], grad, table, soft, lse, temperature, dense[0], state, taken)
    for tensor, copy in zip(targets if writes else targets[:1], dense, strict=False):
        if copy is not tensor:
            tensor.copy_(copy)
