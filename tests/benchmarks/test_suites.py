"""The operators' gates, and the published loop against our sampler."""

import pytest
import torch

from benchmarks.baselines.loop import LoopSettings, PublishedLoop
from benchmarks.harness import oracle
from benchmarks.harness.inputs import Shape
from benchmarks.harness.models import make_world, word_tokenizer
from benchmarks.suites import generation
from benchmarks.suites.ops import OPS, OpSuite
from benchmarks.suites.step import Problem
from entrgi_kernels import ops

SHAPE = Shape(6, 16, 301)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["vectorized", "eager"])
@pytest.mark.parametrize("op", OPS)
def test_every_operator_passes_its_gate(op, name, dtype):
    check = OpSuite(Problem.make(SHAPE, dtype)).candidate(op, name).check()
    assert check.passed, check.detail


BROKEN = {
    "softmax_entropy": lambda right: lambda *a, **k: (right(*a, **k)[0] + 0.01, right(*a, **k)[1]),
    "sample_tokens": lambda right: lambda logits, **k: logits.argmin(dim=-1),
    "soft_embedding": lambda right: lambda *a, **k: 1.1 * right(*a, **k),
    "entrgi_embedding": lambda right: lambda *a, **k: right(*a, **{**k, "weight": "one"}),
    "guidance_update_": lambda right: lambda phi, grad, *a, **k: right(phi, -grad, *a, **k),
    "unmask_confidence": lambda right: lambda *a, **k: 0.9 * right(*a, **k),
}


@pytest.mark.parametrize("op", OPS)
def test_every_gate_can_fail(op, monkeypatch):
    problem = Problem.make(SHAPE, torch.float32)
    name = "soft_embedding" if op == "soft_embedding_backward" else op
    monkeypatch.setattr(ops, name, BROKEN[name](getattr(ops, name)))
    assert not OpSuite(problem).candidate(op, "eager").check().passed


def test_a_baseline_is_held_to_what_its_arithmetic_can_give():
    """Plain torch's float32 entropy at V = 151,936 rounds by more than the bound of ours, on some machines."""
    suite = OpSuite(Problem.make(Shape(4, 8, 151_936), torch.float32))
    logits = suite.problem.phi[suite.problem.rows].double() / suite.problem.settings.temperature
    logsumexp = logits.logsumexp(dim=-1)
    noise = suite.plain_entropy_noise(logits - logsumexp[:, None], logsumexp)
    assert suite.least < noise < 1e-3
    assert suite.candidate("softmax_entropy", "vectorized").check().detail.count(f"{suite.least + noise:.1e}") == 1
    exact = torch.special.entr(logits.softmax(dim=-1)).sum(dim=-1)
    bound = suite.least + noise
    assert suite.compare("entropy", exact + 0.9 * noise * exact.max(), exact, bound).passed
    assert not suite.compare("entropy", exact + 9 * noise * exact.max(), exact, bound).passed


def test_in_nucleus_sees_a_token_outside():
    phi = torch.tensor([[5.0, 4.0, 0.0, -9.0]])
    assert oracle.in_nucleus(phi, torch.tensor([1]), 1.0, 0.9, None).passed
    assert not oracle.in_nucleus(phi, torch.tensor([2]), 1.0, 0.9, None).passed
    assert not oracle.in_nucleus(phi, torch.tensor([1]), 1.0, 0.9, 1).passed
    assert not oracle.in_nucleus(phi, torch.tensor([-1]), 1.0, 0.9, None).passed


def test_the_published_loop_and_the_sampler_make_the_same_tokens():
    check = generation.check_same_tokens("eager")
    assert check.passed, check.detail


def test_the_generation_gate_can_fail(monkeypatch):
    original = generation.sampler

    def other(world, size, backend="auto", **settings):
        sampler = original(world, size, backend, **settings)
        sampler.config = sampler.config.replace(method="none")
        return sampler

    monkeypatch.setattr(generation, "sampler", other)
    assert not generation.check_same_tokens("eager").passed


def test_the_loop_draws_with_what_it_is_given():
    world = make_world(v=97, d=16, width=16, dtype=torch.float32)
    shapes = []

    def draw(probabilities):
        shapes.append(tuple(probabilities.shape))
        return probabilities.argmax(dim=-1)

    settings = LoopSettings(num_samples=2, max_new_tokens=4, steps=2, guidance_steps=1)
    loop = PublishedLoop(world.model, world.tokenizer, world.reward_model, world.reward_tokenizer, settings, draw=draw)
    results = loop.generate(["w1 w2"])
    assert shapes == [(4, 97), (4, 97), (3, 97), (3, 97)]  # int(4 (1 - s/t)) = 1 was committed
    assert [len(ids) for ids, _ in results[0]] == [4, 4]
    assert all(torch.isfinite(torch.tensor(reward)) for _, reward in results[0])


def test_word_tokenizers_share_words_under_other_ids():
    one, other = word_tokenizer(300), word_tokenizer(300, skip=100)
    text = "w150 w290"
    assert one.decode(one(text)["input_ids"]) == text
    assert one.convert_tokens_to_ids("w150") != other.convert_tokens_to_ids("w150")
    assert other.convert_tokens_to_ids("w3") == other.unk_token_id and one.convert_tokens_to_ids("w3") == 10
