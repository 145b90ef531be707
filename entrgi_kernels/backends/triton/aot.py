"""Compilation ahead of the first call: what the raw functions would launch, on all cores, into Triton's cache.

The raw functions are run on tensors without storage, and every launch goes through Triton's own dispatch for a device
that need not be there, up to the point where it would compile: so what is compiled is what a GPU of that architecture
would be given (kernels, argument types, specialisations, tiles, warps and stages), and what is compiled on a machine
that has the GPU is found there by Triton's cache. `benchmarks/tools/gate.py` judges the machine code.
"""

from __future__ import annotations

import importlib
import multiprocessing
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.driver import driver

from ...names import SCORED_ALGS
from ..arguments import Adam, Draw, Placement
from . import (
    config,
    entrgi_embedding,
    first_order_update_,
    guidance_update_,
    launch,
    sample_tokens,
    soft_embedding,
    soft_embedding_backward,
    soft_embedding_grad_table,
    softmax_entropy,
    softmax_entropy_backward,
    unmask_confidence,
)

Case = tuple[int, int, int, torch.dtype, torch.dtype]  # N, V, D, dtype of the logits, of the table


@dataclass(frozen=True)
class Machine:
    """A device that is not there: Triton's name for it, multiprocessors, and bytes of shared memory for a program."""

    gpu: GPUTarget
    sms: int
    shared_limit: int

    @property
    def hip(self) -> bool:
        return self.gpu.backend == "hip"

    @property
    def tables(self) -> config.Target:
        """What :func:`.config.target` gives on such a device."""
        return config.target_of(0 if self.hip else self.gpu.arch // 10, self.sms, self.hip)


@dataclass(frozen=True)
class Launch:
    """One distinct compilation: a kernel with types, constants and options.

    Attributes:
        signature: (name, type) of every argument. constants: (place, value) of those known at compile time.
        attributes: (place, ((name, value), ...)) of what Triton knows of the others, divisibility above all.
        options: (name, value), num_warps and num_stages among them.
    """

    module: str
    kernel: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[int, Any], ...]
    attributes: tuple[tuple[int, tuple[tuple[str, int], ...]], ...]
    options: tuple[tuple[str, Any], ...]

    @property
    def tile(self) -> dict[str, Any]:
        """The constants that kernels write in capitals, by name."""
        return {name: value for name, value in self.named_constants.items() if name.isupper()}

    @property
    def named_constants(self) -> dict[str, Any]:
        return {self.signature[place][0]: value for place, value in self.constants}

    @property
    def num_warps(self) -> int:
        return dict(self.options)["num_warps"]

    @property
    def num_stages(self) -> int:
        return dict(self.options)["num_stages"]

    @property
    def dtypes(self) -> str:
        """The distinct types of floating-point tensors, in the arguments' order."""
        kinds = (re.match(r"(?:\*|tensordesc<)([bf]\w+)", kind) for _, kind in self.signature)
        return "/".join(dict.fromkeys(found[1] for found in kinds if found))

    @property
    def label(self) -> str:
        """The kernel's name, its tensors' types, and the constants that tell configurations apart."""
        shown = [f"{name}={value}" for name, value in self.tile.items() if name != "PART"]
        return f"{self.module}.{self.kernel.strip('_')} [{self.dtypes}] {' '.join(shown)}"


class _Absent:
    """Stands in for Triton's driver of a device that is not there."""

    def __init__(self, gpu: GPUTarget) -> None:
        self._gpu = gpu

    def get_current_target(self) -> GPUTarget:
        return self._gpu

    def get_current_device(self) -> Any:
        # Kernels keep what they have compiled under the device's number: a new device each time has nothing yet.
        return self

    def get_current_stream(self, device: Any) -> int:
        return 0


@contextmanager
def standing_in(machine: Machine) -> Iterator[None]:
    """Calls inside choose tables and dispatch as on `machine`, with nothing there to launch on."""
    before = config.override, driver._active
    config.override = machine.tables
    driver.set_active(_Absent(machine.gpu))
    try:
        yield
    finally:
        config.override, driver._active = before


@contextmanager
def recording(machine: Machine, found: Callable[[Launch], None]) -> Iterator[None]:
    """Launches inside are dispatched as on `machine` and told to `found` instead of being compiled and made."""
    noted: list[dict[str, Any]] = []

    def note(**told: Any) -> bool:
        noted.append(told["compile"])
        return True  # leave out the compilation

    def record(kernel: Any, args: tuple[Any, ...], options: dict[str, Any]) -> None:
        kernel.warmup(*args, grid=(1,), **options)
        told = noted.pop()
        found(
            Launch(
                kernel.fn.__module__.rsplit(".", 1)[-1],
                kernel.fn.__name__,
                tuple(told["signature"].items()),
                tuple((place, value) for (place,), value in told["constants"].items()),
                tuple((place, tuple(tuple(pair) for pair in pairs)) for (place,), pairs in told["configs"][0].items()),
                tuple((name, value) for name, value in options.items() if name not in kernel.arg_names),
            )
        )

    runtime = triton.knobs.runtime
    before = launch.recorder, runtime.jit_cache_hook
    launch.recorder, runtime.jit_cache_hook = record, note
    try:
        with standing_in(machine):
            yield
    finally:
        launch.recorder, runtime.jit_cache_hook = before


