"""Where a generation's time and arithmetic go: listeners of the loop's ranges.

Seconds come from device events on a GPU, so that nothing is waited for inside the run, and from the clock on a CPU.
FLOPs are counted by torch's own formulas for its operators, and by those below for this project's.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, shape_wrapper

from entrgi_kernels.guidance.phases import PHASES

# What is between the phases: Python, launches, small tensors, tokenizers.
REST = "host and rest"


class PhaseTimer:
    """Seconds of each phase; listen with :func:`entrgi_kernels.backends.ranges.listening`."""

    def __init__(self, device: str | torch.device = "cpu") -> None:
        self._cuda = torch.device(device).type == "cuda"
        self._open: dict[str, Any] = {}
        self._spans: list[tuple[str, Any, Any]] = []

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def begin(self, name: str) -> None:
        if name in PHASES:
            self._open[name] = self._now()

    def end(self, name: str) -> None:
        if name in PHASES:
            self._spans.append((name, self._open.pop(name), self._now()))

    def seconds(self, total: float) -> dict[str, float]:
        """Seconds by phase, and what is left of `total` under :data:`REST`; waits for the device."""
        if self._cuda:
            torch.cuda.synchronize()
        spent = dict.fromkeys(PHASES, 0.0)
        for name, begin, end in self._spans:
            spent[name] += begin.elapsed_time(end) / 1e3 if self._cuda else end - begin
        return {**spent, REST: max(0.0, total - sum(spent.values()))}


class FlopCounter(TorchDispatchMode):
    """Counts floating-point operations of products (a multiplication and an addition are two) while it is active.

    Attributes:
        total: FLOPs so far.
        by_phase: those inside each phase; what lies outside of all is the rest of the total.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0
        self.by_phase = dict.fromkeys(PHASES, 0)
        self._before: dict[str, int] = {}
        self._formulas = {**flop_registry, **_own_formulas()}

    def begin(self, name: str) -> None:
        if name in PHASES:
            self._before[name] = self.total

    def end(self, name: str) -> None:
        if name in PHASES:
            self.by_phase[name] += self.total - self._before.pop(name)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        formula = self._formulas.get(func._overloadpacket)
        if formula is None:
            with self:  # composite operators by their parts
                parts = func.decompose(*args, **kwargs)
            return func(*args, **kwargs) if parts is NotImplemented else parts
        out = func(*args, **kwargs)
        self.total += formula(*args, **kwargs, out_val=out)
        return out


def _product(logits: Any, table: Any, *_: Any, **__: Any) -> int:
    """p @ E, or g @ E^T: logits [N, V], E [V, D]."""
    return 2 * logits[0] * table[0] * table[1]


def _backward(logits: Any, _grad: Any, table: Any, *_: Any, **__: Any) -> int:
    return _product(logits, table)


def _attention(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    batch, heads, rows, width = query
    return 2 * batch * heads * rows * key[2] * (width + value[3])


def _attention_backward(_grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    # The scores anew, then the gradients of values, scores, queries and keys.
    batch, heads, rows, width = query
    return 2 * batch * heads * rows * key[2] * (3 * width + 2 * value[3])


def _own_formulas() -> dict[Any, Any]:
    import entrgi_kernels.ops  # noqa: F401  (registers the operators)

    own, aten = torch.ops.entrgi, torch.ops.aten
    formulas = {
        own.soft_embedding: _product,
        own.soft_embedding_backward: _product,
        own.entrgi_embedding: _product,
        own.entrgi_embedding_out: _product,
        own.guidance_update_: _backward,
        own.first_order_update_: _backward,
        aten._scaled_dot_product_flash_attention_for_cpu: _attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    }
    return {operator: shape_wrapper(formula) for operator, formula in formulas.items()}
