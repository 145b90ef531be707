"""pytest-benchmark: one guidance step. Not interleaved: for ratios, `python -m benchmarks.run_cpu` is better."""

from benchmarks.baselines import step as baselines
from benchmarks.suites.step import FLOOR, step_candidates

BASELINES = tuple(baselines.BASELINES)
FLOORS = (FLOOR,)


def test_guidance_step(timed, problem, shape, dtype, name):
    candidates = {candidate.name: candidate for candidate in step_candidates(problem, [name] if name != FLOOR else [])}
    timed(candidates[name], f"guidance step {shape.label} {dtype}")
