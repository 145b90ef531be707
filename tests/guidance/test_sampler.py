"""Guided generation end to end on small random models."""

from __future__ import annotations

import copy
import itertools
import json
import math
import re

import pytest
import torch

from entrgi_kernels import guide, rewards
from entrgi_kernels.guidance import GuidanceConfig, GuidedSampler, NonFiniteLogitsError
from entrgi_kernels.names import ALGS, SCHEDULES

SHORT = dict(num_samples=2, max_new_tokens=6, steps=4, temperature=0.9, top_p=0.95, seed=3)


@pytest.fixture
def sampler(diffusion, reward, tokenizer) -> GuidedSampler:
    return GuidedSampler(diffusion, reward, tokenizer, shift=True)


def tokens_of(results):
    return [[sample.tokens for sample in result.samples] for result in results]


def test_shapes_texts_and_rewards(sampler, tokenizer):
    results = sampler.generate(["Why?", "A longer question, please."], **SHORT)
    assert len(results) == 2
    for result in results:
        assert len(result.samples) == 2 == len(result.rewards)
        assert result.best.reward == max(result.rewards) == result.top1
        assert result.mean == pytest.approx(sum(result.rewards) / 2)
        for sample in result.samples:
            assert len(sample.tokens) == 6 and tokenizer.mask_token_id not in sample.tokens
            assert sample.trace is None and math.isfinite(sample.reward)
    assert json.loads(results[0].to_json())["config"]["steps"] == 4
    assert sampler.stats.steps == sampler.stats.model_forwards == 4
    assert sampler.stats.reward_evaluations == 12 and 0 < sampler.stats.mean_weight < 1


def test_reward_is_that_of_the_text_scored_on_its_own(sampler):
    (result,) = sampler.generate(["Why?"], **SHORT)
    texts = [sample.text for sample in result.samples]
    alone = [sampler.reward.score_texts([[{"role": "user", "content": "Why?"}]], [text])[0] for text in texts]
    assert result.rewards == pytest.approx(alone, abs=1e-4)


@pytest.mark.parametrize("method", ["entrgi", "aps", "expectation"])
def test_guidance_raises_the_reward(sampler, method):
    prompts = [f"Tell me about {i}." for i in range(6)]
    settings = dict(num_samples=4, max_new_tokens=8, steps=8, temperature=1.0, top_p=None, seed=1)
    base = sampler.generate(prompts, method="none", **settings)
    guided = sampler.generate(prompts, method=method, guidance_steps=3, learning_rate=2.0, **settings)
    mean = lambda results: sum(r.mean for r in results) / len(results)  # noqa: E731
    assert mean(guided) > mean(base)


def test_a_seed_reproduces_and_another_differs(sampler):
    one, two = (tokens_of(sampler.generate(["Why?"], **SHORT)) for _ in range(2))
    assert one == two
    assert tokens_of(sampler.generate(["Why?"], **{**SHORT, "seed": 4})) != one


def test_a_prompts_result_does_not_depend_on_its_batch(diffusion, reward, tokenizer):
    sampler = GuidedSampler(diffusion.double(), reward.double(), tokenizer, shift=True)
    prompts = ["Why?", "A much longer question than the other one.", "Why?", "Hm."]
    together = tokens_of(sampler.generate(prompts, **SHORT))
    apart = tokens_of(sampler.generate(prompts, **SHORT, batch_size=1))
    assert together == apart
    assert together[0] != together[2]  # a repeated prompt is another draw
    assert tokens_of(sampler.generate(["Hm."], **SHORT))[0] == together[3]


def test_samples_do_not_depend_on_their_number(diffusion, reward, tokenizer):
    sampler = GuidedSampler(diffusion.double(), reward.double(), tokenizer, shift=True)
    four = tokens_of(sampler.generate(["Why?"], **{**SHORT, "num_samples": 4}))[0]
    assert tokens_of(sampler.generate(["Why?"], **SHORT))[0] == four[:2]


