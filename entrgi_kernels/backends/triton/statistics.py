"""Row statistics: maximum, log-sum-exp, entropy and argmax in one online pass over the logits.

One program reads a slice of one row once. Each of its threads keeps its own running maximum, the sums of e and e * d
at one temperature and of e at a second one (d = logit - running maximum), and rescales them once a tile: no thread
waits for another before the slice ends. A second, tiny kernel merges the slices in a fixed order: same bits run to run.
A NaN or +inf anywhere makes its slice's sum NaN, and through it every statistic of the row.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import config
from .launch import Matrix, Vector, aligned, kernel, launch, rows_of

FAR = tl.constexpr(-1e30)
_PART = 5  # floats a slice leaves: maximum, sum e, sum e * d, sum e at the second temperature, largest key of argmax


class RowStatistics(NamedTuple):
    """float32 [N] each, but for `argmax` (int64). NaN for a bad row.

    `maximum` is the largest logit; `lse`, `entropy` (nats), `share` = entropy / log V, and `logsum` = log sum
    exp((logit - maximum) * inverse) are of the first temperature, `lse2` and `logsum2` of the second (the first's where
    there is none).
    """

    maximum: torch.Tensor
    lse: torch.Tensor
    entropy: torch.Tensor
    share: torch.Tensor
    logsum: torch.Tensor
    lse2: torch.Tensor
    logsum2: torch.Tensor
    argmax: torch.Tensor


@triton.jit
def tile_offsets(STEPS: tl.constexpr, LANES: tl.constexpr, WIDTH: tl.constexpr):
    """Offsets [STEPS, LANES, WIDTH] of a tile: a lane (a thread) has WIDTH neighbours in each of STEPS wide loads.

    Reductions over the first and last axis stay within a thread: no shuffle, no shared memory, no barrier.
    """
    steps = tl.arange(0, STEPS)[:, None, None] * (LANES * WIDTH)
    return steps + tl.arange(0, LANES)[None, :, None] * WIDTH + tl.arange(0, WIDTH)[None, None, :]


@triton.jit
def sum_tile(x):
    """Each lane's sum [LANES] over its entries of a tile."""
    return tl.sum(tl.sum(x, axis=2), axis=0)


@triton.jit
def _add_tile(x, number, m, s, t, s2, place, c, c2, SECOND: tl.constexpr, ARGMAX: tl.constexpr):
    """Each lane's running maximum, sums, and number of the tile that last raised its maximum, with tile `x` added."""
    top = tl.max(tl.max(x, axis=2), axis=0)
    if ARGMAX:
        place = tl.where(top > m, number, place)
    raised = tl.maximum(m, top)
    # Nothing finite so far: any finite reference will do, all terms are zero.
    reference = tl.where(raised == float("-inf"), 0.0, raised)
    moved = m - reference
    scale = tl.exp2(moved * c)
    d = x - reference[None, :, None]
    e = tl.exp2(d * c)
    # A distance that is infinite, or has overflowed (rows masked with the least finite number of their dtype), belongs
    # to a term of zero: any finite distance leaves it zero.
    t = (t + s * tl.maximum(moved, FAR)) * scale + sum_tile(e * tl.maximum(d, FAR))
    s = s * scale + sum_tile(e)
    if SECOND:
        s2 = s2 * tl.exp2(moved * c2) + sum_tile(tl.exp2(d * c2))
    return raised, s, t, s2, place


