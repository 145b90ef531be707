"""GPU figures: `python -m benchmarks.run_gpu`, what `make gpu` runs. Offline, in place, with the interpreter at hand.

In this order, each part only while time is left, every finished group written out at once; a part that fails is
reported and costs no other:

1. what the machine has; all kernels compiled on all cores (one after the other, at their first calls, they would take
the time of the rest); 2. the proof of every kernel (`entrgi check`); 3. the machine's ceilings: a device copy and a
large matrix product; 4. kernels alone, by device events, against those ceilings, a step's kernels first; 5. the
guidance step by the clock at all canonical shapes against the published loop, its batched form and the two products'
floor; then candidate tiles (`benchmarks.tools.tune`) and `pytest -m gpu`, kernels against float64; 6. a whole guided
generation with models of Dream-7B's and Qwen3-1.7B's shapes; 7. the step against the batched form compiled;
8. operators against plain torch; 9. the compiled CUDA kernels against Triton's; 10. the draw against flashinfer's, row
statistics against quack's and Liger's, where those are installed; 11. compute-sanitizer and ncu on the CUDA kernels;
12. a roofline picture.

Rows go to benchmarks/results/<device>.json and, when OUT is set, there too. The table at the end holds every figure
against what it must reach. Exit status: 0; 1 when numerics, a gate or a part was red; 2 without a CUDA GPU.

`--dry` runs the same script on a CPU in a minute, with the eager backend, tiny shapes and results that go nowhere, so
that nothing in it is run for the first time where a GPU's minutes count.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import measure
from benchmarks.harness.inputs import Shape
from benchmarks.harness.measure import Group
from benchmarks.suites import cuda_engine
from benchmarks.suites.end_to_end import EndToEnd, measure_end_to_end
from benchmarks.suites.kernels import (
    REHEARSAL,
    Machine,
    ceilings,
    kernel_group,
    kernels_are_right,
    other_draws,
    other_statistics,
)
from benchmarks.suites.ops import measure_ops
from benchmarks.suites.step import measure_step

ROOT = Path(__file__).parent.parent
PARTS = (
    "cache",
    "check",
    "ceilings",
    "kernels",
    "step",
    "tune",
    "numerics",
    "generation",
    "compiled",
    "ops",
    "cuda",
    "others",
    "nsight",
    "picture",
)
# Reaches every tile that is brought by descriptors. By its full name: collecting all tests takes half of its time.
BULK_TEST = "tests/backends/test_triton_gpu.py::test_every_tile_of_the_tables[descriptor]"
LIBRARIES = ("flashinfer", "quack", "liger_kernel", "matplotlib", "transformers")
# (figure, what it is a share of, least, aim): DESIGN's GPU rows.
MUST = {
    "step's kernels": ("two GEMMs", 0.75, 0.90),
    "guidance_step": ("two GEMMs", 0.0, 0.0),  # by the clock, with a small reward and all that Python does
    "row statistics": ("copy", 0.85, 0.95),
    "filtered sampling": ("3 reads", 1.0, 1.5),
    "generation": ("models", 0.87, 0.91),
}


# By figure: baselines, and how many times faster DESIGN wants it to be (0: for information).
TIMES = {
    "guidance_step": {"published": 0, "vectorized": 0, "compiled": 0},
    "filtered sampling": {"torch.sort": 1},
    "generation": {"published": 3},
}


class Clock:
    """The time that this run may take, and what of it is left."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    def left(self) -> float:
        return self.end - time.monotonic()


