"""The formula of a sample's cost, against torch's own count and against published dimensions."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import torch

from benchmarks.harness.models import Network, World, make_world
from benchmarks.harness.phases import FlopCounter
from entrgi.evaluate import analysis
from entrgi.evaluate.config import from_dict
from entrgi.evaluate.flops import Shape, block_count, sample_flops, total
from entrgi.evaluate.plan import _KNOWN, make_plan, matched_best_of
from entrgi_kernels import GuidedSampler, models
from entrgi_kernels.backends.ranges import listening
from entrgi_kernels.guidance import phases
from entrgi_kernels.guidance.config import GuidanceConfig
from entrgi_kernels.text.template import conversation_from, encode_prompt

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
    first = cost(method="first_order")
    assert cost(method="none") < first < cost(guidance_steps=1) and first == cost(
        method="first_order", guidance_steps=5
    )
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
@pytest.mark.parametrize(
    "settings",
    [
        {"method": "none"},
        {"guidance_steps": 2, "steps": 8},
        {"method": "first_order"},
        {"method": "none", "search": "smc", "search_every": 3},
        {"method": "none", "search": "smc", "self_rewarding": True},
        {"guidance_steps": 2, "steps": 8, "search": "svdd", "candidates": 3},
    ],
)
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
    expected = config.num_samples * (parts["model"] + parts["reward"] + parts["search"] + parts["scoring"])
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.05)


@pytest.fixture(scope="module")
def world() -> World:
    nets = {"diffusion": Network.plain(64, 2), "reward": Network(32, 3, 48, 2, 1, 16)}
    made = make_world(v=401, **nets, dtype=torch.float64)
    made.model.lm_head.weight[made.tokenizer.eos_token_id] = 0  # next to never drawn: an early end is cheaper
    return made


def _counted(
    world: World,
    blocks: int | None,
    settings: dict,
    prompts: int = 1,
    planned: bool = True,
    words: tuple[int, ...] = (11,),
    mean_alone: bool = False,
) -> tuple[dict[str, float], dict[str, float]]:
    """FLOPs by part of some prompts' samples: counted, and by the formula, as planned or as it was run.

    Each of `words` is a prompt, `prompts` times; with `mean_alone` the formula is told of no more than their mean.
    """
    mask = world.tokenizer.mask_token_id
    model = models.MaskedDiffusion(world.model, mask)
    if blocks is not None:
        model = models.BlockCausal(world.model, mask, blocks)
    chosen = {"num_samples": 3, "max_new_tokens": 24, "steps": 12, "guidance_steps": 2, "backend": "eager", **settings}
    chosen["exact_savings"] = tuple(FIXED - chosen.pop("less", set()) | chosen.pop("more", set()))
    sampler = GuidedSampler(model, world.reward_model, world.tokenizer, world.reward_tokenizer, **chosen)
    given = [" ".join(f"w{number + 1}" for number in range(count)) for count in words] * prompts
    if not planned:  # short runs: what a first call finds out about the reward would show
        sampler.generate(given[:1], progress=False, max_new_tokens=blocks or 4, steps=1)
    with (counter := FlopCounter()), listening(counter):
        results = sampler.generate(given, progress=False)
    ended = [world.tokenizer.eos_token_id in sample.tokens for result in results for sample in result.samples]
    assert planned != any(ended) or "threshold" in settings or len(words) > 1
    shapes = [Shape.from_config(net.config.to_dict()) for net in (world.model, world.reward_model)]
    if blocks is not None:
        shapes[0] = Shape.from_config({**world.model.config.to_dict(), "block_length": blocks})
    lengths = [len(encode_prompt(world.tokenizer, conversation_from(prompt))) for prompt in given]
    batch = {"prompts": len(given), **sampler.stats.to_dict()}
    work = None if planned else analysis._work(sampler.config, [batch])
    parts = sample_flops(*shapes, sampler.config, sum(lengths) / len(lengths) if mean_alone else lengths, work)
    found = {
        "model": counter.by_phase[phases.MODEL],
        "reward": counter.by_phase[phases.REWARD] + counter.by_phase[phases.REWARD_BACKWARD],
        "vocabulary": counter.by_phase[phases.EMBED] + counter.by_phase[phases.UPDATE],
    }
    return found, {name: len(given) * sampler.config.num_samples * parts[name] for name in found}


# The savings that the formula counts: those that do not depend on the text.
FIXED = {"idle_steps", "shared_forward", "committed_rows", "adam_state", "reward_prefix", "reward_last_layer"}
BY_BLOCKS = [
    (None, {"block_length": 8}),
    (None, {"block_length": 8, "num_samples": 1, "alg": "maskgit_plus"}),
    (None, {"block_length": 8, "model_cache": "prefix"}),
    (None, {"block_length": 8, "model_cache": "dual", "num_samples": 1}),
    (None, {"block_length": 8, "cfg_scale": 0.5}),
    (None, {"model_cache": "dual"}),
    (8, {}),
    (4, {"num_samples": 1, "steps": 24}),
    (8, {"cfg_scale": 0.5, "schedule": "even"}),
]


@pytest.mark.parametrize(("blocks", "settings"), BY_BLOCKS, ids=str)
def test_the_formula_by_blocks_against_torch(world, blocks, settings) -> None:
    found, expected = _counted(world, blocks, settings)
    for name, flops in expected.items():
        assert found[name] == pytest.approx(flops, rel=0.05), name


@pytest.fixture
def ending(world: World) -> Iterator[World]:
    """The same, with texts that end early now and then."""
    head, eos = world.model.lm_head.weight, world.tokenizer.eos_token_id
    head[eos] = 1.8 * head[60]
    yield world
    head[eos] = 0


@pytest.mark.parametrize("blocks", [None, 4])
@pytest.mark.parametrize(
    "settings",
    [
        {"method": "none"},
        {},
        {"search": "svdd", "candidates": 3},
        {"search": "svdd", "candidates": 3, "method": "none"},
        {"search": "smc", "search_every": 2},
        {"threshold": 0.004, "alg": "maskgit_plus"},
        {"threshold": 0.008, "alg": "maskgit_plus"},
    ],
    ids=str,
)
def test_texts_that_end_early_are_counted_as_they_were_run(ending, blocks, settings) -> None:
    chosen = {"block_length": 4, "deprioritize_eos": False, "temperature": 1.0, "top_p": None, "steps": 24, **settings}
    if "search" in settings:  # which waits for the device before it knows what is committed
        chosen["less"] = {"committed_rows"}
    found, expected = _counted(ending, blocks, {"num_samples": 2, **chosen}, prompts=3, planned=False)
    for name, flops in expected.items():
        assert found[name] == pytest.approx(flops, rel=0.05), name


@pytest.mark.parametrize("planned", [True, False], ids=["planned", "run"])
@pytest.mark.parametrize("blocks", [4, 8])
@pytest.mark.parametrize("words", [(9, 10, 11, 12), (8, 9, 10, 11), (10, 11, 12, 13)], ids=str)
def test_prompts_that_end_anywhere_in_a_block(world, blocks, words, planned) -> None:
    """Their responses share a batch and begin at different places in a block: there is one block more."""
    settings = {"num_samples": 2, "steps": 24, "batch_size": 16}
    found, expected = _counted(world, blocks, settings, planned=planned, words=words)
    for name, flops in expected.items():
        assert found[name] == pytest.approx(flops, rel=0.05), name
    assert found["vocabulary"] == pytest.approx(expected["vocabulary"], rel=1e-6)
    if not planned:  # as results of before the lengths were written down
        found, expected = _counted(world, blocks, settings, planned=False, words=words, mean_alone=True)
        for name, flops in expected.items():
            assert found[name] == pytest.approx(flops, rel=0.05), name


@pytest.mark.parametrize("search", ["best", "smc"])
def test_such_prompts_texts_end_early_too(ending, search) -> None:
    settings = {"block_length": 4, "deprioritize_eos": False, "temperature": 1.0, "top_p": None, "steps": 24}
    settings |= {"search": search, "search_every": 2, "num_samples": 2, "batch_size": 16}
    settings["less"] = {"committed_rows"} if search == "smc" else set()
    found, expected = _counted(ending, 4, settings, prompts=2, planned=False, words=(8, 9, 10, 11))
    for name, flops in expected.items():
        assert found[name] == pytest.approx(flops, rel=0.05), name


def test_blocks_that_nothing_tells_of_are_refused(world) -> None:
    """As of a model whose block length is in its code alone."""
    shapes = [Shape.from_config(net.config.to_dict()) for net in (world.model, world.reward_model)]
    config = GuidanceConfig(max_new_tokens=24, steps=24)
    assert block_count(shapes[0], config, 16) == 1
    with pytest.raises(ValueError, match="work of 3 blocks: expected at most 1"):
        sample_flops(*shapes, config, 16, [(1, 8, 36)] * 3)


@pytest.mark.parametrize("blocks", [None, 8])
def test_the_reward_runs_finished_blocks_once(world, blocks) -> None:
    settings = {"block_length": 8, "max_new_tokens": 40, "steps": 20, "guidance_steps": 1, "more": {"reward_committed"}}
    found, expected = _counted(world, blocks, settings)
    assert 0.8 * expected["reward"] < found["reward"] < 1.01 * expected["reward"]
    whole, _ = _counted(world, blocks, {**settings, "more": set()})
    assert found["reward"] < 0.6 * whole["reward"]


def test_block_lengths_and_shifts_are_read_off_configurations() -> None:
    base = {"num_hidden_layers": 2, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "vocab_size": 9}

    def read(**more) -> tuple[int | None, bool]:
        shape = Shape.from_config({**base, **more})
        return shape.block_length, shape.shift

    assert read(block_size=64) == (None, False)  # nanoGPT calls its positions so
    assert read(block_size=4, auto_map={}) == (4, False) and read(block_length=32) == (32, False)
    assert read(entrgi={"block_length": 8, "shift": True}, block_length=4) == (8, True)
    assert read(model_type="Dream") == (None, True)