def calls(n: int, v: int, d: int, logits_dtype: torch.dtype, table_dtype: torch.dtype) -> Iterator[Any]:
    """Every raw function once, in the variants that choose different kernels."""

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    logits, table = empty(n, v, dtype=logits_dtype), empty(v, d, dtype=table_dtype)
    grad, soft, lse = empty(n, d, dtype=table_dtype), empty(n, d), empty(n)
    rng, keys = empty(2, dtype=torch.int64), empty(n, dtype=torch.int64)
    yield entrgi_embedding(logits, table, Draw(rng, keys, 0.7, 0, 0.95), None, None, "entropy")
    for dtype in dict.fromkeys((logits_dtype, torch.float32)):
        moments = torch.empty_like(logits, dtype=dtype), torch.empty_like(logits, dtype=dtype)
        yield guidance_update_(logits, grad, table, soft, lse, 0.7, Adam(*moments, 2, 0.5, 0.9, 0.999, 1e-8))
    moments = torch.empty_like(logits), torch.empty_like(logits)
    # A first and a last step do less than those between: compiling them for one pair of types is enough.
    for step, keep in ((1, True), (3, False)) if logits_dtype == table_dtype == torch.bfloat16 else ():
        yield guidance_update_(logits, grad, table, soft, lse, 0.7, Adam(*moments, step, 0.5, 0.9, 0.999, 1e-8, keep))
    yield soft_embedding_backward(logits, table, grad, soft, lse, 0.7)
    yield guidance_update_(logits, grad, table, soft, lse, 0.7, Adam(None, None, 1, 0.5, 0.9, 0.999, 1e-8))
    yield first_order_update_(logits, grad, table, keys, 1.0)
    yield soft_embedding_grad_table(logits, grad, lse, 0.7, table_dtype)
    inputs = empty(2 * n, d, dtype=table_dtype)
    yield entrgi_embedding(logits, table, Draw(rng, keys, 1.0, 0, 1.0), None, None, "zero", Placement(inputs, keys))
    yield soft_embedding(logits, table, 0.7)
    yield softmax_entropy(logits, 0.7)
    yield softmax_entropy_backward(logits, lse, lse, lse, lse, 0.7)
    yield sample_tokens(logits, Draw(rng, keys, 0.7, 0, 1.0))
    yield sample_tokens(logits, Draw(rng, keys, 0.0, 0, 1.0))
    for alg in SCORED_ALGS:
        yield unmask_confidence(logits, keys, alg, 0.7, 0, 0.95)


def launches(machine: Machine, cases: Iterable[Case]) -> dict[Launch, set[str]]:
    """Distinct launches of all raw functions on a machine, and the cases that lead to each."""
    found: dict[Launch, set[str]] = {}
    label = ""

    def note(item: Launch) -> None:
        found.setdefault(item, set()).add(label)

    with recording(machine, note):
        for n, v, d, logits_dtype, table_dtype in cases:
            label = f"N{n} V{v} D{d} {str(logits_dtype)[6:]}/{str(table_dtype)[6:]}"
            for _ in calls(n, v, d, logits_dtype, table_dtype):
                pass
    return found


def here() -> Machine:
    """The GPU that torch and Triton see; raises RuntimeError where there is none."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    shared = getattr(properties, "shared_memory_per_block_optin", 64 << 10)
    return Machine(driver.active.get_current_target(), properties.multi_processor_count, shared)


def _kernel(item: Launch) -> Any:
    return getattr(importlib.import_module(f"{__package__}.{item.module}"), item.kernel)


def build(gpu: GPUTarget, item: Launch) -> Any:
    """Triton's compiled kernel, from its cache where it is there."""
    source = ASTSource(
        _kernel(item),
        dict(item.signature),
        constexprs={(place,): value for place, value in item.constants},
        attrs={(place,): [list(pair) for pair in pairs] for place, pairs in item.attributes},
    )
    return triton.compile(source, target=gpu, options=dict(item.options))


def in_processes(
    function: Callable[..., Any], jobs: list[tuple[Any, ...]], workers: int, lost: Callable[[tuple[Any, ...]], Any]
) -> list[Any]:
    """function(*job) of every job, in so many processes; lost(job) of one that ends its process, as LLVM errors do."""
    # Fresh processes: a fork of one that has threads (torch's, pytest's) may hang.
    context = multiprocessing.get_context("spawn")

    def attempt(job: tuple[Any, ...]) -> Any:
        try:
            return pool.submit(function, *job).result()
        except BrokenProcessPool:  # by this job or by another: in a process of its own it shows
            with ProcessPoolExecutor(1, mp_context=context) as own:
                try:
                    return own.submit(function, *job).result()
                except BrokenProcessPool:
                    return lost(job)

    with ProcessPoolExecutor(workers, mp_context=context) as pool, ThreadPoolExecutor(workers) as threads:
        return list(threads.map(attempt, jobs))


def fill_cache(cases: Iterable[Case], workers: int) -> int:
    """Compile for the GPU at hand what the raw functions launch in these cases; how many launches that is.

    Triton compiles a kernel at its first call, one after the other: minutes of one core at the beginning of a session.

    Raises:
        RuntimeError: torch or Triton sees no GPU.
    """
    machine = here()
    wanted = [(machine.gpu, item) for item in launches(machine, cases)]
    in_processes(_built, wanted, workers, lambda job: None)
    return len(wanted)


def _built(gpu: GPUTarget, item: Launch) -> None:
    """:func:`build`; what fails is told where it is launched, and what is built cannot leave its process."""
    with suppress(Exception):
        build(gpu, item)