@pytest.mark.parametrize(("alg", "schedule"), list(itertools.product(ALGS, SCHEDULES)))
def test_every_alg_and_schedule_fills_the_response(sampler, tokenizer, alg, schedule):
    for extra in (
        dict(confidence="guided", top_k=5),
        dict(alg_temp=0.5, steps=9),
        dict(temperature=0.0, top_p=None, steps=1),
        dict(deprioritize_eos=False, guidance_steps=1, state_dtype="float32"),
    ):
        (result,) = sampler.generate(["Why?"], alg=alg, schedule=schedule, **{**SHORT, **extra})
        assert all(tokenizer.mask_token_id not in sample.tokens for sample in result.samples)


def test_temperature_zero_is_deterministic_across_seeds(sampler):
    settings = {**SHORT, "temperature": 0.0, "method": "none"}
    assert tokens_of(sampler.generate(["Why?"], **settings)) == tokens_of(
        sampler.generate(["Why?"], **{**settings, "seed": 99})
    )


def test_float16_models_run_at_default_settings(make_diffusion, make_reward, tokenizer):
    models = make_diffusion(len(tokenizer), seed=0).half(), make_reward(len(tokenizer)).half()
    sampler = GuidedSampler(*models, tokenizer, shift=True)
    (result,) = sampler.generate(["Hm."], num_samples=2, max_new_tokens=12, steps=12)
    assert all(map(math.isfinite, result.rewards))


def test_steps_that_commit_nothing_change_nothing(sampler):
    # T above L: the published schedule then has steps without a commit.
    results = sampler.generate(["Why?"], **{**SHORT, "steps": 20}, trace=True)
    steps = [entry.step for entry in results[0].samples[0].trace]
    assert len(steps) < 20 and steps[-1] == 19
    assert sampler.stats.steps == len(steps) == sampler.stats.model_forwards


def test_trace_tells_the_whole_story(sampler, tokenizer):
    (result,) = sampler.generate(["Why?"], **SHORT, trace=True)
    mask = tokenizer.mask_token_id
    for sample in result.samples:
        open_slots = set(range(6))
        for entry in sample.trace:
            assert {i for i, h in enumerate(entry.entropy) if h is not None} == open_slots
            assert all(0 <= w <= 1 for w in entry.weight if w is not None)
            open_slots -= set(entry.committed)
            assert {i for i, token in enumerate(entry.tokens) if token == mask} == open_slots
            assert None not in (entry.reward_before, entry.reward_after) and math.isfinite(entry.reward)
        assert not open_slots and sample.trace[-1].tokens == sample.tokens
    json.dumps(result.to_dict())
    (base,) = sampler.generate(["Why?"], **SHORT, trace=True, method="none")
    entry = base.samples[0].trace[0]
    assert entry.reward_before is None and set(entry.weight) == {None} and math.isfinite(entry.reward)


def test_trace_changes_no_token(sampler):
    assert tokens_of(sampler.generate(["Why?"], **SHORT, trace=True)) == tokens_of(sampler.generate(["Why?"], **SHORT))


def test_deprioritized_eos_is_only_postponed(sampler, tokenizer, diffusion):
    with torch.no_grad():  # a network that wants nothing but EOS
        diffusion.lm_head.weight.zero_()
        bias = torch.zeros(len(tokenizer))
        bias[tokenizer.eos_token_id] = 50
        diffusion.lm_head.bias = torch.nn.Parameter(bias)
    (result,) = sampler.generate(["Why?"], **SHORT, method="none")
    assert all(set(sample.tokens) == {tokenizer.eos_token_id} for sample in result.samples)
    assert all(sample.text == "" for sample in result.samples)


