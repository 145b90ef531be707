"""Hard tokens. Unfiltered: one exponential race over the whole row, split over programs when rows are few.

An exponential variate is at least the uniform number that it is made of. So what an entry scores at most is known
before a logarithm is taken, and only the few tiles that could hold a new best take any. A filtered draw is a race of
what :mod:`.filters` keeps.
"""

from __future__ import annotations

import torch
import triton.language as tl

from ..arguments import Draw
from ..ranges import ranged
from . import config
from .filters import filtered, is_filtered
from .launch import Matrix, Vector, kernel, launch, rows_of, vector
from .philox import log_exponential, words_of_pairs
from .statistics import row_statistics


@kernel("splits")
def _race_kernel(
    logits_ptr: Matrix,
    stride_n,
    maximum_ptr: Vector,
    rng_ptr: Vector,
    keys_ptr: Vector,
    scores_ptr: Matrix,
    places_ptr: Matrix,
    v,
    slice_length,
    splits,
    inverse,
    BLOCK_V: tl.constexpr,
):
    """Unfiltered race over one slice of one row; a Philox call serves two neighbouring entries."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    base = logits_ptr + row * stride_n
    start = split * slice_length
    end = tl.minimum(start + slice_length, v)
    m = tl.load(maximum_ptr + row)
    key = tl.load(keys_ptr + row)
    pairs = tl.arange(0, BLOCK_V // 2)  # [BV / 2], as all that is made of it
    c = inverse * 1.4426950408889634
    top = float("-inf")
    place = 2147483647
    for tile in range(start, end, BLOCK_V):
        even = tile + 2 * pairs
        x0 = tl.load(base + even, mask=even < end, other=float("-inf")).to(tl.float32) - m
        x1 = tl.load(base + even + 1, mask=even + 1 < end, other=float("-inf")).to(tl.float32) - m
        high0, low0, high1, low1 = words_of_pairs((tile >> 1) + pairs, rng_ptr, key)
        # An exponential variate is at least high / 2^32, so a score at most (x - m) / T - log(high / 2^32): a tile
        # without an entry that could reach the best so far, roundings allowed for, needs no logarithms.
        allowed = 32.01 + 1e-6 * tl.abs(top) - top * 1.4426950408889634
        near = (high0.to(tl.float32) <= tl.exp2(x0 * c + allowed)) | (high1.to(tl.float32) <= tl.exp2(x1 * c + allowed))
        # A branch before a reduction, as in triton-lang/triton #11153; nothing wrong has been seen.
        if tl.max(near.to(tl.int32), axis=0) > 0:
            score0 = x0 * inverse - log_exponential(high0, low0)
            score1 = x1 * inverse - log_exponential(high1, low1)
            best = tl.max(tl.maximum(score0, score1), axis=0)
            index = tl.where(score0 == best, even, tl.where(score1 == best, even + 1, 2147483647))
            place = tl.where(best > top, tl.min(index, axis=0), place)
            top = tl.maximum(best, top)
    tl.store(scores_ptr + row * splits + split, top)
    tl.store(places_ptr + row * splits + split, place)


@kernel("splits")
def _race_merge_kernel(
    maximum_ptr: Vector, scores_ptr: Matrix, places_ptr: Matrix, tokens_ptr: Vector, splits, SPLITS: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, SPLITS)
    mask = lanes < splits
    scores = tl.load(scores_ptr + row * splits + lanes, mask=mask, other=float("-inf"))  # [SPLITS]
    places = tl.load(places_ptr + row * splits + lanes, mask=mask, other=2147483647)
    token = tl.min(tl.where(scores == tl.max(scores, axis=0), places, 2147483647), axis=0)
    m = tl.load(maximum_ptr + row)
    tl.store(tokens_ptr + row, tl.where(m == m, token, -1).to(tl.int64))


def _unfiltered(
    logits: torch.Tensor, maximum: torch.Tensor, rng: torch.Tensor, keys: torch.Tensor, temperature: float
) -> torch.Tensor:
    """Tokens [N] int64 from dense-rowed `logits` [N, V] with their `maximum` [N]; -1 where that is NaN."""
    n, v = logits.shape
    target = config.target(logits.device)
    entry = target.architecture.sample.race
    length, splits = entry.slices(n, v, target.sms)
    scores = torch.empty((n, splits), dtype=torch.float32, device=logits.device)
    places = torch.empty((n, splits), dtype=torch.int32, device=logits.device)
    tokens = torch.empty(n, dtype=torch.int64, device=logits.device)
    launch(
        _race_kernel,
        (n, splits),
        logits,
        logits.stride(0),
        maximum,
        rng,
        vector(keys),
        scores,
        places,
        v,
        length,
        splits,
        1.0 / temperature,
        num_warps=entry.num_warps,
        BLOCK_V=entry.block,
    )
    launch(
        _race_merge_kernel,
        (n,),
        maximum,
        scores,
        places,
        tokens,
        splits,
        num_warps=1,
        SPLITS=config.MOST_SPLITS,
    )
    return tokens


def drawn(logits: torch.Tensor, maximum: torch.Tensor, logsum: torch.Tensor, draw: Draw) -> torch.Tensor:
    """Tokens [N] int64 from dense-rowed `logits` whose maximum and logsum (at `temperature`) are known; -1 if bad."""
    rng, keys, temperature, top_k, top_p = draw
    rng = rng.contiguous()
    if is_filtered(logits.shape[1], top_k, top_p):
        return filtered(logits, maximum, logsum, temperature, top_k, top_p, rng, keys)
    return _unfiltered(logits, maximum, rng, keys, temperature)


@ranged
def sample_tokens(logits: torch.Tensor, draw: Draw) -> torch.Tensor:
    """Tokens [N] int64; see :func:`entrgi_kernels.backends.eager.sample_tokens`."""
    logits = rows_of(logits)
    if draw.temperature == 0:
        statistics = row_statistics(logits, 1.0, argmax=True)
        return torch.where(statistics.maximum.isnan(), -1, statistics.argmax)
    statistics = row_statistics(logits, draw.temperature)
    return drawn(logits, statistics.maximum, statistics.logsum, draw)
