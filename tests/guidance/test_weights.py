"""Interpolation weights by name and by hand."""

import math

import pytest
import torch

from entrgi_kernels.guidance import StepWeight, ThresholdWeight
from entrgi_kernels.guidance.weights import method_weight, resolve_weight

ENTROPY = torch.tensor([0.0, 0.5, 1.0, 1.25, 4.0])


@pytest.mark.parametrize(
    ("name", "mode"), [("linear", "entropy"), ("entropy", "entropy"), ("one", "one"), ("zero", "zero")]
)
def test_names_of_the_operators_own_modes(name, mode):
    assert resolve_weight(name) == mode


def test_threshold_rises_with_the_entropy():
    torch.testing.assert_close(ThresholdWeight(1.0, 0.5)(ENTROPY, 100), torch.tensor([0.0, 0.0, 0.0, 0.5, 1.0]))


def test_step_jumps_at_theta_and_keeps_nan():
    weights = StepWeight(1.0)(torch.tensor([0.9, 1.0, math.nan]), 100)
    assert weights[:2].tolist() == [0.0, 1.0] and weights[2].isnan()


@pytest.mark.parametrize(
    ("text", "schedule"),
    [
        ("threshold", ThresholdWeight(1.0, 1.0)),
        ("threshold(0.5, 2)", ThresholdWeight(0.5, 2.0)),
        (" step( 1.5 ) ", StepWeight(1.5)),
    ],
)
def test_numbers_in_parentheses(text, schedule):
    assert resolve_weight(text) == schedule


def test_a_long_run_of_spaces_is_refused_at_once():
    """A request may bring it: where two parts of the pattern take spaces, this is an hour of a server's."""
    with pytest.raises(ValueError, match="expected"):
        resolve_weight("step" + " " * 500_000 + "!")


@pytest.mark.parametrize("text", ["lin", "step(a)", "threshold(1,2,3)", "threshold(1, 0)", "linear(2)", "", "step(1))"])
def test_bad_names_are_named_in_the_error(text):
    with pytest.raises(ValueError, match="weight="):
        resolve_weight(text)


def test_methods():
    assert method_weight("entrgi") == "entropy"
    assert method_weight("aps") == "one"
    assert method_weight("expectation") == "zero"
    assert method_weight("none") is None
    assert method_weight("entrgi", "step(2)") == StepWeight(2.0)
    with pytest.raises(ValueError, match="only method 'entrgi'"):
        method_weight("aps", "step(2)")
    with pytest.raises(ValueError, match="expected one of .*'entrgi'"):
        method_weight("entrigi")
    with pytest.raises(TypeError, match="callable"):
        resolve_weight(3)
