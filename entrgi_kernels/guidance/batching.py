"""Which trajectories are denoised together: prompts of similar length, as many as the memory holds.

Draws do not depend on the batch and numbers do by rounding alone (docs/philox.md), so that this may be decided anew on
every machine (:class:`.memory.MemoryEstimate`), and halved where it was wrong.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from .config import GuidanceConfig
from .memory import MemoryEstimate, memory_budget

logger = logging.getLogger("entrgi_kernels")


@dataclass(frozen=True)
class Batch:
    """Samples `first` to `first + count` of some prompts."""

    prompts: tuple[int, ...]
    first: int
    count: int

    def halves(self) -> tuple[Batch, Batch] | None:
        """Two batches that are this one: half the prompts each, half the samples of a single one; None for one row."""
        if len(self.prompts) > 1:
            half = len(self.prompts) // 2
            parts = self.prompts[:half], self.prompts[half:]
            return Batch(parts[0], self.first, self.count), Batch(parts[1], self.first, self.count)
        if self.count > 1:
            half = self.count // 2
            return Batch(self.prompts, self.first, half), Batch(self.prompts, self.first + half, self.count - half)
        return None


def make_batches(
    lengths: Sequence[int],
    config: GuidanceConfig,
    estimate: Callable[[], MemoryEstimate] | None = None,
    device: torch.device | None = None,
) -> deque[Batch]:
    """Sort prompts by length and cut the row into batches: of `config.batch_size` prompts, or as many as fit.

    Args:
        lengths: tokens of each prompt.
        estimate: makes the estimate where batch_size is "auto".
        device: where the memory is, likewise.
    """
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    k = config.num_samples
    rows = k * config.copies  # of the models, a prompt
    if config.batch_size != "auto":
        size = int(config.batch_size)
        return deque(Batch(tuple(order[i : i + size]), 0, k) for i in range(0, len(order), size))
    if not order:
        return deque()
    assert estimate is not None and device is not None
    needed, allowed = estimate(), memory_budget(config.memory_budget, device)
    batches: deque[Batch] = deque()
    batch: list[int] = []
    for prompt in order:
        # Sorted: the last is the longest, and sets the width.
        if batch and needed((len(batch) + 1) * rows, lengths[prompt]) > allowed:
            batches.append(Batch(tuple(batch), 0, k))
            batch = []
        batch.append(prompt)
    batches.append(Batch(tuple(batch), 0, k))
    largest = max(len(batch.prompts) for batch in batches)
    logger.info(
        "batch_size='auto': %d prompts in %d batches of %d at most; %.2f GB of %.2f GB allowed by the estimate",
        len(order),
        len(batches),
        largest,
        max(needed(len(b.prompts) * rows, max(lengths[i] for i in b.prompts)) for b in batches) / 1e9,
        allowed / 1e9,
    )
    return batches
