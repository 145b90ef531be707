"""Measure candidate configurations of the Triton kernels on this GPU: `python -m benchmarks.tools.tune`.

    python -m benchmarks.tools.tune --family backward forward statistics --minutes 8
    python -m benchmarks.tools.tune --family hopper --minutes 2   # compiled CUDA: benchmarks/tools/hopper_candidates.py

For every family and row count the candidates are compiled first, on all cores at once (one that spills or wants more
shared memory than there is is dropped, with its reason), then checked against the table's present choice, timed by
device events with a cold L2, and the fastest is named. The result is JSON (benchmarks/results/tune-<device>.json, and
$OUT) and, at the end, the entries to put into
entrgi_kernels/backends/triton/config.py, each with the measurement that goes beside it. Nothing edits the tables
behind anybody's back: a person, or a commit, takes the lines over.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.harness import measure
from benchmarks.harness.inputs import CANONICAL, Shape
from benchmarks.tools import hopper_candidates

# Family, shape, and the entry of the table that is tried.
Job = tuple[str, Shape, Any]
FAMILIES = ("statistics", "forward", "backward", "collect")
COMPILED = "hopper"  # only where it is asked for: few builds hold its candidates
SPACES: dict[str, dict[str, Sequence[Any]]] = {
    # 16, 32 or 64 entries a thread (collect: 32 at most); longer slices cost fewer endings, shorter ones end together.
    "statistics": {
        "block": (4096, 8192),
        "num_warps": (4, 8),
        "programs_per_sm": (8, 24, 64),
        "slice_least": (8192, 16384),
    },
    "collect": {"block": (2048, 4096), "num_warps": (4,), "programs_per_sm": (8, 24, 64), "slice_least": (8192, 12288)},
}
# Tiles of the products, most promising first, of those that keep off the stack on sm_90.
TILES: dict[str, dict[str, Sequence[tuple[int, ...]]]] = {
    "forward": {
        "names": ("block_n", "block_v", "block_d", "num_warps", "num_stages"),
        "few": ((16, 128, 64, 4, 4), (16, 128, 128, 4, 4), (16, 128, 64, 4, 3), (16, 64, 64, 4, 4)),
        "many": (
            (128, 64, 256, 8, 3), (64, 64, 256, 4, 3), (128, 32, 128, 8, 4), (128, 64, 128, 8, 3), (64, 64, 256, 4, 2),
            (64, 64, 128, 4, 4), (64, 64, 64, 4, 4), (128, 32, 256, 8, 4), (64, 32, 256, 4, 4), (128, 128, 128, 8, 2),
            (64, 128, 128, 4, 3), (128, 64, 256, 8, 2), (64, 128, 64, 4, 4),
        ),
    },
    "backward": {
        "names": ("block_n", "block_v", "block_d", "num_warps", "num_stages", "parts"),
        "few": ((16, 128, 64, 4, 4, 1), (16, 256, 64, 4, 4, 2), (16, 128, 128, 4, 3, 1), (16, 64, 128, 4, 4, 1)),
        "many": (
            (128, 128, 64, 8, 3, 8), (128, 256, 64, 8, 4, 16), (128, 128, 64, 4, 3, 16), (128, 256, 64, 8, 3, 16),
            (64, 256, 64, 4, 2, 16), (64, 128, 64, 4, 3, 8), (128, 128, 32, 8, 4, 8), (64, 128, 64, 4, 3, 4),
            (64, 256, 32, 4, 4, 16), (128, 128, 64, 8, 2, 8), (128, 128, 64, 8, 3, 4), (64, 128, 64, 4, 4, 8),
            (64, 64, 64, 4, 4, 2),
        ),
    },
}  # fmt: skip
LOADS = ("descriptor", "pointer")


def candidates(family: str, rows: int, present: Any, loads: Sequence[str] = LOADS) -> Iterator[Any]:
    """The present entry first, the other engine, then what the family may choose from; each once.

    Args:
        rows: of the problem; few have their own tiles.
        loads: the forms of loads that the machine has.
    """
    chosen: list[dict[str, Any]] = [{}]
    if family in TILES:
        tiles = TILES[family]
        chosen.append({"engine": "fused" if present.engine == "chunked" else "chunked"})
        for form, tile in itertools.product(loads, tiles["few" if rows <= 32 else "many"]):
            if tile[0] < max(32, 2 * rows):  # no tile of which half is beyond the last row
                chosen.append(dict(zip(tiles["names"], tile, strict=True)) | {"loads": form, "engine": "fused"})
    else:
        space = SPACES[family]
        chosen += [dict(zip(space, values, strict=True)) for values in itertools.product(*space.values())]
    yield from dict.fromkeys(dataclasses.replace(present, **changes) for changes in chosen)


def with_entry(target: Any, family: str, entry: Any) -> Any:
    """The target with `entry` as the only choice of the family."""
    entry = dataclasses.replace(entry, most_rows=None)
    architecture = target.architecture
    if family == "statistics":
        changed = dataclasses.replace(architecture, statistics=(entry,))
    elif family == "collect":
        changed = dataclasses.replace(architecture, sample=dataclasses.replace(architecture.sample, collect=entry))
    else:
        table = getattr(architecture, family) | {2: (entry,)}
        changed = dataclasses.replace(architecture, **{family: table})
    return dataclasses.replace(target, architecture=changed, compiled=False)


def present_entry(target: Any, family: str, rows: int) -> Any:
    """What the tables choose today."""
    from entrgi_kernels.backends.triton import config

    if family == "statistics":
        return config.pick(target.architecture.statistics, rows)
    if family == "collect":
        return target.architecture.sample.collect
    return config.pick(getattr(target.architecture, family)[2], rows)


def workload(family: str, p: Any) -> Callable[[], tuple[torch.Tensor, ...]]:
    """A call that runs the family's kernel on a problem and returns what it computed."""
    from entrgi_kernels.backends import triton as kernels
    from entrgi_kernels.backends.arguments import Adam, Draw
    from entrgi_kernels.backends.triton.statistics import row_statistics

    s = p.settings
    found = row_statistics(p.phi, s.temperature)
    if family == "statistics":
        return lambda: row_statistics(p.phi, 1.0, s.temperature, True)[:6]
    if family == "collect":
        device = p.phi.device
        rng, rows = torch.zeros(2, dtype=torch.int64, device=device), torch.arange(p.phi.shape[0], device=device)
        return lambda: (kernels.sample_tokens(p.phi, Draw(rng, rows, s.temperature, 0, s.top_p)),)
    if family == "forward":
        from entrgi_kernels.backends.triton.soft_embedding import forward

        return lambda: (forward(p.phi, p.table, found.maximum, found.logsum, s.temperature)[0],)
    soft, lse = kernels.soft_embedding(p.phi, p.table, s.temperature)
    moments = torch.zeros_like(p.phi), torch.zeros_like(p.phi)
    start = p.phi.clone()

    def update() -> tuple[torch.Tensor, ...]:
        adam = Adam(*moments, 2, s.lr, *s.betas, s.eps)
        kernels.guidance_update_(p.phi, p.grad, p.table, soft, lse, s.temperature, adam)
        return p.phi, start, moments[0], moments[1]

    return update


