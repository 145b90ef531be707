"""What the compiler makes of csrc/cuda, on a machine without a GPU: `python -m benchmarks.tools.cuda_static`.

nvcc compiles every source for every shipped architecture; ptxas tells registers, stack and spills, and the machine code
is searched for 16-byte loads and stores and for local memory. Threads and blocks a multiprocessor are template
arguments of each kernel (csrc/cuda/plans.cuh), so the plan is read off the kernel's own name.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCES = tuple(sorted((ROOT / "csrc" / "cuda").glob("*.cu")))
TARGETS = ("sm_80", "sm_90a", "sm_100a")
FLAGS = ("-std=c++20", "-O3", "-lineinfo")  # as setup.py has them
REGISTERS = 65_536  # of a multiprocessor, on every target
_TYPES = {"f": "float32", "NS0_4bf16E": "bfloat16", "NS0_3f16E": "float16"}
_NAME = re.compile(r"_ZN6entrgi4cuda(\d+)(\w+)")


@dataclass(frozen=True)
class Kernel:
    """One compiled kernel.

    Attributes:
        target: architecture. name: the function's. dtype: of the logits. arguments: its other template arguments;
            the first two are threads a block and planned blocks a multiprocessor.
        registers: a thread. stack, spilled: bytes a thread.
        wide_loads, wide_stores: 16-byte accesses of device memory in the machine code. local: accesses of local memory.
    """

    target: str
    name: str
    dtype: str
    arguments: tuple[int, ...]
    registers: int
    stack: int
    spilled: int
    wide_loads: int
    wide_stores: int
    local: int

    @property
    def label(self) -> str:
        return f"{self.name}<{self.dtype}, {', '.join(map(str, self.arguments))}>"

    @property
    def blocks(self) -> int:
        """Blocks for which a multiprocessor has registers; they are given out eight a thread."""
        return REGISTERS // (-(-self.registers // 8) * 8 * self.arguments[0])

    def faults(self) -> list[str]:
        """What is not as planned."""
        found = []
        if self.spilled or self.stack or self.local:
            found.append(f"local memory: {self.spilled} B spilled, {self.stack} B stack, {self.local} accesses")
        if self.blocks < self.arguments[1]:
            found.append(f"{self.registers} registers leave room for {self.blocks} blocks, planned {self.arguments[1]}")
        if self.wide_loads == 0:
            found.append("no 16-byte loads")
        if self.name == "entropy_backward_kernel" and self.wide_stores == 0:
            found.append("no 16-byte stores")
        return found


def nvcc() -> str | None:
    """The CUDA compiler: on PATH, or of CUDA_HOME."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc") or (shutil.which("nvcc", path=str(Path(home, "bin"))) if home else None)


def disassembler() -> str | None:
    """cuobjdump: on PATH, or the one in triton's package."""
    spec = importlib.util.find_spec("triton")
    packaged = [
        str(Path(folder) / "backends" / "nvidia" / "bin") for folder in (spec and spec.submodule_search_locations) or ()
    ]
    return shutil.which("cuobjdump") or shutil.which("cuobjdump", path=os.pathsep.join(packaged))


def identify(symbol: str) -> tuple[str, str, tuple[int, ...]]:
    """(name, dtype, integer arguments) of a mangled kernel of ours."""
    match = _NAME.match(symbol)
    if match is None:
        raise ValueError(f"{symbol!r} is no kernel of entrgi::cuda")
    length = int(match[1])
    name, rest = match[2][:length], match[2][length:]
    arguments = re.match(r"I(NS0_\d[a-z]+\d+E|f)((?:L[ib]\d+E)*)E", rest)
    if arguments is None:
        raise ValueError(f"{symbol!r}: expected a type and integers as template arguments")
    return name, _TYPES[arguments[1]], tuple(map(int, re.findall(r"L[ib](\d+)E", arguments[2])))


