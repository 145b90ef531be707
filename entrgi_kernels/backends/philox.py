"""Counter-based random numbers in plain torch: the specification of docs/philox.md, executable.

Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011). Unsigned 32-bit words are held
in int64 tensors: a product of two of them fits modulo 2^64, and its bits are right whatever the sign.
"""

from __future__ import annotations

import torch

_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_LOW = 0xFFFFFFFF
ROUNDS = 10


def philox4x32(
    counter: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    key: tuple[torch.Tensor, torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ten rounds of Philox4x32.

    Args:
        counter: four broadcastable int64 tensors of words in [0, 2^32).
        key: two broadcastable int64 tensors of words in [0, 2^32).

    Returns:
        Four int64 tensors of words in [0, 2^32).
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(ROUNDS):
        product0, product1 = c0 * _M0, c2 * _M1
        hi0, lo0 = (product0 >> 32) & _LOW, product0 & _LOW
        hi1, lo1 = (product1 >> 32) & _LOW, product1 & _LOW
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
    return c0, c1, c2, c3


def words(rng: torch.Tensor, rows: torch.Tensor, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The two words (high, low) that belong to vocabulary entries of rows.

    Args:
        rng: int64 [2], (seed, step).
        rows: int64 row keys, broadcastable with `index`.
        index: int64 vocabulary indices.

    Returns:
        (high, low), int64 tensors of words in [0, 2^32), of the broadcast shape.
    """
    seed, step = rng[0], rng[1]
    rows, index = torch.broadcast_tensors(rows, index)
    key = (seed & _LOW, (seed >> 32) & _LOW)
    x0, x1, x2, x3 = philox4x32((index >> 1, step & _LOW, rows & _LOW, (rows >> 32) & _LOW), key)
    odd = (index & 1).bool()
    return torch.where(odd, x2, x0), torch.where(odd, x3, x1)


def exponential(rng: torch.Tensor, rows: torch.Tensor, index: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Standard exponential variates with both tails kept: the smallest is about 2^-65, the largest about 45.

    Args:
        rng: int64 [2], (seed, step).
        rows: int64 row keys, broadcastable with `index`.
        index: int64 vocabulary indices.
        dtype: float32 or float64, the precision of the result.

    Returns:
        Positive variates of `dtype`, of the broadcast shape.
    """
    high, low = words(rng, rows, index)
    upper = high >= 1 << 31
    # Above one half the complement is what is small: a uniform rounded to 1 would cut the other tail.
    high, low = torch.where(upper, _LOW - high, high), torch.where(upper, _LOW - low, low)
    uniform = high.to(dtype) * 2.0**-32 + (low.to(dtype) + 0.5) * 2.0**-64
    return torch.where(upper, -torch.log(uniform), -torch.log1p(-uniform))


def uniform(rng: torch.Tensor, rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """float64 uniforms in (0, 1) from the same words."""
    high, low = words(rng, rows, index)
    return (high.double() * 2.0**-32 + (low.double() + 0.5) * 2.0**-64).clamp(max=1 - 2.0**-53)
