"""The random numbers of docs/philox.md in plain Python integers and decimals, independent of the package.

    python tests/data/philox_reference.py          # writes philox_vectors.json beside this file (some minutes, numpy)

Tests of every backend load the vectors; tests/backends/test_philox.py also checks that this file still produces them.
"""

from __future__ import annotations

import json
from decimal import Decimal, localcontext
from pathlib import Path

VECTORS = Path(__file__).with_name("philox_vectors.json")

M0, M1 = 0xD2511F53, 0xCD9E8D57
W0, W1 = 0x9E3779B9, 0xBB67AE85
MASK32, MASK64 = (1 << 32) - 1, (1 << 64) - 1
DIGITS = 60


def philox4x32_10(counter: list[int], key: list[int]) -> list[int]:
    """Ten rounds; words in [0, 2^32)."""
    c, k = list(counter), list(key)
    for _ in range(10):
        left, right = M0 * c[0], M1 * c[2]
        c = [(right >> 32) ^ c[1] ^ k[0], right & MASK32, (left >> 32) ^ c[3] ^ k[1], left & MASK32]
        k = [(k[0] + W0) & MASK32, (k[1] + W1) & MASK32]
    return c


def word64(seed: int, step: int, row: int, v: int) -> int:
    """The 64 bits that belong to vocabulary entry `v` of row key `row`."""
    row &= MASK64
    x = philox4x32_10([v >> 1, step & MASK32, row & MASK32, row >> 32], [seed & MASK32, (seed >> 32) & MASK32])
    return x[2] << 32 | x[3] if v & 1 else x[0] << 32 | x[1]


def exponential(word: int) -> Decimal:
    """-ln(1 - u), u = (word + 1/2) / 2^64, to about 60 digits."""
    with localcontext() as context:
        context.prec = DIGITS + 25
        return -(1 - (Decimal(word) + Decimal("0.5")) / (1 << 64)).ln()


def kept_tokens(logits: list[float], temperature: float, top_k: int, top_p: float) -> tuple[list[int], Decimal]:
    """(tokens that top-p and top-k keep, distance of the nearest cumulative mass to top_p)."""
    finite = [v for v, x in enumerate(logits) if x > float("-inf")]
    with localcontext() as context:
        context.prec = DIGITS
        weight = {v: (Decimal(logits[v]) / Decimal(temperature)).exp() for v in finite}
        total = sum(weight.values())
        mass = {v: sum(weight[u] for u in finite if logits[u] > logits[v]) / total for v in finite}
        kept, gap = finite, Decimal(1)
        if top_p < 1:
            kept = [v for v in kept if mass[v] <= Decimal(top_p)]
            gap = min(abs(mass[v] - Decimal(top_p)) for v in finite)
        if 0 < top_k < len(logits):
            kth = sorted(logits, reverse=True)[top_k - 1]
            kept = [v for v in kept if logits[v] >= kth]
        return kept, gap


def draw(
    logits: list[float], seed: int, step: int, row: int, temperature: float, top_k: int = 0, top_p: float = 1.0
) -> tuple[int, float]:
    """(token, margin): the race's winner and by how much of a score it wins; the margin also covers the top-p cut."""
    if temperature == 0:
        return max(range(len(logits)), key=lambda v: (logits[v], -v)), float("inf")
    kept, gap = kept_tokens(logits, temperature, top_k, top_p)
    maximum = max(logits)
    with localcontext() as context:
        context.prec = DIGITS
        scores = sorted(
            (
                (Decimal(logits[v]) - Decimal(maximum)) / Decimal(temperature)
                - exponential(word64(seed, step, row, v)).ln(),
                -v,
            )
            for v in kept
        )
    lead = scores[-1][0] - scores[-2][0] if len(scores) > 1 else Decimal(1)
    return -scores[-1][1], float(min(lead, gap))


