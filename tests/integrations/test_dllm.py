"""dllm's samplers: their own code where given, a stand-in of their interface elsewhere."""

from __future__ import annotations

import pytest
import torch

import entrgi_kernels

SETTINGS = dict(learning_rate=5.0, temperature=1.0, top_p=None, seed=3)
REAL = {
    "MDLM": ("dllm.core.samplers.mdlm", "MDLMSampler", dict(steps=8, max_new_tokens=8, block_size=4, temperature=0.8)),
    "MDLM cfg": (
        "dllm.core.samplers.mdlm",
        "MDLMSampler",
        dict(steps=8, max_new_tokens=8, block_size=8, temperature=0.8, cfg_scale=0.5),
    ),
    "Dream": (
        "dllm.pipelines.dream.sampler",
        "DreamSampler",
        dict(steps=8, max_new_tokens=8, temperature=0.8, alg="maskgit_plus", top_k=50),
    ),
    "LLaDA2": (
        "dllm.pipelines.llada2.sampler",
        "LLaDA2Sampler",
        dict(max_new_tokens=8, block_size=8, steps_per_block=8, temperature=0.8),
    ),
    "LLaDA2.1": (
        "dllm.pipelines.llada21.sampler",
        "LLaDA21Sampler",
        dict(max_new_tokens=8, block_size=8, temperature=0.8, max_post_steps=2, editing_threshold=0.5),
    ),
}


@pytest.fixture(params=["stand-in", *REAL])
def sampling(request, make_network, tokenizer, standins):
    """(make a sampler, arguments of its sample, inputs)."""
    turns = [[{"role": "user", "content": text}] for text in ("Why?", "A longer question?")]
    inputs = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)["input_ids"]
    if request.param == "stand-in":
        kind, arguments, in_place = standins.Sampler, dict(steps=8, max_new_tokens=8, temperature=0.8), True
    else:
        module, name, arguments = REAL[request.param]
        code, schedulers = request.getfixturevalue("dllm_code")("dllm", module, "dllm.core.schedulers")
        kind, in_place = getattr(code, name), request.param != "Dream"
    if request.param == "LLaDA2":
        inputs = [ids[:17] for ids in inputs]  # it takes equal lengths
    elif request.param == "LLaDA2.1":
        inputs = inputs[:1]
    return lambda: kind(make_network(in_place), tokenizer), arguments, inputs


def test_samplers_are_guided_and_given_back(sampling, reward, tokenizer):
    make, arguments, inputs = sampling
    never, sampler = make(), make()

    def call(which, seed=0):
        torch.manual_seed(seed)
        return which.sample(inputs, **arguments)

    plain, before = call(never), dict(vars(sampler))
    assert entrgi_kernels.guide(sampler, reward, reward_tokenizer=tokenizer, **SETTINGS) is sampler
    handle = sampler.entrgi
    guided = call(sampler)
    assert handle.integration == "dllm" and len(handle.rewards) == len(inputs) and handle.stats.reward_evaluations > 0
    assert not (guided == tokenizer.mask_token_id)[:, : plain.shape[1]].any()
    assert torch.equal(call(sampler), guided)
    assert not sampler.model._forward_hooks  # the model is guided through this sampler alone
    up = base = 0.0
    for seed in range(4):
        call(sampler, seed)
        up += sum(handle.rewards)
        base += sum(handle.score(call(never, seed)))
    assert up > base
    with handle.paused():
        assert torch.equal(call(sampler), plain)
    handle.remove()
    assert torch.equal(call(sampler), plain) and vars(sampler).keys() == before.keys()


def test_a_sampler_with_a_cache_is_refused(make_network, standins, reward, tokenizer):
    class Cached(standins.Sampler):
        def sample(self, inputs, config=None, **kwargs):
            ids = torch.full((1, 4), tokenizer.mask_token_id)
            return self.model(ids, past_key_values=((torch.zeros(1),),)).logits

    model = make_network()
    own = model.forward
    model.forward = lambda input_ids, past_key_values=None: own(input_ids)
    sampler = entrgi_kernels.guide(Cached(model, tokenizer), reward, reward_tokenizer=tokenizer)
    with pytest.raises(ValueError, match="cache"):
        sampler.sample([[1, 2, 3]])
    assert not model._forward_hooks
    with pytest.raises(ValueError, match="guided already, through Cached"):
        entrgi_kernels.guide(Cached(model, tokenizer), reward, reward_tokenizer=tokenizer)