def usage(log: str) -> dict[str, tuple[int, int, int]]:
    """(registers, stack, spilled) by symbol, from what `ptxas -v` says."""
    found = {}
    for part in log.split("Compiling entry function '")[1:]:
        frame = re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part)
        registers = re.search(r"Used (\d+) registers", part)
        if frame is None or registers is None:
            raise ValueError(f"ptxas tells no usage: {part[:300]}")
        found[part.partition("'")[0]] = int(registers[1]), int(frame[1]), int(frame[2]) + int(frame[3])
    return found


def accesses(code: str) -> dict[str, tuple[int, int, int]]:
    """(16-byte loads, 16-byte stores, local accesses) by symbol, from a disassembly."""
    found = {}
    for part in code.split("Function : ")[1:]:
        wide = [len(re.findall(rf"\b{kind}\.E\.(?:[A-Z_]+\.)*128\b", part)) for kind in ("LDG", "STG")]
        found[part.split(None, 1)[0]] = wide[0], wide[1], len(re.findall(r"\b(?:LDL|STL)\b", part))
    return found


def compile_for(target: str) -> list[Kernel]:
    """Every kernel of csrc/cuda for a target.

    Raises:
        RuntimeError: nvcc or cuobjdump is missing or fails; the message holds what it said.
    """
    compiler, reader = nvcc(), disassembler()
    if compiler is None or reader is None:
        raise RuntimeError(f"{'nvcc' if compiler is None else 'cuobjdump'} was not found")
    kernels = []
    with tempfile.TemporaryDirectory() as folder:
        binaries = [Path(folder) / f"{source.stem}.cubin" for source in SOURCES]
        running = [
            subprocess.Popen(
                [compiler, *FLAGS, f"-arch={target}", "-cubin", "-Xptxas=-v", str(source), "-o", str(binary)],
                stderr=subprocess.PIPE,
                text=True,
            )
            for source, binary in zip(SOURCES, binaries, strict=True)
        ]
        logs = [process.communicate()[1] for process in running]
        for source, binary, process, log in zip(SOURCES, binaries, running, logs, strict=True):
            if process.returncode != 0:
                raise RuntimeError(f"nvcc {source.name} for {target}: {log[-2000:]}")
            # cuobjdump calls nvdisasm, which lies beside it.
            path = os.pathsep.join([str(Path(reader).parent), os.environ.get("PATH", os.defpath)])
            run = subprocess.run(
                [reader, "-sass", str(binary)], capture_output=True, text=True, env=os.environ | {"PATH": path}
            )
            if run.returncode != 0:
                raise RuntimeError(f"cuobjdump {binary.name} for {target}: {run.stderr[-2000:]}")
            code = accesses(run.stdout)
            for symbol, numbers in usage(log).items():
                kernels.append(Kernel(target, *identify(symbol), *numbers, *code[symbol]))
    return sorted(kernels, key=lambda k: k.label)


def table(kernels: Sequence[Kernel]) -> str:
    """Markdown, one line a kernel."""
    lines = [
        "| target | kernel | threads x blocks | registers | spilled | 16-byte loads | 16-byte stores |",
        "|---|---|---|---|---|---|---|",
    ]
    for k in kernels:
        rest = "".join(f", {a}" for a in k.arguments[2:])
        lines.append(
            f"| {k.target} | `{k.name}` {k.dtype}{rest} | {k.arguments[0]} x {k.arguments[1]} | {k.registers} | "
            f"{k.spilled} | {k.wide_loads} | {k.wide_stores} |"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table; exit status 1 when a kernel is not as planned or nothing can be compiled."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tools.cuda_static", description=__doc__.splitlines()[0])
    parser.add_argument("--target", action="append", choices=TARGETS, help="default: all")
    try:
        kernels = [kernel for target in parser.parse_args(argv).target or TARGETS for kernel in compile_for(target)]
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    print(table(kernels))
    faults = [f"{k.target} {k.label}: {fault}" for k in kernels for fault in k.faults()]
    print(f"\n{len(kernels)} kernels, {len(faults)} not as planned", *faults, sep="\n")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