def compiled(jobs: Iterable[Job], workers: int) -> dict[Job, str | None]:
    """Compile every job's kernels on all cores, into Triton's cache: what is wrong with each, or None."""
    from benchmarks.tools import gate
    from entrgi_kernels.backends.triton import aot

    machine = aot.here()
    wanted = {job: launches(job, machine) for job in jobs}
    distinct = list(dict.fromkeys(item for items in wanted.values() for item in items))
    made = gate.compile_all([("here", machine, item) for item in distinct], workers)
    wrong = {
        item: report.error or f"{report.spill_bytes} bytes spilled, {report.shared_bytes} of shared memory"
        for item, report in zip(distinct, made, strict=True)
        if not report.passed
    }
    return {job: next((wrong[item] for item in items if item in wrong), None) for job, items in wanted.items()}


def launches(job: Job, machine: Any) -> list[Any]:
    """What a job's workload launches on a machine."""
    from benchmarks.harness.inputs import StepSettings
    from entrgi_kernels.backends.triton import aot, config

    family, shape, entry = job
    sizes = {"phi": (shape.n, shape.v), "table": (shape.v, shape.d), "grad": (shape.n, shape.d)}
    tensors = {name: torch.empty(size, dtype=torch.bfloat16, device="meta") for name, size in sizes.items()}
    found: list[Any] = []
    with aot.recording(machine, found.append):
        config.override = with_entry(machine.tables, family, entry)
        run = workload(family, SimpleNamespace(settings=StepSettings(), **tensors))
        found.clear()  # what prepares the call
        run()
    return found