class TimeIsUp(BaseException):
    """No Exception: what waits inside a part must not take it for a failure of its own and go on."""


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Raise :class:`TimeIsUp` in what runs inside, after so many seconds and every few from then on."""

    def ring(*_: Any) -> None:
        raise TimeIsUp(f"stopped after {seconds:.0f} s, the end of this run's time")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, max(0.01, seconds), 5.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


class Report:
    """Everything measured so far; written out after every group, so that a run cut short leaves what it has."""

    def __init__(self, machine: Machine, path: Path | None = None) -> None:
        self.machine = machine
        self.rows: list[dict[str, Any]] = []
        self.groups: list[Group] = []
        self.lines: list[str] = []
        self.red: list[str] = []
        self.path = path or measure.result_path(machine.device)

    def add(self, groups: Sequence[Group], baselines: Sequence[str] = ()) -> None:
        self.groups += groups
        for group in groups:
            self.rows += measure.rows(group, self.machine.device)
            self._refusals(group)
        print(measure.table(groups, baselines), end="\n\n", flush=True)
        self.flush()

    def add_generation(self, found: EndToEnd) -> None:
        """A whole generation, which brings its own table."""
        self.groups.append(found.group)
        self.rows += found.rows(self.machine.device)
        self._refusals(found.group)
        print(found.table(), end="\n\n", flush=True)
        self.flush()

    def _refusals(self, group: Group) -> None:
        own = ("triton", "cuda", "auto", "no savings", self.machine.backend)
        self.red += [
            f"{group.op} {group.dtype} {group.shape.label} {name}: {why}"
            for name, why in group.refused.items()
            if name in own
        ]

    def flush(self) -> None:
        measure.save(self.rows, self.path)
        if (out := os.environ.get("OUT")) and self.machine.device == "cuda":
            shutil.copy(self.path, Path(out) / self.path.name)


def environment() -> str:
    """One line a fact about the machine; never raises."""
    versions = measure.versions()
    lines = []
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        lines.append(
            f"{properties.name}: compute capability {properties.major}.{properties.minor}, "
            f"{properties.multi_processor_count} multiprocessors, {properties.total_memory / 2**30:.0f} GiB"
        )
    lines.append(
        f"torch {versions['torch']}, triton {versions['triton']}, CUDA {torch.version.cuda}, "
        f"Python {sys.version.split()[0]}, revision {measure.revision()}"
    )
    found = [name for name in LIBRARIES if importlib.util.find_spec(name) is not None]
    lines.append(
        f"installed: {', '.join(found) or 'none'}; not installed: "
        f"{', '.join(name for name in LIBRARIES if name not in found) or 'none'}"
    )
    return "\n".join(lines)


def numerics(clock: Clock, seconds: float, dry: bool = False, triton: str | None = None, tests: str = "tests") -> bool:
    """The GPU tests in a process of their own (dry: collected only); True when they passed.

    Args:
        triton: a folder with another release of Triton, which is then the one that is imported.
        tests: which, as pytest is told them.
    """
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    command += [tests, f"--ignore={cuda_engine.TESTS}", *(["--collect-only"] if dry else [])]
    search = os.pathsep.join(filter(None, [triton, str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH")]))
    try:
        done = subprocess.run(
            command, cwd=ROOT, timeout=min(seconds, clock.left()), env=os.environ | {"PYTHONPATH": search}
        )
    except subprocess.TimeoutExpired:
        print(f"numerics: not finished within {seconds:.0f} s")
        return False
    return done.returncode in (0, 5) if dry else done.returncode == 0  # 5: nothing to collect without a GPU


def _environment() -> dict[str, str]:
    """This process's, with the project on the path."""
    search = [str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, search))}


