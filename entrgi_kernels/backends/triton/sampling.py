"""Filtered draws without a sort: gather the few entries that can matter, find the threshold among them, race them.

1. collect. Entries below probability (1 - top_p) / (2 V) weigh less than 1 - top_p together, so none of them is kept:
   one read of the row writes the others into a short list (value and index). Where a sample of the row says that
   they are too many for it, the cut-off is raised; the search then proves that the list has all that is kept.
2. pick. One program a row searches the ordered bit pattern for the smallest key t whose strictly larger entries weigh
   at most top_p and number fewer than top_k (both conditions are monotone in t, so one search serves both filters),
   then runs the exponential race over the kept entries alone. A 16-bit logit has 16 bits of key and the search starts
   between the cut-off and the maximum: two to four short passes over the list. A row whose list overflows, or has not
   all that is kept (thousands of entries are), is searched and raced in full instead, by the same code.

Masses are summed in a fixed order, so the kept set does not change from run to run. An unfiltered draw is one race over
the whole row, split over programs when rows are few. Noise depends on (seed, step, row key, index) alone.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl

from ..arguments import Draw
from ..ranges import ranged
from . import config
from .launch import aligned, cdiv, kernel, launch, rows_of, vector
from .philox import log_exponential, log_exponential_of, words_of_pairs
from .statistics import RowStatistics, row_statistics, tile_offsets

# A float32 that came from a narrower type ends in zeros: those bits of the key need no search.
_KEY_SHIFT = {torch.bfloat16: 16, torch.float16: 13, torch.float32: 0}
# A cut-off that leaves too many candidates is raised by factors of two in probability (log 2).
_RAISE = tl.constexpr(0.6931471805599453)


@triton.jit
def ordered_key(x, SHIFT: tl.constexpr):
    """int32 keys ordered like the float32 `x`; -0.0 and 0.0 share one."""
    bits = tl.where(x == 0, 0.0, x).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)) >> SHIFT


@triton.jit
def _set_bits(word):
    """How many bits of int32 words are set."""
    pairs = word - ((word >> 1) & 0x55555555)
    fours = (pairs & 0x33333333) + ((pairs >> 2) & 0x33333333)
    return (((fours + (fours >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24


@triton.jit
def _raises(base, v, cut, raise_by, most, CHUNKS: tl.constexpr):
    """How often `cut` is raised until a sample says that at most `most` entries of the row reach it; and the cut then.

    The sample is 32 neighbours in each of CHUNKS stretches of the row, at another place in each: many vocabularies have
    their frequent entries first, and those would stand for the whole of the first stretch.
    """
    apart = tl.maximum(32, v // CHUNKS // 16 * 16)
    chunk = tl.arange(0, CHUNKS)
    shift = (((chunk * 40503 + 20000) & 0xFFFF) >> 4) * (apart - 32) >> 12
    place = (chunk * apart + shift // 16 * 16)[:, None] + tl.arange(0, 32)[None, :]
    x = tl.load(base + place, mask=place < v, other=float("-inf")).to(tl.float32)
    most = most * (tl.minimum(v, CHUNKS * 32).to(tl.float32) / v)
    raises = 0
    while (tl.sum(tl.sum((x >= cut).to(tl.int32), axis=1), axis=0) > most) & (raises < 16):
        raises += 1
        cut += raise_by
    return raises, cut


@kernel("splits")
def _collect_kernel(
    logits_ptr,
    stride_n,
    maximum_ptr,
    logsum_ptr,
    values_ptr,
    index_ptr,
    counts_ptr,
    raises_ptr,
    cuts_ptr,
    v,
    slice_length,
    splits,
    temperature,
    log_cut,
    capacity,
    most,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The entries of one slice of one row that reach the cut-off, in a fixed order.

    A slice is every so many-th stretch of LANES * WIDTH entries: candidates crowd where a vocabulary has its frequent
    entries, and neighbouring stretches fill different lists.

    A thread marks the entries that pass in a word of bits for each tile. Only after WORDS tiles do threads wait for
    each other, to learn where in the list each word's entries go.
    """
    tl.static_assert(BLOCK <= 32 * LANES, "a thread marks at most 32 entries of a tile")
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    base = logits_ptr + row * stride_n
    cut = tl.load(maximum_ptr + row) + temperature * (tl.load(logsum_ptr + row) + log_cut)
    raises, cut = _raises(base, v, cut, temperature * _RAISE, most, BLOCK // 64)
    if split == 0:
        tl.store(raises_ptr + row, raises)
        tl.store(cuts_ptr + row, cut)
    segment = row * splits + split
    out = segment * capacity
    STRETCH: tl.constexpr = LANES * WIDTH
    STEPS: tl.constexpr = BLOCK // STRETCH
    tiles = slice_length // BLOCK
    apart = splits * STRETCH
    offsets = tile_offsets(1, LANES, WIDTH) + tl.arange(0, STEPS)[:, None, None] * apart
    bits = 1 << (tl.arange(0, STEPS)[:, None, None] * WIDTH + tl.arange(0, WIDTH)[None, None, :])
    words = tl.arange(0, WORDS)[:, None]
    # Where a word's first entry lies, after that of its block of WORDS tiles.
    origin = words * (STEPS * apart) + tl.arange(0, LANES)[None, :] * WIDTH
    count = 0
    for first in range(0, tiles, WORDS):
        start = first * STEPS * apart + split * STRETCH
        marks = tl.zeros([WORDS, LANES], tl.int32)
        for word in range(0, tl.minimum(WORDS, tiles - first)):
            index = start + word * (STEPS * apart) + offsets
            x = tl.load(base + index, mask=index < v, other=float("-inf")).to(tl.float32)
            # Entries of -inf carry no mass; the cut-off is finite but for bad rows, where nothing passes.
            marked = tl.sum(tl.sum(tl.where(x >= cut, bits, 0), axis=2), axis=0)
            marks = tl.where(words == word, marked[None, :], marks)
        numbers = _set_bits(marks)
        of_lane = tl.sum(numbers, axis=0)
        found = tl.sum(of_lane, axis=0)
        if (found > 0) & (count < capacity):
            before = count + tl.cumsum(of_lane, axis=0) - of_lane
            place = before[None, :] + tl.cumsum(numbers, axis=0) - numbers
            for _ in range(0, tl.max(tl.max(numbers, axis=0), axis=0)):
                # The place of the lowest set bit, as the exponent of its value.
                lowest = marks & -marks
                value = lowest.to(tl.uint32, bitcast=True).to(tl.float32)
                bit = (value.to(tl.uint32, bitcast=True) >> 23) - 127
                index = start + origin + (bit + bit // WIDTH * (apart - WIDTH)).to(tl.int32)
                fits = (marks != 0) & (place < capacity)
                tl.store(values_ptr + out + place, tl.load(base + index, mask=fits), mask=fits)
                tl.store(index_ptr + out + place, index, mask=fits)
                marks ^= lowest
                place += 1
        count += found
    tl.store(counts_ptr + segment, count)


@triton.jit
def _listed(place, counts_ptr, splits, capacity):
    """Where the candidates number `place` of a row lie: its lists, one a slice, have room for `capacity` each."""
    lies = place
    before = 0
    for split in range(1, splits):
        before += tl.load(counts_ptr + split - 1)
        lies = tl.where(place >= before, split * capacity + place - before, lies)
    return lies


@triton.jit
def _entries(place, inside, values_ptr, row_ptr, listed):
    """float32 entries at `place` of the row's lists or, where they are not `listed`, of the row itself."""
    # Two loads, not one from a chosen address: the compiler for AMD's GPUs stops at a pointer with two origins.
    if listed:
        x = tl.load(values_ptr + place, mask=inside, other=float("-inf"))
    else:
        x = tl.load(row_ptr + place, mask=inside, other=float("-inf"))
    return x.to(tl.float32)


@triton.jit
def _search(
    values_ptr,
    row_ptr,
    listed,
    length,
    counts_ptr,
    splits,
    capacity,
    m,
    c,
    limit,
    top_k,
    lo,
    hi,
    SHIFT: tl.constexpr,
    PIVOTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The smallest key in (lo, hi] whose strictly larger entries weigh at most `limit` and number fewer than top_k.

    Invariant: `hi` satisfies that, and no key up to `lo` needs to be considered.
    """
    lanes = tl.arange(0, BLOCK)
    steps = tl.arange(1, PIVOTS + 1)
    while hi - lo > 1:
        pivots = tl.maximum(lo + ((hi - lo) * steps) // (PIVOTS + 1), lo + 1)
        mass = tl.zeros([PIVOTS], tl.float32)
        number = tl.zeros([PIVOTS], tl.int32)
        for tile in range(0, length, BLOCK):
            place = _listed(tile + lanes, counts_ptr, splits, capacity)
            x = _entries(place, tile + lanes < length, values_ptr, row_ptr, listed)
            e = tl.exp2((x - m) * c)
            above = ordered_key(x, SHIFT)[None, :] > pivots.to(tl.int32)[:, None]
            mass += tl.sum(tl.where(above, e[None, :], 0.0), axis=1)
            number += tl.sum(above.to(tl.int32), axis=1)
        good = (mass <= limit) & (number < top_k)
        lo, hi = tl.max(tl.where(good, lo, pivots), axis=0), tl.min(tl.where(good, pivots, hi), axis=0)
    return hi


@triton.jit
def _race(
    values_ptr,
    row_ptr,
    listed,
    index_ptr,
    length,
    counts_ptr,
    splits,
    capacity,
    m,
    inverse,
    threshold,
    rng_ptr,
    row_key,
    SHIFT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Index of the best score among entries whose key reaches `threshold`; the lowest index of ties.

    The index of a `listed` entry is at `index_ptr`, that of another its place.
    """
    lanes = tl.arange(0, BLOCK)
    best = float("-inf")
    token = -1
    for tile in range(0, length, BLOCK):
        place = _listed(tile + lanes, counts_ptr, splits, capacity)
        x = _entries(place, tile + lanes < length, values_ptr, row_ptr, listed)
        kept = (ordered_key(x, SHIFT) >= threshold) & (x > float("-inf"))
        if tl.max(kept.to(tl.int32), axis=0) > 0:
            index = place
            if listed:
                index = tl.load(index_ptr + place, mask=tile + lanes < length, other=0)
            noise = log_exponential_of(index, rng_ptr, row_key)
            score = tl.where(kept, (x - m) * inverse - noise, float("-inf"))
            top = tl.max(score, axis=0)
            first = tl.min(tl.where(score == top, index, 2147483647), axis=0)
            if (top > best) | ((top == best) & (first < token)):
                best = top
                token = first
    return token


@kernel("splits", "top_k")
def _pick_kernel(
    logits_ptr,
    stride_n,
    maximum_ptr,
    logsum_ptr,
    values_ptr,
    index_ptr,
    counts_ptr,
    raises_ptr,
    cuts_ptr,
    rng_ptr,
    rows_ptr,
    tokens_ptr,
    thresholds_ptr,
    v,
    splits,
    inverse,
    top_p,
    top_k,
    capacity,
    DRAW: tl.constexpr,
    SPLITS: tl.constexpr,
    SHIFT: tl.constexpr,
    PIVOTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    m = tl.load(maximum_ptr + row)
    logsum = tl.load(logsum_ptr + row)
    token = -1
    threshold = 0
    if m == m:
        c = inverse * 1.4426950408889634
        limit = top_p * tl.exp(logsum)
        counts = counts_ptr + row * splits
        split = tl.arange(0, SPLITS)
        found = tl.load(counts + split, mask=split < splits, other=0)
        hi = ordered_key(m, SHIFT).to(tl.int64)
        least = tl.minimum(ordered_key(tl.load(cuts_ptr + row), SHIFT).to(tl.int64), hi)
        doubtful = (tl.load(raises_ptr + row) > 0) | (top_p >= 1.0)
        listed = tl.max(found, axis=0) <= capacity
        values = values_ptr + row * splits * capacity
        base = logits_ptr + row * stride_n
        length = tl.sum(found, axis=0)
        lists = splits
        lo = least - 1
        searching = True
        while searching:
            if listed == 0:
                # The whole row, from the smallest key that the dtype has.
                length = v
                lists = 1
                lo = hi * 0 - (2147483647 >> SHIFT) - 2
            threshold = _search(
                *(values, base, listed, length, counts, lists, capacity, m, c, limit, top_k, lo, hi),
                *(SHIFT, PIVOTS, BLOCK),
            ).to(tl.int32)
            # The first cut-off of top-p is low enough. Any other is where what lies above it weighs more than top_p or
            # numbers top_k, and the threshold is then above it.
            searching = listed & (threshold <= least) & doubtful
            listed = listed & (searching == 0)
        if DRAW:
            key = tl.load(rows_ptr + row)
            indices = index_ptr + row * splits * capacity
            token = _race(
                *(values, base, listed, indices, length, counts, lists, capacity, m, inverse, threshold, rng_ptr, key),
                *(SHIFT, BLOCK),
            )
    if DRAW:
        tl.store(tokens_ptr + row, token.to(tl.int64))
    else:
        tl.store(thresholds_ptr + row, threshold)


@kernel("splits")
def _race_kernel(
    logits_ptr,
    stride_n,
    maximum_ptr,
    rng_ptr,
    rows_ptr,
    scores_ptr,
    places_ptr,
    v,
    slice_length,
    splits,
    inverse,
    BLOCK: tl.constexpr,
):
    """Unfiltered race over one slice of one row; a Philox call serves two neighbouring entries."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    base = logits_ptr + row * stride_n
    start = split * slice_length
    end = tl.minimum(start + slice_length, v)
    m = tl.load(maximum_ptr + row)
    key = tl.load(rows_ptr + row)
    lanes = tl.arange(0, BLOCK)
    pairs = tl.arange(0, BLOCK // 2)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    place = start + lanes
    for tile in range(start, end, BLOCK):
        index = tile + lanes
        x = tl.load(base + index, mask=index < end, other=float("-inf")).to(tl.float32)
        x0, x1, x2, x3 = words_of_pairs((tile >> 1) + pairs, rng_ptr, key)
        noise = log_exponential(tl.interleave(x0, x2), tl.interleave(x1, x3))
        score = (x - m) * inverse - noise
        better = score > best
        best = tl.where(better, score, best)
        place = tl.where(better, index, place)
    top = tl.max(best, axis=0)
    tl.store(scores_ptr + row * splits + split, top)
    tl.store(places_ptr + row * splits + split, tl.min(tl.where(best == top, place, 2147483647), axis=0))


@kernel("splits")
def _race_merge_kernel(maximum_ptr, scores_ptr, places_ptr, tokens_ptr, splits, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    mask = lanes < splits
    scores = tl.load(scores_ptr + row * splits + lanes, mask=mask, other=float("-inf"))
    places = tl.load(places_ptr + row * splits + lanes, mask=mask, other=2147483647)
    token = tl.min(tl.where(scores == tl.max(scores, axis=0), places, 2147483647), axis=0)
    m = tl.load(maximum_ptr + row)
    tl.store(tokens_ptr + row, tl.where(m == m, token, -1).to(tl.int64))


def is_filtered(v: int, top_k: int, top_p: float) -> bool:
    """Whether top-k or top-p can drop anything."""
    return top_p < 1.0 or 0 < top_k < v


def _filtered(
    logits: torch.Tensor,
    maximum: torch.Tensor,
    logsum: torch.Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    rng: torch.Tensor | None,
    rows: torch.Tensor | None,
) -> torch.Tensor:
    """Tokens int64 [N] when `rng` and `rows` are given, else each row's threshold as an ordered int32 key [N]."""
    n, v = logits.shape
    device = logits.device
    target = config.target(device)
    entry = target.architecture.sample
    length, splits = entry.collect.slices(n, v, target.sms)
    capacity = min(length, max(entry.capacity_least, cdiv(v, entry.capacity_share * splits * 32) * 32))
    values = torch.empty((n, splits, capacity), dtype=logits.dtype, device=device)
    index = torch.empty((n, splits, capacity), dtype=torch.int32, device=device)
    counts = torch.empty((n, splits), dtype=torch.int32, device=device)
    raises = torch.empty(n, dtype=torch.int32, device=device)
    cuts = torch.empty(n, dtype=torch.float32, device=device)
    draw = rng is not None and rows is not None
    out = torch.empty(n, dtype=torch.int64 if draw else torch.int32, device=device)
    # Below the cut-off of top-p nothing is kept. For top-k alone any will do that leaves k entries.
    missing = 1.0 - top_p if top_p < 1.0 else 1e-3
    log_cut = math.log(missing) - math.log(2.0 * v)
    launch(
        _collect_kernel,
        (n, splits),
        logits,
        logits.stride(0),
        maximum,
        logsum,
        values,
        index,
        counts,
        raises,
        cuts,
        v,
        length,
        splits,
        temperature,
        log_cut,
        capacity,
        capacity * splits // 2 if v > capacity else capacity,
        num_warps=entry.collect.num_warps,
        WORDS=entry.words,
        BLOCK=entry.collect.block,
        **entry.collect.lanes(logits.element_size(), aligned(logits)),
    )
    unused: Any = counts
    launch(
        _pick_kernel,
        (n,),
        logits,
        logits.stride(0),
        maximum,
        logsum,
        values,
        index,
        counts,
        raises,
        cuts,
        rng if draw else unused,
        vector(rows) if draw and rows is not None else unused,
        out,
        out,
        v,
        splits,
        1.0 / temperature,
        top_p if top_p < 1.0 else math.inf,
        top_k if 0 < top_k < v else v + 1,
        capacity,
        num_warps=entry.num_warps,
        DRAW=draw,
        SPLITS=config.MOST_SPLITS,
        SHIFT=_KEY_SHIFT[logits.dtype],
        PIVOTS=entry.pivots,
        BLOCK=entry.block,
    )
    return out


def filter_thresholds(
    logits: torch.Tensor, statistics: RowStatistics, temperature: float, top_k: int, top_p: float
) -> torch.Tensor:
    """Each row's threshold as an ordered key, int32 [N]: an entry is kept iff its key is at least that."""
    return _filtered(logits, statistics.maximum, statistics.logsum, temperature, top_k, top_p, None, None)


def drawn(logits: torch.Tensor, maximum: torch.Tensor, logsum: torch.Tensor, draw: Draw) -> torch.Tensor:
    """Tokens [N] int64 from dense-rowed `logits` whose maximum and logsum (at `temperature`) are known; -1 if bad."""
    (n, v), temperature = logits.shape, draw.temperature
    rng, rows = draw.rng.contiguous(), draw.keys
    if is_filtered(v, draw.top_k, draw.top_p):
        return _filtered(logits, maximum, logsum, temperature, draw.top_k, draw.top_p, rng, rows)
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
        vector(rows),
        scores,
        places,
        v,
        length,
        splits,
        1.0 / temperature,
        num_warps=entry.num_warps,
        BLOCK=entry.block,
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
        BLOCK=config.MOST_SPLITS,
    )
    return tokens


@ranged
def sample_tokens(logits: torch.Tensor, draw: Draw) -> torch.Tensor:
    """Tokens [N] int64; see :func:`entrgi_kernels.backends.eager.sample_tokens`."""
    logits = rows_of(logits)
    if draw.temperature == 0:
        statistics = row_statistics(logits, 1.0, argmax=True)
        return torch.where(statistics.maximum.isnan(), -1, statistics.argmax)
    statistics = row_statistics(logits, draw.temperature)
    return drawn(logits, statistics.maximum, statistics.logsum, draw)