def test_eos_commits_later_when_deprioritized(sampler, tokenizer, diffusion):
    with torch.no_grad():
        diffusion.lm_head.weight[tokenizer.eos_token_id] += 3
    settings = {**SHORT, "method": "none", "steps": 6, "num_samples": 8, "max_new_tokens": 12}

    def mean_rank(**changes):
        (result,) = sampler.generate(["Why?"], **{**settings, **changes}, trace=True)
        ranks = [
            entry.step
            for sample in result.samples
            for entry in sample.trace
            for slot in entry.committed
            if entry.tokens[slot] == tokenizer.eos_token_id
        ]
        return sum(ranks) / len(ranks)

    assert mean_rank(deprioritize_eos=True) > mean_rank(deprioritize_eos=False)


def test_a_padded_head_never_draws_ids_without_a_token(reward, tokenizer, padded_diffusion):
    sampler = GuidedSampler(padded_diffusion, reward, tokenizer, shift=True)
    results = sampler.generate(["Why?", "How?"], **{**SHORT, "temperature": 2.0, "top_p": None})
    drawn = {token for result in results for sample in result.samples for token in sample.tokens}
    assert max(drawn) < len(tokenizer) and tokenizer.mask_token_id not in drawn


def test_a_prompt_that_holds_the_mask_token_keeps_it(sampler, tokenizer):
    (result,) = sampler.generate(["a <|mask|> and <|im_end|> b"], **SHORT)
    assert all(tokenizer.mask_token_id not in sample.tokens for sample in result.samples)


def test_conversations_with_system_and_turns(sampler):
    conversation = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "And now?"},
    ]
    (result,) = sampler.generate([conversation], **SHORT)
    assert result.prompt == conversation


def test_models_keep_their_mode_and_gradients(sampler, diffusion, reward):
    diffusion.train()
    diffusion.model.layers[0].eval()
    reward.train()
    sampler.generate(["Why?"], **SHORT)
    assert diffusion.training and reward.training and not diffusion.model.layers[0].training
    assert all(p.grad is None and p.requires_grad for m in (diffusion, reward) for p in m.parameters())


def test_callers_under_inference_mode_are_served(sampler):
    expected = tokens_of(sampler.generate(["Why?"], **SHORT))
    with torch.inference_mode():
        assert tokens_of(sampler.generate(["Why?"], **SHORT)) == expected


def test_some_of_the_prompts_in_the_company_that_they_have_among_all(sampler, monkeypatch):
    """Who continues runs whole batches, and a repeated prompt keeps its number."""
    prompts = ["a", "b", "a", "b", "a"]
    whole = dict(sampler.stream(prompts, **SHORT, batch_size=2))
    seen, prepare = [], sampler.reward.prepare  # a reward prepares a batch's prompts
    monkeypatch.setattr(sampler.reward, "prepare", lambda turns: seen.append(len(turns)) or prepare(turns))
    some = dict(sampler.stream(prompts, **SHORT, batch_size=2, only=[2, 4]))
    assert sorted(some) == [2, 4] and seen == [2, 1]
    for index, result in some.items():
        assert tokens_of([result]) == tokens_of([whole[index]]) and result.rewards == whole[index].rewards
    assert not dict(sampler.stream(prompts, **SHORT, only=[]))


def test_prompts_of_different_seeds_share_a_batch(sampler):
    """What a prompt and its seed give alone they give in company, and equal ones give equal samples."""
    prompts, seeds = ["a", "b", "a", "a"], [7, 7, 8, 7]
    together = dict(sampler.stream(prompts, **SHORT, seeds=seeds))
    assert sampler.stats.steps <= SHORT["steps"], "one batch"
    for index, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
        ((_, alone),) = sampler.stream([prompt], **SHORT, seeds=[seed])
        assert tokens_of([alone]) == tokens_of([together[index]])
    assert tokens_of([together[0]]) == tokens_of([together[3]]) != tokens_of([together[2]])
    other = dict(sampler.stream(prompts, **{**SHORT, "seed": 1234}, seeds=seeds))
    assert tokens_of([other[0]]) != tokens_of([together[0]]), "beside the setting, not in its place"


