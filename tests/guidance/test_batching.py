"""Batches: sorted by length, as many prompts as the memory holds, halved where it does not."""

from __future__ import annotations

import collections
import errno
import functools
import logging
from collections import deque

import pytest
import torch

from entrgi_kernels.guidance import GuidanceConfig, GuidedSampler
from entrgi_kernels.guidance import sampler as sampler_module
from entrgi_kernels.guidance.batching import Batch, make_batches
from entrgi_kernels.guidance.memory import Cost, LiveMemory, free_memory, memory_budget, peak_bytes
from entrgi_kernels.models import BlockCausal
from entrgi_kernels.models.block_forwards import BlockForwards
from entrgi_kernels.shortage import is_out_of_memory

PROMPTS = ["Why?", "A rather longer question than that one was.", "Hm", "Tell me more about it", "So"]
SHORT = dict(num_samples=3, max_new_tokens=6, steps=4, guidance_steps=2)
# The estimate may be off by this factor: operators' own temporaries are bounded, not measured.
FACTOR = 1.5


@pytest.fixture
def sampler(diffusion, reward, tokenizer):
    return GuidedSampler(diffusion.double(), reward.double(), tokenizer, shift=True, **SHORT)


def tokens_of(sampler, prompts=PROMPTS, **settings):
    return [[s.tokens for s in r.samples] for r in sampler.generate(prompts, **settings)]


def estimate_of(sampler, config, prompt=PROMPTS[1]):
    """The estimate that the sampler makes, and the prompt's length."""
    made = []

    def seen(lengths, config, estimate, device):
        made.append((estimate(), lengths[0]))
        return deque()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampler_module, "make_batches", seen)
        sampler.generate(prompt, **config.to_dict())
    return made[0]


def test_prompts_of_similar_length_go_together():
    lengths = [5, 40, 3, 20, 4]
    batches = make_batches(lengths, GuidanceConfig(batch_size=2))
    assert [batch.prompts for batch in batches] == [(2, 4), (0, 3), (1,)]


def test_a_result_does_not_depend_on_its_batch(sampler):
    alone = tokens_of(sampler, batch_size=1)
    assert tokens_of(sampler, batch_size=2) == alone
    assert tokens_of(sampler, batch_size="auto") == alone
    assert tokens_of(sampler, batch_size="auto", memory_budget=1) == alone


def test_auto_fills_the_budget_and_no_more(sampler):
    config = sampler.config.replace(batch_size="auto")
    needed, length = estimate_of(sampler, config)
    lengths = [length] * 10
    for fitting in (1, 4, 10):
        budget = config.replace(memory_budget=int(needed(fitting * 3, length)) + 1)
        batches = make_batches(lengths, budget, lambda: needed, torch.device("cpu"))
        assert max(len(batch.prompts) for batch in batches) == fitting
        assert sorted(i for batch in batches for i in batch.prompts) == list(range(10))
    tight = config.replace(memory_budget=1)
    assert len(make_batches(lengths, tight, lambda: needed, torch.device("cpu"))) == 10


def test_auto_says_what_it_chose(sampler, caplog):
    with caplog.at_level(logging.INFO, logger="entrgi_kernels"):
        sampler.generate(PROMPTS, batch_size="auto")
    assert "5 prompts in 1 batches of 5 at most" in caplog.text


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("vocabulary", [0, 30_000])
@pytest.mark.parametrize("settings", [{}, {"method": "none"}, {"guidance_steps": 1, "max_new_tokens": 40}], ids=str)
def test_the_estimate_is_near_the_measured_peak(make_diffusion, reward, tokenizer, rows, vocabulary, settings):
    sampler = GuidedSampler(make_diffusion(len(tokenizer) + vocabulary), reward, tokenizer, shift=True)
    check_estimate(sampler, rows, settings)


# Keys of several layers, and prompts and responses that are long beside a block.
KEYS = dict(num_key_value_heads=8, num_attention_heads=8, head_dim=32)
BLOCKS = [
    (4, {}),
    (4, {"num_samples": 4}),
    (16, {"method": "none"}),
    (4, {"cfg_scale": 1.0}),
    (None, {"block_length": 4}),
    (None, {"block_length": 8, "model_cache": "prefix"}),
    (None, {"block_length": 8, "model_cache": "dual", "num_samples": 3}),
    (None, {"block_length": 8, "cfg_scale": 1.0, "method": "none"}),
]


