"""Shared by the pytest-benchmark suites: `pytest benchmarks --benchmark-only`; the default test run leaves them out.

A benchmark whose candidate fails its check fails; it never reports a time. Shapes are chosen with --bench-shapes, the
backends with --bench-backends.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.harness.inputs import CPU_SHAPES, Shape
from benchmarks.harness.measure import Candidate, available_memory, gate
from benchmarks.suites.step import Problem, memory_needed

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("entrgi benchmarks")
    default = " ".join(f"{n},{d}" for n, d in CPU_SHAPES[:1])
    group.addoption("--bench-shapes", default=default, help=f'shapes "N,D[,V] ..." (default: "{default}")')
    group.addoption("--bench-backends", default="auto,eager", help="backends of this project (default: auto,eager)")
    group.addoption("--bench-rounds", type=int, default=5, help="timed runs of each (default: 5)")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    option = metafunc.config.getoption
    if "shape" in metafunc.fixturenames:
        shapes = [Shape.parse(text) for text in option("--bench-shapes").split()]
        metafunc.parametrize("shape", shapes, ids=[shape.label.replace(" ", "-") for shape in shapes], scope="module")
    if "dtype" in metafunc.fixturenames:
        metafunc.parametrize("dtype", list(DTYPES.values()), ids=list(DTYPES), scope="module")
    if "name" in metafunc.fixturenames:
        backends = [name for name in option("--bench-backends").split(",") if name]
        metafunc.parametrize("name", [*metafunc.module.BASELINES, *backends, *metafunc.module.FLOORS])


@pytest.fixture(scope="module")
def problem(shape: Shape, dtype: torch.dtype) -> Problem:
    """The inputs at a shape and dtype, made once a module."""
    if memory_needed(shape, dtype, ["one", "two"]) > available_memory():
        pytest.skip(f"{shape.label} needs more memory than is free")
    return Problem.make(shape, dtype)


@pytest.fixture
def timed(benchmark: Any, request: pytest.FixtureRequest) -> Callable[[Candidate, str], None]:
    """Check a candidate, then time it under a group's name."""

    def run(candidate: Candidate, group: str) -> None:
        reason = gate(candidate)
        if reason is not None:
            if "BackendUnavailableError" in reason or "BackendCompilerFailed" in reason:
                pytest.skip(reason)
            pytest.fail(f"no speed for {candidate.name}: {reason}")
        benchmark.group = group
        rounds = request.config.getoption("--bench-rounds")
        benchmark.pedantic(candidate.run, setup=candidate.prepare, rounds=rounds, warmup_rounds=1)

    return run
