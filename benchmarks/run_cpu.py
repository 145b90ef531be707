"""CPU figures: `python -m benchmarks.run_cpu`, what `make bench` runs.

Prints one table per part (guidance step, single operators, a whole guided generation) with ratios against the
baselines and the share of the floor, and writes JSON rows as they come: an interrupted run keeps those it has. Exit
status 1 when a check of this project's own code was red: its speed is then missing from the table, with the reason
below it.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.baselines.step import BASELINES
from benchmarks.harness import measure
from benchmarks.harness.inputs import CPU_SHAPES, SMALL_N, Shape
from benchmarks.harness.measure import Group
from benchmarks.suites.end_to_end import measure_end_to_end
from benchmarks.suites.ops import OPS, measure_ops
from benchmarks.suites.step import measure_step, memory_needed

PARTS = ("step", "ops", "generation")


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run_cpu", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="the guidance step at N=64 and one small generation only")
    parser.add_argument("--json", type=Path, help="where to write rows (default: benchmarks/results/<device>.json)")
    parser.add_argument("--shapes", nargs="+", type=Shape.parse, help="N,D or N,D,V (default: 1, 7, 64 and 512 rows)")
    parser.add_argument("--dtypes", default="bfloat16,float32", help="comma-separated (default: %(default)s)")
    parser.add_argument("--backends", default="auto,eager", help="of this project (default: %(default)s)")
    parser.add_argument("--baselines", default=",".join(BASELINES), help="default: %(default)s")
    parser.add_argument("--parts", default=",".join(PARTS), help="default: %(default)s")
    parser.add_argument("--ops", default=",".join(OPS), help="operators of part ops (default: all)")
    parser.add_argument("--budget", type=float, default=15.0, help="seconds of timed runs per group (default: 15)")
    parser.add_argument("--threads", type=int, help="torch threads (default: torch's own choice)")
    chosen = parser.parse_args(argv)
    for name, allowed in (("parts", PARTS), ("baselines", tuple(BASELINES)), ("ops", OPS)):
        values = [value for value in getattr(chosen, name).split(",") if value]
        if unknown := [value for value in values if value not in allowed]:
            parser.error(f"--{name}: {unknown[0]!r} is not one of {', '.join(allowed)}")
        setattr(chosen, name, values)
    chosen.backends = [value for value in chosen.backends.split(",") if value]
    try:
        chosen.dtypes = [getattr(torch, value) for value in chosen.dtypes.split(",")]
        assert all(isinstance(value, torch.dtype) for value in chosen.dtypes)
    except (AttributeError, AssertionError):
        parser.error(f"--dtypes: {chosen.dtypes!r} is not a list of torch dtypes")
    if chosen.shapes is None:
        numbers = CPU_SHAPES[:1] if chosen.quick else [*((n, 1024) for n in SMALL_N), *CPU_SHAPES]
        chosen.shapes = [Shape(n, d) for n, d in numbers]
    if chosen.quick and chosen.parts == list(PARTS):
        chosen.parts = ["step", "generation"]
    return chosen


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts asked for; see the module's text.

    Returns:
        0, or 1 when a backend of this project failed its check.
    """
    chosen = arguments(argv)
    if chosen.threads:
        torch.set_num_threads(chosen.threads)
    print(f"{measure.device_name()} · torch {torch.__version__} · revision {measure.revision()}", flush=True)
    path = chosen.json or measure.result_path()
    red: list[str] = []

    def keep(groups: list[Group], rows: list[dict[str, Any]], text: str) -> None:
        print(text, end="\n\n", flush=True)
        measure.save(rows, path)
        red.extend(name for group in groups for name in group.refused if name not in BASELINES)

    def report(groups: list[Group], baselines: Sequence[str]) -> None:
        keep(groups, [row for group in groups for row in measure.rows(group)], measure.table(groups, baselines))

    for part in chosen.parts:
        began = time.monotonic()
        for dtype in chosen.dtypes if part != "generation" else ():
            for shape in chosen.shapes:
                names = [*chosen.baselines, *chosen.backends]
                needed, free = memory_needed(shape, dtype, names), measure.available_memory()
                if needed > free:
                    print(
                        f"skipped {part} {dtype} {shape.label}: needs {needed / 1e9:.0f} GB, {free / 1e9:.0f} are free"
                    )
                    continue
                if part == "step":
                    report([measure_step(shape, dtype, names, budget=chosen.budget)], chosen.baselines)
                else:
                    report(
                        measure_ops(shape, dtype, chosen.backends, ops=chosen.ops, budget=chosen.budget / 3),
                        [name for name in ("vectorized", "compiled") if name in chosen.baselines],
                    )
        if part == "generation":
            for preset in ("quick",) if chosen.quick else ("guidance", "small"):
                for dtype in chosen.dtypes if preset != "small" else chosen.dtypes[:1]:
                    found = measure_end_to_end(preset, dtype)
                    keep([found.group], found.rows("cpu"), found.table())
        print(f"part {part}: {time.monotonic() - began:.0f} s, rows in {path.name}\n", flush=True)
    return 1 if red else 0


if __name__ == "__main__":
    sys.exit(main())
