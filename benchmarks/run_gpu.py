"""GPU figures: `python -m benchmarks.run_gpu`, what `make gpu` runs. Offline, in place, with the interpreter at hand.

In this order, each part only while time is left, every finished part written out at once:

1. what the machine has; 2. numerics (`pytest -m gpu`, kernels against float64); 3. the machine's ceilings: a device
copy and a large matrix product; 4. kernels alone, by device events, against those ceilings; 5. the guidance step at
all canonical shapes against the published loop, its batched form, that compiled, and the two products' floor;
6. operators against plain torch; 7. the compiled CUDA kernels against Triton's; 8. the draw against flashinfer's where
that is installed; 9. compute-sanitizer and ncu on the CUDA kernels; 10. a roofline picture.

Rows go to benchmarks/results/<device>.json and, when OUT is set, there too. The table at the end holds every figure
against what it must reach. Exit status: 0; 1 when numerics or a gate was red; 2 without a CUDA GPU.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import cuda_engine, measure
from benchmarks.inputs import CANONICAL, Shape
from benchmarks.measure import Candidate, Group

DEVICE = "cuda"
COPY_BYTES, PRODUCT = 4 << 30, 8192  # of the ceilings: far beyond any cache, and a size that fills the chip
ROOT = Path(__file__).parent.parent
PARTS = ("numerics", "ceilings", "kernels", "step", "ops", "cuda", "others", "nsight", "picture")
LIBRARIES = ("flashinfer", "quack", "liger_kernel", "matplotlib", "transformers")
# (figure, what it is a share of, least, aim): DESIGN's GPU rows.
MUST = {
    "guidance_step": ("two GEMMs", 0.75, 0.90),
    "row statistics": ("copy", 0.85, 0.95),
    "filtered sampling": ("3 reads", 1.0, 1.5),
}


class Clock:
    """The time that this run may take, and what of it is left."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    def left(self) -> float:
        return self.end - time.monotonic()


class Report:
    """Everything measured so far; written out after every group, so that a run cut short leaves what it has."""

    def __init__(self) -> None:
        self.rows: list[dict[str, Any]] = []
        self.groups: list[Group] = []
        self.lines: list[str] = []
        self.red: list[str] = []
        self.path = measure.result_path(DEVICE)

    def add(self, groups: Sequence[Group], baselines: Sequence[str] = ()) -> None:
        self.groups += groups
        for group in groups:
            self.rows += measure.rows(group, DEVICE)
            self.red += [
                f"{group.op} {group.dtype} {group.shape.label} {name}: {why}"
                for name, why in group.refused.items()
                if name in ("triton", "cuda", "auto")
            ]
        print(measure.table(groups, baselines), end="\n\n", flush=True)
        self.flush()

    def flush(self) -> None:
        measure.save(self.rows, self.path)
        if out := os.environ.get("OUT"):
            shutil.copy(self.path, Path(out) / self.path.name)


def environment() -> str:
    """One line a fact about the machine; never raises."""
    versions = measure.versions()
    properties = torch.cuda.get_device_properties(0)
    lines = [
        f"{properties.name}: compute capability {properties.major}.{properties.minor}, "
        f"{properties.multi_processor_count} multiprocessors, {properties.total_memory / 2**30:.0f} GiB",
        f"torch {versions['torch']}, triton {versions['triton']}, CUDA {torch.version.cuda}, "
        f"Python {sys.version.split()[0]}, revision {measure.revision()}",
    ]
    found = [name for name in LIBRARIES if importlib.util.find_spec(name) is not None]
    lines.append(
        f"installed: {', '.join(found) or 'none'}; not installed: "
        f"{', '.join(name for name in LIBRARIES if name not in found) or 'none'}"
    )
    return "\n".join(lines)


