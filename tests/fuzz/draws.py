"""What a case is made of: numbers, layouts, dtypes and extreme values, all from (kind, seed, number) alone."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import numpy as np
import torch

T = TypeVar("T")

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16}
_EDGES = [m + d for m in (4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048) for d in (-1, 0, 1)]


class Failure(Exception):
    """A property that does not hold; the message is one line."""


class Draws:
    """One case's source of everything random, and the memory around its tensors.

    Args:
        kind, seed, number: the case.

    Attributes:
        about: what was drawn, in words, for the line that reports a failure.
    """

    def __init__(self, kind: str, seed: int, number: int) -> None:
        self._random = np.random.Generator(np.random.SFC64([zlib.crc32(kind.encode()), seed, number]))
        self._guards: list[tuple[str, torch.Tensor, torch.Tensor, torch.Tensor | None]] = []
        self.number = number
        self.about: dict[str, Any] = {}

    # --- numbers ---

    def chance(self, p: float) -> bool:
        return self._random.random() < p

    def integer(self, low: int, high: int) -> int:
        """From low to high, both included."""
        return low + int(self._random.random() * (high - low + 1))

    def uniform(self, low: float, high: float) -> float:
        return low + float(self._random.random()) * (high - low)

    def pick(self, options: Sequence[T]) -> T:
        return options[int(self._random.random() * len(options))]

    def note(self, **facts: Any) -> None:
        self.about.update(facts)

    # --- sizes and settings of the operators ---

    def length(self, small: int, large: int) -> int:
        """A width from 1 to `large`: small ones, those around a vector's multiples, any."""
        kind = self._random.random()
        if kind < 0.5:
            return self.integer(1, small)
        if kind < 0.8:
            edges = [edge for edge in _EDGES if edge <= large]
            return self.pick(edges)
        return self.integer(1, large)

    def shape(self) -> tuple[int, int]:
        """(rows, vocabulary): small for most, since a million cases are to be run."""
        most = 12_000 if self.chance(0.02) else 1500
        v = self.length(70, 3000)
        kind = self._random.random()
        n = self.integer(0, 5) if kind < 0.6 else self.integer(1, 17) if kind < 0.9 else self.integer(1, 40)
        return min(n, max(1, most // v)), v

    def temperature(self) -> float:
        kind = self._random.random()
        if kind < 0.55:
            tau = self.uniform(0.1, 2.0)
        elif kind < 0.75:
            tau = self.pick([0.0, 1.0, 1, 0.7])
        elif kind < 0.98:
            tau = 10.0 ** self.uniform(-6, 6)
        else:
            tau = self.pick([1e-12, 1e12, 1e-9, 1e9])  # the ends of what is served
        self.note(temperature=tau)
        return tau

    def filters(self, v: int) -> dict[str, Any]:
        chosen: dict[str, Any] = {}
        if self.chance(0.45):
            chosen["top_p"] = self.pick([self.uniform(0.01, 1.0), 0.9, 0.95, 1.0, 1e-9, 0.5, 1 - 2**-53])
        if self.chance(0.35):
            chosen["top_k"] = self.pick([1, 2, self.integer(1, v), v, v + 1, 1 << 40])
        self.note(**chosen)
        return chosen

    def keyed(self, n: int) -> dict[str, Any]:
        chosen: dict[str, Any] = {"seed": self.pick([0, self.integer(0, 1 << 40), -(1 << 63), (1 << 63) - 1, -7])}
        chosen["counter"] = self.pick([0, self.integer(0, 1000), (1 << 32) - 1])
        if self.chance(0.3):
            keys = torch.from_numpy(self._random.integers(-(1 << 63), (1 << 63) - 1, n))
            chosen["keys"] = self.laid(keys, "keys")
        if self.chance(0.1):
            chosen["seed"] = torch.tensor([chosen["seed"], chosen.pop("counter")])
        return chosen

    # --- values ---

    def normal(self, *shape: int) -> np.ndarray:
        return self._random.standard_normal(shape)

    def integers(self, low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.from_numpy(self._random.integers(low, high + 1, shape))

    def logits(self, n: int, v: int, dtype: torch.dtype) -> torch.Tensor:
        """Values [n, v]: mostly a language model's, else what breaks exponentials and comparisons."""
        r, info, kind = self._random, torch.finfo(dtype), self._random.random()
        if kind < 0.35:
            name, x = "normal", r.standard_normal((n, v)) * self.pick([0.1, 1.0, 3.0, 10.0])
        elif kind < 0.5:
            name, x = "peaked", r.standard_normal((n, v)) * 3
            x += 12 * (r.random((n, v)) < 4 / v)
        elif kind < 0.6:
            name, x = "ties", r.integers(-2, 3, (n, v)).astype(float)
        elif kind < 0.66:
            values = [0.0, 1.0, -3.0, 1e4, -1e4, info.max, info.min, -1e31 if info.max > 1e31 else -3e4, info.tiny]
            name, x = "equal", np.full((n, v), self.pick(values))
        elif kind < 0.71:
            name, x = "one", np.full((n, v), self.pick([-np.inf, 0.0, info.min]))
            if n:
                x[np.arange(n), r.integers(0, v, n)] = self.pick([0.0, 30.0, 1e4, info.max])
        elif kind < 0.77:
            name, x = "wide", r.uniform(-1e4, 1e4, (n, v))
        elif kind < 0.81:
            name, x = "tiny", r.standard_normal((n, v)) * info.tiny * self.pick([1, 100])
        elif kind < 0.86:
            name = "extreme"
            some = [info.max, info.min, info.min / 2, info.tiny, 0.0, 1e4, -1e4, -np.inf]
            some += [-1e31, -1e30, 1e30] if info.max > 1e31 else []
            x = np.asarray(some)[r.integers(0, len(some), (n, v))]
        else:
            name, x = "holes", r.standard_normal((n, v)) * 3
            x[r.random((n, v)) < self.pick([0.1, 0.5, 0.95])] = -np.inf
        if n and self.chance(0.12):
            name += " with bad rows"
            rows = r.random(n) < 0.4
            x[rows, r.integers(0, v)] = self.pick([np.nan, np.inf])
            x[r.random(n) < 0.15] = self.pick([np.nan, -np.inf])
        # Numbers below the smallest normal one are zeros on the native backend (docs/native.md).
        x = np.ascontiguousarray(
            np.where(np.abs(x) < (info.smallest_normal if info.bits > 16 or info.max > 1e5 else 0), 0, x)
        )
        self.note(values=name)
        return torch.from_numpy(x).to(dtype) if n else torch.empty(0, v, dtype=dtype)

    def table(self, v: int, d: int, dtype: torch.dtype) -> torch.Tensor:
        scale = self.pick([1.0, 1.0, 0.02, 100.0])
        return torch.from_numpy(self._random.standard_normal((v, d)) * scale).to(dtype)

    # --- memory ---

    def laid(self, values: torch.Tensor, name: str, dense: bool = False, written: bool = False) -> torch.Tensor:
        """The values [n] or [n, m] under some strides, in memory whose other entries must be neither read nor written.

        Args:
            dense: rows have to lie one after the other, as those of `out` do.
            written: the call may write to the view; else nothing of the memory may change.
        """
        poison = float("nan") if values.is_floating_point() else 1 << 62
        if values.dim() == 1:
            step, offset = (1, 0) if self.chance(0.6) else (2, 3)
            base = values.new_full((len(values) * step + offset + 2,), poison)
            view = base[offset : offset + len(values) * step : step]
        else:
            (n, m), kind = values.shape, self._random.random()
            if kind < 0.4 or n == 0:
                base = values.new_full((n * m + 6,), poison)
                view = base[3 : 3 + n * m].view(n, m) if self.chance(0.5) else base[: n * m].view(n, m)
            elif kind < 0.65 or dense:
                base = values.new_full((n, m + self.integer(1, 9)), poison)
                offset = self.integer(0, base.shape[1] - m)
                view = base[:, offset : offset + m]
            elif kind < 0.75:
                base = values.new_full((n + 1, 3 * m + 2), poison)
                view = base[1:, 2::3]
            elif kind < 0.85:
                base = values.new_full((m, n + 2), poison)
                view = base[:, 1 : n + 1].T
            elif kind < 0.93 or written:
                base = values.new_full((2 * n + 1, m), poison)
                view = base[1::2]
            else:  # one row for all: the caller sees that the values are those of the first
                base = values.new_full((m + 2,), poison)
                view = base[1 : m + 1].expand(n, m)
                values = values[:1]
                base[1 : m + 1] = values[0]
                self._guards.append((name, base, base.clone(), None))
                return view
        view.copy_(values)
        self._guards.append((name, base, base.clone(), view if written else None))
        return view

    def check_memory(self) -> None:
        """Raise Failure if anything changed that was not to be written."""
        for name, base, before, view in self._guards:
            if view is not None:
                before.as_strided(view.shape, view.stride(), view.storage_offset()).copy_(view)
            if not same_bits(base, before):
                raise Failure(f"memory of {name} changed where nothing may be written")
        self._guards.clear()


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    if a.is_floating_point() and a.shape == b.shape and a.dtype == b.dtype:
        a, b = (t.detach().contiguous().view(_WORDS[t.element_size()]) for t in (a, b))
    return torch.equal(a, b)


def tensors_of(result: Any) -> list[torch.Tensor]:
    """All tensors of nested tuples."""
    if isinstance(result, torch.Tensor):
        return [result]
    if isinstance(result, tuple):
        return [tensor for part in result for tensor in tensors_of(part)]
    return []


def twice(call: Callable[[], Any], threads: tuple[int, int] = (1, 1)) -> Any:
    """The call's result, after two of it were found the same bit for bit.

    Args:
        threads: of the first and of the second.
    """
    results = []
    for count in threads:
        torch.set_num_threads(count)
        try:
            results.append(call())
        finally:
            torch.set_num_threads(1)
    for first, second in zip(*map(tensors_of, results), strict=True):
        if not same_bits(first, second):
            raise Failure(f"two runs differ (with {threads[0]} and {threads[1]} threads)")
    return results[0]
