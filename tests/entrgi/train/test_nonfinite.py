"""Rewards, losses and gradients that are no finite number: no parameter takes part in them."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from train_cases import PROMPTS, parameters, spoil_gradient, spoil_rewards

from entrgi.train import objectives, records
from entrgi.train.plot import curve

NAN = math.nan


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_the_objectives_leave_out_what_has_no_reward(bad):
    rewards = torch.tensor([bad, 1.0, 3.0, 2.0, 2.0, 5.0], dtype=torch.float64)
    for weighting, expected in {
        "uniform": [0.5, 0.5],
        "best": [0.0, 1.0],
        "softmax": [1 / (1 + math.exp(20)), 1 / (1 + math.exp(-20))],
    }.items():
        weights = objectives.row_weights(rewards, 3, weighting)
        assert weights[0] == 0 and weights[1:3].tolist() == pytest.approx(expected)
        assert torch.equal(weights[3:], objectives.row_weights(rewards[3:], 3, weighting))
    assert objectives.advantages(rewards, 3).tolist() == [0, -1, 1, -1, -1, 2]
    scaled = objectives.advantages(rewards, 3, scale=True)
    assert scaled[:3].tolist() == pytest.approx([0, -1 / (math.sqrt(2) + 1e-4), 1 / (math.sqrt(2) + 1e-4)])
    mean, deviation, best = objectives.group_statistics(rewards, 3)
    assert mean.tolist() == [2, 3] and deviation.tolist() == pytest.approx([math.sqrt(2), math.sqrt(3)])
    assert best.tolist() == [3, 5]


def test_a_prompt_without_any_reward_counts_for_nothing():
    rewards = torch.tensor([NAN, math.inf, 1.0, 1.0])
    for weighting in objectives.WEIGHTINGS:
        assert objectives.row_weights(rewards, 2, weighting)[:2].tolist() == [0, 0]
    for scale in (False, True):  # nor does a group without a deviation
        assert objectives.advantages(rewards, 2, scale).tolist() == [0, 0, 0, 0]


def runs(trainer) -> dict[int, dict]:
    trainer.train()
    assert all(value.isfinite().all() for value in parameters(trainer).values())
    return {r["step"]: r for r in records.read(trainer.args.output_dir, records.LOG) if "reward" in r}


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "diffu-grpo", "beta": 0.3, "num_iterations": 1},
        {"method": "diffu-grpo", "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2},
        {"method": "rgrl-entrgi", "weighting": "softmax"},
    ],
    ids=lambda changes: "-".join(map(str, changes.values())),
)
@pytest.mark.parametrize("places", [[1], [0, 1]], ids=["one", "a-prompt"])
def test_a_step_leaves_out_completions_without_a_reward(trainer_of, caplog, changes, places):
    trainer = trainer_of(**{"max_steps": 2, "num_iterations": 1, **changes})
    spoil_rewards(trainer, places)
    with caplog.at_level(logging.WARNING, "entrgi_kernels"):
        log = runs(trainer)
    assert log[2]["reward_missing"] == len(places) and "reward_missing" not in log[1]
    assert all(isinstance(log[2][name], float) for name in ("reward", "reward_std", "reward_best", "loss"))
    (message,) = [r.getMessage() for r in caplog.records if r.name == "entrgi_kernels"]
    assert "nan for sample 1 of prompt" in message and any(f"{p!r:.60}"[:60] in message for p in PROMPTS)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_rewards, "step 2: no completion has a finite reward"),
        (spoil_gradient, "the gradient of step 2 is NaN or infinite, its loss is finite"),
    ],
)
@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
def test_what_would_spoil_the_parameters_is_refused_before_the_step(trainer_of, spoil, message, max_grad_norm):
    trainer = trainer_of(method="diffu-grpo", max_steps=3, num_iterations=1, max_grad_norm=max_grad_norm)
    before = []
    spoil(trainer)
    step = trainer.training_step
    trainer.training_step = lambda *args, **kwargs: (before.append(parameters(trainer)), step(*args, **kwargs))[1]
    with pytest.raises(ArithmeticError, match=message):
        trainer.train()
    assert trainer.state.global_step == 1
    after = parameters(trainer)
    if spoil is spoil_gradient:
        assert all(torch.equal(before[-1][name], after[name]) for name in after)
    assert all(value.isfinite().all() for value in after.values())


@pytest.mark.parametrize("method", ["diffu-grpo", "rgrl-entrgi"])
def test_a_loss_that_is_not_finite_names_the_prompt(trainer_of, method):
    trainer = trainer_of(method=method, max_steps=1, num_iterations=1)
    before, log_probs = parameters(trainer), trainer.log_probs

    def spoiled(*args):
        found = log_probs(*args)
        return found.index_fill(0, torch.tensor([2]), -math.inf) if found.requires_grad else found

    trainer.log_probs = spoiled
    with pytest.raises(
        ArithmeticError, match="loss of step 1.*policy's log-probabilities of a completion of '"
    ) as error:
        trainer.train()
    after = parameters(trainer)
    assert "no parameter" in str(error.value) and all(torch.equal(before[name], after[name]) for name in after)


def test_held_out_prompts_without_a_reward(trainer_of, tmp_path):
    trainer = trainer_of(eval_samples=2)
    spoil_rewards(trainer, [1, 2, 3], step=0)  # half of the first prompt's, all of the second's
    metrics = trainer.evaluate()
    (record,) = records.read(trainer.args.output_dir, records.EVALUATIONS)
    assert metrics["eval_reward_missing"] == 3 and record["reward"][1] is None
    given = [value for value in record["reward"] if value is not None]
    assert len(given) == 3 and metrics["eval_reward"] == pytest.approx(sum(given) / 3)
    assert curve(trainer.args.output_dir, "reward")[2] == [pytest.approx(metrics["eval_reward"])]
