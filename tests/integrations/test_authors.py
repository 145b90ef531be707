"""The published script and training sampler: their own code where given, an eager loop of their interface elsewhere."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import entrgi_kernels

EXAMPLES = Path(__file__).parents[2] / "examples" / "integrations"
PROMPTS = ["Why?", "A longer question?"]


@pytest.fixture(params=["stand-in", "real"])
def script(request, monkeypatch):
    """The script as a module."""
    if request.param == "real":
        folder = request.getfixturevalue("integration_code")("entrgi", "main_expts")
        monkeypatch.syspath_prepend(str(folder))
        load = request.getfixturevalue("load_code")
        try:
            return load(folder / "entrgi.py", "published_script")
        finally:
            sys.modules.pop("utils", None)
    return request.getfixturevalue("load_code")(EXAMPLES / "standin_script.py", "standin_script")


@pytest.mark.parametrize("method", ["entrgi", "aps", "expectation"])
def test_the_script_token_for_token(script, make_network, reward, tokenizer, method):
    model, reward = make_network(in_place=False).double(), reward.double()
    for parameter in reward.parameters():
        parameter.requires_grad_(False)
    cfg = SimpleNamespace(
        K=2, T=6, M=3, eta=0.7, max_new_tokens=6, temperature=0.8, top_p=0.95, top_k=1, alg="entropy", alg_temp=None,
        deprioritize_eos=False, use_entrgi=method == "entrgi", use_aps=method == "aps", device=torch.device("cpu"),
    )  # fmt: skip
    ids = dict(mask_id=tokenizer.mask_token_id, eos_id=tokenizer.eos_token_id, pad_id=tokenizer.pad_token_id)
    mapping = torch.arange(len(tokenizer))
    mapped = reward.get_input_embeddings().weight.detach()

    def run():
        results = script.generate(model, tokenizer, reward, tokenizer, mapping, mapped, PROMPTS, cfg, ids)
        return [result["all_responses"] for result in results]

    own = script.optimize_logits
    theirs = run()
    assert entrgi_kernels.guide(script, seed=0) is script
    assert script.optimize_logits is not own
    assert run() == theirs
    assert script.entrgi.stats.reward_evaluations == 3 * script.entrgi.stats.steps > 0
    with pytest.raises(ValueError, match="guided already"):
        entrgi_kernels.guide(script)
    with script.entrgi.paused():
        assert run() == theirs
    script.entrgi.remove()
    assert script.optimize_logits is own and "entrgi" not in vars(script)


def test_what_the_replacement_returns(script, load_code, reward, tokenizer):
    """Element by element, prompts with a mask token and rows that are done included."""
    reward = reward.double()
    for parameter in reward.parameters():
        parameter.requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    size, start, slots = len(tokenizer), 5, 7
    tokens = torch.randint(0, 200, (4, start + slots), generator=generator)
    masked = torch.zeros(4, start + slots, dtype=torch.bool)
    masked[:, start:] = torch.rand(4, slots, generator=generator) < 0.6
    masked[1] = False
    tokens[2, start + 2] = tokenizer.eos_token_id
    masked[2, start + 2] = False
    logits = 3 * torch.randn(4, start + slots, size, generator=generator, dtype=torch.float64)
    cfg = SimpleNamespace(
        M=3, eta=0.5, temperature=0.7, top_p=1.0, top_k=1, use_entrgi=True, use_aps=False, max_new_tokens=slots
    )
    mapped = reward.get_input_embeddings().weight.detach()
    standin = load_code(EXAMPLES / "standin_script.py", "standin_script")
    caches = [standin.reward_cache(reward, tokenizer, prompt) for prompt in PROMPTS]
    arguments = (
        logits, list(masked), tokens, start, torch.zeros(4), 2, 2, reward, caches, torch.arange(size), mapped,
        reward.get_input_embeddings(), tokenizer.eos_token_id, tokenizer.pad_token_id, cfg,
    )  # fmt: skip
    theirs = script.optimize_logits(*arguments)
    with entrgi_kernels.guide(script).entrgi:
        ours = script.optimize_logits(*arguments)
        with torch.inference_mode():
            again = script.optimize_logits(*arguments)
        nothing = script.optimize_logits(logits, [row & False for row in masked], *arguments[2:])
    assert torch.equal(ours[1], theirs[1]) and torch.equal(again[0], ours[0])
    moved = (theirs[0] - theirs[1]).abs()
    assert moved.max() > 0.3
    # Adam's first step is a sign: where a gradient is next to nothing it may fall either way.
    assert ((ours[0] - theirs[0]).abs() > 1e-4).double().mean() < 1e-3
    assert nothing == (None, None)


@pytest.fixture(params=["stand-in", "real"])
def training(request, monkeypatch, make_network, reward, tokenizer):
    """(training sampler, class of its settings)."""
    model = make_network(in_place=False).double()
    reward = reward.double()
    for parameter in reward.parameters():
        parameter.requires_grad_(False)
    parts = dict(
        model=model,
        tokenizer=tokenizer,
        reward_model=reward,
        reward_tokenizer=tokenizer,
        token_mapping=torch.arange(len(tokenizer)),
        mapped_embeds=reward.get_input_embeddings().weight.detach(),
    )
    if request.param == "real":
        load = request.getfixturevalue("dllm_code")
        sampler, schedulers = load("entrgi-rgrl", "dllm.pipelines.rl.rgrl.sampler", "dllm.core.schedulers")
        return sampler.RgrlDreamSampler(
            scheduler=schedulers.LinearAlphaScheduler(), **parts
        ), sampler.RgrlDreamSamplerConfig
    monkeypatch.syspath_prepend(str(EXAMPLES))
    standin = request.getfixturevalue("load_code")(EXAMPLES / "standin_training.py", "standin_training")
    return standin.Sampler(**parts), standin.SamplerConfig


@pytest.mark.parametrize("settings", [{}, {"guidance_type": "aps", "alg": "maskgit_plus"}, {"steps": 11, "M": 1}])
def test_the_training_sampler_token_for_token(training, tokenizer, settings, monkeypatch):
    # One token left by the filter makes draws certain and all confidences equal: ties go by position, as ours do.
    topk = torch.topk

    def stable_topk(x, k, *args, **kwargs):
        if x.dim() != 1:
            return topk(x, k, *args, **kwargs)
        order = x.argsort(descending=True, stable=True)[: int(k)]
        return x[order], order

    monkeypatch.setattr(torch, "topk", stable_topk)
    sampler, kind = training
    config = kind(
        **{
            **dict(M=2, eta=0.6, num_generations=2, max_new_tokens=6, steps=6, temperature=0.8, top_k=1, alg="entropy"),
            **settings,
        }
    )
    turns = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]
    encoded = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]
    inputs = [torch.tensor(ids) for ids in encoded for _ in range(2)]
    theirs = sampler.sample(inputs, config)
    before = dict(vars(sampler))
    entrgi_kernels.guide(sampler, seed=0)
    ours = sampler.sample(inputs, config)
    assert torch.equal(ours, theirs)
    assert len(sampler.entrgi.rewards) == 4 and 0 < sampler._last_entropy_weight_mean <= 1
    with pytest.raises(ValueError, match="stochastic_transfer"):
        sampler.sample(inputs, config, stochastic_transfer=True)
    sampler.entrgi.remove()
    assert vars(sampler).keys() - {"_last_entropy_weight_mean"} == before.keys() - {"_last_entropy_weight_mean"}
    assert torch.equal(sampler.sample(inputs, config), theirs)


@pytest.mark.parametrize("alg", ["origin", "entropy"])
def test_the_training_sampler_leaves_no_mask_token(training, tokenizer, alg):
    """Fewer slots than steps, and a model that would rather draw the mask token than any other."""
    sampler, kind = training
    mask = tokenizer.mask_token_id
    with torch.no_grad():
        sampler.model.lm_head.weight[mask] = 0
        sampler.model.lm_head.weight /= 100
        sampler.model.lm_head.bias = torch.nn.Parameter(torch.zeros(len(tokenizer), dtype=torch.float64))
        sampler.model.lm_head.bias[mask] = 6
    ids = tokenizer.apply_chat_template([{"role": "user", "content": "Why?"}], add_generation_prompt=True)
    inputs = [torch.tensor(ids if isinstance(ids, list) else ids["input_ids"])] * 2
    entrgi_kernels.guide(sampler, seed=0)
    config = kind(M=1, num_generations=2, max_new_tokens=8, steps=19, temperature=1.0, alg=alg)
    assert not (sampler.sample(inputs, config)[:, len(inputs[0]) :] == mask).any()