def numerics(clock: Clock, seconds: float) -> bool:
    """The GPU tests in a process of their own; True when they passed."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "gpu", "-p", "no:cacheprovider", "tests"]
    command.append(f"--ignore={cuda_engine.TESTS}")
    search = os.pathsep.join(filter(None, [str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH")]))
    try:
        done = subprocess.run(
            command, cwd=ROOT, timeout=min(seconds, clock.left()), env=os.environ | {"PYTHONPATH": search}
        )
    except subprocess.TimeoutExpired:
        print(f"numerics: not finished within {seconds:.0f} s")
        return False
    return done.returncode == 0


def timed(run: Callable[[], Any], scratch: torch.Tensor, runs: int = 15) -> list[float]:
    """Seconds of each run by device events, the L2 cache swept before it."""
    run()
    seconds = []
    for _ in range(runs):
        scratch.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        seconds.append(begin.elapsed_time(end) / 1e3)
    return sorted(seconds)


def ceilings(report: Report, scratch: torch.Tensor) -> tuple[float, float]:
    """(bytes/s of a device copy, reads and writes counted; FLOP/s of an 8192^3 bf16 product on random data)."""
    source = torch.randint(0, 255, (COPY_BYTES,), dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    copy = timed(lambda: target.copy_(source), scratch)[7]
    a, b = (torch.randn(PRODUCT, PRODUCT, device=DEVICE).bfloat16() for _ in range(2))
    product = timed(lambda: a @ b, scratch)[7]
    bandwidth, rate = 2 * COPY_BYTES / copy, 2 * PRODUCT**3 / product
    common = {"device": measure.device_name(DEVICE), **measure.versions(), "revision": measure.revision()}
    empty = {"p20": None, "p80": None, "share of floor": None, "peak MB": None, "runs": 15}
    report.rows.append(
        {
            "op": "ceiling",
            "backend": "device copy",
            "dtype": "uint8",
            "shape": {},
            "p50": copy * 1e3,
            "GB/s": bandwidth / 1e9,
            "TFLOP/s": None,
            **empty,
            **common,
        }
    )
    report.rows.append(
        {
            "op": "ceiling",
            "backend": f"torch.mm {PRODUCT}",
            "dtype": "bfloat16",
            "shape": {},
            "p50": product * 1e3,
            "GB/s": None,
            "TFLOP/s": rate / 1e12,
            **empty,
            **common,
        }
    )
    print(f"ceilings: copy {bandwidth / 1e12:.2f} TB/s, bf16 product {rate / 1e12:.0f} TFLOP/s\n", flush=True)
    return bandwidth, rate


def kernel_group(shape: Shape, scratch: torch.Tensor, bandwidth: float) -> list[Group]:
    """Kernels alone at a shape in bf16, by device events: no Python or launch gaps between them are left out."""
    from benchmarks.suite_step import Problem
    from entrgi_kernels.backends import triton as kernels
    from entrgi_kernels.backends.triton.statistics import row_statistics

    p = Problem.make(shape, torch.bfloat16, device=DEVICE)
    s, n, v, d = p.settings, shape.n, shape.v, shape.d
    size = float(n * v * 2)
    rng, rows = torch.zeros(2, dtype=torch.int64, device=DEVICE), torch.arange(n, device=DEVICE)
    soft, lse = kernels.soft_embedding(p.phi, p.table, s.temperature)
    moments = torch.zeros_like(p.phi), torch.zeros_like(p.phi)
    scalars = (s.temperature, s.lr, *s.betas, s.eps)
    left, out, back = torch.rand_like(p.phi), torch.empty_like(p.grad), torch.empty_like(p.phi)
    n_v_d, read, thrice = 2.0 * n * v * d, size / bandwidth, 3 * size / bandwidth

    def sample(top_p: float) -> torch.Tensor:
        return kernels.sample_tokens(p.phi, rng, rows, s.temperature, 0, top_p)

    def embed() -> Any:
        return kernels.entrgi_embedding(p.phi, p.table, rng, rows, None, None, "entropy", s.temperature, 0, s.top_p)

    def update(state: tuple[Any, Any], step: int) -> None:
        kernels.guidance_update_(p.phi, p.grad, p.table, soft, lse, *state, step, *scalars)

    def forward_product() -> None:
        torch.mm(left, p.table, out=out)

    def backward_product() -> None:
        torch.mm(p.grad, p.table.t(), out=back)

    # name: (call, bytes, FLOP, floor as a call or in seconds)
    work: dict[str, tuple[Callable[[], Any], float, float, Callable[[], Any] | float]] = {
        "row statistics": (lambda: row_statistics(p.phi, 1.0, s.temperature, True), size, 0.0, read),
        "filtered sampling": (lambda: sample(s.top_p), size, 0.0, thrice),
        "unfiltered sampling": (lambda: sample(1.0), size, 0.0, read),
        "torch.sort": (lambda: p.phi.sort(dim=-1, descending=True), size, 0.0, read),
        "soft embedding": (lambda: kernels.soft_embedding(p.phi, p.table, s.temperature), size, n_v_d, forward_product),
        "whole forward": (embed, size, n_v_d, forward_product),
        "guidance update": (lambda: update(moments, 2), 6 * size, n_v_d, backward_product),
        "guidance update, M = 1": (lambda: update((None, None), 1), 2 * size, n_v_d, backward_product),
    }
    groups = []
    start = p.phi.clone()
    for name, (run, moved, flop, floor) in work.items():
        p.phi.copy_(start)
        group = Group(name, "bfloat16", shape, {}, {}, flop, moved)
        who = "torch" if name.startswith("torch") else "triton"
        group.timings[who] = measure.Timing(who, timed(run, scratch))
        seconds = timed(floor, scratch) if callable(floor) else [floor]
        label = "one GEMM" if callable(floor) else "3 reads" if name == "filtered sampling" else "copy"
        group.timings[label] = measure.Timing(label, seconds, floor=True)
        groups.append(group)
    return groups


def kernels_are_right(shape: Shape) -> list[str]:
    """What is wrong with the kernels at a shape; their times are reported only when nothing is."""
    from benchmarks.suite_ops import OPS, OpSuite
    from benchmarks.suite_step import Problem

    suite = OpSuite(Problem.make(shape, torch.bfloat16, device=DEVICE))
    wrong = []
    for op in OPS:
        candidate = getattr(suite, f"_{op.rstrip('_')}")("triton")
        if reason := measure.gate(candidate):
            wrong.append(f"{op} {shape.label}: {reason}")
    return wrong


def others(shape: Shape) -> Group | None:
    """The filtered draw against flashinfer's, where it is installed."""
    if importlib.util.find_spec("flashinfer") is None:
        return None
    import flashinfer

    from benchmarks import oracle
    from benchmarks.suite_ops import OpSuite
    from benchmarks.suite_step import Problem

    problem = Problem.make(shape, torch.bfloat16, device=DEVICE)
    s = problem.settings

    def draw() -> torch.Tensor:
        probability = torch.softmax(problem.phi.float() / s.temperature, dim=-1)
        return flashinfer.sampling.top_p_sampling_from_probs(probability, s.top_p)

    def check() -> oracle.Check:
        tokens = draw().long()[problem.rows]
        return oracle.in_nucleus(problem.phi[problem.rows], tokens, s.temperature, s.top_p, None)

    suite = OpSuite(problem)
    candidates = [*suite.candidates("sample_tokens", ["triton"]), Candidate("flashinfer", draw, check)]
    return measure.measure("sample_tokens", torch.bfloat16, shape, candidates, device=DEVICE, budget=3.0)


