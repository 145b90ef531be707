"""Ahead-of-time compilation of what this backend would launch, on a machine without a GPU.

    python -m entrgi_kernels.backends.triton.aot [--target sm_90 ...] [--only REGEX] [--list]

The raw functions are run on tensors without storage with their launches recorded, so that what is compiled is what a
GPU of that architecture would be given: kernels, argument types, specialisations, tiles, warps and stages. Each
distinct launch is compiled for its target by the packaged ptxas, and cuobjdump says how many registers its machine
code takes and whether it spills. What is printed is the table of docs/gpu.md.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from . import (
    chunked,
    config,
    entrgi_embedding,
    guidance_update_,
    launch,
    sample_tokens,
    soft_embedding_backward,
    soft_embedding_grad_table,
    softmax_entropy,
    softmax_entropy_backward,
    unmask_confidence,
)

CAPABILITY = {"sm_80": 80, "sm_90": 90, "sm_100": 100}
SMS = {"sm_80": 108, "sm_90": 132, "sm_100": 148}
# Shared memory that one program can be given.
SHARED_LIMIT = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10}
VOCABULARY = 151_936
_TYPES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int64: "i64", torch.int32: "i32",
}  # fmt: skip


@dataclass(frozen=True)
class Launch:
    """One distinct compilation: a kernel with types, constants and options."""

    module: str
    kernel: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    divisible: tuple[int, ...]
    num_warps: int
    num_stages: int

    @property
    def configuration(self) -> tuple[Any, ...]:
        """What the tables and the tensors' types decide; sizes and strides are left to the first launch met."""
        pointers = tuple(item for item in self.signature if item[1].startswith("*"))
        chosen = tuple(item for item in self.constants if item[0].isupper())
        return self.module, self.kernel, pointers, chosen, self.num_warps, self.num_stages

    @property
    def label(self) -> str:
        """The kernel's name, its first pointer's type, and the constants that tell configurations apart."""
        types = dict(self.signature)
        pointers = list(dict.fromkeys(t[1:] for t in types.values() if t.startswith("*") and t[1:3] in ("bf", "fp")))
        shown = [f"{name}={value}" for name, value in self.constants if name.isupper() and name != "PART"]
        return f"{self.module}.{self.kernel.strip('_')} [{'/'.join(pointers)}] {' '.join(shown)}"


@dataclass
class Report:
    """What ptxas made of a launch on a target."""

    target: str
    launch: Launch
    registers: int = 0
    spill_bytes: int = 0
    shared_bytes: int = 0
    error: str | None = None
    shapes: set[str] = field(default_factory=set)

    @property
    def passed(self) -> bool:
        """Compiled, spills nothing, and fits the target's shared memory."""
        return self.error is None and self.spill_bytes == 0 and self.shared_bytes <= SHARED_LIMIT[self.target]


def _specialise(kernel: Any, args: tuple[Any, ...], num_warps: int, num_stages: int, meta: dict[str, Any]) -> Launch:
    """The launch as Triton's own dispatch specialises it: ones are constants, multiples of 16 are known as such."""
    names = kernel.arg_names
    signature, constants, divisible = {}, {}, []
    values = dict(zip(names, args, strict=False)) | meta
    for position, name in enumerate(names):
        value = values[name]
        if name in meta:
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = "*" + _TYPES[value.dtype]
            divisible.append(position)
        elif isinstance(value, float):
            signature[name] = "fp32"
        elif value == 1 and not kernel.params[position].do_not_specialize:
            signature[name], constants[name] = "constexpr", 1
        else:
            signature[name] = "i32" if -(1 << 31) <= value < 1 << 31 else "i64"
            if value % 16 == 0 and not kernel.params[position].do_not_specialize:
                divisible.append(position)
    return Launch(
        kernel.fn.__module__.rsplit(".", 1)[-1],
        kernel.fn.__name__,
        tuple(signature.items()),
        tuple(constants.items()),
        tuple(divisible),
        num_warps,
        num_stages,
    )


def _calls(n: int, v: int, d: int, logits_dtype: torch.dtype, table_dtype: torch.dtype) -> Iterator[Any]:
    """Every raw function once, in the variants that choose different kernels."""

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    logits, table = empty(n, v, dtype=logits_dtype), empty(v, d, dtype=table_dtype)
    grad, soft, lse = empty(n, d, dtype=table_dtype), empty(n, d), empty(n)
    rng, rows = empty(2, dtype=torch.int64), empty(n, dtype=torch.int64)
    yield entrgi_embedding(logits, table, rng, rows, None, None, "entropy", 0.7, 0, 0.95)
    moments = torch.empty_like(logits), torch.empty_like(logits)
    yield guidance_update_(logits, grad, table, soft, lse, *moments, 2, 0.7, 0.5, 0.9, 0.999, 1e-8)
    yield soft_embedding_backward(logits, table, grad, soft, lse, 0.7)
    yield guidance_update_(logits, grad, table, soft, lse, None, None, 1, 0.7, 0.5, 0.9, 0.999, 1e-8)
    yield soft_embedding_grad_table(logits, grad, lse, 0.7, table_dtype)
    yield entrgi_embedding(logits, table, rng, rows, None, None, "zero", 1.0, 0, 1.0)
    yield softmax_entropy(logits, 0.7)
    yield softmax_entropy_backward(logits, lse, lse, lse, lse, 0.7)
    yield sample_tokens(logits, rng, rows, 0.7, 0, 1.0)
    yield sample_tokens(logits, rng, rows, 0.0, 0, 1.0)
    for alg in ("entropy", "maskgit_plus", "topk_margin", "anchor"):
        yield unmask_confidence(logits, rows, alg, 0.7, 0, 0.95)


