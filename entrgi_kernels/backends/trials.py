"""Which kernels a call launches: the unit in which GPU kernels are proven (:mod:`.proof`).

A :class:`Trial` is what decides that, and nothing else: the operator, the rows that one entry of the tables serves, by
which powers of two V and D can be divided, dtype and alignment of each matrix, and the flags that choose other kernels.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from ..names import SCORED_ALGS
from .arguments import Adam, Draw, Placement


class Form(NamedTuple):
    """What kernels know of a matrix: dtype, largest power of two (up to 16) that divides the distance of its rows,
    whether it starts on 16 bytes, and whether its rows lie apart."""

    dtype: torch.dtype
    low: int
    aligned: bool
    apart: bool

    def __str__(self) -> str:
        rest = ("" if self.aligned else "-unaligned") + ("" if self.apart else "-expanded")
        return f"{str(self.dtype)[6:]}/{self.low}{rest}"


class Trial(NamedTuple):
    """Which kernels a call launches.

    Attributes:
        op: the raw function. rows: first and last N that the same entries of the tables serve; None: no last.
        v, d: largest power of two that divides V and D (up to a limit); 0 for the number 1, and for no D.
        forms: of the matrices, in the order of :data:`READERS`; None where one is absent. flags: the rest.
    """

    op: str
    rows: tuple[int, int | None]
    v: int
    d: int
    forms: tuple[Form | None, ...]
    flags: tuple[Any, ...]

    def __str__(self) -> str:
        last = "" if self.rows[1] is None else self.rows[1]
        forms, flags = (" ".join(map(str, part)) for part in (self.forms, self.flags))
        return f"{self.op} N {self.rows[0]}-{last} V/{self.v} D/{self.d} [{forms}] {flags}".rstrip()


# -- reading a call ---------------------------------------------------------------------------------------------------
# Matrices and flags of a raw function's arguments. This runs at every call: no arithmetic beyond comparisons.


def _filters(v: int, top_k: int, top_p: float) -> str:
    return ("k" if 0 < top_k < v else "") + ("p" if top_p < 1.0 else "") or "unfiltered"


def _statistics(logits, *_):
    return (logits,), ()


def _sample(logits, draw):
    filters = _filters(logits.shape[1], draw.top_k, draw.top_p)
    return (logits,), ("argmax" if draw.temperature == 0 else filters,)


def _soft(logits, table, temperature):
    return (logits, table), ()


def _soft_backward(logits, table, grad, soft, lse, temperature):
    return (logits, table, grad), (soft.dtype,)


def _grad_table(logits, grad, lse, temperature, dtype):
    return (logits, grad), (dtype,)


def _entrgi(logits, table, draw, tokens, weight, mode, placement=None):
    filters = _filters(logits.shape[1], draw.top_k, draw.top_p)
    if tokens is not None or mode == "zero":
        filters = "undrawn"
    return (logits, table, placement and placement.out), (filters, draw.temperature == 1.0)


def _update(logits, grad, table, soft, lse, temperature, adam):
    keep = adam.exp_avg is not None and adam.keep
    reads = adam.exp_avg is not None and adam.step > 1
    moments = (adam.exp_avg, adam.exp_avg_sq) if reads or keep else (None, None)
    return (logits, table, grad, *moments), (soft.dtype, reads, keep)


def _first_order(logits, grad, table, tokens, scale):
    return (logits, table, grad), ()


def _confidence(logits, tokens, alg, temperature, top_k, top_p):
    return (logits,), (alg, _filters(logits.shape[1], top_k, top_p))


READERS: dict[str, Callable[..., tuple[tuple[Any, ...], tuple[Any, ...]]]] = {
    "softmax_entropy": _statistics,
    "softmax_entropy_backward": _statistics,
    "sample_tokens": _sample,
    "soft_embedding": _soft,
    "soft_embedding_backward": _soft_backward,
    "soft_embedding_grad_table": _grad_table,
    "entrgi_embedding": _entrgi,
    "guidance_update_": _update,
    "first_order_update_": _first_order,
    "unmask_confidence": _confidence,
}
# The tables that an operator reads beside that of the statistics.
_TABLES = {
    "soft_embedding": ("forward",),
    "entrgi_embedding": ("forward",),
    "soft_embedding_backward": ("backward",),
    "guidance_update_": ("backward",),
    "first_order_update_": ("backward",),
    "soft_embedding_grad_table": ("table",),
}


def architecture(device: torch.device) -> Any:
    """The Triton backend's tables for a device; None where it has none."""
    try:
        from . import triton
        from .triton import config
    except ImportError:
        return None
    return None if device.type == "cpu" and not triton.INTERPRETED else config.target(device).architecture


def limit(device: torch.device) -> int:
    """The largest power of two that :attr:`Trial.v` and `d` tell: no tile is wider."""
    chosen = architecture(device)
    return 32 if chosen is not None and chosen.name == "interpreter" else 256


def low(number: int, limit: int) -> int:
    """The largest power of two that divides a number, up to a limit."""
    return min(number & -number, limit) or limit


def _form(matrix: torch.Tensor) -> Form:
    dense = matrix.shape[1] == 1 or matrix.stride(1) == 1  # others are copied before anything is launched
    stride = matrix.stride(0) if dense else matrix.shape[1]
    aligned = not dense or matrix.data_ptr() % 16 == 0
    return Form(matrix.dtype, low(stride, 16), aligned, stride >= matrix.shape[1])