@kernel("splits")
def _statistics_kernel(
    logits_ptr: Matrix,
    stride_n,
    parts_ptr: Matrix,
    index_ptr: Vector,
    v,
    slice_length,
    splits,
    inverse,
    inverse2,
    SECOND: tl.constexpr,
    ARGMAX: tl.constexpr,
    PART: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    start = split * slice_length
    length = tl.minimum(slice_length, v - start)
    base = logits_ptr + row * stride_n + start
    offsets = tile_offsets(BLOCK_V // (LANES * WIDTH), LANES, WIDTH)
    c = inverse * 1.4426950408889634
    c2 = inverse2 * 1.4426950408889634
    m = tl.full([LANES], float("-inf"), tl.float32)  # [L], as all that follow: a lane (a thread) has its own
    s = tl.zeros([LANES], tl.float32)
    t = tl.zeros([LANES], tl.float32)
    s2 = tl.zeros([LANES], tl.float32)
    place = tl.zeros([LANES], tl.int32)
    full = length // BLOCK_V
    for number in range(0, full):
        x = tl.load(base + number * BLOCK_V + offsets).to(tl.float32)  # [S, L, W], S steps of W neighbours a lane
        m, s, t, s2, place = _add_tile(x, number, m, s, t, s2, place, c, c2, SECOND, ARGMAX)
    if full * BLOCK_V < length:
        index = full * BLOCK_V + offsets
        x = tl.load(base + index, mask=index < length, other=float("-inf")).to(tl.float32)  # [S, L, W]
        m, s, t, s2, place = _add_tile(x, full, m, s, t, s2, place, c, c2, SECOND, ARGMAX)
    top = tl.max(m, axis=0)
    moved = m - tl.where(top == float("-inf"), 0.0, top)
    scale = tl.exp2(moved * c)
    total = tl.sum(s * scale, axis=0)
    part = parts_ptr + (row * splits + split) * PART
    tl.store(part, top)
    tl.store(part + 1, total)
    tl.store(part + 2, tl.sum((t + s * tl.maximum(moved, FAR)) * scale, axis=0))
    if SECOND:
        tl.store(part + 3, tl.sum(s2 * tl.exp2(moved * c2), axis=0))
    if ARGMAX:
        # Tiles lie one after the other, so the first that reached the maximum holds its first place: it is read again.
        best = m == top
        number = tl.min(tl.where(best, place, 2147483647), axis=0)
        index = number * BLOCK_V + offsets
        again = best[None, :, None] & (index < length)
        x = tl.load(base + index, mask=again, other=float("-inf")).to(tl.float32)
        first = tl.min(tl.where(again & (x == top), index, 2147483647).reshape([BLOCK_V]), axis=0)
        if total != total:
            # NaN or +inf: the first of them.
            top = float("inf")
            first = 2147483647
            lanes = tl.arange(0, BLOCK_V)
            for tile in range(0, length, BLOCK_V):
                bad = tl.load(base + tile + lanes, mask=tile + lanes < length, other=0.0).to(tl.float32)
                first = tl.minimum(first, tl.min(tl.where(bad < float("inf"), 2147483647, tile + lanes), axis=0))
        tl.store(part + 4, top)
        tl.store(index_ptr + row * splits + split, start + first)


@kernel("splits")
def _merge_kernel(
    parts_ptr: Matrix,
    index_ptr: Vector,
    maximum_ptr: Vector,
    logsum_ptr: Vector,
    logsum2_ptr: Vector,
    lse_ptr: Vector,
    lse2_ptr: Vector,
    entropy_ptr: Vector,
    share_ptr: Vector,
    argmax_ptr: Matrix,
    splits,
    inverse,
    inverse2,
    log_v,
    SECOND: tl.constexpr,
    ARGMAX: tl.constexpr,
    PART: tl.constexpr,
    SPLITS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, SPLITS)
    mask = lanes < splits
    part = parts_ptr + (row * splits + lanes) * PART
    ms = tl.load(part, mask=mask, other=float("-inf"))  # [SPLITS]
    ss = tl.load(part + 1, mask=mask, other=0.0)
    ts = tl.load(part + 2, mask=mask, other=0.0)
    m = tl.max(ms, axis=0)
    moved = ms - m
    scale = tl.where(mask, tl.exp(moved * inverse), 0.0)
    s = tl.sum(ss * scale, axis=0)
    t = tl.sum(tl.where((ss > 0) & (scale > 0), scale * (ts + ss * moved), 0.0), axis=0)
    # s is NaN for a bad row (a row without a finite entry has moved = -inf + inf); the maximum has to say so too.
    m = tl.where(s != s, s, m)
    logsum = tl.log(s)
    entropy = logsum - t / s * inverse
    entropy = tl.where(entropy < 0, 0.0, entropy)
    tl.store(maximum_ptr + row, m)
    tl.store(logsum_ptr + row, logsum)
    tl.store(lse_ptr + row, m * inverse + logsum)
    tl.store(entropy_ptr + row, entropy)
    tl.store(share_ptr + row, entropy / log_v)
    if SECOND:
        ss2 = tl.load(part + 3, mask=mask, other=0.0)
        logsum2 = tl.log(tl.sum(ss2 * tl.where(mask, tl.exp(moved * inverse2), 0.0), axis=0))
        tl.store(lse2_ptr + row, m * inverse2 + logsum2)
        tl.store(logsum2_ptr + row, logsum2)
    if ARGMAX:
        keys = tl.load(part + 4, mask=mask, other=float("-inf"))
        places = tl.load(index_ptr + row * splits + lanes, mask=mask, other=2147483647)
        place = tl.min(tl.where(keys == tl.max(keys, axis=0), places, 2147483647), axis=0)
        tl.store(argmax_ptr + row, place.to(tl.int64))


def row_statistics(
    logits: torch.Tensor, temperature: float, second: float | None = None, argmax: bool = False
) -> RowStatistics:
    """One pass over `logits` [N, V]; `second` is a second temperature, for its log-sum-exp alone."""
    logits = rows_of(logits)
    n, v = logits.shape
    target = config.target(logits.device)
    row = config.pick(target.architecture.statistics, n)
    slice_length, splits = row.slices(n, v, target.sms)
    if second == temperature:
        second = None
    device = logits.device
    parts = torch.empty((n, splits, _PART), dtype=torch.float32, device=device)
    index = torch.empty((n, splits) if argmax else (0,), dtype=torch.int32, device=device)
    # What callers hand on to theirs must not share memory: torch's operators return no views of one buffer.
    maximum, logsum, logsum2 = torch.empty((3, n), dtype=torch.float32, device=device).unbind(0)
    lse, lse2, entropy, share = (torch.empty(n, dtype=torch.float32, device=device) for _ in range(4))
    winner = torch.empty(n if argmax else 0, dtype=torch.int64, device=device)
    inverses = 1.0 / temperature, 1.0 / (second or temperature)
    flags = dict(SECOND=second is not None, ARGMAX=argmax, PART=_PART)
    launch(
        _statistics_kernel,
        (n, splits),
        logits,
        logits.stride(0),
        parts,
        index,
        v,
        slice_length,
        splits,
        *inverses,
        num_warps=row.num_warps,
        BLOCK_V=row.block,
        **row.lanes(logits.element_size(), aligned(logits)),
        **flags,
    )
    launch(
        _merge_kernel,
        (n,),
        parts,
        index,
        maximum,
        logsum,
        logsum2,
        lse,
        lse2,
        entropy,
        share,
        winner,
        splits,
        *inverses,
        math.log(max(v, 2)),
        num_warps=1,
        SPLITS=config.MOST_SPLITS,
        **flags,
    )
    if second is None:
        lse2, logsum2 = lse, logsum
    return RowStatistics(maximum, lse, entropy, share, logsum, lse2, logsum2, winner)
