"""Keeps every step of every trajectory, for replays; waits for the device each step."""

from __future__ import annotations

import torch

from .canvas import Canvas, OpenSlots
from .results import StepTrace


class Trace:
    """Adds a :class:`StepTrace` a trajectory for each denoising step.

    Args:
        trajectories: a list for each of the R trajectories.
    """

    def __init__(self, trajectories: list[list[StepTrace]]) -> None:
        self.trajectories = trajectories

    def add(
        self,
        step: int,
        canvas: Canvas,
        opened: OpenSlots,
        entropy: torch.Tensor,
        weight: torch.Tensor | None,
        chosen: torch.Tensor,
        reward: torch.Tensor,
        before: torch.Tensor | None,
        after: torch.Tensor | None,
    ) -> None:
        """Add a step.

        Args:
            canvas: after the step.
            opened: the slots that were open before it.
            entropy, weight: [N], by open slot; no weight without guidance.
            chosen: [R, L] bool, the slots committed.
            reward, before, after: [R], see :class:`StepTrace`.
        """
        entropies, weights = self._by_slot(canvas, opened, entropy), self._by_slot(canvas, opened, weight)
        tokens, committed = canvas.response.tolist(), chosen.tolist()
        values = [None if value is None else value.tolist() for value in (before, after)]
        for row, trajectory in enumerate(self.trajectories):
            first, last = (None if value is None else value[row] for value in values)
            trajectory.append(
                StepTrace(
                    step=step,
                    tokens=tokens[row],
                    entropy=entropies[row],
                    weight=weights[row],
                    committed=[slot for slot, is_chosen in enumerate(committed[row]) if is_chosen],
                    reward=reward[row].item(),
                    reward_before=first,
                    reward_after=last,
                )
            )

    def _by_slot(self, canvas: Canvas, opened: OpenSlots, column: torch.Tensor | None) -> list[list[float | None]]:
        grid: list[list[float | None]] = [[None] * canvas.masked.shape[1] for _ in self.trajectories]
        if column is not None:
            for row, slot, number in zip(opened.rows.tolist(), opened.slots.tolist(), column.tolist(), strict=True):
                grid[row][slot] = number
        return grid
