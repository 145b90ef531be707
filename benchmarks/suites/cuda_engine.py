"""The compiled CUDA kernels on a GPU: times against Triton, compute-sanitizer, and what Nsight Compute counts.

`make gpu` calls :func:`compare` and :func:`nsight`. Times go with the other rows into benchmarks/results/<device>.json,
Nsight's figures into <device>-ncu.txt beside it.
Everything that is missing (the extension, a tool, time) is named and left out.
"""

from __future__ import annotations

import csv
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks.harness.inputs import Shape
from benchmarks.harness.measure import Group, measure

ROOT = Path(__file__).parents[2]
OPS = ("softmax_entropy", "sample_tokens", "unmask_confidence")
TESTS = "tests/backends/cuda/test_cuda_gpu.py"  # left out of the first part: these kernels must not cost Triton's run
TOOLS = ("memcheck", "racecheck")
FOUND = 86  # exit status that compute-sanitizer is told to end with when it finds something
# Of a kernel, by ncu's own names: what is kept of its report, and the heading in ours.
METRICS = {
    "Duration": "time",
    "DRAM Throughput": "DRAM",
    "Memory Throughput": "memory",
    "Compute (SM) Throughput": "SM",
    "L2 Hit Rate": "L2 hits",
    "Achieved Occupancy": "occupancy",
    "Registers Per Thread": "registers",
}
SECTIONS = (
    "SpeedOfLight",
    "MemoryWorkloadAnalysis",
    "ComputeWorkloadAnalysis",
    "Occupancy",
    "LaunchStats",
)


def why_not() -> str | None:
    """Why the CUDA kernels cannot run here; None when they can."""
    from entrgi_kernels.backends import cuda

    return cuda.why_not(torch.device("cuda", torch.cuda.current_device()), torch.bfloat16)


def _pytest(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "pytest", "-q", "-x", "-m", "gpu", "-p", "no:cacheprovider", TESTS, *arguments]


def _environment(**more: str) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "python")]), **more}


def numerics(seconds: float) -> str | None:
    """Why the GPU tests of the CUDA kernels are red; None when they passed, or there are no kernels to test."""
    if (reason := why_not()) is not None:
        print(f"no CUDA kernels to test: {reason}")
        return None
    try:
        code = subprocess.run(_pytest(), cwd=ROOT, env=_environment(), timeout=seconds).returncode
    except subprocess.TimeoutExpired:
        return f"{TESTS}: not finished within {seconds:.0f} s"
    return None if code == 0 else f"{TESTS}: exit status {code}"


def compare(shapes: Sequence[Shape], left: Callable[[], float], add: Callable[[list[Group]], None]) -> list[Group]:
    """Each operator that the CUDA kernels serve, against Triton's and a copy, checked and interleaved.

    Args:
        shapes: canonical shapes. left: seconds that remain. add: takes what was measured at a shape.
    """
    from benchmarks.suites.ops import OpSuite
    from benchmarks.suites.step import Problem

    groups: list[Group] = []
    if (reason := why_not()) is not None:
        print(f"no CUDA kernels to measure: {reason}")
        return groups
    names = [name for name in ("triton", "cuda") if name == "cuda" or importlib.util.find_spec("triton")]
    for dtype in (torch.bfloat16, torch.float32):
        for shape in shapes:
            if left() < 60:
                print(f"no time left to compare the CUDA kernels in {dtype} at {shape.label}")
                return groups
            suite = OpSuite(Problem.make(shape, dtype, device="cuda"))
            here = []
            for op in OPS:
                candidates = [*(suite.candidate(op, name) for name in names), suite.floor(op)]
                moved = float(shape.n) * shape.v * dtype.itemsize
                here.append(
                    measure(op, dtype, shape, candidates, bytes_moved=moved, budget=0.7, device="cuda", memory=False)
                )
            add(here)
            groups += here
            torch.cuda.empty_cache()
    return groups