def roofline(report: Report, bandwidth: float, rate: float, path: Path) -> None:
    """A picture of achieved FLOP/s over arithmetic intensity, below the measured roof."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    span = [2.0**i for i in range(-2, 13)]
    axes.loglog(span, [min(rate, bandwidth * x) / 1e12 for x in span], color="black", label="measured roof")
    for group in report.groups:
        timing = group.timings.get(report.machine.backend)
        if timing is not None and group.flop and group.bytes_moved:
            achieved = group.flop / timing.median / 1e12
            axes.plot(group.flop / group.bytes_moved, achieved, "o")
            axes.annotate(f"{group.op} {group.shape.label}", (group.flop / group.bytes_moved, achieved), fontsize=5)
    axes.set(
        xlabel="FLOP per byte of least traffic", ylabel="TFLOP/s", title=measure.device_name(report.machine.device)
    )
    axes.legend()
    figure.savefig(path, dpi=150, bbox_inches="tight")


def summary(report: Report) -> str:
    """The short table: each figure that DESIGN asks for, its share of the floor, what it must and aims to reach."""
    lines = [f"{'figure':<44}{'floor':<12}{'share':>7}{'must':>7}{'aim':>7}"]
    own = report.machine.backend
    sorts = {group.shape: group.timings["torch"] for group in report.groups if group.op == "torch.sort"}
    for group in report.groups:
        if group.op not in MUST or group.dtype != "bfloat16" or own not in group.timings or group.floor is None:
            continue
        floor, must, aim = MUST[group.op]
        share = group.floor.median / group.timings[own].median
        judged = group.shape.n >= (1024 if group.op == "step's kernels" else 64)
        verdict = "" if not judged or not must else "ok" if share >= must else "MISSED"
        lines.append(
            f"{group.op + ' ' + group.shape.label:<44}{floor:<12}{share:>7.0%}{must:>7.0%}{aim:>7.0%}  {verdict}"
        )
        if group.op == "guidance_step":
            extra = group.timings[own].peak_bytes or 0
            allowed = 0.1 * group.shape.n * group.shape.v * 2
            lines.append(
                f"{'  extra memory beyond phi and moments':<44}{'10% of N V':<12}{extra / 1e6:>6.0f}M"
                f"{allowed / 1e6:>6.0f}M       {'ok' if extra <= allowed else 'MISSED'}"
            )
        for name, least in TIMES.get(group.op, {}).items():
            other = group.timings.get(name) or sorts.get(group.shape)
            if other is not None and (name in group.timings or name == "torch.sort"):
                ratio = other.median / group.timings[own].median
                verdict = f"{least:>6.0f}x       {'ok' if ratio >= least else 'MISSED'}" if least else ""
                lines.append(f"{'  times faster than ' + name:<56}{ratio:>6.1f}x{verdict}")
    return "\n".join(lines)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run_gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=9.0, help="time for everything (default: 9)")
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated (default: all)")
    parser.add_argument(
        "--triton", nargs="*", default=[], help="folders of further Triton releases: numerics runs with each of them"
    )
    parser.add_argument("--dry", action="store_true", help="rehearse on a CPU; writes nowhere")
    parser.add_argument("--shapes", nargs="+", type=Shape.parse, help="N,D or N,D,V (default: the canonical ones)")
    chosen = parser.parse_args(argv)
    chosen.parts = chosen.parts.split(",")
    if unknown := [part for part in chosen.parts if part not in PARTS]:
        parser.error(f"--parts: {unknown[0]!r} is not one of {', '.join(PARTS)}")
    chosen.machine = REHEARSAL if chosen.dry else Machine()
    chosen.shapes = chosen.shapes or list(chosen.machine.shapes)
    return chosen


class Run:
    """The parts, in order; see the module's text.

    Args:
        chosen: the command line.
        report: filled as parts are finished.
    """

    def __init__(self, chosen: argparse.Namespace, report: Report) -> None:
        self.chosen, self.report, self.machine = chosen, report, report.machine
        self.clock = Clock(60 * chosen.minutes)
        self.scratch = torch.empty(self.machine.scratch_bytes, dtype=torch.uint8, device=self.machine.device)
        self.bandwidth, self.rate = 1.0, 1.0

    def part(self, name: str, work: Callable[[], None], least: float) -> None:
        """Run a part if it was asked for and so many seconds are left; what it raises is reported, and no more."""
        needed = name.partition(" ")[0]
        if needed not in self.chosen.parts:
            return
        if self.clock.left() < least:
            print(f"left out for want of time: {name}", flush=True)
            return
        try:
            with deadline(self.clock.left()):
                work()
        except (Exception, TimeIsUp) as error:
            self.report.red.append(f"{name}: {type(error).__name__}: {error}".splitlines()[0])
            traceback.print_exc()
        self.machine.free()

    def all(self) -> None:
        """Everything, by what is learned from it first."""
        shapes = self.chosen.shapes
        if self.machine.device == "cuda":
            self.part("cache", self.cache, 60)
            self.part("check (tiles copied in bulk)", self.bulk_copies, 30)
            self.part("check", self.check, 30)
        self.part("ceilings", self.ceilings, 20)
        for shape in [*shapes, *self.machine.few]:
            self.part(f"kernels {shape.label}", lambda shape=shape: self.kernels(shape), 60)
        # First without torch.compile at every shape, then with it, largest gain in knowledge first, while time is left.
        own = self.machine.backend
        for shape in shapes:
            self.part(f"step {shape.label}", lambda s=shape: self.step(s, ["published", "vectorized", own], 4.0), 45)
        if self.machine.device == "cuda":
            self.part("tune", self.tune, 240)
        self.part("numerics", self.numerics, 30)
        self.part("generation", self.generation, 150)
        for shape in shapes[2:3] + shapes[:1] + shapes[3:]:
            self.part(f"compiled {shape.label}", lambda s=shape: self.step(s, ["compiled", own], 2.0), 110)
        for shape in shapes[1:3]:
            self.part(f"ops {shape.label}", lambda shape=shape: self.operators(shape), 100)
        names = ["published", "vectorized", own]
        self.part("step in float32", lambda: self.step(shapes[0], names, 2.0, torch.float32), 40)
        if self.machine.device == "cuda":
            self.part("cuda", self.cuda, 30)
        self.part("others (draws)", self.draws, 30)
        self.part("others (statistics)", lambda: self.report.add([other_statistics(self.machine)], ["torch"]), 20)
        if self.machine.device == "cuda":
            self.part("nsight", self.nsight, 20)
        self.part("picture", self.picture, 10)

    def cache(self) -> None:
        """Compile what the parts below launch, in processes of their own, into Triton's cache."""
        command = [sys.executable, "-m", "benchmarks.tools.gate", "--here"]
        done = subprocess.run(
            command, cwd=ROOT, timeout=0.25 * self.clock.left(), capture_output=True, text=True, check=False
        )
        print(*done.stdout.splitlines()[-1:], end="\n\n", flush=True)
        if done.returncode:
            self.report.red.append(f"cache: {(done.stderr.splitlines() or done.stdout.splitlines() or ['?'])[-1]}")

    def bulk_copies(self) -> None:
        """The products by descriptors, in a process of their own; where they fail, what follows loads by pointers."""
        from entrgi_kernels.backends.triton import config

        target = config.target(torch.device(self.machine.device))
        if target.architecture.bulk and not numerics(self.clock, 90, tests=BULK_TEST):
            config.override = replace(target, architecture=replace(target.architecture, bulk=False))
            self.report.red.append("the products by descriptors: figures below are of the products by pointers")

    def check(self) -> None:
        """`entrgi check`: every kernel of the tables compared with eager arithmetic, its verdicts and times as JSON."""
        path = self.report.path.with_name(f"check-{self.report.path.name}")
        command = [sys.executable, "-m", "entrgi", "check", "--json", str(path)]
        done = subprocess.run(command, cwd=ROOT, timeout=min(180.0, self.clock.left()), env=_environment(), check=False)
        if done.returncode:
            self.report.red.append(f"check: exit status {done.returncode}")
        if path.exists() and (out := os.environ.get("OUT")):
            shutil.copy(path, out)

    def tune(self) -> None:
        """Candidates of every family, for a third of the time that is left."""
        minutes = self.clock.left() / 180
        command = [sys.executable, "-m", "benchmarks.tools.tune", "--minutes", f"{minutes:.2f}"]
        subprocess.run(command, cwd=ROOT, timeout=60 * minutes + 60, env=_environment(), check=True)

    def numerics(self) -> None:
        seconds = 0.35 * 60 * self.chosen.minutes / (1 + len(self.chosen.triton))
        for folder in (None, *self.chosen.triton):
            if not numerics(self.clock, seconds, self.chosen.dry, folder):
                self.report.red.append("numerics: pytest -m gpu" + (f" with the Triton in {folder}" if folder else ""))

    def ceilings(self) -> None:
        self.bandwidth, self.rate, rows = ceilings(self.machine, self.scratch)
        self.report.rows += rows

    def kernels(self, shape: Shape) -> None:
        if wrong := kernels_are_right(self.machine, shape):
            self.report.red += wrong
            print("no times for kernels that are wrong:", *wrong, sep="\n  ", flush=True)
            return
        self.report.add(kernel_group(self.machine, shape, self.scratch, self.bandwidth))

    def step(self, shape: Shape, names: list[str], budget: float, dtype: torch.dtype = torch.bfloat16) -> None:
        group = measure_step(shape, dtype, names, device=self.machine.device, budget=budget)
        self.report.add([group], names[:-1])

    def generation(self) -> None:
        left, machine = self.clock.left(), self.machine
        found = measure_end_to_end(
            machine.preset,
            torch.bfloat16,
            device=machine.device,
            backend=machine.backend,
            budget=0.1 * left,
            rounds=(1, 3),
            size=machine.size,
            seconds=0.4 * left,
        )
        self.report.add_generation(found)

    def operators(self, shape: Shape) -> None:
        groups = measure_ops(shape, torch.bfloat16, [self.machine.backend], device=self.machine.device, budget=1.0)
        self.report.add(groups, ["vectorized", "compiled"])

    def cuda(self) -> None:
        if wrong := cuda_engine.numerics(min(100.0, self.clock.left())):
            self.report.red.append(wrong)
        else:
            cuda_engine.compare(self.chosen.shapes, self.clock.left, lambda groups: self.report.add(groups, ["triton"]))

    def nsight(self) -> None:
        counts = self.report.path.with_name(f"{self.report.path.stem}-ncu.txt")
        device, revision = measure.device_name(self.machine.device), measure.revision()
        found, written = cuda_engine.nsight(counts, device, revision, self.chosen.shapes[2:3], self.clock.left)
        self.report.red += found
        if written and (out := os.environ.get("OUT")):
            shutil.copy(written, out)

    def draws(self) -> None:
        group = other_draws(self.machine)
        if group is None:
            print("flashinfer is not installed: no comparison with it")
        else:
            self.report.add([group], ["vectorized", "flashinfer"])

    def picture(self) -> None:
        picture = self.report.path.with_suffix(".png")
        roofline(self.report, self.bandwidth, self.rate, picture)
        if (out := os.environ.get("OUT")) and self.machine.device == "cuda":
            shutil.copy(picture, out)


def run(chosen: argparse.Namespace, report: Report) -> int:
    """All parts and the table; 0, or 1 when something was red."""
    print(environment(), end="\n\n", flush=True)
    everything = Run(chosen, report)
    try:
        everything.all()
    finally:  # also of a run that is told to end before its time
        report.flush()
        print(summary(report))
        for line in report.red:
            print(f"RED  {line}")
        print(f"{len(report.rows)} rows in {report.path.name}; {everything.clock.left():.0f} s left", flush=True)
    return 1 if report.red else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; see the module's text for the exit status."""
    chosen = arguments(argv)
    if chosen.dry:
        with tempfile.TemporaryDirectory() as folder:
            return run(chosen, Report(chosen.machine, Path(folder) / "rows.json"))
    if not torch.cuda.is_available():
        print(
            "make gpu needs a CUDA GPU that torch can see; there is none here. Nothing was measured.", file=sys.stderr
        )
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    return run(chosen, Report(chosen.machine))


if __name__ == "__main__":
    sys.exit(main())
