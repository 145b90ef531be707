"""Ahead-of-time compilation of what this backend would launch, on a machine without a GPU.

    python -m entrgi_kernels.backends.triton.aot [--target sm_90 ...] [--only REGEX] [--list]
    python -m entrgi_kernels.backends.triton.aot --here      # on a machine with a GPU: fills Triton's cache, all cores

The raw functions are run on tensors without storage, and every launch goes through Triton's own dispatch for a device
that is not there, up to the point where it would compile: so what is compiled is what a GPU of that architecture would
be given (kernels, argument types, specialisations, tiles, warps and stages), and what is compiled on a machine that has
the GPU is found there by Triton's cache. Of each distinct launch the packaged tools say how many registers its machine
code takes and whether it spills.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.driver import driver

from ..arguments import Adam, Draw, Placement
from . import (
    chunked,
    config,
    entrgi_embedding,
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


def _nvidia(capability: int, sms: int, kilobytes: int) -> Machine:
    return Machine(GPUTarget("cuda", capability, 32), sms, kilobytes << 10)


def _amd(name: str, units: int, kilobytes: int) -> Machine:
    return Machine(GPUTarget("hip", name, 64), units, kilobytes << 10)


# A100, H100 / H200, B200: what the tables are made for.
SHIPPED = {"sm_80": _nvidia(80, 108, 163), "sm_90": _nvidia(90, 132, 227), "sm_100": _nvidia(100, 148, 227)}
# Served by the same tables, with less shared memory (A6000, L40S, RTX 5090), and AMD's (MI250X, MI300X).
FALLBACK = {
    "sm_86": _nvidia(86, 84, 99),
    "sm_89": _nvidia(89, 142, 99),
    "sm_120": _nvidia(120, 170, 99),
    "gfx90a": _amd("gfx90a", 110, 64),
    "gfx942": _amd("gfx942", 304, 64),
}
MACHINES = SHIPPED | FALLBACK
VOCABULARY = 151_936


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


@dataclass
class Report:
    """What the compiler made of a launch on a target."""

    target: str
    machine: Machine
    launch: Launch
    registers: int = 0
    spill_bytes: int = 0
    shared_bytes: int = 0
    error: str | None = None
    shapes: set[str] = field(default_factory=set)

    @property
    def passed(self) -> bool:
        """Compiled, spills nothing, and fits the target's shared memory."""
        return self.error is None and self.spill_bytes == 0 and self.shared_bytes <= self.machine.shared_limit


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
    before = config.override, launch.recorder, runtime.jit_cache_hook, driver._active
    config.override, launch.recorder, runtime.jit_cache_hook = machine.tables, record, note
    driver.set_active(_Absent(machine.gpu))
    try:
        yield
    finally:
        config.override, launch.recorder, runtime.jit_cache_hook, driver._active = before


def _calls(n: int, v: int, d: int, logits_dtype: torch.dtype, table_dtype: torch.dtype) -> Iterator[Any]:
    """Every raw function once, in the variants that choose different kernels."""

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    logits, table = empty(n, v, dtype=logits_dtype), empty(v, d, dtype=table_dtype)
    grad, soft, lse = empty(n, d, dtype=table_dtype), empty(n, d), empty(n)
    rng, rows = empty(2, dtype=torch.int64), empty(n, dtype=torch.int64)
    yield entrgi_embedding(logits, table, Draw(rng, rows, 0.7, 0, 0.95), None, None, "entropy")
    for dtype in dict.fromkeys((logits_dtype, torch.float32)):
        moments = torch.empty_like(logits, dtype=dtype), torch.empty_like(logits, dtype=dtype)
        yield guidance_update_(logits, grad, table, soft, lse, 0.7, Adam(*moments, 2, 0.5, 0.9, 0.999, 1e-8))
    moments = torch.empty_like(logits), torch.empty_like(logits)
    # A first and a last step do less than those between: compiling them for one pair of types is enough.
    for step, keep in ((1, True), (3, False)) if logits_dtype == table_dtype == _BF16 else ():
        yield guidance_update_(logits, grad, table, soft, lse, 0.7, Adam(*moments, step, 0.5, 0.9, 0.999, 1e-8, keep))
    yield soft_embedding_backward(logits, table, grad, soft, lse, 0.7)
    yield guidance_update_(logits, grad, table, soft, lse, 0.7, Adam(None, None, 1, 0.5, 0.9, 0.999, 1e-8))
    yield soft_embedding_grad_table(logits, grad, lse, 0.7, table_dtype)
    inputs = empty(2 * n, d, dtype=table_dtype)
    yield entrgi_embedding(logits, table, Draw(rng, rows, 1.0, 0, 1.0), None, None, "zero", Placement(inputs, rows))
    yield soft_embedding(logits, table, 0.7)
    yield softmax_entropy(logits, 0.7)
    yield softmax_entropy_backward(logits, lse, lse, lse, lse, 0.7)
    yield sample_tokens(logits, Draw(rng, rows, 0.7, 0, 1.0))
    yield sample_tokens(logits, Draw(rng, rows, 0.0, 0, 1.0))
    for alg in ("entropy", "maskgit_plus", "topk_margin", "anchor"):
        yield unmask_confidence(logits, rows, alg, 0.7, 0, 0.95)


