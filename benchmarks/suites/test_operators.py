"""pytest-benchmark: every operator against plain torch, batched and compiled, and its floor."""

import pytest

from benchmarks.suites.ops import OPS, PLAIN, OpSuite

BASELINES = PLAIN
FLOORS = ("floor",)


@pytest.mark.parametrize("op", OPS)
def test_operator(timed, problem, shape, dtype, op, name):
    suite = OpSuite(problem)
    timed(suite.floor(op) if name == "floor" else suite.candidate(op, name), f"{op} {shape.label} {dtype}")
