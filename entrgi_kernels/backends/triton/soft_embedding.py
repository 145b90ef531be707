"""softmax(logits / temperature) @ E with the probabilities formed inside the product, and the blend after it.

This product serves ``entrgi_embedding`` too. The gradient for the logits is ``guidance_update``'s product without Adam;
that for E, p^T grad, recomputes p inside a product that sums over rows.

The left operand of every tile product is exp((logit - maximum) / tau - logsum), computed in registers from the logits
and the row statistics that the pass before left; N x V probabilities never exist. When rows are few the vocabulary is
split over programs: since p is already normalised, the partial products simply add, in a fixed order. The pass over
[N, D] that adds them blends too. Inside the product the blend takes 236 registers in place of 124: one program a
multiprocessor in place of two on sm_90.

In float16 the probabilities are scaled by 2^10 inside the product (and back after it), so that p down to 6e-11 is not
flushed to zero; bfloat16 and float32 need no scale.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from .. import eager
from ..ranges import ranged
from . import chunked, config, hopper
from .chunked import NO_STEP
from .guidance_update import backward, product_dtype
from .launch import Matrix, Vector, aligned, bulk, cdiv, kernel, launch, rows_of, tiles, vector
from .statistics import row_statistics

_EMPTY_SPLIT_WASTE = 0.1


@triton.jit
def blend(soft, table_ptr, stride_e, tokens_ptr, weight_ptr, rows, columns, mask, v):
    """soft + weight (E[token] - soft) by the formula of torch.lerp, which returns E[token] exactly at weight 1."""
    token = tl.minimum(tl.maximum(tl.load(tokens_ptr + rows), 0), v - 1).to(tl.int64)
    # [BN, BD]
    hard = tl.load(table_ptr + token[:, None] * stride_e + columns[None, :], mask=mask, other=0.0).to(tl.float32)
    w = tl.load(weight_ptr + rows)[:, None]
    shift = hard - soft
    return tl.where(w < 0.5, soft + w * shift, hard - shift * (1.0 - w))


@triton.jit
def ended(acc):
    """`acc`, when the product that forms it has ended: its left operand's registers may then be written anew.

    No instruction, but one that reads and writes the sums. See :class:`.config.Target`, `waits`.
    """
    return tl.inline_asm_elementwise("// $0", "=f,0", [acc], dtype=tl.float32, is_pure=True, pack=1)


@kernel("n")
def _forward_kernel(
    logits: Matrix,
    stride_n,
    table: Matrix,
    stride_e,
    maximum_ptr: Vector,
    logsum_ptr: Vector,
    soft_ptr: Matrix,
    parts_ptr: Matrix,
    n,
    v,
    d,
    slice_length,
    inverse,
    log2_scale,
    scale_back,
    DESCRIPTORS: tl.constexpr,
    WAITS: tl.constexpr,
    EVEN_V: tl.constexpr,
    EVEN_D: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    blocks_n = tl.cdiv(n, BLOCK_N)
    blocks_d = tl.cdiv(d, BLOCK_D)
    pid = tl.program_id(0)
    split = pid // (blocks_n * blocks_d)
    # Rows vary fastest: programs that run together read the same tiles of E.
    block_n = pid % blocks_n
    block_d = (pid // blocks_n) % blocks_d
    rows = block_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside_n = rows < n
    rows = tl.minimum(rows, n - 1)
    columns = block_d * BLOCK_D + tl.arange(0, BLOCK_D)
    inside_d = columns < d
    lanes = tl.arange(0, BLOCK_V)
    m = tl.load(maximum_ptr + rows)  # [BN]
    # A tile of logits goes from shared memory straight into the layout of a left operand if all that p is formed of
    # has been loaded; else p's tile passes through shared memory once more, behind a barrier. So the scalars become
    # vectors by way of loads that are masked off.
    never = rows < 0
    c = tl.load(maximum_ptr + rows, mask=never, other=inverse * 1.4426950408889634)
    offset = log2_scale - tl.load(logsum_ptr + rows) * 1.4426950408889634
    offset = tl.load(logsum_ptr + rows, mask=never, other=offset)
    if not DESCRIPTORS:
        x_ptrs = logits + rows[:, None] * stride_n + lanes[None, :]
        e_ptrs = table + lanes.to(tl.int64)[:, None] * stride_e + columns[None, :]
    acc = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)  # [BN, BD]
    start = split * slice_length
    end = tl.minimum(start + slice_length, v)
    for v0 in range(start, end, BLOCK_V):
        far = tl.cast(v0, tl.int64)
        if DESCRIPTORS:
            x = logits.load([block_n * BLOCK_N, v0])  # [BN, BV]
            e = table.load([v0, block_d * BLOCK_D])  # [BV, BD]
        else:
            if EVEN_V:
                x = tl.load(x_ptrs + far)
            else:
                x = tl.load(x_ptrs + far, mask=(v0 + lanes)[None, :] < end, other=float("-inf"))
            if EVEN_V and EVEN_D:
                e = tl.load(e_ptrs + far * stride_e)
            else:
                e = tl.load(e_ptrs + far * stride_e, mask=((v0 + lanes) < end)[:, None] & inside_d[None, :], other=0.0)
        below = x.to(tl.float32) - m[:, None]
        if DESCRIPTORS and not EVEN_V:
            below = tl.minimum(below, 0.0)  # beyond the row x is 0, and so is E: a finite p adds nothing there
        p = tl.exp2(below * c[:, None] + offset[:, None])  # [BN, BV]
        acc = tl.dot(p.to(e.dtype), e, acc, input_precision=PRECISION)
        if WAITS:
            acc = ended(acc)
    acc *= scale_back
    mask = inside_n[:, None] & inside_d[None, :]
    place = rows[:, None] * d + columns[None, :]
    base = soft_ptr
    if split > 0:
        base = parts_ptr + (split - 1).to(tl.int64) * n * d
    tl.store(base + place, acc, mask=mask)


@kernel("n", "splits", "places")
def _merge_kernel(
    parts_ptr: Matrix,
    table_ptr: Matrix,
    stride_e,
    tokens_ptr: Vector,
    weight_ptr: Vector,
    soft_ptr: Matrix,
    out_ptr: Matrix,
    stride_o,
    index_ptr: Vector,
    places,
    n,
    v,
    d,
    splits,
    BLEND: tl.constexpr,
    PLACED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Adds the partial products of the slices in order to the first, which is in `soft`, then blends."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = (rows < n)[:, None] & (columns < d)[None, :]
    rows = tl.minimum(rows, n - 1)
    place = rows[:, None] * d + columns[None, :]
    acc = tl.load(soft_ptr + place, mask=mask, other=0.0)  # [BN, BD]
    stride = tl.cast(n, tl.int64) * d
    for part in range(0, splits - 1):
        acc += tl.load(parts_ptr + part * stride + place, mask=mask, other=0.0)
    tl.store(soft_ptr + place, acc, mask=mask)
    if BLEND:
        mixed = blend(acc, table_ptr, stride_e, tokens_ptr, weight_ptr, rows, columns, mask, v)
        if PLACED:
            rows = tl.load(index_ptr + rows)
            mask &= ((rows >= 0) & (rows < places))[:, None]  # what has no place there is left out
        to = out_ptr + rows[:, None] * stride_o + columns[None, :]
        tl.store(to, mixed.to(out_ptr.dtype.element_ty), mask=mask)


@kernel("n")
def _table_kernel(
    logits_ptr: Matrix,
    stride_n,
    grad_ptr: Matrix,
    stride_g,
    lse_ptr: Vector,
    out_ptr: Matrix,
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
    acc = tl.zeros([BLOCK_V, BLOCK_D], tl.float32)  # [BV, BD]
    for n0 in range(0, n, BLOCK_N):
        rows = tl.cast(n0 + lanes, tl.int64)
        inside_n = rows < n
        # Read transposed: the left operand is p^T, straight from memory. A transposed accumulator in a second product
        # has been compiled wrongly (fla-org/flash-linear-attention #826, #984).
        x = tl.load(
            logits_ptr + rows[None, :] * stride_n + entries[:, None],
            mask=inside_n[None, :] & inside_v[:, None],
            other=float("-inf"),
        ).to(tl.float32)  # [BV, BN]
        g = tl.load(
            grad_ptr + rows[:, None] * stride_g + columns[None, :],
            mask=inside_n[:, None] & inside_d[None, :],
            other=0.0,
        )  # [BN, BD]
        lse = tl.load(lse_ptr + rows, mask=inside_n, other=0.0)
        p = tl.exp2((x * inverse - lse[None, :]) * 1.4426950408889634 + log2_scale)  # [BV, BN]
        acc = tl.dot(p.to(g.dtype), g, acc, input_precision=PRECISION)
        if WAITS:
            acc = ended(acc)
    place = entries.to(tl.int64)[:, None] * d + columns[None, :]
    value = (acc * scale_back).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + place, value, mask=inside_v[:, None] & inside_d[None, :])


def split_count(tiles: int, blocks_v: int, slots: int, most: int) -> int:
    """How many slices of the vocabulary let `tiles` output tiles fill `slots` concurrent programs.

    The fewest slices that leave at most a tenth of the slots idle over all waves, else the best found.
    """
    best, best_waste = 1, math.inf
    for splits in range(1, max(1, min(blocks_v, most)) + 1):
        programs = tiles * splits
        waste = 1.0 - programs / (cdiv(programs, slots) * slots)
        if waste <= _EMPTY_SPLIT_WASTE:
            return splits
        if waste < best_waste:
            best, best_waste = splits, waste
    return best


def scale_of(dtype: torch.dtype) -> float:
    """Log2 of the factor that probabilities carry inside a product of `dtype`."""
    return 10.0 if dtype == torch.float16 else 0.0


def forward(
    logits: torch.Tensor,
    table: torch.Tensor,
    maximum: torch.Tensor,
    logsum: torch.Tensor,
    temperature: float,
    mixed: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
    index: torch.Tensor | None = None,
) -> torch.Tensor:
    """soft [N, D] float32; where a blend with hard tokens is wanted, it is written.

    Args:
        maximum, logsum: [N] float32, from the row statistics at `temperature`.
        mixed: (int64 tokens [N], float32 weight [N], [M, D] with dense rows, which the blend goes to).
        index: int64 [N], the place of each row there; None keeps their order.
    """
    logits, table = rows_of(logits), rows_of(table)
    (n, v), d = logits.shape, table.shape[1]
    device = logits.device
    target = config.target(device)
    whole = bulk(logits, table)
    even = aligned(logits, table)
    entry = config.pick_product(target.architecture, "forward", table.element_size(), n, even, whole)
    scale = scale_of(table.dtype)
    if n == 0:
        return torch.empty((0, d), dtype=torch.float32, device=device)
    if target.compiled and n >= config.LEAST_COMPILED and hopper.serves(logits, table):
        spare = target.architecture.spare_bytes(logits, d, table.element_size())
        arguments = (logits, table, vector(maximum), vector(logsum), temperature, spare, target.sms)
        soft, parts, splits = hopper.forward(*arguments)
    elif entry.engine == "chunked":
        soft = parts = chunked.forward(logits, table, maximum, logsum, temperature, scale)
        splits = 1
    else:
        blocks_v = cdiv(v, entry.block_v)
        programs = cdiv(n, entry.block_n) * cdiv(d, entry.block_d)
        spare = target.architecture.spare_bytes(logits, d, table.element_size()) // (4 * n * d)
        splits = split_count(programs, blocks_v, target.sms * max(1, 8 // entry.num_warps), min(64, 1 + spare))
        length = cdiv(blocks_v, splits) * entry.block_v
        splits = cdiv(v, length)
        soft = torch.empty((n, d), dtype=torch.float32, device=device)
        parts = soft if splits == 1 else torch.empty((splits - 1, n, d), dtype=torch.float32, device=device)
        descriptors = entry.loads == "descriptor"
        launch(
            _forward_kernel,
            (programs * splits,),
            tiles(logits, entry.block_n, entry.block_v) if descriptors else logits,
            logits.stride(0),
            tiles(table, entry.block_v, entry.block_d) if descriptors else table,
            table.stride(0),
            maximum,
            logsum,
            soft,
            parts,
            n,
            v,
            d,
            length,
            1.0 / temperature,
            scale,
            2.0**-scale,
            num_warps=entry.num_warps,
            # Logits wider than the table: a stage less, or GPUs with 99 KiB of shared memory refuse the launch.
            num_stages=max(1, entry.num_stages - (logits.element_size() > table.element_size())),
            DESCRIPTORS=descriptors,
            WAITS=target.waits and table.element_size() == 2,
            EVEN_V=v % entry.block_v == 0,
            EVEN_D=descriptors or d % entry.block_d == 0,
            PRECISION=target.precision,
            BLOCK_N=entry.block_n,
            BLOCK_V=entry.block_v,
            BLOCK_D=entry.block_d,
        )
    if splits > 1 or mixed is not None:
        # Without a blend, or places, the kernel is given pointers that it does not follow.
        tokens, weight, out = mixed or (maximum, maximum, soft)
        block_n, block_d = target.architecture.merge_block
        launch(
            _merge_kernel,
            (cdiv(n, block_n), cdiv(d, block_d)),
            parts,
            table,
            table.stride(0),
            vector(tokens),
            vector(weight),
            soft,
            out,
            out.stride(0),
            vector(tokens if index is None else index),
            out.shape[0],
            n,
            v,
            d,
            splits,
            num_warps=4,
            BLEND=mixed is not None,
            PLACED=index is not None,
            BLOCK_N=block_n,
            BLOCK_D=block_d,
        )
    return soft


@ranged
def soft_embedding(logits: torch.Tensor, table: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(softmax(logits / temperature) @ table [N, D], log-sum-exp [N]), float32."""
    if table.dtype == torch.float64:
        # float64 under narrower logits: its sums have to be float64, which only the eager backend forms on a GPU.
        return eager.soft_embedding(logits, table, temperature)
    logits = rows_of(logits)
    rows = row_statistics(logits, temperature)
    return forward(logits, table, rows.maximum, rows.logsum, temperature), rows.lse


@ranged
def soft_embedding_backward(
    logits: torch.Tensor,
    table: torch.Tensor,
    grad: torch.Tensor,
    soft: torch.Tensor,
    lse: torch.Tensor,
    temperature: float,
) -> torch.Tensor:
    """d loss/d logits [N, V] of the logits' dtype."""
    if soft.dtype == torch.float64:  # of a float64 table
        return eager.soft_embedding_backward(logits, table, grad, soft, lse, temperature)
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    backward(rows_of(logits), grad, table, soft, lse, temperature, out, None, NO_STEP)
    return out


@ranged
def soft_embedding_grad_table(
    logits: torch.Tensor, grad: torch.Tensor, lse: torch.Tensor, temperature: float, dtype: torch.dtype
) -> torch.Tensor:
    """d loss/d E = p^T grad [V, D] of `dtype`."""
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
