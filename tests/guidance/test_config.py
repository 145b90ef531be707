"""Settings: every bad value is refused by name, with what is accepted."""

import json

import numpy
import pytest
import torch

from entrgi_kernels.guidance import GuidanceConfig, ThresholdWeight


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("method", "entropy"),
        ("weight", "nothing"),
        ("guidance_steps", -1),
        ("guidance_steps", 254),
        ("guidance_steps", 1.5),
        ("learning_rate", float("nan")),
        ("learning_rate", -0.1),
        ("betas", (0.9, 1.0)),
        ("betas", (0.9,)),
        ("betas", 0.9),
        ("betas", ("0.9", 0.9)),
        ("betas", None),
        ("temperature", torch.tensor(0.5)),
        ("method", None),
        ("method", ["aps"]),
        ("learning_rate", 10**400),
        ("temperature", 10**400),
        ("top_k", 1 << 63),
        ("exact_savings", 5),
        ("exact_savings", ["all", 5]),
        ("backend", None),
        ("eps", -1e-8),
        ("state_dtype", "float8"),
        ("state_dtype", "float16"),
        ("num_samples", 0),
        ("num_samples", 2000),
        ("num_samples", True),
        ("max_new_tokens", 0),
        ("max_new_tokens", -4),
        ("max_new_tokens", 1 << 15),
        ("steps", 0),
        ("temperature", -0.5),
        ("temperature", float("inf")),
        ("temperature", "warm"),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("top_k", 0),
        ("top_k", 2.0),
        ("alg", "random"),
        ("alg_temp", -1.0),
        ("confidence", "both"),
        ("schedule", "cosine"),
        ("schedule_eps", 0.0),
        ("deprioritize_eos", 1),
        ("suppress_undrawable", None),
        ("batch_size", 0),
        ("seed", "7"),
        ("seed", 1 << 63),
        ("backend", "gpu"),
    ],
)
def test_bad_settings_are_refused_by_name_and_value(name, value):
    with pytest.raises((ValueError, TypeError)) as error:
        GuidanceConfig(**{name: value})
    assert (
        name in str(error.value) and "expected" in str(error.value) and str(value).strip("()")[:3] in str(error.value)
    )


def test_unknown_setting_lists_the_known():
    with pytest.raises(TypeError, match="guidance_step'.*guidance_steps"):
        GuidanceConfig().replace(guidance_step=3)


def test_guided():
    assert GuidanceConfig().guided
    assert not GuidanceConfig(method="none").guided
    assert not GuidanceConfig(guidance_steps=0).guided


def test_json():
    content = GuidanceConfig(weight=ThresholdWeight(0.5, 1.0)).to_dict()
    assert json.loads(json.dumps(content))["weight"] == "ThresholdWeight(theta=0.5, width=1.0)"
    assert GuidanceConfig(weight="step(1)").to_dict()["weight"] == "step(1)"


def test_numpy_integers_are_integers():
    assert GuidanceConfig(seed=numpy.int64(3), num_samples=numpy.int32(2)).num_samples == 2


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("betas", 0.9),
        ("betas", (None, 0.9)),
        ("exact_savings", 3),
        ("exact_savings", [1, "idle_steps"]),
        ("alg", numpy.array([1, 2])),
        ("top_p", 10**400),
    ],
)
def test_values_of_another_kind_are_refused_in_the_settings_own_name(name, value):
    with pytest.raises((ValueError, TypeError), match=f"{name}=.*expected"):
        GuidanceConfig(**{name: value})
