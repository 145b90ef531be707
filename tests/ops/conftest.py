"""Every operator test runs on every backend that serves this machine's CPU, with uninitialised memory full of NaN."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from entrgi_kernels import ops

sys.path.insert(0, str(Path(__file__).parent))  # for ops_reference


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" in metafunc.fixturenames:
        metafunc.parametrize("backend", [name for name, info in ops.backends().items() if "cpu" in info.devices])


@pytest.fixture(autouse=True)
def poisoned_memory():
    """torch.empty gives NaN (and huge integers): an entry that an operator forgets to write is seen."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory and torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Compilations of one test do not count toward another's limit."""
    yield
    torch._dynamo.reset()
