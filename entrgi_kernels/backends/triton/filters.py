"""What top-k and top-p keep, and a draw from it, without a sort.

The few entries that can matter are gathered, the threshold is found among them, and they are raced.

1. cut. Entries below probability (1 - top_p) / (2 V) weigh less than 1 - top_p together, so none of them is kept. Where
   a sample of the row says that more entries than its list holds lie above that cut-off, it is raised.
2. collect. One read of the row writes what reaches the cut-off into a short list (value and index) a slice.
3. pick. One program a row searches the ordered bit pattern for the smallest key t whose strictly larger entries weigh
   at most top_p and number fewer than top_k (both conditions are monotone in t, so one search serves both filters),
   then runs the exponential race over the kept entries alone. The list stays in registers (the first tile of a long
   one), and the search starts between the cut-off and the maximum: two or three passes.

Nothing kept is lost: under a raised cut-off a list is believed only where it weighs more than top_p or numbers top_k,
for then the threshold lies inside. Where it does not, all of it is kept, and the row itself is searched, by the same
code, between the first cut-off and the raised one. A row whose list overflows is searched up to its maximum.

Masses are summed in a fixed order, so the kept set does not change from run to run. Noise depends on (seed, step, row
key, index) alone. An unfiltered draw is another kernel's (:mod:`.sample_tokens`).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl

from . import config
from .launch import Matrix, Vector, aligned, cdiv, kernel, launch, vector
from .philox import log_exponential_of
from .statistics import RowStatistics, tile_offsets

# A float32 that came from a narrower type ends in zeros: those bits of the key need no search.
KEY_SHIFT = {torch.bfloat16: 16, torch.float16: 13, torch.float32: 0}
# A cut-off that leaves too many candidates is raised by factors of sqrt 2 in probability: 2^_DOUBLINGS - 1 of them at
# most. Of the benchmarks' rows 30 to 40% have more above the first cut-off than their list holds.
_RAISE = tl.constexpr(0.34657359027997264)
_DOUBLINGS = 5


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
def _first_cut(m, logsum, temperature, log_cut):
    """The logit of the probability exp(`log_cut`): what lies below is left out."""
    return m + temperature * (logsum + log_cut)


@kernel()
def _cut_kernel(
    logits_ptr: Matrix,
    stride_n,
    maximum_ptr: Vector,
    logsum_ptr: Vector,
    raises_ptr: Matrix,
    cuts_ptr: Matrix,
    v,
    temperature,
    log_cut,
    most,
    SHIFT: tl.constexpr,
    CHUNKS: tl.constexpr,
    DOUBLINGS: tl.constexpr,
):
    """How often a row's cut-off is raised until a sample says that at most `most` entries reach it; and the cut-off.

    The sample is 32 neighbours in each of CHUNKS stretches of the row, at another place in each: many vocabularies have
    their frequent entries first, and those would stand for the whole of the first stretch.
    """
    row = tl.program_id(0).to(tl.int64)
    m = tl.load(maximum_ptr + row)
    first = _first_cut(m, tl.load(logsum_ptr + row), temperature, log_cut)
    apart = tl.maximum(32, v // CHUNKS // 16 * 16)
    chunk = tl.arange(0, CHUNKS)
    shift = (((chunk * 40503 + 20000) & 0xFFFF) >> 4) * (apart - 32) >> 12
    place = (chunk * apart + shift // 16 * 16)[:, None] + tl.arange(0, 32)[None, :]
    x = tl.load(logits_ptr + row * stride_n + place, mask=place < v, other=float("-inf")).to(tl.float32)  # [CHUNKS, 32]
    allowed = most * (tl.minimum(v, CHUNKS * 32).to(tl.float32) / v)
    raises = 0
    if tl.sum(tl.sum((x >= first).to(tl.int32), axis=1), axis=0) > allowed:
        # The least number of raises that does, bit by bit: fewer are not enough.
        for bit in tl.static_range(DOUBLINGS):
            more = raises + (1 << (DOUBLINGS - 1 - bit))
            reach = tl.sum(tl.sum((x >= first + (more - 1) * temperature * _RAISE).to(tl.int32), axis=1), axis=0)
            raises = tl.where(reach > allowed, more, raises)
    tl.store(raises_ptr + row, raises)
    # No higher than the maximum, and lowered to where its key begins: what has at least that key is what is listed.
    key = ordered_key(tl.minimum(first + raises * temperature * _RAISE, m), SHIFT) << SHIFT
    tl.store(cuts_ptr + row, (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True))


@kernel("splits")
def _collect_kernel(
    logits_ptr: Matrix,
    stride_n,
    cuts_ptr: Matrix,
    values_ptr: Matrix,
    index_ptr: Vector,
    counts_ptr: Matrix,
    v,
    slice_length,
    splits,
    capacity,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
    WORDS: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """The entries of one slice of one row that reach the cut-off, in a fixed order.

    A slice is every so many-th stretch of LANES * WIDTH entries: candidates crowd where a vocabulary has its frequent
    entries, and neighbouring stretches fill different lists.

    A thread marks the entries that pass in a word of bits for each tile. Only after WORDS tiles do threads wait for
    each other, to learn where in the list each word's entries go.
    """
    tl.static_assert(BLOCK_V <= 32 * LANES, "a thread marks at most 32 entries of a tile")
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    base = logits_ptr + row * stride_n
    cut = tl.load(cuts_ptr + row)
    segment = row * splits + split
    out = segment * capacity
    STRETCH: tl.constexpr = LANES * WIDTH
    STEPS: tl.constexpr = BLOCK_V // STRETCH
    tiles = slice_length // BLOCK_V
    apart = splits * STRETCH
    offsets = tile_offsets(1, LANES, WIDTH) + tl.arange(0, STEPS)[:, None, None] * apart
    bits = 1 << (tl.arange(0, STEPS)[:, None, None] * WIDTH + tl.arange(0, WIDTH)[None, None, :])
    words = tl.arange(0, WORDS)[:, None]
    # Where a word's first entry lies, after that of its block of WORDS tiles.
    origin = words * (STEPS * apart) + tl.arange(0, LANES)[None, :] * WIDTH
    count = 0
    for first in range(0, tiles, WORDS):
        start = first * STEPS * apart + split * STRETCH
        marks = tl.zeros([WORDS, LANES], tl.int32)  # [WORDS, L]
        for word in range(0, tl.minimum(WORDS, tiles - first)):
            index = start + word * (STEPS * apart) + offsets
            x = tl.load(base + index, mask=index < v, other=float("-inf")).to(tl.float32)  # [S, L, W]
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
def _entries(base, numbers, length, counts_ptr, room, capacity, LISTED: tl.constexpr):
    """float32 entries `numbers` of `length` in a row's lists at `base` or, not LISTED, of the row; where they lie.

    Of each list, one a slice, with room for `capacity`, the first `room` places are numbered: as many as the fullest
    takes. Numbers without an entry yield -inf.
    """
    inside = numbers < length
    if LISTED:
        split = numbers // room
        place = numbers - split * room
        inside &= place < tl.load(counts_ptr + split, mask=inside, other=0)
        place += split * capacity
    else:
        # A choice, so that Triton sees no neighbours: with wide loads each thread would hand most of what it has loaded
        # over to others, through shared memory.
        place = tl.where(inside, numbers, 0)
    return tl.load(base + place, mask=inside, other=float("-inf")).to(tl.float32), place


@triton.jit
def _tile(
    base, first, length, counts_ptr, room, capacity, LANES: tl.constexpr, BLOCK_V: tl.constexpr, LISTED: tl.constexpr
):
    """:func:`_entries` number `first` and the next, [BLOCK_V / LANES, LANES]: a lane (a thread) has a column."""
    x, _ = _entries(base, first + tl.arange(0, BLOCK_V), length, counts_ptr, room, capacity, LISTED)
    return x.reshape([BLOCK_V // LANES, LANES])


@triton.jit
def _weigh(masses, totals, x, m, c, lo, hi, SHIFT: tl.constexpr, PIVOTS: tl.constexpr):
    """`masses` and `totals` [PIVOTS, LANES] with those of the entries `x` [R, LANES] above each pivot added."""
    e = tl.exp2((x - m) * c)
    keys = ordered_key(x, SHIFT)
    pivots = tl.arange(0, PIVOTS)[:, None]
    for pivot in tl.static_range(PIVOTS):
        above = keys > _pivot(lo, hi, pivot, PIVOTS)
        mass = tl.sum(tl.where(above, e, 0.0), axis=0)
        number = tl.sum(above.to(tl.int32), axis=0)
        masses += tl.where(pivots == pivot, mass[None, :], 0.0)
        totals += tl.where(pivots == pivot, number[None, :], 0)
    return masses, totals


@triton.jit
def _pivot(lo, hi, pivot, PIVOTS: tl.constexpr):
    """The pivot (or pivots) number `pivot` of PIVOTS in (lo, hi)."""
    # Keys of float32 are up to 2^32 apart.
    step = tl.maximum((hi - lo).to(tl.uint32, bitcast=True) // (PIVOTS + 1), 1).to(tl.int32, bitcast=True)
    return tl.minimum(lo + step * (pivot + 1), hi - 1)


@triton.jit
def _search(
    x,
    base,
    length,
    counts_ptr,
    room,
    capacity,
    m,
    c,
    limit,
    top_k,
    lo,
    hi,
    below,
    beyond,
    SHIFT: tl.constexpr,
    PIVOTS: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_V: tl.constexpr,
    LISTED: tl.constexpr,
):
    """A key that keeps what the smallest one does whose strictly larger entries weigh <= `limit` and number < top_k.

    Invariant: `hi` satisfies that, `lo` does not. Above them lie `beyond` and at most `below` entries: once one entry
    is left between, it is the smallest that is kept. `x` are the first BLOCK_V entries: they are read once.
    """
    while (hi != lo + 1) & (below - beyond > 1):
        masses = tl.zeros([PIVOTS, LANES], tl.float32)  # [PIVOTS, L]
        totals = tl.zeros([PIVOTS, LANES], tl.int32)
        masses, totals = _weigh(masses, totals, x, m, c, lo, hi, SHIFT, PIVOTS)
        for tile in range(BLOCK_V, length, BLOCK_V):
            more = _tile(base, tile, length, counts_ptr, room, capacity, LANES, BLOCK_V, LISTED)
            masses, totals = _weigh(masses, totals, more, m, c, lo, hi, SHIFT, PIVOTS)
        pivots = _pivot(lo, hi, tl.arange(0, PIVOTS), PIVOTS)
        mass = tl.sum(masses, axis=1)
        number = tl.sum(totals, axis=1)
        good = (mass <= limit) & (number < top_k)
        lo, hi = tl.max(tl.where(good, lo, pivots), axis=0), tl.min(tl.where(good, pivots, hi), axis=0)
        below = tl.min(tl.where(good, below, number), axis=0)
        beyond = tl.max(tl.where(good, number, beyond), axis=0)
    return lo + 1


@triton.jit
def _among_listed(
    base,
    length,
    number,
    counts_ptr,
    room,
    capacity,
    m,
    c,
    limit,
    top_k,
    lo,
    hi,
    SHIFT: tl.constexpr,
    PIVOTS: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """:func:`_search` among a row's listed entries, all above `lo`; and whether all of them are kept.

    There are `number` of them under `length` numbers of :func:`_entries`.
    """
    x = _tile(base, 0, length, counts_ptr, room, capacity, LANES, BLOCK_V, True)  # [R, L], R a lane
    masses = tl.sum(tl.exp2((x - m) * c), axis=0)
    for tile in range(BLOCK_V, length, BLOCK_V):
        more = _tile(base, tile, length, counts_ptr, room, capacity, LANES, BLOCK_V, True)
        masses += tl.sum(tl.exp2((more - m) * c), axis=0)
    everything = (tl.sum(masses, axis=0) <= limit) & (number < top_k)
    threshold = lo + 1
    if everything == 0:
        threshold = _search(
            *(x, base, length, counts_ptr, room, capacity, m, c, limit, top_k, lo, hi, number, number * 0),
            *(SHIFT, PIVOTS, LANES, BLOCK_V, True),
        )
    return threshold, everything


@triton.jit
def _race(
    base,
    index_ptr,
    length,
    counts_ptr,
    room,
    capacity,
    m,
    inverse,
    threshold,
    rng_ptr,
    row_key,
    SHIFT: tl.constexpr,
    BLOCK_V: tl.constexpr,
    LISTED: tl.constexpr,
):
    """Index of the best score among entries whose key reaches `threshold`; the lowest index of ties.

    The index of a LISTED entry is at `index_ptr`, that of another its place.
    """
    lanes = tl.arange(0, BLOCK_V)
    best = tl.full([BLOCK_V], float("-inf"), tl.float32)  # [BV]
    token = tl.full([BLOCK_V], 2147483647, tl.int32)
    for tile in range(0, length, BLOCK_V):
        x, index = _entries(base, tile + lanes, length, counts_ptr, room, capacity, LISTED)
        kept = (ordered_key(x, SHIFT) >= threshold) & (x > float("-inf"))
        if tl.max(kept.to(tl.int32), axis=0) > 0:
            if LISTED:
                index = tl.load(index_ptr + index, mask=kept, other=0)
            noise = log_exponential_of(index, rng_ptr, row_key)
            score = tl.where(kept, (x - m) * inverse - noise, float("-inf"))
            better = (score > best) | ((score == best) & (index < token) & kept)
            best = tl.where(better, score, best)
            token = tl.where(better, index, token)
    top = tl.max(best, axis=0)
    first = tl.min(tl.where(best == top, token, 2147483647), axis=0)
    return tl.where(top > float("-inf"), first, -1)


@kernel("splits", "top_k")
def _pick_kernel(
    logits_ptr: Matrix,
    stride_n,
    maximum_ptr: Vector,
    logsum_ptr: Vector,
    values_ptr: Matrix,
    index_ptr: Vector,
    counts_ptr: Matrix,
    raises_ptr: Matrix,
    cuts_ptr: Matrix,
    rng_ptr: Vector,
    keys_ptr: Vector,
    tokens_ptr: Vector,
    thresholds_ptr: Vector,
    v,
    splits,
    inverse,
    temperature,
    log_cut,
    top_p,
    top_k,
    capacity,
    DRAW: tl.constexpr,
    SPLITS: tl.constexpr,
    SHIFT: tl.constexpr,
    PIVOTS: tl.constexpr,
    LANES: tl.constexpr,
    BLOCK_V: tl.constexpr,
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
        number = tl.sum(found, axis=0)
        room = tl.maximum(tl.max(found, axis=0), 1)
        length = splits * room
        values = values_ptr + row * splits * capacity
        base = logits_ptr + row * stride_n
        hi = ordered_key(m, SHIFT)
        lo = tl.minimum(ordered_key(tl.load(cuts_ptr + row), SHIFT), hi) - 1
        reached = lo + 1
        beyond = 0
        whole = room > capacity
        if whole == 0:
            reached, everything = _among_listed(
                *(values, length, number, counts, room, capacity, m, c, limit, top_k, lo, hi),
                *(SHIFT, PIVOTS, LANES, BLOCK_V),
            )
            # The first cut-off of top-p is low enough. Under any other more may be kept than is listed, unless that
            # weighs more than top_p or numbers top_k.
            whole = everything & ((tl.load(raises_ptr + row) > 0) | (top_p >= 1.0))
            hi = tl.where(whole, lo, hi)
            beyond = tl.where(whole, number, beyond)
        if whole:
            lo = ordered_key(m * 0 - float("inf"), SHIFT) - 1
            if top_p < 1.0:
                first = ordered_key(_first_cut(m, logsum, temperature, log_cut), SHIFT)
                lo = tl.minimum(first, hi) - 1
            x = _tile(base, 0, v, counts, room, capacity, LANES, BLOCK_V, False)
            reached = _search(
                *(x, base, v, counts, room, capacity, m, c, limit, top_k, lo, hi, v, beyond),
                *(SHIFT, PIVOTS, LANES, BLOCK_V, False),
            )
        threshold = reached
        if DRAW:
            key = tl.load(keys_ptr + row)
            indices = index_ptr + row * splits * capacity
            if whole:
                token = _race(
                    *(base, indices, v, counts, room, capacity, m, inverse, threshold, rng_ptr, key),
                    *(SHIFT, BLOCK_V // 2, False),
                )
            else:
                token = _race(
                    *(values, indices, length, counts, room, capacity, m, inverse, threshold, rng_ptr, key),
                    *(SHIFT, BLOCK_V // 2, True),
                )
    if DRAW:
        tl.store(tokens_ptr + row, token.to(tl.int64))  # type: ignore[attr-defined]
    else:
        tl.store(thresholds_ptr + row, threshold)


def is_filtered(v: int, top_k: int, top_p: float) -> bool:
    """Whether top-k or top-p can drop anything."""
    return top_p < 1.0 or 0 < top_k < v


def filtered(
    logits: torch.Tensor,
    maximum: torch.Tensor,
    logsum: torch.Tensor,
    temperature: float,
    top_k: int,
    top_p: float,
    rng: torch.Tensor | None,
    keys: torch.Tensor | None,
) -> torch.Tensor:
    """Tokens int64 [N] when `rng` and `keys` are given, else each row's threshold as an ordered int32 key [N]."""
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
    draw = rng is not None and keys is not None
    out = torch.empty(n, dtype=torch.int64 if draw else torch.int32, device=device)
    # Below the cut-off of top-p nothing is kept. For top-k alone any will do that leaves k entries.
    missing = 1.0 - top_p if top_p < 1.0 else 1e-3
    log_cut = math.log(missing) - math.log(2.0 * v)
    launch(
        _cut_kernel,
        (n,),
        logits,
        logits.stride(0),
        maximum,
        logsum,
        raises,
        cuts,
        v,
        temperature,
        log_cut,
        capacity * splits * entry.use if v > capacity else float(v),
        num_warps=entry.cut_warps,
        SHIFT=KEY_SHIFT[logits.dtype],
        CHUNKS=entry.sample // 32,
        DOUBLINGS=_DOUBLINGS,
    )
    launch(
        _collect_kernel,
        (n, splits),
        logits,
        logits.stride(0),
        cuts,
        values,
        index,
        counts,
        v,
        length,
        splits,
        capacity,
        num_warps=entry.collect.num_warps,
        WORDS=entry.words,
        BLOCK_V=entry.collect.block,
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
        vector(keys) if draw and keys is not None else unused,
        out,
        out,
        v,
        splits,
        1.0 / temperature,
        temperature,
        log_cut,
        top_p if top_p < 1.0 else math.inf,
        top_k if 0 < top_k < v else v + 1,
        capacity,
        num_warps=entry.num_warps,
        DRAW=draw,
        SPLITS=config.MOST_SPLITS,
        SHIFT=KEY_SHIFT[logits.dtype],
        PIVOTS=entry.pivots,
        LANES=32 * entry.num_warps,
        BLOCK_V=entry.block,
    )
    return out


def filter_thresholds(
    logits: torch.Tensor, statistics: RowStatistics, temperature: float, top_k: int, top_p: float
) -> torch.Tensor:
    """Each row's threshold as an ordered key, int32 [N]: an entry is kept iff its key is at least that."""
    return filtered(logits, statistics.maximum, statistics.logsum, temperature, top_k, top_p, None, None)