def _same(family: str, result: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> bool:
    if family == "collect":
        return bool((result[0] != expected[0]).float().mean() <= 1e-3)
    scale = expected[0].float().abs().max()
    return bool(((result[0].float() - expected[0].float()).abs() > 2e-2 * scale).float().mean() <= 1e-3)


def tune(family: str, shape: Shape, verdicts: dict[Any, str | None], deadline: float) -> list[dict[str, Any]]:
    """Every candidate of a family at a shape: milliseconds, or the reason why it has none; fastest first.

    `verdicts` has the candidates in the order in which they are tried, each with what the compiler holds against it.
    """
    from benchmarks.suites.kernels import timed
    from benchmarks.suites.step import Problem
    from entrgi_kernels.backends.triton import config

    target = config.target(torch.device("cuda"))
    run = workload(family, Problem.make(shape, torch.bfloat16, device="cuda"))
    scratch = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    made: list[dict[str, Any]] = []
    expected: tuple[torch.Tensor, ...] | None = None

    def restore(result: tuple[torch.Tensor, ...]) -> None:
        if family == "backward":
            result[0].copy_(result[1])
            result[2].zero_()
            result[3].zero_()

    try:
        for entry, wrong in verdicts.items():
            row: dict[str, Any] = {"family": family, "shape": shape.to_dict(), "entry": dataclasses.asdict(entry)}
            if wrong is not None:
                made.append(row | {"refused": wrong})
                continue
            if time.monotonic() > deadline:
                break
            config.override = with_entry(target, family, entry)
            try:
                result = run()
                torch.cuda.synchronize()
                copies = tuple(t.clone() for t in result)
                restore(result)
                if expected is None:
                    expected = copies
                if _same(family, copies, expected):
                    row["ms"] = 1e3 * timed(run, scratch, 9)[4]
                else:
                    row["refused"] = "its result differs from the present configuration's"
                restore(result)
            except Exception as error:  # a candidate less, not the end of the run
                row["refused"] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
            made.append(row)
    finally:
        config.override = None
    return sorted(made, key=lambda row: row.get("ms", float("inf")))


def advice(family: str, shape: Shape, made: list[dict[str, Any]]) -> str:
    """The line for the table, with its measurement."""
    if not made or "ms" not in made[0]:
        return f"# {family} at {shape.label}: nothing ran"
    best = made[0]
    kept = {k: v for k, v in best["entry"].items() if k != "most_rows"}
    words = ", ".join(f"{k}={v!r}" for k, v in kept.items())
    second = made[1].get("ms") if len(made) > 1 else None
    versions = measure.versions()
    measured = f"{best['ms']:.3f} ms at {shape.label} (next {second and round(second, 3)}), " + (
        f"{measure.device_name('cuda')}, torch {versions['torch']}, triton {versions['triton']}"
    )
    kind = "GemmConfig" if family in ("forward", "backward") else "RowConfig"
    return f"{family}: {kind}({words}, most_rows={shape.n})  # {measured}"


def main(argv: Sequence[str] | None = None) -> int:
    """Tune the families asked for; exit status 2 without a CUDA GPU, 1 where what serves of Hopper's is wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tools.tune", description=__doc__.splitlines()[0])
    parser.add_argument("--family", nargs="+", choices=(*FAMILIES, COMPILED), default=list(FAMILIES))
    parser.add_argument("--shapes", nargs="+", type=Shape.parse, help="N,D or N,D,V (default: the canonical ones)")
    parser.add_argument("--minutes", type=float, default=8.0, help="time for everything (default: 8)")
    chosen = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("tuning needs a CUDA GPU that torch can see; there is none here", file=sys.stderr)
        return 2
    shapes = chosen.shapes or [Shape(n, d) for n, d in CANONICAL]
    path = measure.result_path("cuda")
    path = path.with_name(f"tune-{path.name}")
    from entrgi_kernels.backends.triton import config

    rows: list[dict[str, Any]] = []
    lines: list[str] = []
    end, target = time.monotonic() + 60 * chosen.minutes, config.target(torch.device("cuda"))

    def keep(made: list[dict[str, Any]]) -> None:
        path.write_text(json.dumps(made, indent=1) + "\n")
        if out := os.environ.get("OUT"):
            shutil.copy(path, Path(out) / path.name)

    status = 0
    families = [family for family in chosen.family if family != COMPILED]
    if COMPILED in chosen.family:
        found = hopper_candidates.tune(chosen.shapes or hopper_candidates.SHAPES, end, keep)
        if isinstance(found, str):
            print(found, file=sys.stderr)
            status = 0 if families else 2
        else:
            rows += found
            status = int(any(not row["same"] for row in found if row["tile"] in hopper_candidates.SERVING))
    if not families:
        return status
    pairs = [(family, shape) for shape in shapes for family in families]
    loads = LOADS if target.architecture.bulk else LOADS[1:]
    jobs = [(f, s, entry) for f, s in pairs for entry in candidates(f, s.n, present_entry(target, f, s.n), loads)]
    verdicts = compiled(jobs, os.cpu_count() or 2)
    print(f"{len(jobs)} candidates compiled, {end - time.monotonic():.0f} s left to time them", flush=True)
    for place, (family, shape) in enumerate(pairs):
        share = max(0.0, end - time.monotonic()) / (len(pairs) - place)
        own = {entry: wrong for (f, s, entry), wrong in verdicts.items() if (f, s) == (family, shape)}
        made = tune(family, shape, own, time.monotonic() + share)
        rows += made
        lines.append(advice(family, shape, made))
        print(lines[-1], flush=True)
        keep(rows)
        torch.cuda.empty_cache()
    print("\nFor entrgi_kernels/backends/triton/config.py:\n" + "\n".join(lines))
    return status


if __name__ == "__main__":
    sys.exit(main())
