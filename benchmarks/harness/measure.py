"""Timing with a gate: nothing is timed, let alone printed, for code whose check of the same run is red.

Candidates of one group run interleaved (one run of each per round, the order rotating), so that a noisy neighbour or
a change of clock strikes all of them alike; what is reported are percentiles of each and ratios of medians.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness.inputs import Shape
from benchmarks.harness.oracle import Check

RESULTS = Path(__file__).parents[1] / "results"


class GateError(RuntimeError):
    """A speed was asked of code that did not pass its check."""


@dataclass
class Candidate:
    """One implementation in a group.

    Attributes:
        name: shown in tables and written as "backend".
        run: the timed call.
        check: the gate; called once, before any timing, on the very objects that will be timed.
        prepare: called before every run, outside the timed part (restores phi, for example).
        floor: True for the speed-of-light reference of the group. It has no arithmetic to check; a check of it says
            whether it is the least work.
    """

    name: str
    run: Callable[[], Any]
    check: Callable[[], Check] | None = None
    prepare: Callable[[], None] | None = None
    floor: bool = False


@dataclass
class Timing:
    """Seconds of every run of one candidate, and its peak of extra memory (bytes; None where not measured)."""

    name: str
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int | None = None
    floor: bool = False

    def percentile(self, share: float) -> float:
        """Linear-interpolated percentile, share in [0, 1], in seconds."""
        ordered = sorted(self.seconds)
        place = share * (len(ordered) - 1)
        low = int(place)
        high = min(low + 1, len(ordered) - 1)
        return ordered[low] + (ordered[high] - ordered[low]) * (place - low)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


@dataclass
class Group:
    """The timings of candidates that did the same work, and the refusals: name to reason."""

    op: str
    dtype: str
    shape: Shape
    timings: dict[str, Timing]
    refused: dict[str, str]
    flop: float = 0.0
    bytes_moved: float = 0.0

    @property
    def floor(self) -> Timing | None:
        return next((timing for timing in self.timings.values() if timing.floor), None)

    def speed(self, name: str) -> Timing:
        """The timing of a candidate.

        Raises:
            GateError: its check was red (or it could not run); the message says why.
        """
        if name in self.refused:
            raise GateError(f"{self.op} {self.dtype} {self.shape.label}: no speed for {name!r}: {self.refused[name]}")
        return self.timings[name]

    def ratio(self, name: str, baseline: str) -> float | None:
        """How many times faster `name` is than `baseline` (medians); None where either has no speed."""
        if name not in self.timings or baseline not in self.timings:
            return None
        return self.timings[baseline].median / self.timings[name].median


def synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def gate(candidate: Candidate) -> str | None:
    """None when the candidate may be timed, else the reason why not. Never raises."""
    if candidate.floor and candidate.check is None:
        return None
    if candidate.check is None:
        return "it has no correctness check"
    try:
        check = candidate.check()
    except Exception as error:  # an unavailable backend or a crash is a refusal of this candidate, not of the run
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return None if check.passed else f"check failed: {check.detail}"


def measure(
    op: str,
    dtype: torch.dtype,
    shape: Shape,
    candidates: Iterable[Candidate],
    *,
    flop: float = 0.0,
    bytes_moved: float = 0.0,
    budget: float = 10.0,
    rounds: tuple[int, int] = (3, 25),
    warmup: int = 1,
    device: str = "cpu",
    memory: bool = True,
) -> Group:
    """Gate, warm up, and time candidates interleaved.

    Args:
        flop: floating-point operations of the mathematics (for TFLOP/s). bytes_moved: least traffic (for GB/s).
        budget: seconds for the timed rounds of this group; `rounds` = (least, most) binds first.
        memory: also measure each candidate's peak of extra memory, in a run of its own.

    Returns:
        The group; candidates with a red check are in `.refused` and have no timing.
    """
    group = Group(op, str(dtype).removeprefix("torch."), shape, {}, {}, flop, bytes_moved)
    ready: list[Candidate] = []
    for candidate in candidates:
        reason = gate(candidate)
        if reason is not None:
            group.refused[candidate.name] = reason
            continue
        ready.append(candidate)
        group.timings[candidate.name] = Timing(candidate.name, floor=candidate.floor)
    for candidate in ready:
        for _ in range(warmup):
            _timed(candidate, device)
        if memory:
            group.timings[candidate.name].peak_bytes = peak_memory(candidate, device)
    started = time.perf_counter()
    for number in range(rounds[1]):
        turn = number % max(1, len(ready))
        for candidate in ready[turn:] + ready[:turn]:
            group.timings[candidate.name].seconds.append(_timed(candidate, device))
        if number + 1 >= rounds[0] and time.perf_counter() - started > budget:
            break
    return group


def _timed(candidate: Candidate, device: str) -> float:
    if candidate.prepare is not None:
        candidate.prepare()
    synchronize(device)
    started = time.perf_counter()
    candidate.run()
    synchronize(device)
    return time.perf_counter() - started


def resident(which: str = "VmRSS") -> int | None:
    """This process's resident memory (VmRSS) or its peak (VmHWM) in bytes; None where the kernel does not say."""
    try:
        match = re.search(rf"{which}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    except OSError:
        return None
    return int(match[1]) * 1024 if match else None


def available_memory() -> float:
    """Bytes that can be taken without swapping; infinity where the system does not say."""
    try:
        match = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    except OSError:
        match = None
    return int(match[1]) * 1024.0 if match else float("inf")


def _return_freed_memory() -> None:
    """Make the C library give freed pages back: kept ones would hide what the next run takes."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError, TypeError):  # not glibc
        pass


def peak_memory(candidate: Candidate, device: str = "cpu") -> int | None:
    """Peak of memory beyond what was held before one run: allocator peak on CUDA, resident-set growth on a CPU.

    None where the system cannot reset or report its peak. Growth below about 1 MB is page noise.
    """
    if candidate.prepare is not None:
        candidate.prepare()
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        candidate.run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    _return_freed_memory()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    before_run = resident()
    result = candidate.run()
    peak = resident("VmHWM")
    del result
    return None if peak is None or before_run is None else max(0, peak - before_run)


def device_name(device: str = "cpu") -> str:
    """The device in words: the GPU's name, or the CPU's with its widest matrix instructions and torch's threads."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name()
    model, flags = platform.processor() or platform.machine(), ""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    if match := re.search(r"model name\s*:\s*(.+)", text):
        model = match[1].strip()
    if match := re.search(r"flags\s*:\s*(.+)", text):
        flags = match[1]
    named = (("amx_bf16", "AMX"), ("avx512_bf16", "AVX-512 bf16"), ("avx512f", "AVX-512"), ("avx2", "AVX2"))
    best = next((label for flag, label in named if flag in flags.split()), "")
    return ", ".join(part for part in (model, best, f"{torch.get_num_threads()} threads") if part)


def revision(folder: Path = RESULTS.parent) -> str:
    """The commit that is checked out, with "-dirty" when files differ from it; "unknown" outside a repository.

    Results do not count: a run's own first rows would make all that follow dirty.

    Args:
        folder: that of the benchmarks.
    """

    def git(*words: str) -> str:
        run = subprocess.run(["git", *words], cwd=folder, capture_output=True, text=True, timeout=20, check=True)
        return run.stdout.strip()

    try:
        commit = git("rev-parse", "--short=12", "HEAD")
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ":(top)", ":(exclude)results")
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return f"{commit}-dirty" if changed else commit


