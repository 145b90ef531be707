"""Which prompts each step takes: the training set as the trainer sees it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import Dataset

from .forward_process import derive_seed


class PromptSchedule(Dataset):
    """Item i is a prompt of step i // batch: the run's whole course, in order.

    Prompts are shuffled anew for each pass. A rollout's prompts come again for each of its inner iterations. The order
    depends on the seed alone, so a run resumes at its place however it is split over processes and accumulation steps.

    Args:
        prompts: strings or conversations, at least one.
        batch: prompts a step, over all processes and accumulation steps.
        steps: optimiser steps of the run.
        num_iterations: optimiser steps on each rollout.
        seed: of the shuffling.
    """

    def __init__(self, prompts: Sequence[Any], batch: int, steps: int, num_iterations: int = 1, seed: int = 0) -> None:
        if not prompts:
            raise ValueError("no prompts to train on: expected at least one")
        self.prompts, self.batch, self.steps = list(prompts), batch, steps
        self.num_iterations, self.seed = num_iterations, seed
        self._order: tuple[int, list[int]] | None = None

    def __len__(self) -> int:
        return self.steps * self.batch

    def __getitem__(self, index: int) -> dict[str, Any]:
        """{"prompt", "rollout", "iteration"}: rollout and inner iteration count from 0."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        step, place = divmod(index, self.batch)
        rollout, iteration = divmod(step, self.num_iterations)
        turn, place = divmod(rollout * self.batch + place, len(self.prompts))
        if self._order is None or self._order[0] != turn:
            generator = torch.Generator().manual_seed(derive_seed("order", self.seed, turn))
            self._order = turn, torch.randperm(len(self.prompts), generator=generator).tolist()
        return {"prompt": self.prompts[self._order[1][place]], "rollout": rollout, "iteration": iteration}
