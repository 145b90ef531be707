"""Run one operator, one denoising step's guidance, or one whole denoising step, so that a profiler shows just that.

    ncu --clock-control none --nvtx --nvtx-include "measured/" --set full -o op \\
        python -m benchmarks.tools.profile guidance_update_ --shape 2048,2048
    nsys profile --trace=cuda,nvtx --capture-range=cudaProfilerApi -o step python -m benchmarks.tools.profile step
    nsys profile --trace=cuda,nvtx --capture-range=cudaProfilerApi -o whole python -m benchmarks.tools.profile denoise

Compilation and warm-up happen before the range "measured" and before cudaProfilerStart; inputs are the benchmarks' own.
docs/profiling.md says how to read the result. Without a profiler it prints the time by device events.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from benchmarks.harness.inputs import Shape
from benchmarks.suites.generation import PRESETS, sampler
from benchmarks.suites.ops import OPS
from benchmarks.suites.step import Problem, maker
from entrgi_kernels.backends import ranges
from entrgi_kernels.guidance.phases import MODEL


def call(
    name: str, shape: Shape, dtype: torch.dtype, backend: str, guidance_steps: int, device: str
) -> Callable[[], Any]:
    """The call to profile: an operator, or M guidance steps on fresh Adam state ("step")."""
    problem = Problem.make(shape, dtype, device=device)
    if name == "step":

        def loop() -> None:
            stepper = maker(problem, backend)()
            for _ in range(guidance_steps):
                stepper.step(problem.reward)

        return loop
    from benchmarks.suites.ops import OpSuite

    candidate = getattr(OpSuite(problem), f"_{name.rstrip('_')}")(backend)
    if candidate.prepare is not None:
        candidate.prepare()
    return candidate.run


class OneStep:
    """Listens to a generation and hands one of its denoising steps to the profiler.

    Args:
        number: the step, counted from 0; the first ones compile kernels and fill caches.
        start, stop: called at its beginning and at its end.
    """

    def __init__(self, number: int, start: Callable[[], None], stop: Callable[[], None]) -> None:
        self._number, self._start, self._stop = number, start, stop
        self._seen, self.running = 0, False

    def begin(self, name: str) -> None:
        if name == MODEL:  # a step's first phase
            self.close()
            if self._seen == self._number:
                self._start()
                self.running = True
            self._seen += 1

    def end(self, name: str) -> None:
        pass

    def close(self) -> None:
        """End the step where the generation ends with it."""
        if self.running:
            self._stop()
            self.running = False


def profile_denoising(preset: str, dtype: torch.dtype, backend: str, number: int) -> float:
    """Generate, the given step inside the range; its milliseconds by device events."""
    size = PRESETS[preset]
    ours = sampler(size.world(dtype, "cuda"), size, backend)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def start() -> None:
        torch.cuda.synchronize()
        torch.cuda.cudart().cudaProfilerStart()
        torch.cuda.nvtx.range_push("measured")
        begin.record()

    def stop() -> None:
        end.record()
        torch.cuda.synchronize()
        torch.cuda.nvtx.range_pop()
        torch.cuda.cudart().cudaProfilerStop()

    step = OneStep(number, start, stop)
    with ranges.listening(step):
        ours.generate(size.texts, progress=False)
    step.close()
    return begin.elapsed_time(end)


def main(argv: Sequence[str] | None = None) -> int:
    """Warm up, then run once inside the range "measured"; exit status 2 without a CUDA GPU."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tools.profile", description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("denoise", "step", *OPS))
    parser.add_argument("--shape", type=Shape.parse, default=Shape(2048, 2048), help="N,D or N,D,V (default 2048,2048)")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--backend", default="triton")
    parser.add_argument("--guidance-steps", type=int, default=3, help="of `step` (default 3)")
    parser.add_argument("--preset", default="dream", choices=tuple(PRESETS), help="of `denoise` (default dream)")
    parser.add_argument("--number", type=int, default=2, help="of `denoise`: which denoising step (default 2)")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--runs", type=int, default=1, help="runs inside the range (default 1)")
    chosen = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("profiling needs a CUDA GPU that torch can see; there is none here", file=sys.stderr)
        return 2
    ranges.enable_nvtx()
    if chosen.what == "denoise":
        took = profile_denoising(chosen.preset, getattr(torch, chosen.dtype), chosen.backend, chosen.number)
        print(f"denoising step {chosen.number} of {chosen.preset} {chosen.dtype} {chosen.backend}: {took:.3f} ms")
        return 0
    ranges.enable_nvtx(False)
    run = call(chosen.what, chosen.shape, getattr(torch, chosen.dtype), chosen.backend, chosen.guidance_steps, "cuda")
    for _ in range(chosen.warmup):
        run()
    torch.cuda.synchronize()
    ranges.enable_nvtx()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.cudart().cudaProfilerStart()
    with ranges.scope("measured"):
        begin.record()
        for _ in range(chosen.runs):
            run()
        end.record()
        torch.cuda.synchronize()
    torch.cuda.cudart().cudaProfilerStop()
    took = begin.elapsed_time(end) / chosen.runs
    print(f"{chosen.what} {chosen.shape.label} {chosen.dtype} {chosen.backend}: {took:.3f} ms")
    return 0


if __name__ == "__main__":
    sys.exit(main())