def describe(op: str, matrices: Sequence[torch.Tensor | None], flags: tuple[Any, ...], device: torch.device) -> Trial:
    """The trial of a call, from what :data:`READERS` tell of it; the matrices may be on the meta device."""
    first, second = matrices[0], matrices[1] if len(matrices) > 1 else None
    assert first is not None
    widths = first.shape[1], 0 if second is None else second.shape[1]
    v, d = (0 if size <= 1 else low(size, limit(device)) for size in widths)
    forms = tuple(None if matrix is None else _form(matrix) for matrix in matrices)
    return Trial(op, _bucket(op, first.shape[0], forms, flags, device), v, d, forms, flags)


def _ends(op: str, forms: Sequence[Form | None], flags: tuple[Any, ...], device: torch.device) -> list[int]:
    """The last N of each entry that the operator's tables have for such operands, ascending; the last has none."""
    chosen = architecture(device)
    if chosen is None:
        return []
    dtypes = [form.dtype for form in forms[1:3] if form is not None]
    if op in ("soft_embedding", "entrgi_embedding"):
        dtypes = dtypes[:1]
    elif op == "soft_embedding_grad_table":
        dtypes.append(flags[0])
    tables = [chosen.statistics]
    for family in _TABLES.get(op, ()):
        width = dtypes[0].itemsize if len(set(dtypes)) == 1 else 4
        tables.append(getattr(chosen, family).get(width, ()))
    return sorted({entry.most_rows for table in tables for entry in table if entry.most_rows is not None})


def _bucket(
    op: str, n: int, forms: Sequence[Form | None], flags: tuple[Any, ...], device: torch.device
) -> tuple[int, int | None]:
    """First and last N that the same entries serve."""
    ends = _ends(op, forms, flags, device)
    place = bisect_left(ends, n)
    return (ends[place - 1] + 1 if place else 1), (ends[place] if place < len(ends) else None)


_WIDE = 151_936, 1024  # V, D


def every(device: torch.device, pairs: Sequence[tuple[torch.dtype, torch.dtype]]) -> Iterator[Trial]:
    """All that guided generation and training call at wide, aligned matrices: every entry of the tables, each once.

    Args:
        pairs: dtypes of (logits, table).
    """
    found: dict[Trial, None] = {}
    for pair in pairs:
        n: int | None = 1
        while n is not None:
            here = [describe(op, *READERS[op](*args), device) for op, args in calls(n, *_WIDE, *pair)]
            found.update(dict.fromkeys(here))
            n = min((trial.rows[1] + 1 for trial in here if trial.rows[1] is not None), default=None)
    yield from found


def calls(
    n: int, v: int, d: int, logits_dtype: torch.dtype, table_dtype: torch.dtype
) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Raw functions' names and arguments, without storage, in the variants that choose different kernels."""

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    logits, table = empty(n, v, dtype=logits_dtype), empty(v, d, dtype=table_dtype)
    grad = empty(n, d, dtype=table_dtype)
    moments, soft, lse, keys = (torch.empty_like(logits),) * 2, empty(n, d), empty(n), empty(n, dtype=torch.int64)
    out, rng = empty(2 * n, d, dtype=table_dtype), empty(2, dtype=torch.int64)
    yield "softmax_entropy", (logits, 1.0)
    yield "softmax_entropy_backward", (logits, lse, lse, lse, lse, 1.0)
    for top_k, top_p, temperature in ((0, 0.95, 0.7), (0, 1.0, 0.7), (50, 1.0, 0.7), (0, 1.0, 0.0)):
        yield "sample_tokens", (logits, Draw(rng, keys, temperature, top_k, top_p))
    yield "soft_embedding", (logits, table, 0.7)
    yield "soft_embedding_backward", (logits, table, grad, soft, lse, 0.7)
    yield "soft_embedding_grad_table", (logits, grad, lse, 0.7, table_dtype)
    for top_p, placement in ((0.95, None), (0.95, Placement(out, keys)), (1.0, Placement(out, keys))):
        draw = Draw(rng, keys, 0.7, 0, top_p)
        yield "entrgi_embedding", (logits, table, draw, None, None, "entropy", placement)
    for held, step, keep in (((None, None), 1, True), (moments, 1, True), (moments, 2, True), (moments, 3, False)):
        adam = Adam(held[0], held[1], step, 0.5, 0.9, 0.999, 1e-8, keep)
        yield "guidance_update_", (logits, grad, table, soft, lse, 0.7, adam)
    yield "first_order_update_", (logits, grad, table, keys, 1.0)
    for alg in SCORED_ALGS:
        yield "unmask_confidence", (logits, keys, alg, 0.7, 0, 0.95)
    if logits_dtype == table_dtype:  # passes of token_log_prob over a chunk's logits: a whole chunk, and the last one
        for part in dict.fromkeys((min(v, 25_600), v % 256 or min(v, 256))):
            chunk = empty(n, part, dtype=torch.float32 if table_dtype.itemsize == 2 else table_dtype)
            yield "softmax_entropy", (chunk, 1.0)
            yield "soft_embedding", (chunk, table[:part], 1.0)
            yield "soft_embedding_grad_table", (chunk, grad, lse, 1.0, table_dtype)
