"""What loops of the Triton kernels ask of an NVIDIA GPU's pipes, from machine code: `python -m benchmarks.tools.sass`.

    python -m benchmarks.tools.sass --only 'statistics_kernel .bf16' --clock 1.755

Needs no GPU and measures nothing: every launch of the ahead-of-time gate that matches is compiled and disassembled,
and of each loop the instructions are counted by the pipe that takes them. From that follows a ceiling of entries a
clock of a multiprocessor, and the share of the bandwidth that this is where a loop reads each entry once. Latency,
caches and bank conflicts are not in the model; how many programs a multiprocessor has registers for is printed too.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Thread instructions a clock of one multiprocessor (compute capability 8.0 and 9.0). What a pipe is not given for takes
# an issue slot only; "imad" shares the FMA pipe, of which half can multiply integers.
RATES = {"issue": 128, "fma": 128, "imad": 64, "alu": 64, "mufu": 16}
_FMA = {"FFMA", "FMUL", "FADD", "HFMA2", "HADD2", "HMUL2"}
_MUFU = {"MUFU", "POPC", "FLO", "BREV", "F2I", "I2F", "F2F"}
_OTHER = {
    *("LDG", "STG", "LDS", "STS", "LDSM", "LDC", "ULDC", "LDGSTS", "SHFL", "LDL", "STL", "REDUX", "VOTE"),
    *("BRA", "BAR", "EXIT", "NOP", "BSSY", "BSYNC", "WARPSYNC", "DEPBAR", "LDGDEPBAR", "S2R", "CS2R", "R2UR", "CALL"),
}
_LABEL = re.compile(r"\s*(\.L_x_\d+):")
_INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9]*)\b(.*)")


def pipes(name: str) -> tuple[str, ...]:
    """The entries of :data:`RATES` that an instruction counts against."""
    if name == "IMAD":
        return "issue", "fma", "imad"
    if name in _FMA:
        return "issue", "fma"
    if name in _MUFU:
        return "issue", "mufu"
    # The uniform datapath (U...) works beside the others, but shares their issue slots.
    return ("issue",) if name in _OTHER or name.startswith("U") else ("issue", "alu")


@dataclass(frozen=True)
class Loop:
    """A backward branch and what lies between it and its target: instructions by pipe (of one thread), and by name."""

    counts: Counter[str]
    names: Counter[str]

    @property
    def clocks(self) -> float:
        """Clocks of a multiprocessor for one thread's pass, if its busiest pipe were never idle."""
        return max(self.counts[pipe] / rate for pipe, rate in RATES.items())

    @property
    def bound(self) -> str:
        """The busiest pipe."""
        return max(RATES, key=lambda pipe: self.counts[pipe] / RATES[pipe])


def loops(disassembly: str) -> list[Loop]:
    """Every loop of one kernel in what `nvdisasm` prints, outer ones with all that they hold."""
    names: list[str] = []
    starts: dict[str, int] = {}
    found = []
    for line in disassembly.splitlines():
        if label := _LABEL.match(line):
            starts[label[1]] = len(names)
        elif instruction := _INSTRUCTION.match(line):
            names.append(instruction[1])
            target = re.search(r"(\.L_x_\d+)", instruction[2])
            start = starts.get(target[1]) if instruction[1] == "BRA" and target else None
            # The last instruction is a branch to itself.
            if start is not None and start < len(names) - 1:
                inside = names[start:]
                found.append(Loop(Counter(pipe for name in inside for pipe in pipes(name)), Counter(inside)))
    return found


def disassemble(cubin: bytes) -> str:
    """Machine code as text, by the disassembler that Triton's package carries."""
    from benchmarks.tools import gate

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        done = subprocess.run([gate.tool("nvdisasm"), "-c", str(path)], capture_output=True, text=True, check=True)
    return done.stdout


def rows(target: str, only: str, clock: float, bandwidth: float) -> Iterator[str]:
    """Lines of the table: a launch, then its loops. `clock` in GHz, `bandwidth` in TB/s."""
    from benchmarks.tools import gate
    from entrgi_kernels.backends.triton import aot

    machine = gate.MACHINES[target]
    for item in gate.jobs(target):
        if not re.search(only, item.label):
            continue
        registers = gate.compile_launch(target, machine, item).registers
        threads = 32 * item.num_warps
        programs = 65_536 // (-(-registers // 8) * 8 * threads)
        yield f"{item.label}: {registers} registers, {threads} threads, {programs} programs a multiprocessor"
        entries = item.tile.get("BLOCK_V", threads) / threads
        width = 4 if item.dtypes.startswith("fp32") else 2
        arriving = bandwidth * 1e3 / (machine.sms * clock * width)  # entries a clock of a multiprocessor
        for loop in loops(disassemble(aot.build(machine.gpu, item).asm["cubin"])):
            counts = ", ".join(f"{loop.counts[pipe] / entries:.2f} {pipe}" for pipe in RATES)
            rate = entries / loop.clocks
            yield (
                f"    {loop.counts['issue']:5d} instructions; an entry: {counts}; at most {rate:.1f} entries a clock "
                f"({loop.bound}), {rate / arriving:.0%} of {bandwidth} TB/s"
            )


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the counts; exit status 1 when no launch matches."""
    parser: Any = argparse.ArgumentParser(prog="python -m benchmarks.tools.sass", description=__doc__.splitlines()[0])
    parser.add_argument("--target", default="sm_90", choices=("sm_80", "sm_90"))
    parser.add_argument(
        "--only", default="statistics_kernel|collect_kernel|confidence_kernel", help="regular expression"
    )
    parser.add_argument("--clock", type=float, default=1.98, help="GHz (default: an H200's highest)")
    parser.add_argument("--bandwidth", type=float, default=4.2, help="TB/s of a device copy (default: an H200's)")
    chosen = parser.parse_args(argv)
    printed = 0
    for line in rows(chosen.target, chosen.only, chosen.clock, chosen.bandwidth):
        print(line, flush=True)
        printed += 1
    return int(printed == 0)


if __name__ == "__main__":
    raise SystemExit(main())
