"""How many positions a denoising step commits.

Both published schedules, to the token: the test-time code's `linspace` in float32 with its truncation, the training
sampler's `even` with its rounding. They are planned on the host before the loop starts, so that no step waits for a
count from the device.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..names import SCHEDULES


@dataclass(frozen=True)
class Plan:
    """What each denoising step does.

    Attributes:
        counts: positions to commit, a list a step with an entry a trajectory.
        shares: likewise 1 - s/t: the probability with which alg "origin" commits a position. Always 1 at a
            trajectory's last step and behind it, so that nothing stays masked.
    """

    counts: tuple[tuple[int, ...], ...]
    shares: tuple[tuple[float, ...], ...]

    def __len__(self) -> int:
        return len(self.counts)


def plan(schedule: str, masked: list[int], steps: int, eps: float = 1e-3) -> Plan:
    """Plan the commits of every step for trajectories with `masked` positions each.

    `linspace`: int(n (1 - s/t)) over linspace(1, eps, steps + 1), n still masked, and all that is left at the last
    step; with steps > n some commit nothing. `even`: round(n (1 - s/t)) over t = steps/steps .. 1/steps (half to even),
    with empty steps dropped from each trajectory; its shares are those of the steps that it is left, so that they
    depend on no other trajectory.

    Args:
        schedule: "linspace" or "even".
        masked: masked positions of each trajectory at the start.
        steps: denoising steps T.
        eps: last time of `linspace`.

    Raises:
        ValueError: no such schedule.
    """
    if schedule == "linspace":
        times = torch.linspace(1, eps, steps + 1, dtype=torch.float32).tolist()
        shares = [1 - s / t for t, s in zip(times, times[1:], strict=False)]
        shares[-1] = 1.0
        columns, of_each = [_drain(n, shares, int) for n in masked], [shares for _ in masked]
    elif schedule == "even":
        columns = [[count for count in _drain(n, _even_shares(steps), round) if count] for n in masked]
        longest = max((len(column) for column in columns), default=0)
        # Not the shares of the steps that were kept: the last step, of share 1, may be among the dropped ones.
        of_each = [_even_shares(len(column)) + [1.0] * (longest - len(column)) for column in columns]
        columns = [column + [0] * (longest - len(column)) for column in columns]
    else:
        raise ValueError(f"schedule={schedule!r}: expected one of {', '.join(map(repr, SCHEDULES))}")
    return Plan(tuple(zip(*columns, strict=True)), tuple(zip(*of_each, strict=True)))


def steps_of_block(steps: int, number: int, blocks: int) -> tuple[int, int]:
    """(first step, steps) of a block: of the block's number alone, so that no trajectory depends on its batch."""
    begins = [max(block, steps * block // blocks) for block in (number, number + 1)]
    return begins[0], begins[1] - begins[0]


def step_behind(steps: int, blocks: int | None) -> int:
    """A number that no step has, of the settings alone.

    Args:
        steps: denoising steps.
        blocks: of the response, which may begin within one and so reach into one more; None where there are none.
    """
    return steps if blocks is None else steps_of_block(steps, blocks + 1, blocks)[0]


def _drain(n: int, shares: list[float], rounding: Callable[[float], int]) -> list[int]:
    """Counts a step for one trajectory: rounding(n share), never more than are left."""
    counts = []
    for share in shares:
        count = min(n, rounding(n * share))
        counts.append(count)
        n -= count
    return counts


@functools.lru_cache(maxsize=4096)  # of one length for every trajectory, as a rule
def _even_shares(steps: int) -> list[float]:
    # float32, as the published scheduler computes it: half-way cases round by its last bit.
    left = torch.arange(steps, -1, -1, dtype=torch.float64) / steps
    t, s = left[:-1].float(), left[1:].float()
    return (1 - ((1 - (1 - s)) / (1 - (1 - t))).double()).tolist()