@pytest.mark.parametrize(
    ("seeds", "said"), [([1], "1 seeds for 2 prompts"), ([1, 0.5], "seed=0.5"), ([1, 1 << 64], "seed=")]
)
def test_seeds_are_integers_one_a_prompt(sampler, seeds, said):
    with pytest.raises((TypeError, ValueError), match=said):
        next(sampler.stream(["a", "b"], **SHORT, seeds=seeds))


@pytest.mark.parametrize("trace", [False, True])
def test_a_watch_sees_every_step_of_every_batch(sampler, trace):
    seen = []

    def watch(progress):
        steps = None if progress.traces is None else [trace[-1].tokens for trace in progress.traces]
        seen.append((progress.prompts, progress.step, progress.responses.tolist(), steps))

    results = dict(sampler.stream(["a", "b", "c"], **SHORT, batch_size=2, trace=trace, watch=watch))
    k, mask = SHORT["num_samples"], sampler.model.mask_token_id
    assert [(prompts, step) for prompts, step, _, _ in seen] == [
        (prompts, step) for prompts in ((0, 1), (2,)) for step in range(SHORT["steps"])
    ]
    for prompts, step, responses, steps in seen:
        assert len(responses) == k * len(prompts)
        if step == SHORT["steps"] - 1:
            assert responses == [sample.tokens for index in prompts for sample in results[index].samples]
        assert (step < SHORT["steps"] - 1) == any(mask in response for response in responses)
        assert steps == (responses if trace else None)


def test_what_a_watch_raises_ends_the_run(sampler):
    class EnoughError(Exception):
        pass

    def watch(progress):
        if progress.step == 1:
            raise EnoughError

    with pytest.raises(EnoughError):
        list(sampler.stream(["a"], **SHORT, watch=watch))
    assert sampler.stats.steps == 2
    assert sampler.generate(["a"], **SHORT), "and the sampler serves on"


def test_callback_and_stream(sampler):
    seen = []
    sampler.generate(["a", "b", "c"], **SHORT, batch_size=2, callback=lambda i, r: seen.append((i, r.prompt)))
    assert seen == [(0, "a"), (1, "b"), (2, "c")]


@pytest.mark.parametrize(("savings", "sample"), [("none", 1), ("all", 0)])
@pytest.mark.parametrize("method", ["none", "entrgi"])
def test_nan_logits_name_step_prompt_and_sample(sampler, diffusion, savings, sample, method):
    def poison(module, arguments, output):
        output.logits.view(-1, output.logits.shape[-1])[-1] = math.nan  # one slot of the last trajectory of the batch
        return output

    handle = diffusion.register_forward_hook(poison)
    try:
        # With all savings on, the first forward is shared by the samples: all of them are hit, the first is named.
        named = f"step 0, sample {0 if method == 'entrgi' and savings == 'all' else sample} of prompt 'Why"
        with pytest.raises(NonFiniteLogitsError, match=named):
            sampler.generate(["Why?"], **{**SHORT, "steps": 2}, method=method, exact_savings=savings)
    finally:
        handle.remove()


@pytest.mark.parametrize(
    ("prompts", "message"),
    [([""], "empty"), ([3], "3|int"), ([[]], "empty|at least"), ([[{"role": "user"}]], "content")],
)
def test_bad_prompts_are_refused(sampler, prompts, message):
    with pytest.raises((ValueError, TypeError), match=message):
        sampler.generate(prompts, **SHORT)
    with pytest.raises(TypeError, match="prompts is NoneType"):
        sampler.generate(None, **SHORT)


def test_no_prompts_no_results(sampler):
    assert sampler.generate([], **SHORT) == []


def test_settings_are_checked_before_anything_runs(sampler):
    with pytest.raises(ValueError, match="top_p=1.5"):
        sampler.generate(["Why?"], top_p=1.5)
    with pytest.raises(TypeError, match="max_tokens"):
        sampler.generate(["Why?"], max_tokens=5)