def roofline(report: Report, bandwidth: float, rate: float, path: Path) -> None:
    """A picture of achieved FLOP/s over arithmetic intensity, below the measured roof."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5))
    span = [2.0**i for i in range(-2, 13)]
    axes.loglog(span, [min(rate, bandwidth * x) / 1e12 for x in span], color="black", label="measured roof")
    for group in report.groups:
        timing = group.timings.get("triton")
        if timing is not None and group.flop and group.bytes_moved:
            achieved = group.flop / timing.median / 1e12
            axes.plot(group.flop / group.bytes_moved, achieved, "o")
            axes.annotate(f"{group.op} {group.shape.label}", (group.flop / group.bytes_moved, achieved), fontsize=5)
    axes.set(xlabel="FLOP per byte of least traffic", ylabel="TFLOP/s", title=measure.device_name(DEVICE))
    axes.legend()
    figure.savefig(path, dpi=150, bbox_inches="tight")


def summary(report: Report) -> str:
    """The short table: each figure that DESIGN asks for, its share of the floor, what it must and aims to reach."""
    lines = [f"{'figure':<44}{'floor':<12}{'share':>7}{'must':>7}{'aim':>7}"]
    for group in report.groups:
        if group.op not in MUST or group.dtype != "bfloat16" or "triton" not in group.timings or group.floor is None:
            continue
        floor, must, aim = MUST[group.op]
        share = group.floor.median / group.timings["triton"].median
        judged = group.op != "guidance_step" or group.shape.n >= 1024
        verdict = "" if not judged else "ok" if share >= must else "MISSED"
        lines.append(
            f"{group.op + ' ' + group.shape.label:<44}{floor:<12}{share:>7.0%}{must:>7.0%}{aim:>7.0%}  {verdict}"
        )
        if group.op == "guidance_step":
            extra = group.timings["triton"].peak_bytes or 0
            allowed = 0.1 * group.shape.n * group.shape.v * 2
            lines.append(
                f"{'  extra memory beyond phi and moments':<44}{'10% of N V':<12}{extra / 1e6:>6.0f}M"
                f"{allowed / 1e6:>6.0f}M       {'ok' if extra <= allowed else 'MISSED'}"
            )
            for name in ("published", "vectorized", "compiled"):
                if ratio := group.ratio("triton", name):
                    lines.append(f"{'  times faster than ' + name:<56}{ratio:>7.1f}")
    return "\n".join(lines)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run_gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=9.0, help="time for everything (default: 9)")
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated (default: all)")
    parser.add_argument("--shapes", nargs="+", type=Shape.parse, help="N,D or N,D,V (default: the canonical ones)")
    chosen = parser.parse_args(argv)
    chosen.parts = chosen.parts.split(",")
    if unknown := [part for part in chosen.parts if part not in PARTS]:
        parser.error(f"--parts: {unknown[0]!r} is not one of {', '.join(PARTS)}")
    chosen.shapes = chosen.shapes or [Shape(n, d) for n, d in CANONICAL]
    return chosen


def run(chosen: argparse.Namespace) -> int:
    """All parts; see the module's text."""
    clock, report, parts = Clock(60 * chosen.minutes), Report(), chosen.parts
    print(environment(), end="\n\n", flush=True)
    if "numerics" in parts and not numerics(clock, 0.35 * 60 * chosen.minutes):
        report.red.append("numerics: pytest -m gpu")
    scratch = torch.empty(256 << 20, dtype=torch.uint8, device=DEVICE)
    bandwidth, rate = ceilings(report, scratch)
    for shape in chosen.shapes if "kernels" in parts else ():
        if clock.left() < 60:
            break
        if wrong := kernels_are_right(shape):
            report.red += wrong
            print("no times for kernels that are wrong:", *wrong, sep="\n  ", flush=True)
            continue
        report.add(kernel_group(shape, scratch, bandwidth))
        torch.cuda.empty_cache()
    from benchmarks.suite_ops import measure_ops
    from benchmarks.suite_step import measure_step

    # First without torch.compile at every shape, then with it, largest gain in knowledge first, while time is left.
    names = ["published", "vectorized", "triton"]
    for shape in chosen.shapes if "step" in parts else ():
        if clock.left() > 45:
            report.add([measure_step(shape, torch.bfloat16, names, device=DEVICE, budget=4.0)], names[:-1])
            torch.cuda.empty_cache()
    for shape in (chosen.shapes[2:3] + chosen.shapes[:1] + chosen.shapes[3:]) if "step" in parts else ():
        if clock.left() > 110:
            report.add(
                [measure_step(shape, torch.bfloat16, ["compiled", "triton"], device=DEVICE, budget=2.0)], ["compiled"]
            )
            torch.cuda.empty_cache()
    for shape in chosen.shapes[1:3] if "ops" in parts else ():
        if clock.left() > 100:
            report.add(
                measure_ops(shape, torch.bfloat16, ["triton"], device=DEVICE, budget=1.0), ["vectorized", "compiled"]
            )
            torch.cuda.empty_cache()
    if "step" in parts and clock.left() > 40:
        report.add([measure_step(chosen.shapes[0], torch.float32, names, device=DEVICE, budget=2.0)], names[:-1])
    if "cuda" in parts:
        if wrong := cuda_engine.numerics(min(100.0, clock.left())):
            report.red.append(wrong)
        else:
            cuda_engine.compare(chosen.shapes, clock.left, lambda groups: report.add(groups, ["triton"]))
    if "others" in parts and clock.left() > 30:
        group = others(Shape(512, 64))
        if group is None:
            print("flashinfer is not installed: no comparison with it")
        else:
            report.add([group], ["vectorized", "flashinfer"])
    if "nsight" in parts:
        counts = report.path.with_name(f"{report.path.stem}-ncu.txt")
        device, revision = measure.device_name(DEVICE), measure.revision()
        found, written = cuda_engine.nsight(counts, device, revision, chosen.shapes[2:3], clock.left)
        report.red += found
        if written and (out := os.environ.get("OUT")):
            shutil.copy(written, out)
    if "picture" in parts and clock.left() > 10:
        try:
            picture = report.path.with_suffix(".png")
            roofline(report, bandwidth, rate, picture)
            if out := os.environ.get("OUT"):
                shutil.copy(picture, out)
        except Exception as error:  # a picture is no figure: its failure must not cost the run
            print(f"no roofline picture: {type(error).__name__}: {error}")
    report.flush()
    print(summary(report))
    for line in report.red:
        print(f"RED  {line}")
    print(f"{len(report.rows)} rows in {report.path.name}; {clock.left():.0f} s left")
    return 1 if report.red else 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; see the module's text for the exit status."""
    chosen = arguments(argv)
    if not torch.cuda.is_available():
        print(
            "make gpu needs a CUDA GPU that torch can see; there is none here. Nothing was measured.", file=sys.stderr
        )
        return 2
    return run(chosen)


if __name__ == "__main__":
    sys.exit(main())
