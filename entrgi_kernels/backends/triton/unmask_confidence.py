"""Confidence of drawn tokens under the filtered softmax: one read of the logits after statistics and threshold.

One program reads a slice of one row and leaves its sums and its two largest entries; a second, tiny kernel merges the
slices in a fixed order and puts the drawn token's own logit beside them.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ..ranges import ranged
from . import config
from .filters import KEY_SHIFT, filter_thresholds, is_filtered, ordered_key
from .launch import Matrix, Vector, aligned, kernel, launch, rows_of, vector
from .statistics import FAR, row_statistics, sum_tile, tile_offsets

_PART = 4  # floats a slice leaves: sum e, sum e * d (d = logit - maximum), largest and second largest kept logit


@kernel("splits")
def _confidence_kernel(
    logits_ptr: Matrix,
    stride_n,
    maximum_ptr: Vector,
    thresholds_ptr: Vector,
    parts_ptr: Matrix,
    v,
    slice_length,
    splits,
    inverse,
    ALG: tl.constexpr,
    FILTERED: tl.constexpr,
    SHIFT: tl.constexpr,
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
    m = tl.load(maximum_ptr + row)
    threshold = tl.load(thresholds_ptr + row) if FILTERED else 0
    c = inverse * 1.4426950408889634
    STEPS: tl.constexpr = BLOCK_V // (LANES * WIDTH)
    offsets = tile_offsets(STEPS, LANES, WIDTH)
    mass = tl.zeros([LANES], tl.float32)  # [L], a lane (a thread) its own
    moment = tl.zeros([LANES], tl.float32)
    first = tl.full([STEPS, LANES, WIDTH], float("-inf"), tl.float32)  # [S, L, W], as the tile
    second = tl.full([STEPS, LANES, WIDTH], float("-inf"), tl.float32)
    for tile in range(0, length, BLOCK_V):
        x = tl.load(base + tile + offsets, mask=tile + offsets < length, other=float("-inf")).to(tl.float32)
        if FILTERED:
            x = tl.where(ordered_key(x, SHIFT) >= threshold, x, float("-inf"))
        e = tl.exp2((x - m) * c)
        mass += sum_tile(e)
        if ALG == "entropy":
            moment += sum_tile(e * tl.maximum(x - m, FAR))
        if ALG == "topk_margin":
            second = tl.maximum(second, tl.minimum(first, x))
            first = tl.maximum(first, x)
    part = parts_ptr + (row * splits + split) * PART
    tl.store(part, tl.sum(mass, axis=0))
    if ALG == "entropy":
        tl.store(part + 1, tl.sum(moment, axis=0))
    if ALG == "topk_margin":
        top, others = _two_largest(first.reshape([BLOCK_V]), second.reshape([BLOCK_V]), BLOCK_V)
        tl.store(part + 2, top)
        tl.store(part + 3, others)


@triton.jit
def _two_largest(first, second, LANES: tl.constexpr):
    """The two largest of all lanes' two: the lane of the largest gives its second as well, others their first."""
    lanes = tl.arange(0, LANES)
    top = tl.max(first, axis=0)
    lane = tl.min(tl.where(first == top, lanes, LANES), axis=0)
    return top, tl.max(tl.where(lanes == lane, second, first), axis=0)


@kernel("splits")
def _confidence_merge_kernel(
    logits_ptr: Matrix,
    stride_n,
    maximum_ptr: Vector,
    thresholds_ptr: Vector,
    tokens_ptr: Vector,
    parts_ptr: Matrix,
    out_ptr: Matrix,
    v,
    splits,
    inverse,
    ALG: tl.constexpr,
    FILTERED: tl.constexpr,
    SHIFT: tl.constexpr,
    PART: tl.constexpr,
    SPLITS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    m = tl.load(maximum_ptr + row)
    token = tl.minimum(tl.maximum(tl.load(tokens_ptr + row), 0), v - 1)
    value = tl.load(logits_ptr + row * stride_n + token).to(tl.float32)
    if ALG != "anchor":
        c = inverse * 1.4426950408889634
        lanes = tl.arange(0, SPLITS)
        mask = lanes < splits
        part = parts_ptr + (row * splits + lanes) * PART
        total = tl.sum(tl.load(part, mask=mask, other=0.0), axis=0)
        if ALG == "entropy":
            moment = tl.sum(tl.load(part + 1, mask=mask, other=0.0), axis=0)
            entropy = tl.log(total) - moment * inverse / total
            value = -tl.where(entropy < 0, 0.0, entropy)
        elif ALG == "maskgit_plus":
            if FILTERED:
                value = tl.where(ordered_key(value, SHIFT) >= tl.load(thresholds_ptr + row), value, float("-inf"))
            value = tl.exp2((value - m) * c) / total
        else:
            first = tl.load(part + 2, mask=mask, other=float("-inf"))
            second = tl.load(part + 3, mask=mask, other=float("-inf"))
            # The largest is the row's maximum, exactly: it is a logit.
            _, others = _two_largest(first, second, SPLITS)
            value = (1.0 - tl.exp2((others - m) * c)) / total
    tl.store(out_ptr + row, tl.where(m != m, m, value))


@ranged
def unmask_confidence(
    logits: torch.Tensor, tokens: torch.Tensor, alg: str, temperature: float, top_k: int, top_p: float
) -> torch.Tensor:
    """Confidence [N] float32; see :func:`entrgi_kernels.backends.eager.unmask_confidence`."""
    logits = rows_of(logits)
    n, v = logits.shape
    statistics = row_statistics(logits, temperature)
    filtered = alg != "anchor" and is_filtered(v, top_k, top_p)
    if alg == "entropy" and not filtered:
        return -statistics.entropy
    thresholds = statistics.maximum
    if filtered:
        thresholds = filter_thresholds(logits, statistics, temperature, top_k, top_p)
    target = config.target(logits.device)
    entry = target.architecture.confidence
    length, splits = entry.slices(n, v, target.sms)
    parts = torch.empty((n, splits, _PART), dtype=torch.float32, device=logits.device)
    out = torch.empty(n, dtype=torch.float32, device=logits.device)
    read = logits, logits.stride(0), statistics.maximum, thresholds
    flags: Any = dict(ALG=alg, FILTERED=filtered, SHIFT=KEY_SHIFT[logits.dtype], PART=_PART)
    if alg != "anchor":
        launch(
            _confidence_kernel,
            (n, splits),
            *read,
            parts,
            v,
            length,
            splits,
            1.0 / temperature,
            num_warps=entry.num_warps,
            BLOCK_V=entry.block,
            **entry.lanes(logits.element_size(), aligned(logits)),
            **flags,
        )
    launch(
        _confidence_merge_kernel,
        (n,),
        *read,
        vector(tokens),
        parts,
        out,
        v,
        splits,
        1.0 / temperature,
        num_warps=1,
        SPLITS=config.MOST_SPLITS,
        **flags,
    )
    return out