def test_config_is_kept_with_the_result(sampler):
    (result,) = sampler.generate(["Why?"], **SHORT)
    assert result.config == GuidanceConfig(**SHORT)


def test_a_drawn_mask_token_stays_open_and_is_counted_again(sampler, tokenizer, diffusion):
    """The published behaviour where the mask token is not suppressed: the last step fills what is left."""
    with torch.no_grad():
        diffusion.lm_head.weight.zero_()
        diffusion.lm_head.bias = torch.nn.Parameter(torch.zeros(len(tokenizer)))
        diffusion.lm_head.bias[tokenizer.mask_token_id] = math.log(2 * len(tokenizer))
    settings = {**SHORT, "method": "none", "max_new_tokens": 12, "steps": 12, "top_p": None, "temperature": 1.0}
    (result,) = sampler.generate(["Why?"], **settings, suppress_undrawable=False, trace=True)
    for sample in result.samples:
        open_before_last = sample.trace[-2].tokens.count(tokenizer.mask_token_id)
        assert len(sample.trace[-1].committed) == open_before_last
    assert sum(len(entry.committed) for sample in result.samples for entry in sample.trace) > 24


@pytest.mark.parametrize("added", ["[PAD]", "<|marker|>", "word"])
@pytest.mark.parametrize("side", ["diffusion", "reward"])
def test_a_token_without_a_row_is_named_before_anything_runs(diffusion, reward, tokenizer, added, side):
    larger = copy.deepcopy(tokenizer)
    if added == "[PAD]":
        larger.add_special_tokens({"pad_token": added})
    else:
        larger.add_tokens([added], special_tokens=added != "word")
    message = re.escape(f"token {added!r} has id {len(tokenizer)}") + f".* the {side} .* has {len(tokenizer)} rows"
    pair = (larger, tokenizer) if side == "diffusion" else (tokenizer, larger)
    with pytest.raises(ValueError, match=message):
        GuidedSampler(diffusion, reward, *pair, shift=True)
    with pytest.raises(ValueError, match=message):
        guide(diffusion, reward, *pair, shift=True)
    assert not hasattr(diffusion, "entrgi")
    if side == "reward":
        with pytest.raises(ValueError, match=message):
            rewards.wrap(reward, larger)
        reward.resize_token_embeddings(len(larger))
        rewards.wrap(reward, larger)


def test_a_bad_prompt_is_named_before_the_first_batch(diffusion, reward, tokenizer, monkeypatch):
    strict = copy.deepcopy(tokenizer)
    strict.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        + tokenizer.chat_template
    )
    system = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Why?"}]
    one = rewards.wrap(reward, tokenizer)
    for judged, second, message in [
        (rewards.wrap(reward, strict), system, "the chat template refuses .*no system role"),
        (one + rewards.wrap(reward, strict), system, "the chat template refuses .*no system role"),
        (one, [*system, {"role": "assistant", "content": "So."}], "the prompt's last turn is the assistant's"),
        (one, "half \ud83d", r"the prompt has a lone surrogate, '\\ud83d', at character 5"),
        (one, [{"role": "user", "content": "\ud83d"}], "turn 0 of the prompt has a lone surrogate"),
    ]:
        sampler = GuidedSampler(diffusion, judged, tokenizer, shift=True)
        monkeypatch.setattr(sampler.model, "masked_logits", None)  # not reached
        with pytest.raises(ValueError, match=r"prompts\[1\]: " + message):
            sampler.generate(["Why?", second], batch_size=1, **SHORT)
        monkeypatch.undo()


def test_half_a_character_in_texts_to_score(reward, tokenizer):
    judged = rewards.wrap(reward, tokenizer)
    with pytest.raises(ValueError, match="a response has a lone surrogate"):
        judged.score_texts([[{"role": "user", "content": "Why?"}]], ["So \ud83d"])
    with pytest.raises(ValueError, match="user turn has a lone surrogate"):
        judged.score_texts([[{"role": "user", "content": "\ud83d"}]], ["So"])