# --- compute-sanitizer ------------------------------------------------------------------------------------------------
def sanitize(tool: str, seconds: float) -> str | None:
    """Run the small GPU tests under a tool of compute-sanitizer; what it found in our kernels, or None."""
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", str(FOUND), *_pytest("-k", "small")]
    # Without torch's cache each tensor is an allocation of its own, whose ends the tool knows.
    environment = _environment(PYTORCH_NO_CUDA_MEMORY_CACHING="1")
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, timeout=seconds, **output)
    except subprocess.TimeoutExpired:
        return f"not finished within {seconds:.0f} s"
    lines = [line.strip("= ") for line in done.stdout.splitlines() if line.startswith("=========")]
    print(f"compute-sanitizer {tool}: {lines[-1] if lines else done.stdout[-300:]}", flush=True)
    ours = [line for line in lines if "entrgi" in line]
    if done.returncode == 0 or (done.returncode == FOUND and not ours):  # torch's own kernels are not ours to mend
        return None
    return f"exit status {done.returncode}: {'; '.join(ours[:3]) or done.stdout[-300:]}"


# --- Nsight Compute ---------------------------------------------------------------------------------------------------
def profile(op: str, shape: Shape, backend: str, seconds: float) -> str:
    """ncu's report, as CSV, on one call of an operator.

    Raises:
        RuntimeError: ncu failed; the message holds the end of its output.
    """
    command = ["ncu", "--clock-control", "none", "--nvtx", "--nvtx-include", "measured/", "--csv", "--page", "details"]
    command += [f"--section={name}" for name in SECTIONS] + ["--print-details=all"]
    command += [sys.executable, "-m", "benchmarks.tools.profile", op, "--backend", backend]
    command += ["--shape", f"{shape.n},{shape.d},{shape.v}"]
    done = subprocess.run(command, cwd=ROOT, env=_environment(), timeout=seconds, capture_output=True, text=True)
    if done.returncode != 0 or '"Kernel Name"' not in done.stdout:
        raise RuntimeError(f"ncu: {(done.stdout + done.stderr)[-400:]}")
    return done.stdout


def counters(report: str) -> list[dict[str, str]]:
    """One dictionary a launch from ncu's CSV: "kernel", the METRICS, and whatever it says of tensor cores."""
    lines = report.splitlines()
    start = next(i for i, line in enumerate(lines) if '"Kernel Name"' in line)
    launches: dict[str, dict[str, str]] = {}
    for row in csv.DictReader(lines[start:]):
        name, unit = row.get("Metric Name") or "", row.get("Metric Unit") or ""
        launch = launches.setdefault(row["ID"], {"kernel": re.sub(r"\(.*", "", row["Kernel Name"])})
        value = f"{row.get('Metric Value', '')} {unit}".strip()
        if name in METRICS:
            # "Memory Throughput" comes twice: a share of the peak, and bytes a second.
            heading = METRICS[name] + (" rate" if "/s" in unit or "/second" in unit else "")
            launch.setdefault(heading, value)
        elif "tensor" in name.lower():
            launch.setdefault(name, value)
    return list(launches.values())


def nsight(
    path: Path, device: str, revision: str, shapes: Sequence[Shape], left: Callable[[], float]
) -> tuple[list[str], Path | None]:
    """Sanitizer runs and ncu's figures of every CUDA kernel at the given shapes.

    Args:
        path: the text file to write. left: seconds that remain.

    Returns:
        (what is wrong, the file written or None).
    """
    if (reason := why_not()) is not None:
        print(f"no CUDA kernels to look at: {reason}")
        return [], None
    red: list[str] = []
    for tool in TOOLS:
        if shutil.which("compute-sanitizer") is None:
            print(f"compute-sanitizer is not installed: no {tool}")
        elif left() < 60:
            print(f"no time left for compute-sanitizer {tool}")
        elif (found := sanitize(tool, min(120.0, left() - 20))) is not None:
            red.append(f"compute-sanitizer {tool}: {found}")
    if shutil.which("ncu") is None:
        print("ncu is not installed: no counters")
        return red, None
    text = [f"Nsight Compute, {device}, revision {revision}; one call of each operator, bfloat16, --clock-control none"]
    for shape in shapes:
        for op in OPS:
            if left() < 45:
                text.append(f"{op} {shape.label}: no time left")
                continue
            try:
                found = counters(profile(op, shape, "cuda", min(60.0, left() - 10)))
            except (RuntimeError, subprocess.TimeoutExpired) as error:
                text.append(f"{op} {shape.label}: {error}")
                continue
            for launch in found:
                facts = ", ".join(f"{name} {value}" for name, value in launch.items() if name != "kernel")
                text.append(f"{op} {shape.label} {launch['kernel']}: {facts}")
    print(*text, sep="\n", flush=True)
    path.write_text("\n".join(text) + "\n", encoding="utf-8")
    return red, path
