"""State of a run: the trajectories, and what was done to them."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

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
            "diffusion model's and the reward model's weights and dtype (float16 ends at 65504), and the learning rate"
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


@dataclass
class Canvas:
    """A batch of trajectories.

    Attributes:
        tokens: [R, S] int64, prompts left-padded, then the response with masks where nothing is committed.
        attention: [R, S] bool, False on padding.
        start: first response slot; the response is ``tokens[:, start:]``, L slots.
        masked: [R, L] bool, the slots still to be filled. Kept apart from the tokens: a prompt may hold the mask token.
        keys: [R, L] int64, keys of each slot's draws.
        repeats: this many consecutive trajectories start out identical (K samples of a prompt); 1 claims nothing.
    """

    tokens: torch.Tensor
    attention: torch.Tensor
    start: int
    masked: torch.Tensor
    keys: torch.Tensor
    repeats: int = 1

    @property
    def response(self) -> torch.Tensor:
        """[R, L] view of the response's tokens."""
        return self.tokens[:, self.start :]


@dataclass
class OpenSlots:
    """The masked slots of one denoising step, row-major: row i of phi belongs to slot (rows[i], slots[i]).

    Attributes:
        rows, slots, keys: [N] int64, trajectory, response slot and random key of each.
        counts: open slots of each trajectory.
    """

    rows: torch.Tensor
    slots: torch.Tensor
    keys: torch.Tensor
    counts: list[int]

    @classmethod
    def of(cls, canvas: Canvas, counts: list[int]) -> OpenSlots:
        """The open slots of a canvas; their numbers being known, nothing waits for the device."""
        width = canvas.masked.shape[1]
        # A stable sort puts the open slots first and leaves them in order.
        flat = (~canvas.masked).flatten().to(torch.uint8).argsort(stable=True)[: sum(counts)]
        rows, slots = flat // width, flat % width
        return cls(rows, slots, canvas.keys[rows, slots], counts)

    def __len__(self) -> int:
        return self.rows.shape[0]

    def index_of_slot(self, masked: torch.Tensor) -> torch.Tensor:
        """[R, L] int64: the row of phi that belongs to a slot, -1 where it is not open."""
        index = torch.full(masked.shape, -1, device=masked.device)
        index[self.rows, self.slots] = torch.arange(len(self), device=masked.device)
        return index


@dataclass
class Statistics:
    """What a run did.

    Attributes:
        steps: denoising steps taken (those that commit nothing are skipped).
        model_forwards: forwards of the diffusion model, batches.
        reward_evaluations: forwards and backwards of the reward model under guidance, batches.
        mean_weight: mean share of the hard token over all rows and inner steps; None without guidance.
        seconds: wall-clock time of the whole run, models included.
    """

    steps: int = 0
    model_forwards: int = 0
    reward_evaluations: int = 0
    mean_weight: float | None = None
    seconds: float = 0.0
    _weights: list[torch.Tensor] = field(default_factory=list, repr=False)

    def add_weights(self, weights: torch.Tensor) -> None:
        """Note the weights [M, N] of a denoising step's inner steps, without waiting for the device."""
        self._weights.append(weights.mean(dim=1))

    def finish(self, seconds: float) -> None:
        """Close the run: read what was gathered on the device."""
        self.seconds = seconds
        self.mean_weight = torch.cat(self._weights).mean().item() if self._weights else None

    def to_dict(self) -> dict[str, float | int | None]:
        """The figures as a JSON-safe dict."""
        return {
            name: getattr(self, name)
            for name in ("steps", "model_forwards", "reward_evaluations", "mean_weight", "seconds")
        }
