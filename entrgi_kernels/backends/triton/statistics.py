"""Row statistics: maximum, log-sum-exp, entropy and argmax in one online pass over the logits.

One program reads a slice of one row once and keeps, per lane, the sums of e and e * d at one temperature and of e at a
second one (d = logit - running maximum). A second, tiny kernel merges the slices in a fixed order: same bits run to
run. A NaN or +inf anywhere makes its slice's sum NaN, and through it every statistic of the row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton.language as tl

from ..ranges import ranged
from . import config
from .launch import cdiv, kernel, launch, rows_of, vector

_PART = 5  # floats a slice leaves: maximum, sum e, sum e * d, sum e at the second temperature, largest key of argmax


class RowStatistics(NamedTuple):
    """float32 [N] each, but for `argmax` (int64). NaN for a bad row.

    `maximum` is the largest logit; `lse`, `entropy` (nats) and `logsum` = log sum exp((logit - maximum) * inverse) are
    of the first temperature, `lse2` and `logsum2` of the second (the first's where there is none).
    """

    maximum: torch.Tensor
    lse: torch.Tensor
    entropy: torch.Tensor
    logsum: torch.Tensor
    lse2: torch.Tensor
    logsum2: torch.Tensor
    argmax: torch.Tensor


@kernel("splits")
def _statistics_kernel(
    logits_ptr,
    stride_n,
    parts_ptr,
    index_ptr,
    v,
    slice_length,
    splits,
    inverse,
    inverse2,
    SECOND: tl.constexpr,
    ARGMAX: tl.constexpr,
    PART: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    base = logits_ptr + row * stride_n
    start = split * slice_length
    end = tl.minimum(start + slice_length, v)
    lanes = tl.arange(0, BLOCK)
    c = inverse * 1.4426950408889634
    c2 = inverse2 * 1.4426950408889634
    m = float("-inf")
    s = tl.zeros([BLOCK], tl.float32)
    t = tl.zeros([BLOCK], tl.float32)
    s2 = tl.zeros([BLOCK], tl.float32)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    place = start + lanes
    for tile in range(start, end, BLOCK):
        index = tile + lanes
        x = tl.load(base + index, mask=index < end, other=float("-inf")).to(tl.float32)
        raised = tl.maximum(m, tl.max(x, axis=0))
        # Nothing finite so far: any finite reference will do, all terms are zero.
        reference = tl.where(raised == float("-inf"), 0.0, raised)
        moved = tl.where(m == float("-inf"), 0.0, m - reference)
        d = x - reference
        e = tl.exp2(d * c)
        scale = tl.exp2(moved * c)
        # Where nothing is left of what was summed, its distance may have overflowed: rows masked with the least finite
        # number of their dtype.
        t = (t + s * tl.where(scale > 0, moved, 0.0)) * scale + tl.where(e > 0, e * d, 0.0)
        s = s * scale + e
        if SECOND:
            s2 = s2 * tl.exp2(moved * c2) + tl.exp2(d * c2)
        if ARGMAX:
            key = tl.where(x != x, float("inf"), x)
            better = key > best
            best = tl.where(better, key, best)
            place = tl.where(better, index, place)
        m = raised
    part = parts_ptr + (row * splits + split) * PART
    tl.store(part, m)
    tl.store(part + 1, tl.sum(s, axis=0))
    tl.store(part + 2, tl.sum(t, axis=0))
    if SECOND:
        tl.store(part + 3, tl.sum(s2, axis=0))
    if ARGMAX:
        top = tl.max(best, axis=0)
        tl.store(part + 4, top)
        tl.store(index_ptr + row * splits + split, tl.min(tl.where(best == top, place, 2147483647), axis=0))


@kernel("n", "splits")
def _merge_kernel(
    parts_ptr,
    index_ptr,
    out_ptr,
    argmax_ptr,
    n,
    splits,
    inverse,
    inverse2,
    SECOND: tl.constexpr,
    ARGMAX: tl.constexpr,
    PART: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    mask = lanes < splits
    part = parts_ptr + (row * splits + lanes) * PART
    ms = tl.load(part, mask=mask, other=float("-inf"))
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
    tl.store(out_ptr + row, m)
    tl.store(out_ptr + n + row, m * inverse + logsum)
    tl.store(out_ptr + 2 * n + row, entropy)
    tl.store(out_ptr + 3 * n + row, logsum)
    if SECOND:
        ss2 = tl.load(part + 3, mask=mask, other=0.0)
        logsum2 = tl.log(tl.sum(ss2 * tl.where(mask, tl.exp(moved * inverse2), 0.0), axis=0))
        tl.store(out_ptr + 4 * n + row, m * inverse2 + logsum2)
        tl.store(out_ptr + 5 * n + row, logsum2)
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
    slice_length = cdiv(cdiv(v, row.splits(n, v, target.sms)), row.block) * row.block
    splits = cdiv(v, slice_length)
    if second == temperature:
        second = None
    device = logits.device
    parts = torch.empty((n, splits, _PART), dtype=torch.float32, device=device)
    index = torch.empty((n, splits) if argmax else (0,), dtype=torch.int32, device=device)
    out = torch.empty((6, n), dtype=torch.float32, device=device)
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
        BLOCK=row.block,
        **flags,
    )
    launch(
        _merge_kernel,
        (n,),
        parts,
        index,
        out,
        winner,
        n,
        splits,
        *inverses,
        num_warps=1,
        BLOCK=config.MOST_SPLITS,
        **flags,
    )
    maximum, lse, entropy, logsum, lse2, logsum2 = out.unbind(0)
    if second is None:
        lse2, logsum2 = lse, logsum
    return RowStatistics(maximum, lse, entropy, logsum, lse2, logsum2, winner)


@kernel()
def _backward_kernel(
    logits_ptr,
    stride_n,
    lse_ptr,
    entropy_ptr,
    grad_lse_ptr,
    grad_entropy_ptr,
    out_ptr,
    v,
    inverse,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    index = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = index < v
    x = tl.load(logits_ptr + row * stride_n + index, mask=mask, other=float("-inf")).to(tl.float32)
    log_p = x * inverse - tl.load(lse_ptr + row)
    p = tl.exp(log_p)
    surprise = tl.where(p > 0, log_p, 0.0) + tl.load(entropy_ptr + row)
    grad = p * (tl.load(grad_lse_ptr + row) - tl.load(grad_entropy_ptr + row) * surprise) * inverse
    tl.store(out_ptr + row * v + index, grad.to(out_ptr.dtype.element_ty), mask=mask)


@ranged
def softmax_entropy(logits: torch.Tensor, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(log-sum-exp [N], entropy [N] in nats) of softmax(logits / temperature), float32."""
    statistics = row_statistics(logits, temperature)
    return statistics.lse.clone(), statistics.entropy.clone()


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
        BLOCK=entry.block,
    )
    return out
