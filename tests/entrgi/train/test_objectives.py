"""Losses against the formulas written out, in float64."""

from __future__ import annotations

import math

import pytest
import torch

from entrgi.train import objectives

K, L = 3, 5
REWARDS = torch.tensor([1.0, 3.0, 2.0, -1.0, -1.0, 0.5], dtype=torch.float64)


def _case(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    log_probs = -torch.rand(6, L, generator=g, dtype=torch.float64) * 4
    mask = torch.arange(L) < torch.tensor([5, 1, 3, 2, 0, 4])[:, None]
    return log_probs, mask


def test_completion_mask_ends_with_the_first_end_of_sequence():
    completions = torch.tensor([[4, 9, 5, 9], [9, 4, 4, 4], [4, 5, 6, 7], [4, 5, 6, 9], [9, 9, 9, 9]])
    mask = objectives.completion_mask(completions, 9)
    assert mask.sum(1).tolist() == [2, 1, 4, 4, 1]
    assert mask[0].tolist() == [True, True, False, False]


def test_rgrl_is_the_published_sum_over_rows():
    log_probs, mask = _case()
    expected = 0.0
    for row in range(6):
        inside = [float(log_probs[row, i]) for i in range(L) if mask[row, i]]
        expected -= sum(inside) / max(1, len(inside)) / K
    found = objectives.rgrl_loss(log_probs, mask, objectives.row_weights(REWARDS, K))
    assert float(found) == pytest.approx(expected, rel=1e-14)


def test_rgrl_leaves_what_is_masked_alone():
    log_probs, mask = _case()
    log_probs.requires_grad_()
    objectives.rgrl_loss(log_probs, mask, objectives.row_weights(REWARDS, K)).backward()
    assert (log_probs.grad[~mask] == 0).all()
    torch.testing.assert_close(log_probs.grad[2, :3], torch.full((3,), -1 / 3 / K, dtype=torch.float64))


def test_weights():
    groups = [[1.0, 3.0, 2.0], [-1.0, -1.0, 0.5]]
    assert objectives.row_weights(REWARDS, K).tolist() == [1 / 3] * 6
    expected = [math.exp(r / 0.1) / sum(math.exp(s / 0.1) for s in group) for group in groups for r in group]
    torch.testing.assert_close(objectives.row_weights(REWARDS, K, "softmax").tolist(), expected)
    assert objectives.row_weights(REWARDS, K, "best").tolist() == [0, 1, 0, 0, 0, 1]
    with pytest.raises(ValueError, match="'uniform', 'softmax', 'best'"):
        objectives.row_weights(REWARDS, K, "rank")
    with pytest.raises(ValueError, match="num_samples=4"):
        objectives.row_weights(REWARDS, 4)


def test_advantages():
    found = objectives.advantages(REWARDS, K)
    torch.testing.assert_close(found.tolist(), [-1.0, 1.0, 0.0, -0.5, -0.5, 1.0])
    scaled = objectives.advantages(REWARDS, K, scale=True)
    torch.testing.assert_close(scaled[:3].tolist(), [-1 / 1.0001, 1 / 1.0001, 0.0])
    deviation = math.sqrt((0.25 + 0.25 + 1) / 2)
    assert float(scaled[5]) == pytest.approx(1 / (deviation + 1e-4))
    assert objectives.advantages(REWARDS, 1, scale=True).tolist() == [0.0] * 6


def _grpo(log_probs, old, reference, mask, advantage, epsilon, beta):
    total = kl_total = binding = 0.0
    for row in range(len(mask)):
        for i in range(L):
            if not mask[row, i]:
                continue
            ratio = math.exp(log_probs[row, i] - old[row, i])
            clipped = min(max(ratio, 1 - epsilon), 1 + epsilon)
            gain = float(advantage[row])
            difference = float(reference[row, i] - log_probs[row, i])
            kl = math.exp(difference) - difference - 1
            total -= min(ratio * gain, clipped * gain) - beta * kl
            kl_total += kl
            binding += clipped * gain < ratio * gain
    count = int(mask.sum())
    return total / count, kl_total / count, binding / count


def test_grpo_is_the_clipped_surrogate_with_k3():
    log_probs, mask = _case()
    old, reference = _case(1)[0], _case(2)[0]
    advantage = objectives.advantages(REWARDS, K)
    settings = {"epsilon": 0.5, "beta": 0.04}
    loss, shares = objectives.grpo_loss(log_probs, old, reference, mask, advantage, tokens=mask.sum(), **settings)
    expected, kl, clipped = _grpo(log_probs, old, reference, mask, advantage, 0.5, 0.04)
    assert 0 < clipped < 1
    for found, value in ((loss, expected), (shares["kl"], kl), (shares["clipped"], clipped)):
        assert float(found) == pytest.approx(value, rel=1e-12)


def test_grpo_gradient_is_the_policy_gradient_at_the_start_and_stops_at_the_clip():
    log_probs, mask = _case()
    advantage = objectives.advantages(REWARDS, K)
    leaf = log_probs.clone().requires_grad_()
    options = {"mask": mask, "advantage": advantage, "epsilon": 0.5, "beta": 0.0, "tokens": 1.0}
    objectives.grpo_loss(leaf, log_probs, None, **options)[0].backward()
    torch.testing.assert_close(leaf.grad, -advantage[:, None] * mask)
    leaf = log_probs.clone().requires_grad_()
    objectives.grpo_loss(leaf, log_probs - 1, None, **options)[0].backward()  # ratio e: above 1.5
    assert (leaf.grad[advantage > 0] == 0).all()
    assert (leaf.grad[(advantage < 0)][mask[advantage < 0]] > 0).all()


def test_parts_of_a_step_add_up():
    log_probs, mask = _case()
    old, reference = _case(1)[0], _case(2)[0]
    advantage, weights = objectives.advantages(REWARDS, K), objectives.row_weights(REWARDS, K)

    def both(rows: slice) -> torch.Tensor:
        grpo, _ = objectives.grpo_loss(
            *(t[rows] for t in (log_probs, old, reference, mask, advantage)), epsilon=0.5, beta=0.04, tokens=mask.sum()
        )
        return torch.stack([grpo, objectives.rgrl_loss(log_probs[rows], mask[rows], weights[rows])])

    torch.testing.assert_close(both(slice(0, 3)) + both(slice(3, 6)), both(slice(0, 6)), rtol=1e-13, atol=0)
