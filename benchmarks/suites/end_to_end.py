"""Guided generation, whole: `python -m benchmarks.suites.end_to_end [--preset small] [--dtype …] [--device cuda]`.

The published loop and our sampler, with all exact savings and with none, on the same random models; and the floor, the
models' own forwards and backwards replayed alone. For our sampler also where the time goes, phase by phase, and the
FLOPs of each phase. Presets by blocks time a block-causal model with finished blocks kept and without, one that sees
the whole canvas, and the published loop on it. Rows go to benchmarks/results/<device>.json. Exit status 1 when a check
was red: no time then.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import measure
from benchmarks.harness.measure import Candidate, Group
from benchmarks.harness.models import World
from benchmarks.harness.phases import REST, FlopCounter, PhaseTimer
from benchmarks.suites.generation import (
    FLOOR,
    KEPT,
    PRESETS,
    UNKEPT,
    WHOLE,
    Size,
    block_samplers,
    candidates,
    check_ours,
    check_same_blocks,
    published_loops,
    sampler,
    tokens_of,
)
from entrgi_kernels.backends.ranges import listening
from entrgi_kernels.guidance.phases import MODEL, PHASES, REWARD, REWARD_BACKWARD

OP, PLAIN = "generation", "no savings"


@dataclass
class EndToEnd:
    """One preset at one dtype.

    Attributes:
        group: the timings; its refusals say what was not timed, and why.
        phases: for our samplers, seconds of each phase in a run of its own.
        flops: likewise FLOPs, with the rest of the total under :data:`REST`; for the published loop the total alone.
        same: share of the tokens that are the same with and without `what`, at this dtype.
        what: all savings, or kept blocks.
    """

    preset: str
    group: Group
    phases: dict[str, dict[str, float]] = field(default_factory=dict)
    flops: dict[str, dict[str, float]] = field(default_factory=dict)
    same: float | None = None
    what: str = "savings"

    def share_of_models(self, name: str) -> float:
        """What the two models' own forwards and backwards took of a run's time; final scoring is not among it."""
        seconds = self.phases[name]
        return sum(seconds[phase] for phase in (MODEL, REWARD, REWARD_BACKWARD)) / sum(seconds.values())

    def rows(self, device: str) -> list[dict[str, Any]]:
        """JSON rows: those of every benchmark, with the preset, the phases and the FLOPs."""
        made = measure.rows(self.group, device)
        for row in made:
            row["shape"] = {**row["shape"], "preset": self.preset}
            if flops := self.flops.get(row["backend"]):
                row["TFLOP"] = sum(flops.values()) / 1e12
                row["TFLOP/s"] = row["TFLOP"] / (row["p50"] / 1e3)
            if phases := self.phases.get(row["backend"]):
                row["phases ms"] = {name: 1e3 * seconds for name, seconds in phases.items()}
                row["share of models"] = self.share_of_models(row["backend"])
                row["phases TFLOP"] = {name: flop / 1e12 for name, flop in self.flops[row["backend"]].items()}
            if row["backend"] not in ("published", FLOOR, WHOLE):
                row[f"tokens equal with and without {self.what}"] = self.same
        return made

    def table(self) -> str:
        """Times, ratios and share of the floor; then the phases."""
        baselines = [name for name in ("published", WHOLE, UNKEPT) if name in {"published", *self.group.timings}]
        text = [f"preset {self.preset}", measure.table([self.group], baselines)]
        head = ["phase", *(f"{name}: {what}" for name in self.phases for what in ("ms", "share", "GFLOP"))]
        lines = [head]
        for phase in (*PHASES, REST):
            line = [phase]
            for name, seconds in self.phases.items():
                total, flop = sum(seconds.values()), self.flops[name].get(phase, 0)
                line += [f"{1e3 * seconds[phase]:.1f}", f"{seconds[phase] / total:.0%}", f"{flop / 1e9:.1f}"]
            lines.append(line)
        widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
        text += ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines]
        shares = ", ".join(f"{name} {self.share_of_models(name):.0%}" for name in self.phases)
        text.append(f"share of the models' own forwards and backwards: {shares}")
        totals = ", ".join(f"{name} {sum(flops.values()) / 1e12:.3g}" for name, flops in self.flops.items())
        text.append(f"TFLOP in all: {totals}")
        if self.same is not None:
            text.append(f"tokens that are the same with and without {self.what} in this dtype: {self.same:.1%}")
        return "\n".join(text)


def measure_end_to_end(
    preset: str = "small",
    dtype: torch.dtype = torch.bfloat16,
    *,
    device: str = "cpu",
    backend: str = "auto",
    baselines: Sequence[str] = ("published",),
    budget: float = 60.0,
    rounds: tuple[int, int] = (1, 5),
    size: Size | None = None,
    seconds: float = float("inf"),
) -> EndToEnd:
    """Gate and time a preset.

    Args:
        budget: seconds for the timed rounds; `rounds` = (least, most) binds first.
        size: in place of the preset's.
        seconds: leave out what comes after the timings (phases, FLOPs) when this much time has passed by then.
    """
    started = time.monotonic()
    size = size or PRESETS[preset]
    world = size.world(dtype, device)
    if size.block_length is not None:
        return _by_blocks(preset, world, size, dtype, device, backend, baselines, budget, rounds)
    made = candidates(world, size, [backend], baselines, device)
    plain = sampler(world, size, backend, exact_savings="none")
    without = Candidate(
        PLAIN,
        lambda: plain.generate(size.texts, progress=False),
        lambda: check_ours(world, size, backend, device),
    )
    group = measure.measure(
        OP,
        dtype,
        size.shape,
        [*made[:-1], without, made[-1]],
        budget=budget,
        rounds=rounds,
        device=device,
        memory=device != "cpu",
    )
    found = EndToEnd(preset, group)
    if group.refused or time.monotonic() - started > seconds:
        return found
    watched = {name: sampler(world, size, backend, exact_savings=x) for name, x in ((backend, "all"), (PLAIN, "none"))}
    _look_inside(found, watched, size, device)
    return found


def _by_blocks(
    preset: str,
    world: World,
    size: Size,
    dtype: torch.dtype,
    device: str,
    backend: str,
    baselines: Sequence[str],
    budget: float,
    rounds: tuple[int, int],
) -> EndToEnd:
    """A preset by blocks. The run that counts each one's FLOPs is its warm-up."""
    ours = block_samplers(world, size, backend)
    loops = published_loops(world, size, baselines)
    same = functools.cache(lambda: check_same_blocks(ours[KEPT].model.keeps_blocks, backend, device))
    checks = {KEPT: same, UNKEPT: same, WHOLE: functools.cache(lambda: check_ours(world, size, backend, device))}
    made = [
        *(dataclasses.replace(loop, check=functools.cache(loop.check)) for loop in loops if loop.check),
        *(Candidate(n, functools.partial(o.generate, size.texts, progress=False), checks[n]) for n, o in ours.items()),
    ]
    refused = {candidate.name: reason for candidate in made if (reason := measure.gate(candidate))}
    found = EndToEnd(preset, measure.Group(OP, str(dtype), size.shape, {}, refused), what="kept blocks")
    if refused:
        return found
    for loop in loops:
        with FlopCounter() as counter:
            loop.run()
        found.flops[loop.name] = {REST: float(counter.total)}
    _look_inside(found, ours, size, device)
    settings = {"budget": budget, "rounds": rounds, "warmup": 0, "device": device, "memory": device != "cpu"}
    return dataclasses.replace(found, group=measure.measure(OP, dtype, size.shape, made, **settings))