@pytest.mark.parametrize("vocabulary", [0, 10_000])
@pytest.mark.parametrize(("length", "settings"), BLOCKS, ids=str)
def test_the_estimate_knows_blocks_and_what_is_kept(make_diffusion, reward, tokenizer, length, vocabulary, settings):
    model = make_diffusion(len(tokenizer) + vocabulary, **KEYS)
    if length is not None:
        model = BlockCausal(model, tokenizer.mask_token_id, length)
    sampler = GuidedSampler(model, reward, tokenizer)
    needed, prompt = check_estimate(sampler, 2, {"max_new_tokens": 64, "steps": 16, "guidance_steps": 1, **settings})
    assert needed.open_slots == (length or settings["block_length"])
    keeps = length is not None or "model_cache" in settings
    assert (needed.kept(100) > 100 * KEYS["num_key_value_heads"] * 32 * 2 * 2 * 4) == keeps


def check_estimate(sampler, rows, settings):
    """Hold the estimate for so many prompts to the measured peak; returns it, and the prompt's length."""
    config = sampler.config.replace(**{**SHORT, "num_samples": 1, "backend": "native", **settings})
    if "native" not in available():
        config = config.replace(backend="eager")
    # A random network's bytes are no text: each would come back from the decoder as three.
    sampler.decode = lambda response: "a" * len(response)
    prompt = PROMPTS[1] * 2
    sampler.generate(prompt, **{**config.to_dict(), "steps": 1})  # the table is made once
    estimate, length = estimate_of(sampler, config, prompt)
    # What operators take inside of them is not seen when it is measured: it must not be counted when it is compared.
    plain = estimate.__class__(**{**estimate.__dict__, "workspace_bytes": 0.0})
    measured = peak_bytes(lambda: sampler.generate([prompt] * rows, **{**config.to_dict(), "batch_size": rows}))
    assert measured / FACTOR <= plain(rows * config.num_samples, length) <= measured * FACTOR
    return estimate, length


def available():
    from entrgi_kernels.ops import backends

    return [name for name, info in backends().items() if info.available]


def test_live_memory_sees_peaks_and_frees():
    held = torch.zeros(1000)

    def run():
        a = torch.zeros(100)
        b = a.view(10, 10)  # a view takes nothing
        del a, b
        c = torch.ones(50) + held[:50]
        held.mul_(2)
        return c

    assert peak_bytes(run) == 4 * 100
    with LiveMemory() as memory:
        kept = run()
    assert memory.live == 4 * 50 and len(kept) == 50


def test_a_parabola_through_three_points():
    cost = Cost.through([16, 32, 64], [5 + 2 * n + 3 * n * n for n in (16, 32, 64)])
    assert cost(100) == pytest.approx(5 + 200 + 30_000)
    assert Cost.through([16, 32, 64], [100, 90, 70])(1000) == 70  # what falls, or bends down, is noise
    assert Cost.through([16, 32, 64], [100, 200, 300])(128) == pytest.approx(500)


def fails_beyond(sampler, rows, monkeypatch, error):
    """Make the loop run out of memory when it holds more trajectories than that, in the middle of a batch."""
    forward, sizes, steps = sampler.model.masked_logits, [], collections.Counter()

    @functools.wraps(forward)
    def fails(canvas, attention, masked, **given):  # the first step shows one of a prompt's samples, later ones all
        sizes.append(len(canvas))
        steps[len(canvas)] += 1
        if len(canvas) > rows and steps[len(canvas)] == 2:
            raise error
        return forward(canvas, attention, masked, **given)

    monkeypatch.setattr(sampler.model, "masked_logits", fails)
    return sizes


ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried ..."),
    MemoryError(),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    OSError("Cannot allocate memory (os error 12)"),
    RuntimeError("unable to mmap 400001414 bytes from file </m/a.bin>: Cannot allocate memory (12)"),
    RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 400000000 bytes."),
    RuntimeError("Triton Error [CUDA]: out of memory"),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    RuntimeError("HIP out of memory. Tried to allocate 2.00 GiB"),
]
OTHERS = [
    RuntimeError("shapes"),
    RuntimeError("index out of memory bounds"),
    OSError(errno.ENOSPC, "full"),
    OSError(errno.EDQUOT, "Disk quota exceeded"),
    OSError("Remote I/O error (os error 121)"),
    OSError("Disk quota exceeded (os error 122)"),
]