def versions() -> dict[str, str | None]:
    try:
        import triton

        triton_version: str | None = triton.__version__
    except Exception:  # a triton that cannot be imported is the same as none here
        triton_version = None
    return {"torch": torch.__version__, "triton": triton_version}


def rows(group: Group, device: str = "cpu") -> list[dict[str, Any]]:
    """JSON rows of a group, one per candidate that was timed; times in milliseconds, memory in MB (10^6 bytes)."""
    common = {"device": device_name(device), **versions(), "revision": revision()}
    floor = group.floor
    made = []
    for timing in group.timings.values():
        median = timing.median
        made.append(
            {
                "op": group.op,
                "backend": timing.name,
                "dtype": group.dtype,
                "shape": group.shape.to_dict(),
                "p20": 1e3 * timing.percentile(0.2),
                "p50": 1e3 * median,
                "p80": 1e3 * timing.percentile(0.8),
                "GB/s": group.bytes_moved / median / 1e9 if group.bytes_moved else None,
                "TFLOP/s": group.flop / median / 1e12 if group.flop else None,
                "share of floor": floor.median / median if floor else None,
                "peak MB": None if timing.peak_bytes is None else timing.peak_bytes / 1e6,
                "runs": len(timing.seconds),
                **common,
            }
        )
    return made


def result_path(device: str = "cpu") -> Path:
    """benchmarks/results/<device>.json."""
    slug = re.sub(r"[^a-z0-9]+", "-", re.sub(r"\((r|tm)\)", "", device_name(device).lower())).strip("-")
    return RESULTS / f"{slug}.json"


def save(new: Sequence[dict[str, Any]], path: Path) -> None:
    """Merge rows into a JSON file; a row replaces the one of the same op, backend, dtype and shape."""

    def key(row: dict[str, Any]) -> str:
        return json.dumps([row["op"], row["backend"], row["dtype"], row["shape"], row["device"]], sort_keys=True)

    old = json.loads(path.read_text()) if path.exists() else []
    merged = {key(row): row for row in [*old, *new]}
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".tmp")
    scratch.write_text("[\n" + ",\n".join(json.dumps(row) for row in merged.values()) + "\n]\n")
    os.replace(scratch, path)


def table(groups: Sequence[Group], baselines: Sequence[str]) -> str:
    """Groups as a text table: milliseconds, ratios against each baseline, share of floor, extra memory.

    A ratio above 1 means faster than that baseline. Refusals follow the table, with their reasons.
    """
    head = [
        "op",
        "dtype",
        "shape",
        "backend",
        "p50 ms",
        "p20-p80",
        *(f"vs {name}" for name in baselines),
        "% floor",
        "extra MB",
    ]
    lines = [head]
    for group in groups:
        for timing in group.timings.values():
            ratios = [group.ratio(timing.name, name) for name in baselines]
            share = group.floor.median / timing.median if group.floor else None
            lines.append(
                [
                    group.op,
                    group.dtype,
                    group.shape.label,
                    timing.name,
                    f"{1e3 * timing.median:.2f}",
                    f"{1e3 * timing.percentile(0.2):.1f}-{1e3 * timing.percentile(0.8):.1f}",
                    *("-" if ratio is None else f"{ratio:.2f}x" for ratio in ratios),
                    "-" if share is None else f"{100 * share:.0f}",
                    "-" if timing.peak_bytes is None else f"{timing.peak_bytes / 1e6:.0f}",
                ]
            )
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    text = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines]
    text.insert(1, "  ".join("-" * width for width in widths))
    for group in groups:
        for name, reason in group.refused.items():
            text.append(f"REFUSED  {group.op} {group.dtype} {group.shape.label} {name}: {reason}")
    return "\n".join(text)
