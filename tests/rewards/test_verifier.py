"""A function of the finished text as a reward: it ranks samples, and does not guide."""

from __future__ import annotations

import itertools
import logging
import math
import threading

import pytest
import torch

from entrgi import tiny
from entrgi_kernels import GuidedSampler, rewards
from entrgi_kernels.guidance.config import GuidanceConfig
from entrgi_kernels.integrations.steering import Steering
from entrgi_kernels.rewards import WeightedSum, verifier
from tests.rewards.moods import moody

HELLO = [{"role": "user", "content": "Hello"}]
SMALL = {"num_samples": 3, "max_new_tokens": 8, "steps": 4, "seed": 1}


def length(prompt: str, text: str) -> int:
    return len(text)


@pytest.fixture(scope="module")
def models():
    return tiny.load_diffusion(), tiny.load_reward()


def test_order_is_kept_whatever_the_workers():
    texts = ["x" * (i % 7) for i in range(23)]
    expected = [float(len(text)) for text in texts]
    gate = threading.Barrier(2)

    def late_first(prompt, text):
        if text in ("a", "b"):  # the first returns only once the second has begun
            gate.wait(5)
        return text == "a"

    assert verifier(late_first, workers=2).score_texts([HELLO] * 2, ["a", "b"]) == [1.0, 0.0]
    for workers in (1, 3, 50):
        assert verifier(length, workers=workers).score_texts([HELLO] * 23, texts) == expected
    assert verifier(length, timeout=None).score_texts([], []) == []
    prompts = [[{"role": "user", "content": "early"}, {"role": "user", "content": name}] for name in "ab"]
    assert verifier(lambda prompt, text: prompt + text == "bc").score_texts(prompts, ["c", "c"]) == [0.0, 1.0]


def test_what_fails_costs_one_text_its_reward(caplog):
    texts = ["abc", "nan", "yes", "exit", "none", "half", "text", "hang", "exit"]
    reward = verifier(moody, workers=2, timeout=1, failed=-2)
    with caplog.at_level(logging.WARNING, logger="entrgi_kernels"):
        assert reward.score_texts([HELLO] * 9, texts) == [3, -2, 1, -2, -2, 0.5, -2, -2, -2]
    (record,) = caplog.records
    assert "Verifier(moody) failed on 6 of 9 texts, which are given -2: 2 x SystemExit" in record.message
    caplog.clear()
    assert reward.score_texts([HELLO], ["abc"]) == [3] and not caplog.records


def test_processes_are_ended_at_the_limit(caplog):
    texts = ["abc", "hang", "yes", "die", "half", "exit", "de"]
    reward = verifier(moody, workers=2, timeout=1.5, processes=True)
    with caplog.at_level(logging.WARNING, logger="entrgi_kernels"):
        assert reward.score_texts([HELLO] * 7, texts) == [3, 0, 1, 0, 0.5, 0, 2]
    said = caplog.records[0].message
    assert "3 of 7 texts" in said and "took longer than 1.5 s" in said and "ended its process" in said
    with pytest.raises(TypeError, match="does not pickle .*: expected one that is defined at the top of a module"):
        verifier(lambda prompt, text: 1, processes=True)


def test_it_ranks_samples(models):
    (model, tokenizer), _ = models
    sampler = GuidedSampler(model, verifier(length), tokenizer, **SMALL)
    found = sampler.generate(["How was the inn?"], method="none", trace=True)[0]
    assert found.rewards == [len(sample.text) for sample in found.samples]
    assert len(found.best.text) == max(map(len, (sample.text for sample in found.samples)))
    for sample in found.samples:  # of the text as it stood, its masks filled
        assert sample.trace[-1].reward == sample.reward
    other = GuidedSampler(model, models[1][0], tokenizer, models[1][1], **SMALL).generate(
        ["How was the inn?"], method="none"
    )[0]
    assert [sample.tokens for sample in other.samples] == [sample.tokens for sample in found.samples]
    zero = sampler.generate(["How was the inn?"], guidance_steps=0)[0]
    assert zero.rewards == found.rewards
    auto = sampler.generate(["How was the inn?"], method="none", batch_size="auto")[0]
    assert auto.rewards == found.rewards


@pytest.mark.parametrize("search", ["smc", "svdd"])
def test_it_steers_a_search(models, search):
    """Longer texts go on: more of them than without."""
    (model, tokenizer), _ = models
    settings = SMALL | {"num_samples": 6, "steps": 8, "search_every": 2, "search_temperature": 2.0}
    sampler = GuidedSampler(model, verifier(length), tokenizer, method="none", **settings)
    plain, searched = (
        sampler.generate(["How was the inn?"])[0],
        sampler.generate(["How was the inn?"], search=search)[0],
    )
    assert searched.rewards == [len(sample.text) for sample in searched.samples]
    assert searched.mean > plain.mean