SHAPES = ((7, 1024), (64, 1024), (512, 1024), (1024, 2048), (4096, 2560))
_BF16, _FP16, _FP32 = torch.bfloat16, torch.float16, torch.float32


def launches(target: str, thorough: bool = True) -> dict[Launch, set[str]]:
    """Distinct launches on a target over the canonical shapes and dtypes, and the shapes that lead to each.

    `thorough` adds float16, and bfloat16 logits under a float32 table.
    """
    found: dict[Launch, set[str]] = {}
    label = ""

    seen: dict[tuple[Any, ...], Launch] = {}

    def record(kernel, grid, args, num_warps, num_stages, meta):
        item = _specialise(kernel, args, num_warps, num_stages, meta)
        found.setdefault(seen.setdefault(item.configuration, item), set()).add(label)

    cases = [(n, VOCABULARY, d, _BF16, _BF16) for n, d in SHAPES]
    cases += [(n, VOCABULARY, d, _FP32, _FP32) for n, d in ((7, 1024), (512, 1024))]
    cases += [(64, 50257, 1000, _BF16, _BF16), (64, 50257, 1000, _FP32, _FP32)]
    if thorough:
        cases += [(512, VOCABULARY, 1024, _FP16, _FP16), (512, VOCABULARY, 1024, _BF16, _FP32)]
    before = config.override, launch.recorder
    config.override = config.Target(config.ARCHITECTURES[target], SMS[target], "tf32x3")
    launch.recorder = record
    try:
        for n, v, d, logits_dtype, table_dtype in cases:
            label = f"N{n} V{v} D{d} {_TYPES[logits_dtype]}/{_TYPES[table_dtype]}"
            for _ in _calls(n, v, d, logits_dtype, table_dtype):
                pass
        # The engine that the tables do not choose at these shapes has to compile as well.
        label = "chunked"
        logits = torch.empty(64, VOCABULARY, dtype=_BF16, device="meta")
        embedding, grad = (torch.empty(rows, 1024, dtype=_BF16, device="meta") for rows in (VOCABULARY, 64))
        stats, moments = torch.empty(64, device="meta"), (torch.empty_like(logits), torch.empty_like(logits))
        scalars = (0.5, 1.0, 0.9, 0.999, 1e-8)
        chunked.forward(logits, embedding, stats, stats, 0.7, 0.0)
        chunked.backward(logits, grad, embedding, stats, stats, 0.7, logits, moments, scalars)
    finally:
        config.override, launch.recorder = before
    return found


def tool(name: str) -> str:
    """Path of a program that triton's package carries."""
    return str(Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name)


def _kernel(item: Launch) -> Any:
    return getattr(importlib.import_module(f"{__package__}.{item.module}"), item.kernel)


def compile_launch(target: str, item: Launch) -> Report:
    """Compile one launch for a target and read what its machine code uses. A failure is told in `error`."""
    report = Report(target, item)
    try:
        source = ASTSource(
            _kernel(item),
            dict(item.signature),
            constexprs=dict(item.constants),
            attrs={(position,): [["tt.divisibility", 16]] for position in item.divisible},
        )
        options = {"num_warps": item.num_warps, "num_stages": item.num_stages}
        built = triton.compile(source, target=GPUTarget("cuda", CAPABILITY[target], 32), options=options)
        report.shared_bytes = built.metadata.shared
        _read_usage(report, built.asm["cubin"])
    except Exception as error:
        report.error = f"{type(error).__name__}: {str(error)[:500]}"
    return report


def _read_usage(report: Report, cubin: bytes) -> None:
    """Registers and stack of the machine code. A spill needs a stack frame; nothing else here has one."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        done = subprocess.run([tool("cuobjdump"), "-res-usage", str(path)], capture_output=True, text=True)
    usage = re.search(r"REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", done.stdout)
    if usage is None:
        raise RuntimeError(f"cuobjdump does not tell: {done.stdout} {done.stderr}")
    report.registers = int(usage[1])
    report.spill_bytes = int(usage[2]) + int(usage[3])


def _compile_pair(pair: tuple[str, Launch]) -> Report:
    return compile_launch(*pair)


def reports(targets: Iterable[str] = tuple(CAPABILITY), workers: int = 2, only: str = "") -> list[Report]:
    """Compile every launch of the targets whose label matches `only`. Triton's own cache makes a second run fast."""
    jobs = {
        (target, item): shapes
        for target in targets
        for item, shapes in launches(target, target == "sm_90").items()
        if re.search(only, item.label)
    }
    # Fresh processes: a fork of one that has threads (torch's, pytest's) may hang.
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        made = list(pool.map(_compile_pair, jobs))
    for report, shapes in zip(made, jobs.values(), strict=True):
        report.shapes = shapes
    return made


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
    parser.add_argument("--target", action="append", choices=sorted(CAPABILITY), help="default: all")
    parser.add_argument("--list", action="store_true", help="list the launches, compile nothing")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", default="", help="regular expression on the launch's label")
    arguments = parser.parse_args()
    targets = arguments.target or list(CAPABILITY)
    if arguments.list:
        for target in targets:
            for item, shapes in launches(target).items():
                print(target, item.label, item.num_warps, item.num_stages, len(shapes))
        return 0
    made = reports(targets, arguments.workers, arguments.only)
    print(table(made))
    failed = [r for r in made if not r.passed]
    print(f"\n{len(made)} launches, {len(failed)} failed")
    return bool(failed)


if __name__ == "__main__":
    raise SystemExit(main())
