"""Positions a step: both published schedules, to the token."""

import pytest
import torch

from entrgi_kernels.guidance.schedules import plan


def published_linspace(n, steps):
    """The rule as the test-time code states it, on tensors."""
    times = torch.linspace(1, 1e-3, steps + 1)
    counts = []
    for step in range(steps):
        t, s = times[step].item(), times[step + 1].item()
        counts.append(int(n * (1 - s / t)) if step < steps - 1 else n)
        n -= counts[-1]
    return counts


@pytest.mark.parametrize("steps", [1, 2, 7, 16, 128, 256])
@pytest.mark.parametrize("n", [1, 5, 32, 128])
def test_linspace_is_the_published_rule_and_commits_everything(n, steps):
    counts = [row[0] for row in plan("linspace", [n], steps).counts]
    assert counts == published_linspace(n, steps)
    assert sum(counts) == n and len(counts) == steps


def test_linspace_with_more_steps_than_slots_has_idle_steps():
    counts = [row[0] for row in plan("linspace", [128], 256).counts]
    assert counts.count(0) == 129


@pytest.mark.parametrize("steps", [1, 3, 16, 50, 128, 200])
@pytest.mark.parametrize("n", [1, 7, 32, 128])
def test_even_drops_empty_steps_and_commits_everything(n, steps):
    counts = [row[0] for row in plan("even", [n], steps).counts]
    assert sum(counts) == n and min(counts) > 0 and len(counts) <= min(n, steps)
    assert max(counts) - min(counts) <= 1 or n > steps


def test_even_of_one_token_a_step():
    assert [row[0] for row in plan("even", [16], 16).counts] == [1] * 16


def test_trajectories_are_planned_apart():
    schedule = plan("even", [4, 2, 0], 4)
    columns = list(zip(*schedule.counts, strict=True))
    assert [sum(column) for column in columns] == [4, 2, 0]
    assert len(schedule) == 4 and schedule.shares[-1] == (1.0, 1.0, 1.0)


def test_a_trajectory_s_shares_are_its_own():
    """Alone or beside a longer one: alg "origin" commits by them."""
    for masked, steps in (([1, 4], 4), ([3, 8, 0], 8), ([5, 7], 19)):
        together = zip(*plan("even", masked, steps).shares, strict=True)
        for n, shares in zip(masked, together, strict=True):
            alone = [share for (share,) in plan("even", [n], steps).shares]
            assert list(shares) == alone + [1.0] * (len(shares) - len(alone))
    assert plan("linspace", [1, 4], 4).shares == tuple((share,) * 2 for (share,) in plan("linspace", [1], 4).shares)


def test_shares_end_with_one():
    schedule = plan("linspace", [8], 4)
    assert schedule.shares[-1] == (1.0,) and all(0 < share <= 1 for (share,) in schedule.shares)


def test_nothing_masked_and_bad_name():
    assert sum(map(sum, plan("linspace", [0, 0], 3).counts)) == 0
    assert len(plan("even", [0], 3)) == 0
    with pytest.raises(ValueError, match="'linspace', 'even'"):
        plan("cosine", [3], 3)