def _look_inside(found: EndToEnd, samplers: Mapping[str, Any], size: Size, device: str) -> None:
    """Phases, FLOPs and tokens, in runs of their own: watching costs time. `same` is of the first two samplers."""
    tokens = []
    for name, ours in samplers.items():
        timer, counter = PhaseTimer(device), FlopCounter()
        ours.generate(size.texts[:1], progress=False, steps=1)  # the vocabulary map and the table are made once
        with listening(counter), counter:
            ours.generate(size.texts, progress=False)
        found.flops[name] = {**counter.by_phase, REST: counter.total - sum(counter.by_phase.values())}
        measure.synchronize(device)
        begin = time.perf_counter()
        with listening(timer):
            tokens.append(torch.tensor(tokens_of(ours, size.texts)))
            measure.synchronize(device)
        found.phases[name] = timer.seconds(time.perf_counter() - begin)
    found.same = (tokens[0] == tokens[1]).double().mean().item()


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.suites.end_to_end", description=__doc__.splitlines()[0])
    parser.add_argument("--preset", action="append", choices=tuple(PRESETS), help="may be repeated (default: small)")
    parser.add_argument("--dtype", action="append", choices=("bfloat16", "float16", "float32"), help="may be repeated")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--backend", default="auto", help="of our sampler (default: auto)")
    parser.add_argument("--baselines", default="published", help="published, vectorized, both with a comma, or empty")
    parser.add_argument("--budget", type=float, default=60.0, help="seconds of timed runs for each (default: 60)")
    parser.add_argument("--json", type=Path, help="where to write rows (default: benchmarks/results/<device>.json)")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure the presets asked for; see the module's text."""
    chosen = arguments(argv)
    print(
        f"{measure.device_name(chosen.device)} · torch {torch.__version__} · revision {measure.revision()}", flush=True
    )
    path, red = chosen.json or measure.result_path(chosen.device), False
    for preset in chosen.preset or ["small"]:
        for dtype in chosen.dtype or ["bfloat16"]:
            found = measure_end_to_end(
                preset,
                getattr(torch, dtype),
                device=chosen.device,
                backend=chosen.backend,
                baselines=[name for name in chosen.baselines.split(",") if name],
                budget=chosen.budget,
            )
            print(found.table(), end="\n\n", flush=True)
            measure.save(found.rows(chosen.device), path)
            red |= bool(found.group.refused)
    print(f"rows written to {path.name}")
    return int(red)


if __name__ == "__main__":
    sys.exit(main())
