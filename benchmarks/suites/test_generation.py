"""pytest-benchmark: a whole guided generation at V = 151,936 with small random models."""

import pytest

from benchmarks.suites.generation import FLOOR, Size, candidates

BASELINES = ("published", "vectorized")
FLOORS = (FLOOR,)
SIZE = Size(d=512, max_new_tokens=8, steps=4)


@pytest.fixture(scope="module")
def world(dtype):
    return SIZE.world(dtype)


def test_generation(timed, world, dtype, name):
    backends = [name] if name not in (*BASELINES, FLOOR) else []
    made = {candidate.name: candidate for candidate in candidates(world, SIZE, backends or ["auto"])}
    timed(made[name], f"generation V{SIZE.v} D{SIZE.d} T{SIZE.steps} {dtype}")
