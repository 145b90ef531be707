"""Means, standard errors and paired differences, against numbers worked out by hand and against numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest

from entrgi.statistics import Estimate, estimate, paired_difference


def test_by_hand() -> None:
    # Deviations -2, 0, 2: variance 8 / 2 = 4, error 2 / sqrt(3).
    got = estimate([1, 3, 5])
    assert (got.mean, got.n) == (3.0, 3) and got.error == pytest.approx(2 / math.sqrt(3), rel=1e-14)


def test_against_numpy() -> None:
    values = np.random.default_rng(0).normal(2.0, 3.0, 37)
    got = estimate(values)
    assert got.mean == pytest.approx(values.mean(), rel=1e-12)
    assert got.error == pytest.approx(values.std(ddof=1) / math.sqrt(37), rel=1e-12)


def test_pairing_removes_what_prompts_share() -> None:
    shared = [0.0, 100.0, -50.0, 7.0]
    got = paired_difference([x + d for x, d in zip(shared, [1, 2, 1, 2], strict=True)], shared)
    assert got.mean == pytest.approx(1.5)
    assert got.error == pytest.approx(math.sqrt(1 / 3) / 2)
    assert estimate(shared).error > 10 * got.error


def test_one_prompt_has_no_error() -> None:
    assert estimate([4.0]) == Estimate(4.0, None, 1)
    assert str(estimate([4.0])) == "4.00" and estimate([4.0]).signed() == "+4.00"
    assert estimate([4.0]).to_dict() == {"mean": 4.0, "error": None, "n": 1}


def test_refusals() -> None:
    with pytest.raises(ValueError, match="at least one"):
        estimate([])
    with pytest.raises(ValueError, match="got 2 and 1"):
        paired_difference([1.0, 2.0], [1.0])


def test_not_finite_is_safe_in_json() -> None:
    assert estimate([math.nan, 1.0]).to_dict() == {"mean": 1.0, "error": None, "n": 1}