SHAPES = ((7, 1024), (64, 1024), (200, 1024), (512, 1024), (1024, 2048), (4096, 2560))
# (N, V, D) at which tests/backends/test_triton_gpu.py checks every operator.
CHECKED = ((1, 7, 3), (5, 50_257, 100), (64, VOCABULARY, 1024), (130, 32_000, 1000), (1100, 8192, 256))
_BF16, _FP16, _FP32 = torch.bfloat16, torch.float16, torch.float32


Case = tuple[int, int, int, torch.dtype, torch.dtype]


def _cases(thorough: bool) -> Iterator[Case]:
    """(N, V, D, dtype of the logits, of the table)."""
    for n, d in SHAPES:
        yield n, VOCABULARY, d, _BF16, _BF16
    for n in (7, 512):
        yield n, VOCABULARY, 1024, _FP32, _FP32
    # Rows that are not aligned, and rows that are but end inside a tile (as do the embeddings).
    for dtype in (_BF16, _FP32):
        yield 64, 50257, 1000, dtype, dtype
    yield 64, 50272, 576, _BF16, _BF16
    if thorough:
        yield 512, VOCABULARY, 1024, _FP16, _FP16
        for n, d in SHAPES[:5]:
            # A model that gives float32 logits beside a reward model in bfloat16; and the other way round.
            yield n, VOCABULARY, d, _FP32, _BF16
        yield 512, VOCABULARY, 1024, _BF16, _FP32


def launches(machine: Machine, cases: Iterable[Case]) -> dict[Launch, set[str]]:
    """Distinct launches of all raw functions on a machine, and the cases that lead to each."""
    found: dict[Launch, set[str]] = {}
    label = ""

    def note(item: Launch) -> None:
        found.setdefault(item, set()).add(label)

    with recording(machine, note):
        for n, v, d, logits_dtype, table_dtype in cases:
            label = f"N{n} V{v} D{d} {str(logits_dtype)[6:]}/{str(table_dtype)[6:]}"
            for _ in _calls(n, v, d, logits_dtype, table_dtype):
                pass
        # The engine that the tables do not choose at these shapes has to compile as well.
        label = "chunked"
        logits = torch.empty(64, VOCABULARY, dtype=_BF16, device="meta")
        embedding, grad = (torch.empty(rows, 1024, dtype=_BF16, device="meta") for rows in (VOCABULARY, 64))
        stats, moments = torch.empty(64, device="meta"), (torch.empty_like(logits), torch.empty_like(logits))
        step = chunked.AdamStep(0.5, 1.0, 0.9, 0.999, 1e-8, reads=True, writes=True)
        chunked.forward(logits, embedding, stats, stats, 0.7, 0.0)
        chunked.backward(logits, grad, embedding, stats, stats, 0.7, logits, moments, step)
    return found


def jobs(target: str) -> dict[Launch, set[str]]:
    """What the gate compiles: everything for H100 and H200, less for the others, each tile once for the fallbacks."""
    found = launches(MACHINES[target], _cases(thorough=target == "sm_90"))
    if target in SHIPPED:
        return found
    first: dict[tuple[Any, ...], Launch] = {}
    for item in found:
        sizes = tuple(size for size in item.tile.items() if size[0].startswith(("BLOCK", "PARTS")))
        first.setdefault((item.module, item.kernel, sizes, item.options), item)
    return {item: found[item] for item in first.values()}


def tool(name: str) -> str:
    """Path of a program that triton's package carries."""
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _kernel(item: Launch) -> Any:
    return getattr(importlib.import_module(f"{__package__}.{item.module}"), item.kernel)


def compile_launch(target: str, machine: Machine, item: Launch) -> Report:
    """Compile one launch for a machine and read what its machine code uses. A failure is told in `error`."""
    report = Report(target, machine, item)
    try:
        built = build(machine.gpu, item)
        report.shared_bytes = built.metadata.shared
        (_read_amdgcn if machine.hip else _read_cubin)(report, built.asm)
    except Exception as error:
        report.error = f"{type(error).__name__}: {str(error)[:500]}"
    return report


def build(gpu: GPUTarget, item: Launch) -> Any:
    """Triton's compiled kernel, from its cache where it is there."""
    source = ASTSource(
        _kernel(item),
        dict(item.signature),
        constexprs={(place,): value for place, value in item.constants},
        attrs={(place,): [list(pair) for pair in pairs] for place, pairs in item.attributes},
    )
    return triton.compile(source, target=gpu, options=dict(item.options))


