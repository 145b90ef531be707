"""One case of the operators' fuzz: its draws and the engines that it runs on."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import torch

from entrgi_kernels.backends import native

from .draws import DTYPES, Draws, twice

TRITON = os.environ.get("TRITON_INTERPRET") == "1"
_ISAS: list[str] = []
LEAST = 2.0**-24 * TRITON  # float16's smallest number


def prepare() -> None:
    """What a process needs once: one thread, uninitialised memory full of NaN, the instruction sets of this machine."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    if native.why_not(torch.device("cpu"), torch.float32) is None:
        _ISAS[:] = native.build_info()["supported_isas"]


class Case:
    """One operator's case: its draws, its engines, and the calls on them."""

    def __init__(self, draws: Draws, name: str) -> None:
        self.d, self.engine = draws, "inputs"
        draws.note(operator=name)
        engines = ["eager"]
        if TRITON:  # its interpreter: slow, without float64, and wrong for products of bfloat16
            engines = ["triton"]
        elif _ISAS:  # two of four, so that a million cases fit the time
            start = draws.integer(0, len(_ISAS) - 1)
            engines += sorted({_ISAS[start], _ISAS[(start + 1 + draws.integer(0, 1)) % len(_ISAS)]})
        self.engines = engines
        self._again = draws.chance(0.08)
        # token_log_prob's products are torch's own, whose bits depend on the number of threads.
        self._threads = 2 if draws.chance(0.3) and name != "token_log_prob" else 1
        self.counts: dict[str, int] = {}

    def dtypes(self) -> tuple[torch.dtype, torch.dtype]:
        """(of logits, of the table)."""
        served = (torch.float32, torch.float16) if TRITON else DTYPES
        first = self.d.pick(served)
        second = first if self.d.chance(0.6) else self.d.pick(served)
        self.d.note(dtype=first, table=second)
        return first, second

    def shape(self) -> tuple[int, int]:
        n, v = self.d.shape()
        if TRITON:
            n, v = min(n, 5), min(v, 300)
        self.d.note(n=n, v=v)
        return n, v

    def width(self) -> int:
        most = 200 if self.d.chance(0.05) else max(4, 15_000 // self.d.about["v"])
        d = min(self.d.length(20, 200), 24 if TRITON else most)
        self.d.note(d=d)
        return d

    def each(self, call: Callable[[str], Any]) -> Iterator[Any]:
        """call(backend) on each engine, some twice: the same bits."""
        for engine in self.engines:
            self.engine = engine
            backend = "native" if engine in _ISAS else engine
            if backend == "native":
                native.set_isa(engine)
            if self._again and engine != "triton":
                yield twice(lambda: call(backend), (1, self._threads if backend == "native" else 1))  # noqa: B023
            else:
                yield call(backend)
            self.counts[engine] = self.counts.get(engine, 0) + 1
        self.engine = "inputs"
        self.d.check_memory()
