"""pytest-benchmark: one guidance step. Not interleaved: for ratios, `python -m benchmarks.run_cpu` is better."""

from benchmarks import baselines
from benchmarks.suite_step import FLOOR, step_candidates

BASELINES = tuple(baselines.BASELINES)
FLOORS = (FLOOR,)


def test_guidance_step(timed, problem, shape, dtype, name):
    candidates = {candidate.name: candidate for candidate in step_candidates(problem, [name] if name != FLOOR else [])}
    timed(candidates[name], f"guidance step {shape.label} {dtype}")