def _read_cubin(report: Report, asm: Any) -> None:
    """Registers and stack of the machine code. A spill needs a stack frame; nothing else here has one."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(asm["cubin"])
        done = subprocess.run([tool("cuobjdump"), "-res-usage", str(path)], capture_output=True, text=True)
    usage = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", done.stdout)
    if usage is None:
        raise RuntimeError(f"cuobjdump does not tell: {done.stdout} {done.stderr}")
    report.registers = int(usage[1])
    report.spill_bytes = int(usage[2]) + int(usage[3])


def _read_amdgcn(report: Report, asm: Any) -> None:
    """Vector registers and scratch memory, from the assembler's own notes."""
    notes = [
        int(found[1])
        for name in ("vgpr_count", "private_segment_fixed_size")
        if (found := re.search(rf"\.{name}:\s+(\d+)", asm["amdgcn"]))
    ]
    if len(notes) != 2:
        raise RuntimeError("the assembly does not tell its registers")
    report.registers, report.spill_bytes = notes


def compile_all(wanted: Iterable[tuple[str, Machine, Launch]], workers: int) -> list[Report]:
    """:func:`compile_launch` of each, in so many processes. Triton's own cache makes a second run fast."""

    def lost(job: tuple[Any, ...]) -> Report:
        target, machine, launch = job
        return Report(target, machine, launch, error="the compiler crashed")

    return in_processes(compile_launch, list(wanted), workers, lost)


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


def reports(targets: Iterable[str] = tuple(SHIPPED), workers: int = 2, only: str = "") -> list[Report]:
    """Compile every launch of the targets whose label matches `only`."""
    wanted = {
        (target, MACHINES[target], item): shapes
        for target in targets
        for item, shapes in jobs(target).items()
        if re.search(only, item.label)
    }
    made = compile_all(wanted, workers)
    for report, shapes in zip(made, wanted.values(), strict=True):
        report.shapes = shapes
    return made


def here() -> Machine:
    """The GPU that torch and Triton see; raises RuntimeError where there is none."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    shared = getattr(properties, "shared_memory_per_block_optin", 64 << 10)
    return Machine(driver.active.get_current_target(), properties.multi_processor_count, shared)


def fill_cache(workers: int) -> list[Report]:
    """Compile for the GPU at hand all that the gate's own shapes and those of the GPU's tests launch there.

    Triton compiles a kernel at its first call, one after the other: minutes of one core at the beginning of a session.
    """
    machine = here()
    checked = [(*shape, dtype, dtype) for shape in CHECKED for dtype in (_BF16, _FP16, _FP32)]
    wanted = launches(machine, [*_cases(thorough=True), *checked])
    return compile_all([("here", machine, item) for item in wanted], workers)


def table(made: list[Report]) -> str:
    """Markdown: one line a launch, worst first within a kernel."""
    lines = [
        "| target | launch | warps x stages | registers | spilled bytes | shared bytes | a shape that leads to it |",
        "|---|---|---|---|---|---|---|",
    ]
    for r in sorted(made, key=lambda r: (r.target, r.launch.label, r.launch.num_warps)):
        outcome = f"{r.registers} | {r.spill_bytes} | {r.shared_bytes}" if r.error is None else f"{r.error} | |"
        shape = min(r.shapes) if r.shapes else ""
        lines.append(
            f"| {r.target} | {r.launch.label} | {r.launch.num_warps} x {r.launch.num_stages} | {outcome} | {shape} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description="Compile every launch of the Triton backend without a GPU.")
    parser.add_argument("--target", action="append", choices=sorted(MACHINES), help="default: those with tables")
    parser.add_argument("--here", action="store_true", help="for the GPU of this machine, into Triton's cache")
    parser.add_argument("--list", action="store_true", help="list the launches, compile nothing")
    parser.add_argument("--workers", type=int, help="default: 2; with --here as many as there are cores")
    parser.add_argument("--only", default="", help="regular expression on the launch's label")
    arguments = parser.parse_args()
    targets = arguments.target or list(SHIPPED)
    if arguments.list:
        for target in targets:
            for item, shapes in jobs(target).items():
                print(target, item.label, item.num_warps, item.num_stages, len(shapes))
        return 0
    if arguments.here:
        made = fill_cache(arguments.workers or os.cpu_count() or 2)
    else:
        made = reports(targets, arguments.workers or 2, arguments.only)
    print(table(made))
    failed = [r for r in made if not r.passed]
    print(f"\n{len(made)} launches, {len(failed)} failed")
    return bool(failed)


if __name__ == "__main__":
    raise SystemExit(main())
