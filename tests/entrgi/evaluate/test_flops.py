"""The formula of a sample's cost, against torch's own count and against published dimensions."""

from __future__ import annotations

import json

import pytest

from entrgi.evaluate.config import from_dict
from entrgi.evaluate.flops import Shape, sample_flops, total
from entrgi.evaluate.plan import _KNOWN, make_plan, matched_best_of
from entrgi_kernels.guidance.config import GuidanceConfig

DREAM, SKYWORK = "Dream-org/Dream-v0-Instruct-7B", "Skywork/Skywork-Reward-V2-Qwen3-1.7B"


def test_parameters_of_published_models() -> None:
    assert Shape.from_config(_KNOWN[DREAM]).parameters(head=True) == pytest.approx(7.6e9, rel=0.01)
    sizes = {
        name: Shape.from_config(config).parameters(head=False) for name, config in _KNOWN.items() if "Qwen3" in name
    }
    for name, size in sizes.items():
        stated = {"0.6B": 0.6e9, "1.7B": 1.72e9, "4B": 4.02e9}[name.rsplit("-", 1)[1]]
        assert size == pytest.approx(stated, rel=0.01)


def test_the_published_batch_costs_what_the_design_says() -> None:
    """16 trajectories at the published settings: between 11 and 14 PFLOP with the savings that are exact."""
    model, reward = (Shape.from_config(_KNOWN[name]) for name in (DREAM, SKYWORK))
    parts = sample_flops(model, reward, GuidanceConfig(), prompt_tokens=128)
    assert 11e15 < 16 * total(parts) < 14e15
    assert 0.5 < parts["model"] / total(parts) < 0.8 and 0.2 < parts["reward"] / total(parts) < 0.4


def test_what_makes_a_sample_dearer() -> None:
    model, reward = (Shape.from_config(_KNOWN[name]) for name in (DREAM, SKYWORK))

    def cost(**settings) -> float:
        return total(sample_flops(model, reward, GuidanceConfig(**settings), 100))

    base = cost()
    assert cost(method="none") < cost(guidance_steps=1) < base < cost(guidance_steps=5)
    assert cost(steps=64) < base and cost(max_new_tokens=64) < base
    assert cost(method="none", guidance_steps=9) == cost(method="none") == cost(guidance_steps=0)
    # With twice as many steps as slots half of them commit nothing and are skipped.
    assert cost(max_new_tokens=32, steps=64) < 1.3 * cost(max_new_tokens=32, steps=32)


def test_best_of_n_is_raised_to_the_dearest_method() -> None:
    config = from_dict({"best_of": "auto", "methods": ["none", "entrgi", {"method": "entrgi", "guidance_steps": 6}]})
    plan = make_plan(config)
    (cell,) = [cell for cell in plan.cells if not cell.config.guided]
    dearest = max(plan.cells, key=lambda c: c.config.guidance_steps)
    shapes = [Shape(**plan.shapes[key]) for key in ("model:tiny", "reward:tiny")]
    length = sum(len(item.prompt) / 4 + 10 for item in plan.prompts["tiny", 0]) / 24
    one, guided = (total(sample_flops(*shapes, c.config, length)) for c in (cell, dearest))
    assert 0.9 < cell.config.num_samples * one / (4 * guided) < 1.15
    assert cell.config.num_samples == matched_best_of(config, plan.prompts, plan.shapes)


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"method": "none"}, {"guidance_steps": 2, "steps": 8}])
def test_the_formula_against_torch(tiny_weights, settings) -> None:
    """torch.utils.flop_counter sees the models' products (not those inside the project's own operators)."""
    from torch.utils.flop_counter import FlopCounterMode

    from entrgi import tiny
    from entrgi_kernels import GuidedSampler

    paths = {role: tiny.weights_path(name) for role, name in (("model", "diffusion"), ("reward", "reward"))}
    model, reward = (
        Shape.from_config(json.loads((paths[role] / "config.json").read_text())) for role in ("model", "reward")
    )
    # The savings that the formula counts: those that do not depend on the text.
    fixed = ("idle_steps", "shared_forward", "committed_rows", "adam_state", "reward_prefix", "reward_last_layer")
    config = GuidanceConfig(**{"max_new_tokens": 24, "steps": 16, "exact_savings": fixed, **settings})
    (diffusion, tokenizer), (classifier, reward_tokenizer) = tiny.load_diffusion(), tiny.load_reward()
    sampler = GuidedSampler(diffusion, classifier, tokenizer, reward_tokenizer)
    prompt = "What did you think of the soup?"
    chosen = {name: getattr(config, name) for name in config.to_dict()}
    sampler.generate([prompt], progress=False, **chosen)  # finds out, once, which savings the reward can be served with
    with FlopCounterMode(display=False) as counter:
        sampler.generate([prompt], progress=False, **chosen)
    from entrgi_kernels.text.template import conversation_from, encode_prompt

    length = len(encode_prompt(tokenizer, conversation_from(prompt)))
    parts = sample_flops(model, reward, config, length)
    expected = config.num_samples * (parts["model"] + parts["reward"] + parts["scoring"])
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.05)
