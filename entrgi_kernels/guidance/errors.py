"""What is raised when numbers are not finite, and the record on the device of where they first were not."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch


class NonFiniteLogitsError(ArithmeticError):
    """Logits were NaN or infinite.

    Attributes:
        step: the first denoising step in which they were.
        trajectory: the first trajectory of the batch that was hit in it.
    """

    def __init__(self, step: int, trajectory: int, where: str) -> None:
        self.step, self.trajectory = step, trajectory
        super().__init__(
            f"logits are NaN or infinite at denoising step {step}, {where}: expected finite logits; check the "
            "diffusion model's and the reward model's weights and dtype (float16 ends at 65504), and the learning rate "
            "or guidance scale"
        )

    def at(self, where: str) -> NonFiniteLogitsError:
        """The same error with another name of the place."""
        return NonFiniteLogitsError(self.step, self.trajectory, where)


class NonFiniteRewardError(ArithmeticError):
    """A reward that guides was NaN or infinite, or its gradient was; the diffusion model's logits were finite.

    Attributes:
        step, trajectory: as in :class:`NonFiniteLogitsError`.
        reward: its value there; where that is finite the gradient is not.
    """

    def __init__(self, step: int, trajectory: int, where: str, reward: float) -> None:
        self.step, self.trajectory, self.reward = step, trajectory, reward
        finite = math.isfinite(reward)
        said = "the gradient of the reward is NaN or infinite" if finite else f"the reward is {reward}"
        said += f" at denoising step {step}, {where}"
        said += f" (the reward is {reward:.6g}): expected a finite gradient" if finite else ": expected a finite number"
        super().__init__(f"{said}; check the reward model's weights and dtype, or the reward function")

    def at(self, where: str) -> NonFiniteRewardError:
        """The same error with another name of the place."""
        return NonFiniteRewardError(self.step, self.trajectory, where, self.reward)


class Faults:
    """The step in which each trajectory's logits, or its reward, first were not finite; nothing waits until asked.

    Args:
        trajectories: R.
        device: of the run.
    """

    def __init__(self, trajectories: int, device: torch.device) -> None:
        # One of the two steps at most is set, the other -1.
        self._logits = torch.full((trajectories,), -1, device=device)
        self._rewards = torch.full_like(self._logits, -1)
        self._values = torch.zeros(trajectories, device=device)

    def note_logits(self, step: int, rows: torch.Tensor, bad: torch.Tensor) -> None:
        """Logits that are not finite.

        Args:
            rows: int64 [n], trajectories.
            bad: [n] bool.
        """
        hit = torch.zeros_like(self._logits).index_put_((rows,), bad.long(), accumulate=True) > 0
        self._logits = torch.where(hit & self._none_yet, step, self._logits)

    def note_rewards(self, step: int, hit: torch.Tensor, values: torch.Tensor) -> None:
        """Rewards, or gradients, that are not finite: what they spoil is not the diffusion model's doing.

        Args:
            hit: [R] bool.
            values: [R], the rewards.
        """
        hit = hit & self._none_yet
        self._rewards = torch.where(hit, step, self._rewards)
        self._values = torch.where(hit, values, self._values)

    @property
    def _none_yet(self) -> torch.Tensor:
        return (self._logits < 0) & (self._rewards < 0)

    def check(self, *columns: torch.Tensor) -> list[list[int]]:
        """Raise for the first fault; one wait for the device.

        Args:
            columns: int64 [R], read on the way.

        Returns:
            The columns, as lists.

        Raises:
            NonFiniteLogitsError, NonFiniteRewardError: of the earliest step, and there of the first trajectory.
        """
        logits, rewards, *read = torch.stack([self._logits, self._rewards, *columns]).tolist()
        self._raise_first(logits, rewards)
        return read

    def _raise_first(self, logits: Sequence[int], rewards: Sequence[int]) -> None:
        steps = [max(pair) for pair in zip(logits, rewards, strict=True)]
        step = min((step for step in steps if step >= 0), default=None)
        if step is None:
            return
        row = steps.index(step)
        where = f"trajectory {row} of the batch"
        if rewards[row] >= 0:
            raise NonFiniteRewardError(step, row, where, self._values[row].item())
        raise NonFiniteLogitsError(step, row, where)
