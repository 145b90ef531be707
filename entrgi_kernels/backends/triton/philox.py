"""Philox4x32-10 and the exponential variate of docs/philox.md, as Triton device functions.

Written out rather than taken from ``tl.philox``, whose counter layout belongs to Triton and may change under us: these
bits are a contract with every other backend. Products of 32-bit words are formed in 64 bits, which NVPTX turns into
one ``mul.wide.u32`` and the interpreter evaluates exactly.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def philox4x32(c0, c1, c2, c3, k0, k1):
    """Ten rounds on uint32 words (any broadcastable shapes); returns four uint32 words."""
    for _ in tl.static_range(10):
        product0 = c0.to(tl.uint64) * 0xD2511F53
        product1 = c2.to(tl.uint64) * 0xCD9E8D57
        n0 = (product1 >> 32).to(tl.uint32) ^ c1 ^ k0
        n2 = (product0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = product1.to(tl.uint32)
        c3 = product0.to(tl.uint32)
        c0 = n0
        c2 = n2
        k0 = (k0.to(tl.uint64) + 0x9E3779B9).to(tl.uint32)
        k1 = (k1.to(tl.uint64) + 0xBB67AE85).to(tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def low_word(x):
    """Low 32 bits of an int64, as uint32."""
    return (x & 0xFFFFFFFF).to(tl.uint32)


@triton.jit
def high_word(x):
    """High 32 bits of an int64, as uint32."""
    return ((x >> 32) & 0xFFFFFFFF).to(tl.uint32)


@triton.jit
def words_of_pairs(pair, rng_ptr, row_key):
    """Words of vocabulary entries 2 * pair and 2 * pair + 1: (x0, x1, x2, x3), one Philox call for two entries."""
    seed = tl.load(rng_ptr)
    step = tl.load(rng_ptr + 1)
    c0 = pair.to(tl.uint32)
    zero = c0 * 0
    return philox4x32(
        c0, zero + low_word(step), zero + low_word(row_key), zero + high_word(row_key), low_word(seed), high_word(seed)
    )


@triton.jit
def log_exponential(high, low):
    """log E in float32, E the standard exponential variate of the 64-bit word (high, low).

    Neither tail is cut. Below one half, -log1p(-u) = 2 atanh(u / (2 - u)) by its series (s <= 1/3: eight terms leave
    less than 2^-26), since a fast device logarithm near 1 has only absolute, not relative, accuracy and the winner of a
    race is decided by the relative error of small variates.
    """
    upper = high >= 0x80000000
    # Not ~: the interpreter of Triton 3.6 cannot form it of unsigned words.
    high = tl.where(upper, high ^ 0xFFFFFFFF, high)
    low = tl.where(upper, low ^ 0xFFFFFFFF, low)
    u = high.to(tl.float32) * 2.3283064365386963e-10 + (low.to(tl.float32) + 0.5) * 5.421010862427522e-20
    s = u / (2.0 - u)
    q = s * s
    series = q * (1.0 / 15) + (1.0 / 13)
    series = series * q + (1.0 / 11)
    series = series * q + (1.0 / 9)
    series = series * q + (1.0 / 7)
    series = series * q + (1.0 / 5)
    series = series * q + (1.0 / 3)
    series = series * q + 1.0
    variate = tl.where(upper, -tl.log(u), 2.0 * s * series)
    return tl.log(variate)


@triton.jit
def log_exponential_of(index, rng_ptr, row_key):
    """log E of arbitrary vocabulary entries `index` (int32)."""
    x0, x1, x2, x3 = words_of_pairs(index >> 1, rng_ptr, row_key)
    odd = (index & 1) == 1
    return log_exponential(tl.where(odd, x2, x0), tl.where(odd, x3, x1))
