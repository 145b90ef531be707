"""Which positions a step commits."""

import math

import torch

from entrgi_kernels.guidance import commits

MASKED = torch.tensor([[True, True, False, True, True], [True, True, True, True, True]])
KEYS = torch.arange(10).view(2, 5)


def test_best_positions_are_masked_ones_alone():
    confidence = torch.tensor([[0.1, 0.9, 9.0, 0.5, -1.0], [0.0, 0.0, 0.0, 0.0, 0.0]])
    chosen = commits.best_positions(confidence, MASKED, torch.tensor([2, 3]))
    assert chosen.tolist() == [[False, True, False, True, False], [True, True, True, False, False]]


def test_postponed_tokens_come_last_but_come():
    confidence = torch.tensor([[-math.inf, 0.9, 9.0, math.nan, -1.0]] * 2)
    chosen = commits.best_positions(confidence, MASKED, torch.tensor([2, 3]))
    assert chosen[0].tolist() == [False, True, False, False, True]
    # The published code's best-of-N let positions tied at -inf win over masked ones: never an unmasked one here.
    everything = commits.best_positions(confidence, MASKED, torch.tensor([4, 5]))
    assert torch.equal(everything, MASKED)


def test_no_count_chooses_nothing_and_too_many_choose_all():
    confidence = torch.zeros(2, 5)
    assert not commits.best_positions(confidence, MASKED, torch.tensor([0, 0])).any()
    assert torch.equal(commits.best_positions(confidence, MASKED, torch.tensor([99, 99])), MASKED)


def test_drawn_positions_follow_the_softmax():
    confidence = torch.tensor([[0.0, 1.0, 5.0, 2.0, -math.inf]]).double()
    masked = torch.tensor([[True, True, False, True, True]])
    counts = torch.zeros(5)
    draws = 2000
    for step in range(draws):
        rng = torch.tensor([3, step])
        noisy = commits.perturbed(confidence, 0.8, rng, KEYS[:1])
        chosen = commits.best_positions(noisy, masked, torch.tensor([1]))
        assert chosen.sum() == 1
        counts += chosen[0]
    expected = torch.softmax(confidence.masked_fill(~masked, -math.inf) / 0.8, -1)[0]
    assert counts[2] == 0 and counts[4] == 0
    torch.testing.assert_close(counts / draws, expected.float(), atol=0.04, rtol=0)


def test_independent_positions_have_their_share():
    masked = torch.ones(50, 40, dtype=torch.bool)
    masked[:, 0] = False
    keys = torch.arange(2000).view(50, 40)
    chosen = commits.independent_positions(masked, torch.full((len(masked),), 0.3), torch.tensor([1, 2]), keys)
    assert not chosen[:, 0].any()
    assert abs(chosen[:, 1:].float().mean() - 0.3) < 0.04
    assert torch.equal(
        commits.independent_positions(masked, torch.ones(len(masked)), torch.tensor([1, 2]), keys), masked
    )