def inverse_search(seed: int, word: int, odd: bool, vocabulary: int) -> tuple[int, int, int]:
    """(step, row, v) whose 64 bits are exactly `word`, v < vocabulary.

    Philox permutes the counters of a key: fix the two output words of interest, let the other two run, turn the rounds
    back, and keep the first counter whose v >> 1 is in range.
    """
    import numpy as np

    inverse0, inverse1 = (np.uint64(pow(m, -1, 1 << 32)) for m in (M0, M1))
    mask, shift = np.uint64(MASK32), np.uint64(32)
    keys = [((seed & MASK32) + r * W0 & MASK32, ((seed >> 32) & MASK32) + r * W1 & MASK32) for r in range(10)]
    block = 1 << 20
    for start in range(0, 1 << 40, block):
        free = np.arange(start, start + block, dtype=np.uint64)
        wanted = [np.full(block, word >> 32, np.uint64), np.full(block, word & MASK32, np.uint64)]
        other = [free >> shift, free & mask]
        n0, n1, n2, n3 = (*other, *wanted) if odd else (*wanted, *other)
        for k0, k1 in reversed(keys):
            c2, c0 = n1 * inverse1 & mask, n3 * inverse0 & mask
            n1 = n0 ^ (c2 * np.uint64(M1) >> shift) ^ np.uint64(k0)
            n3 = n2 ^ (c0 * np.uint64(M0) >> shift) ^ np.uint64(k1)
            n0, n2 = c0, c2
        hits = np.flatnonzero(n0 < np.uint64(vocabulary // 2))
        if hits.size:
            i = int(hits[0])
            row = int(n3[i]) << 32 | int(n2[i])
            return int(n1[i]), row - (1 << 64) if row >> 63 else row, int(n0[i]) << 1 | odd
    raise AssertionError("unreachable: some counter is always in range")


KNOWN_ANSWERS = [  # Random123's kat_vectors for philox4x32-10
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([MASK32] * 4, [MASK32] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]
LAYOUT = [  # seed, step, row, v
    (0, 0, 0, 0),
    (0, 0, 0, 1),
    (0, 0, 0, 2),
    (0, 0, 1, 0),
    (0, 1, 0, 0),
    (1, 0, 0, 0),
    (1234, 5, 7, 151935),
    (1 << 32, 0, 0, 3),
    (-1, (1 << 32) - 1, -1, 262143),
    (-(1 << 63), 1 << 31, 1 << 62, 126463),
    ((1 << 63) - 1, 127 << 8 | 254, ((0xABCDEF0123 << 24) | (3 << 14) | 127) - (1 << 64), 50257),
]
TAIL_SEED, TAIL_VOCABULARY = 2024, 64
TAILS = [0, 1 << 24, (1 << 63) - 1, 1 << 63, MASK64]


def small_logits() -> list[list[float]]:
    """Five rows of 11 logits, multiples of 1/64 up to 2: exact in every floating dtype."""
    rows = [[((37 * (v + 11 * n) ** 2 + 101 * n + 13 * v) % 257 - 128) / 64 for v in range(11)] for n in range(5)]
    rows[2][3] = rows[2][8] = max(rows[2])  # a tie at the top
    rows[3] = [x if v % 3 else float("-inf") for v, x in enumerate(rows[3])]
    rows[4] = [float("-inf")] * 10 + [0.5]
    return rows


DRAWS = [  # temperature, top_k, top_p, seed, step, rows
    (1.0, 0, 1.0, 0, 0, [0, 1, 2, 3, 4]),
    (0.7, 0, 1.0, 1234, 5, [0, 1, 2, 3, 4]),
    (0.7, 0, 0.85, -7, (1 << 32) - 1, [1 << 40, -1, 12345678901234, 7, 0]),
    (1.0, 3, 1.0, 99, 254, [4, 3, 2, 1, 0]),
    (1.3, 4, 0.8, 1 << 40, 1, [10, 20, 30, 40, 50]),
    (0.0, 0, 1.0, 3, 3, [0, 1, 2, 3, 4]),
]


def make(tails: list[dict] | None = None) -> dict:
    """All the vectors; `tails` as found before, or None to search them again."""
    logits = small_logits()
    draws = []
    for temperature, top_k, top_p, seed, step, rows in DRAWS:
        drawn = [draw(x, seed, step, r, temperature, top_k, top_p) for x, r in zip(logits, rows, strict=True)]
        assert min(margin for _, margin in drawn) > 1e-3, "a draw that rounding could change is no test vector"
        draws.append(
            {
                "temperature": temperature,
                "top_k": top_k,
                "top_p": top_p,
                "seed": seed,
                "step": step,
                "rows": rows,
                "tokens": [token for token, _ in drawn],
            }
        )
    if tails is None:
        tails = []
        for word in TAILS:
            for odd in (False, True):
                step, row, v = inverse_search(TAIL_SEED, word, odd, TAIL_VOCABULARY)
                tails.append({"seed": TAIL_SEED, "step": step, "row": row, "v": v})
    points = [dict(zip(("seed", "step", "row", "v"), values, strict=True)) for values in LAYOUT]
    for point in points + tails:
        word = word64(**{name: point[name] for name in ("seed", "step", "row", "v")})
        point.update(high=f"{word >> 32:08x}", low=f"{word & MASK32:08x}", exponential=f"{exponential(word):.24e}")
    return {
        "about": "docs/philox.md; made by tests/data/philox_reference.py, not by the package",
        "known_answers": [
            {"counter": [f"{x:08x}" for x in c], "key": [f"{x:08x}" for x in k], "words": [f"{x:08x}" for x in w]}
            for c, k, w in KNOWN_ANSWERS
        ],
        "layout": points,
        "tails": tails,
        "logits": [["-inf" if x == float("-inf") else x for x in row] for row in logits],
        "draws": draws,
    }


if __name__ == "__main__":
    VECTORS.write_text(json.dumps(make(), indent=1) + "\n", encoding="utf-8")
