"""The inner loop from graphs and through torch.compile: the same tokens."""

from __future__ import annotations

import shutil

import pytest
import torch

from entrgi_kernels.guidance import GuidanceConfig, GuidedSampler, capture
from entrgi_kernels.guidance import sampler as sampler_module
from entrgi_kernels.guidance.capture import compiled
from entrgi_kernels.guidance.memory import Memory

PROMPTS = ["Why?", "A rather longer question than that."]
SETTINGS = dict(num_samples=2, max_new_tokens=12, steps=12, guidance_steps=2, temperature=1.0, seed=5)


@pytest.fixture
def sampler(diffusion, reward, tokenizer):
    with torch.no_grad():
        diffusion.lm_head.weight[tokenizer.eos_token_id] += 1
    return GuidedSampler(diffusion.double(), reward.double(), tokenizer, shift=True, **SETTINGS)


def tokens_of(sampler, **settings):
    return [[s.tokens for s in r.samples] for r in sampler.generate(PROMPTS, **settings)]


@pytest.fixture
def emulated(monkeypatch):
    """Graphs without a GPU: a replay runs the captured function again, on the captured tensors, into its first results.

    As on a GPU, capturing computes nothing, and whatever a step changes must come in through captured memory.
    """
    calls = {"captured": 0, "replayed": 0}

    held: list[dict[str, torch.Tensor]] = []

    class Watched(Memory):
        def __init__(self):
            super().__init__()
            held.append(self.held)

    def captured(run):
        calls["captured"] += 1
        before = [{name: tensor.clone() for name, tensor in one.items()} for one in held]
        result = run()
        for one, saved in zip(held, before, strict=True):
            for name, tensor in saved.items():
                one[name].copy_(tensor)

        def replay():
            calls["replayed"] += 1
            again = run()
            for name in ("weights", "unreadable", "rewards", "gradients", "pending"):
                mine = getattr(result, name)
                if mine is not None:
                    mine.copy_(getattr(again, name))
            result.optimizer = again.optimizer

        return result, replay

    monkeypatch.setattr(sampler_module, "Memory", Watched)
    monkeypatch.setattr(capture, "cuda_capture", captured)
    monkeypatch.setattr(capture, "check_device", lambda device: None)
    return calls


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"guidance_steps": 1},
        {"guidance_steps": 3, "confidence": "guided"},
        {"alg": "origin", "num_samples": 1},
        {"exact_savings": "none"},
        {"method": "aps", "steps": 30, "deprioritize_eos": False},
        {"method": "first_order"},
        {"method": "first_order", "confidence": "guided", "exact_savings": "none"},
    ],
    ids=str,
)
def test_replayed_graphs_give_the_same_tokens(sampler, emulated, settings):
    expected = tokens_of(sampler, **settings)
    assert tokens_of(sampler, **settings, cuda_graphs=True) == expected
    assert emulated["replayed"] >= 4 and 1 <= emulated["captured"] <= 2


def test_the_emulation_sees_what_bypasses_captured_memory(sampler, emulated, monkeypatch):
    """Seeds baked into a graph: its replays draw the same numbers at every step."""
    expected = tokens_of(sampler)
    original = Memory.take

    def stale(self, name, *args):
        tensor = original(self, name, *args)
        return tensor.clone() if name == "graph rngs" else tensor

    monkeypatch.setattr(Memory, "take", stale)
    assert tokens_of(sampler, cuda_graphs=True) != expected


def test_traces_and_stats_of_graphs(sampler, emulated):
    plain = sampler.generate(PROMPTS, trace=True)
    weight = sampler.stats.mean_weight
    graphed = sampler.generate(PROMPTS, trace=True, cuda_graphs=True)
    for ours, theirs in zip(graphed, plain, strict=True):
        assert [s.trace for s in ours.samples] == [s.trace for s in theirs.samples]
    assert sampler.stats.mean_weight == pytest.approx(weight, rel=1e-12)


def test_graphs_need_a_gpu(sampler):
    with pytest.raises(ValueError, match="cuda_graphs=True: expected models on a CUDA device, they are on cpu"):
        sampler.generate(PROMPTS, cuda_graphs=True)
    with pytest.raises(TypeError, match="cuda_graphs"):
        GuidanceConfig(cuda_graphs="yes")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("backend", ["triton", "eager"])
def test_graphs_on_a_gpu(diffusion, reward, tokenizer, backend):
    sampler = GuidedSampler(diffusion.cuda(), reward.cuda(), tokenizer, shift=True, **SETTINGS, backend=backend)
    expected = tokens_of(sampler)
    found = tokens_of(sampler, cuda_graphs=True)
    same = (torch.tensor(found) == torch.tensor(expected)).double().mean().item()
    # float32: padded rows may change a product's summation order, and with it a draw that was a tie to rounding.
    assert same >= 0.9


@pytest.fixture
def small(make_diffusion, make_reward, tokenizer):
    reward = make_reward(len(tokenizer), num_hidden_layers=1).double()
    settings = dict(num_samples=1, max_new_tokens=5, steps=2, guidance_steps=1)
    return GuidedSampler(make_diffusion(len(tokenizer)).double(), reward, tokenizer, shift=True, **settings)


def test_compiled_layers_give_the_same_tokens(sampler):
    expected = tokens_of(sampler)
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    assert tokens_of(sampler, torch_compile="aot_eager") == expected
    graphs = counters["stats"]["unique_graphs"]
    assert 2 <= graphs <= 10 and not counters["graph_break"]
    tokens_of(sampler, torch_compile="aot_eager", max_new_tokens=9)
    assert counters["stats"]["unique_graphs"] == graphs  # other lengths run what there is


@pytest.mark.skipif(not shutil.which("g++"), reason="inductor asks for a C++ compiler on a CPU")
def test_inductor_gives_the_same_tokens(small):
    expected = small.generate(PROMPTS)
    torch._dynamo.reset()
    for ours, theirs in zip(small.generate(PROMPTS, torch_compile=True), expected, strict=True):
        assert [s.tokens for s in ours.samples] == [s.tokens for s in theirs.samples]
        assert ours.rewards == pytest.approx(theirs.rewards, rel=1e-9)
    assert torch._dynamo.utils.counters["inductor"] or torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_compiling_is_undone(reward, sampler):
    parts = list(reward.model.layers[0].children())
    with compiled(sampler.reward, "eager"):
        assert sum(part._compiled_call_impl is not None for part in parts) == 3  # two norms and the MLP
    assert all(part._compiled_call_impl is None for part in parts)
    with compiled(object(), True):
        pass


def test_compile_backends_are_checked():
    assert GuidanceConfig(torch_compile="aot_eager").torch_compile == "aot_eager"
    with pytest.raises(ValueError, match="torch_compile='magic'"):
        GuidanceConfig(torch_compile="magic")
    with pytest.raises(TypeError, match="torch_compile=1"):
        GuidanceConfig(torch_compile=1)