def test_out_of_memory_halves_and_loses_nothing(sampler, monkeypatch, caplog):
    expected = [(r.prompt, [(s.tokens, s.reward) for s in r.samples]) for r in sampler.generate(PROMPTS, batch_size=1)]
    work = sampler.stats.work
    sizes = fails_beyond(sampler, 2, monkeypatch, ERRORS[0])
    with caplog.at_level(logging.WARNING, logger="entrgi_kernels"):
        seen = []
        results = sampler.generate(PROMPTS, batch_size=5, trace=True, callback=lambda i, r: seen.append(i))
    found = [(r.prompt, [(s.tokens, pytest.approx(s.reward, rel=1e-9)) for s in r.samples]) for r in results]
    assert found == expected and sorted(seen) == list(range(5))
    assert sampler.stats.work == work, "what was run in vain is no work of the samples"
    assert max(sizes) == 15 and min(sizes) == 1 and "out of memory with 15 trajectories" in caplog.text
    assert all(len(s.trace) == 4 for r in results for s in r.samples)


def test_out_of_memory_within_a_block_halves(make_diffusion, reward, tokenizer, monkeypatch, caplog):
    model = BlockCausal(make_diffusion(len(tokenizer)).double(), tokenizer.mask_token_id, 2)
    sampler = GuidedSampler(model, reward.double(), tokenizer, **{**SHORT, "steps": 6})
    expected = tokens_of(sampler, batch_size=1)
    forward, sizes = BlockForwards.masked_logits, []

    @functools.wraps(forward)
    def fails(self, tokens, masked, **given):
        sizes.append(len(tokens))
        if len(tokens) > 2 and len(sizes) > 3:  # in the second block: the first one is kept
            sizes.clear()
            raise ERRORS[0]
        return forward(self, tokens, masked, **given)

    monkeypatch.setattr(BlockForwards, "masked_logits", fails)
    with caplog.at_level(logging.WARNING, logger="entrgi_kernels"):
        assert tokens_of(sampler, batch_size=5) == expected
    assert "out of memory with 15 trajectories" in caplog.text and caplog.text.count("out of memory") > 1


def test_a_single_trajectory_that_does_not_fit_is_an_error(sampler, monkeypatch):
    fails_beyond(sampler, 0, monkeypatch, ERRORS[0])
    with pytest.raises(torch.OutOfMemoryError):
        sampler.generate(PROMPTS)


def test_other_errors_are_not_swallowed(sampler, monkeypatch):
    fails_beyond(sampler, 0, monkeypatch, RuntimeError("shapes do not match"))
    with pytest.raises(RuntimeError, match="shapes"):
        sampler.generate(PROMPTS)


def test_errors_of_memory_are_known():
    assert all(map(is_out_of_memory, ERRORS)) and not any(map(is_out_of_memory, OTHERS))
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)


def test_halves_of_a_batch():
    assert Batch((4, 2, 7), 0, 4).halves() == (Batch((4,), 0, 4), Batch((2, 7), 0, 4))
    assert Batch((4,), 1, 3).halves() == (Batch((4,), 1, 1), Batch((4,), 2, 2))
    assert Batch((4,), 1, 1).halves() is None


@pytest.mark.parametrize("budget", [0, -5, 1.5, 0.0, "10GB", True])
def test_bad_budgets_are_named(budget):
    with pytest.raises((TypeError, ValueError), match="memory_budget="):
        GuidanceConfig(memory_budget=budget)


def test_budgets():
    device = torch.device("cpu")
    free = free_memory(device)
    assert 1e7 < free < 1e14
    assert memory_budget(12345, device) == 12345
    assert memory_budget(0.5, device) == pytest.approx(free / 2, rel=0.2)
    with pytest.raises(ValueError, match="batch_size='big'.*'auto'"):
        GuidanceConfig(batch_size="big")


def test_the_moments_of_float16_logits_are_counted_as_float32(diffusion, reward, tokenizer):
    sampler = GuidedSampler(diffusion.half(), reward.half(), tokenizer, shift=True, **SHORT)
    assert estimate_of(sampler, sampler.config.replace(batch_size="auto"))[0].moment_bytes == 8
    changed = sampler.config.replace(batch_size="auto", state_dtype="bfloat16")
    assert estimate_of(sampler, changed)[0].moment_bytes == 4
