"""A few slots, steps and prompts of the built-in models: a training step in a fraction of a second."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from entrgi import tiny

pytest.importorskip("accelerate")

sys.path.insert(0, str(Path(__file__).parent))  # for train_cases


@pytest.fixture(scope="session")
def models(tiny_weights) -> tuple[Any, Any, Any]:
    """(diffusion model, its tokenizer, reward model) in float64; copy the first before training it."""
    diffusion, tokenizer = tiny.load_diffusion(torch.float64)
    return diffusion, tokenizer, tiny.load_reward(torch.float64)[0]


@pytest.fixture
def trainer_of(models, tmp_path) -> Callable[..., Any]:
    """Makes a trainer of a fresh copy of the model; keyword arguments change its settings."""
    import train_cases

    return lambda folder="run", **changes: train_cases.make_trainer(models, tmp_path / folder, **changes)
