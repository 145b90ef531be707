"""The gate: what the Triton backend would launch is compiled without a GPU; spills and shared memory are judged.

    python -m benchmarks.tools.gate [--target sm_90 ...] [--only REGEX] [--list]
    python -m benchmarks.tools.gate --here      # on a machine with a GPU: fills Triton's cache, all cores

Of each distinct launch (:mod:`entrgi_kernels.backends.triton.aot`) the tools that Triton's package carries say how many
registers its machine code takes and whether it spills.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from entrgi_kernels.backends.triton import aot, chunked
from entrgi_kernels.backends.triton.aot import Launch, Machine


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


SHAPES = ((7, 1024), (64, 1024), (200, 1024), (512, 1024), (1024, 2048), (4096, 2560))
# (N, V, D) at which tests/backends/test_triton_gpu.py checks every operator.
CHECKED = ((1, 7, 3), (5, 50_257, 100), (64, VOCABULARY, 1024), (130, 32_000, 1000), (1100, 8192, 256))
_BF16, _FP16, _FP32 = torch.bfloat16, torch.float16, torch.float32


def cases(thorough: bool) -> Iterator[aot.Case]:
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


def every_case() -> list[aot.Case]:
    """The gate's own, and those of the GPU's tests."""
    return [*cases(thorough=True), *((*shape, dtype, dtype) for shape in CHECKED for dtype in (_BF16, _FP16, _FP32))]


def launches(machine: Machine, cases: Iterable[aot.Case]) -> dict[Launch, set[str]]:
    """:func:`.aot.launches`, and those of the engine that the tables do not choose at these shapes."""
    found = aot.launches(machine, cases)
    with aot.recording(machine, lambda item: found.setdefault(item, set()).add("chunked")):
        logits = torch.empty(64, VOCABULARY, dtype=_BF16, device="meta")
        embedding, grad = (torch.empty(rows, 1024, dtype=_BF16, device="meta") for rows in (VOCABULARY, 64))
        stats, moments = torch.empty(64, device="meta"), (torch.empty_like(logits), torch.empty_like(logits))
        step = chunked.Step(0.5, 1.0, 0.9, 0.999, 1e-8, reads=True, writes=True)
        chunked.forward(logits, embedding, stats, stats, 0.7, 0.0)
        chunked.backward(logits, grad, embedding, stats, stats, 0.7, logits, moments, step)
        chunked.backward(logits, grad, embedding, stats, stats, 1.0, logits, None, chunked.Step.linear(1.0))
    return found


def jobs(target: str) -> dict[Launch, set[str]]:
    """What the gate compiles: everything for H100 and H200, less for the others, each tile once for the fallbacks."""
    found = launches(MACHINES[target], cases(thorough=target == "sm_90"))
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


def compile_launch(target: str, machine: Machine, item: Launch) -> Report:
    """Compile one launch for a machine and read what its machine code uses. A failure is told in `error`."""
    report = Report(target, machine, item)
    try:
        built = aot.build(machine.gpu, item)
        report.shared_bytes = built.metadata.shared
        (_read_amdgcn if machine.hip else _read_cubin)(report, built.asm)
    except Exception as error:
        report.error = f"{type(error).__name__}: {str(error)[:500]}"
    return report


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
    """:func:`compile_launch` of each, in so many processes. Triton's cache makes a second run fast."""

    def lost(job: tuple[Any, ...]) -> Report:
        target, machine, launch = job
        return Report(target, machine, launch, error="the compiler crashed")

    return aot.in_processes(compile_launch, list(wanted), workers, lost)


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


def fill_cache(workers: int) -> list[Report]:
    """Compile for the GPU at hand all that :func:`every_case` launches there."""
    machine = aot.here()
    return compile_all([("here", machine, item) for item in launches(machine, every_case())], workers)


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
