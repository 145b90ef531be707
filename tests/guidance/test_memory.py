"""Memory of a run: taken at its first step, used by all."""

from __future__ import annotations

import functools

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from entrgi_kernels.guidance import GuidedSampler
from entrgi_kernels.guidance import sampler as sampler_module
from entrgi_kernels.guidance.memory import Memory

PROMPTS = ["Why?", "A rather longer question than that."]
CPU = torch.device("cpu")


@pytest.fixture
def sampler(diffusion, reward, tokenizer):
    settings = dict(num_samples=2, max_new_tokens=8, steps=6, guidance_steps=3)
    return GuidedSampler(diffusion, reward, tokenizer, shift=True, **settings)


def test_a_name_is_one_memory():
    memory = Memory()
    first = memory.take("phi", (4, 6), torch.float32, CPU).fill_(7)
    smaller = memory.take("phi", (3, 5), torch.float32, CPU)
    assert smaller.data_ptr() == first.data_ptr() and smaller.is_contiguous() and bool((smaller == 7).all())
    assert memory.take("other", (4, 6), torch.float32, CPU).data_ptr() != first.data_ptr()
    assert memory.take("phi", (5, 6), torch.float32, CPU).shape == (5, 6)
    assert memory.take("phi", (2,), torch.float64, CPU).dtype == torch.float64


def test_rows_are_those_of_the_source():
    source = torch.randn(6, 3)
    index = torch.tensor([4, 0, 4])
    assert torch.equal(Memory().rows("a", source, index), source[index])


class OverVocabulary(TorchDispatchMode):
    """Counts the tensors made with a column for every token and memory of their own."""

    def __init__(self, vocab_size):
        super().__init__()
        self.vocab_size, self.made = vocab_size, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = {t.untyped_storage().data_ptr() for t in tree_iter((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = func(*args, **kwargs or {})
        for value in tree_iter(out):
            if isinstance(value, torch.Tensor) and value.dim() > 1 and value.shape[-1] == self.vocab_size:
                self.made += value.untyped_storage().data_ptr() not in before
        return out


class Watched(Memory):
    """Notes where each name's memory lies."""

    places: set[tuple[str, int]] = set()

    def take(self, name, shape, dtype, device):
        tensor = super().take(name, shape, dtype, device)
        self.places.add((name, tensor.data_ptr()))
        return tensor


@pytest.fixture
def places(monkeypatch):
    monkeypatch.setattr(sampler_module, "Memory", Watched)
    monkeypatch.setattr(Watched, "places", set())
    return Watched


def test_no_step_after_the_first_makes_logits_or_moments_of_its_own(sampler, places, monkeypatch):
    sampler.generate(PROMPTS)  # the table is made once
    places.places.clear()
    made, forward = [], sampler.model.masked_logits
    with OverVocabulary(sampler.model.vocab_size) as over:

        @functools.wraps(forward)
        def counted(*args, **kwargs):  # a step begins
            made.append(over.made)
            return forward(*args, **kwargs)

        monkeypatch.setattr(sampler.model, "masked_logits", counted)
        sampler.generate(PROMPTS)
    # The first step makes the logits that the K samples share; the rest is views of what is kept.
    assert made[1] - made[0] == 1 and len(set(made[1:])) == 1, made
    at_first = [name for name, _ in places.places if name in ("phi", "exp_avg", "exp_avg_sq", "response")]
    assert len(at_first) == len(set(at_first)) == 4


def test_batches_share_the_memory(sampler, places):
    sampler.generate([*PROMPTS, "So"], batch_size=1)
    assert len([name for name, _ in places.places if name == "phi"]) == 1


@pytest.mark.parametrize("kind", ["plain", "bias", "wrapped"])
def test_heads_write_where_they_are_told_or_keep_to_their_own(sampler, diffusion, kind):
    if kind == "bias":
        diffusion.lm_head.bias = torch.nn.Parameter(torch.zeros(diffusion.lm_head.out_features))
    if kind == "wrapped":  # as accelerate's hooks do
        plain = diffusion.lm_head.forward
        diffusion.lm_head.forward = lambda hidden: plain(hidden)
    canvas = torch.full((2, 5), sampler.model.mask_token_id)
    real, masked = torch.ones_like(canvas, dtype=torch.bool), torch.zeros_like(canvas, dtype=torch.bool)
    masked[:, 2:] = True
    expected = sampler.model.masked_logits(canvas, real, masked)
    out = torch.empty(6, sampler.model.vocab_size)
    found = sampler.model.masked_logits(canvas, real, masked, out=out)
    torch.testing.assert_close(found, expected)
    assert (found.data_ptr() == out.data_ptr()) == (kind == "plain")
    assert ("forward" in vars(diffusion.lm_head)) == (kind == "wrapped")