def test_a_sum_ranks_too(models):
    (model, tokenizer), (network, theirs) = models
    judge = rewards.wrap(network, theirs)
    total = 0.5 * judge + 2 * verifier(length)
    assert total.names == ["SequenceClassifier", "Verifier"] and not total.differentiable and judge * 1 is not None
    runs = [
        GuidedSampler(model, reward, tokenizer, method="none", **SMALL).generate(["How was the inn?"], trace=True)[0]
        for reward in (total, judge)
    ]
    prompt = [{"role": "user", "content": "How was the inn?"}]
    for sample, alone in zip(*(run.samples for run in runs), strict=True):
        expected = 0.5 * judge.score_texts([prompt], [sample.text])[0] + 2 * len(sample.text)
        assert sample.reward == pytest.approx(expected, abs=1e-4)
        expected = 0.5 * alone.trace[-1].reward + 2 * len(sample.text)
        assert sample.tokens == alone.tokens and sample.trace[-1].reward == pytest.approx(expected, abs=1e-3)


def test_guidance_refuses_it_before_anything_runs(models):
    (model, tokenizer), (network, theirs) = models
    ran = []
    whole = rewards.wrap(network, theirs) + verifier(length)
    alone, summed = (
        r"Verifier\(length\) has no gradient and cannot guide: expected method=",
        "nor can the sum WeightedSum",
    )
    for reward, named in ((verifier(length), alone), (whole, summed)):
        sampler = GuidedSampler(model, reward, tokenizer, **SMALL)
        handle = model.register_forward_hook(lambda *_: ran.append(1))
        for method in ("entrgi", "aps", "expectation"):
            with pytest.raises(ValueError, match=named):
                sampler.generate(["Hello"], method=method)
        canvas = sampler.canvas([[5]], [0], 1, 8, torch.device("cpu"))
        with pytest.raises(ValueError, match=named):
            sampler.denoise(
                canvas, [HELLO], torch.zeros(1, dtype=torch.int64), GuidanceConfig(max_new_tokens=8, steps=4)
            )
        with pytest.raises(ValueError, match=named):
            Steering(sampler).begin([[5]], [1], seed=0)
        handle.remove()
    assert not ran


def test_a_loop_of_ones_own(models):
    (_, tokenizer), _ = models
    reward = verifier(length)
    tokens = torch.tensor([tokenizer("a b", add_special_tokens=False)["input_ids"][:1] * 3])
    word = tokenizer.decode(tokens[0, :1])
    targets = rewards.Targets(tokenizer, len(tokenizer), tokens)
    empty, alive = torch.empty(1, 3, 0), torch.ones(1, 3, dtype=torch.bool)
    given = reward.prepare([HELLO]), torch.tensor([0]), empty, alive
    ended = torch.tensor([[False, True, False]])
    assert reward.score_embeddings(*given, targets=targets, ended=ended).tolist() == [len(word)]
    assert reward.score_embeddings(*given, targets=targets).tolist() == [len(tokenizer.decode(tokens[0]))]
    with pytest.raises(ValueError, match="expected targets="):
        reward.score_embeddings(*given)
    with pytest.raises(ValueError, match="has no gradient"):
        reward.score_embeddings(*given[:2], empty.requires_grad_(), alive, targets=targets)


def test_names_and_settings():
    assert verifier("length=2-3").score_texts([HELLO] * 2, ["a b", "a"]) == [1.0, 0.0]
    assert isinstance(verifier(length), rewards.Reward) and isinstance(2 * verifier(length), WeightedSum)
    assert rewards.wrap(reward := verifier("json")) is reward and "Json" in repr(reward)
    for settings in itertools.chain(
        ({"workers": value} for value in (0, True, 1.5)), ({"timeout": value} for value in (0, -1, math.inf, math.nan))
    ):
        with pytest.raises(ValueError, match=f"{next(iter(settings))}=.*: expected"):
            verifier(length, **settings)
    for settings in ({"failed": None}, {"failed": "0"}, {"timeout": "1"}, {"failed": True}):
        with pytest.raises(TypeError, match="expected a number"):
            verifier(length, **settings)
    assert math.isnan(verifier(moody, failed=math.nan).score_texts([HELLO], ["none"])[0])  # no reward, if so wanted
    for wrong in (3, int, None):
        with pytest.raises(TypeError, match=r"expected a function of \(prompt, text\)"):
            verifier(wrong)
    with pytest.raises(ValueError, match="timeout=10: PythonTests has a limit of 30 s of its own"):
        verifier(rewards.verifiers.PythonTests("", timeout=30))
    with pytest.raises(ValueError, match="expected one of regex=PATTERN, json"):
        verifier("nothing")
    with pytest.raises(TypeError, match=r"ranks samples: entrgi_kernels.rewards.verifier\(function\)"):
        rewards.wrap(length)
