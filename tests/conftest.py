"""What all tests share: no network, two threads, fixed seeds, and the markers that skip where they must."""

from __future__ import annotations

import os

# Before transformers is imported anywhere: a test never reaches for the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Before torch is: on a shared box, threads that spin at each barrier of a tiny product steal each other's core.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import random  # noqa: E402

import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

THREADS = 2  # results of a sum depend on how it is split; every machine splits it in two


def pytest_addoption(parser: pytest.Parser) -> None:
    layout = "code of the loops that guide() takes, laid out as docs/integrations.md says"
    parser.addoption("--integrations", metavar="FOLDER", help=layout)
    parser.addoption("--deep", action="store_true", help="also every architecture (make test-all)")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(THREADS)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what this machine cannot run, so that `make test` is always all that it can."""
    no_gpu = None if torch.cuda.is_available() else pytest.mark.skip(reason="needs a CUDA GPU")
    not_chosen = None
    if "real" not in (config.option.markexpr or ""):
        not_chosen = pytest.mark.skip(reason="needs published checkpoints on disk: choose with -m real")
    for item in items:
        for name, skip in (("gpu", no_gpu), ("real", not_chosen)):
            if skip is not None and item.get_closest_marker(name):
                item.add_marker(skip)


@pytest.fixture(scope="session")
def deep(request: pytest.FixtureRequest) -> bool:
    """Whether everything is asked for, minutes of compilation among it."""
    return request.config.getoption("--deep")


@pytest.fixture(autouse=True)
def _fixed_seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
