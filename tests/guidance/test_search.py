"""Searches: exact distributions on a toy, nothing changed where nothing is searched, copies that part."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from entrgi_kernels.backends import philox
from entrgi_kernels.guidance import GuidanceConfig, GuidedSampler, commits
from entrgi_kernels.guidance.inner import InnerLoop
from entrgi_kernels.guidance.search import systematic
from entrgi_kernels.models import BlockCausal
from entrgi_kernels.rewards import CallableReward, LikelihoodReward

PROMPTS = ["Why?", "A rather longer question than that."]
SETTINGS = dict(num_samples=4, max_new_tokens=8, steps=8, guidance_steps=2, temperature=1.0, seed=3)
UNGUIDED = dict(method="none", top_p=None)


@pytest.fixture(scope="module")
def parts(make_diffusion, make_reward, tokenizer):
    return make_diffusion(len(tokenizer)).double(), make_reward(len(tokenizer)).double(), tokenizer


@pytest.fixture
def sampler(parts):
    return GuidedSampler(*parts, shift=True, **SETTINGS)


def tokens_of(sampler, prompts=PROMPTS, **settings):
    return [[s.tokens for s in result.samples] for result in sampler.generate(prompts, **settings)]


class Toy:
    """Two slots of three letters, A, B and C, the second depending on the first: a model whose every text is known."""

    shift, dtype, device = False, torch.float64, torch.device("cpu")
    LOGITS = torch.tensor([0.4, 0.0, -0.3], dtype=torch.float64)
    AFTER = torch.tensor([[0.0, 0.8, -0.5], [0.6, 0.0, 0.0], [-0.4, 0.1, 0.9]], dtype=torch.float64)

    def __init__(self, tokenizer):
        self.module, self.mask_token_id, self.vocab_size = (
            torch.nn.Linear(1, 1),
            tokenizer.mask_token_id,
            len(tokenizer),
        )
        self.letters = torch.tensor([tokenizer(letter).input_ids[0] for letter in "ABC"])

    def masked_logits(self, canvas, attention_mask, masked):
        rows, columns = masked.nonzero(as_tuple=True)
        logits = torch.full((len(rows), self.vocab_size), -torch.inf, dtype=self.dtype)
        other = torch.where(columns == canvas.shape[1] - 1, columns - 1, columns + 1)
        neighbour = canvas[rows, other]
        for number, letter in enumerate(self.letters):
            # Whichever is filled first, the pair is drawn from one joint table.
            joint = self.LOGITS[:, None] + self.AFTER
            first = columns == canvas.shape[1] - 2
            marginal = torch.where(first, joint.logsumexp(1)[number], joint.logsumexp(0)[number])
            known = torch.zeros_like(marginal)
            for mate, token in enumerate(self.letters):
                pair = torch.where(first, joint[number, mate], joint[mate, number])
                known = torch.where(neighbour == token, pair, known)
            logits[:, letter] = torch.where(neighbour == self.mask_token_id, marginal, known)
        return logits

    def joint(self):
        return torch.softmax((self.LOGITS[:, None] + self.AFTER).flatten(), dim=0)


def values(text):
    """A reward of the whole text: what no slot's own logits tell."""
    return 1.2 * (text[0] == text[1]) + 0.5 * text.count("C")


class Known:
    """A verifier: texts alone."""

    differentiable, module = False, None

    def embedding_table(self, tokenizer, vocab_size):
        return torch.zeros(vocab_size, 2, dtype=torch.float64)

    def prepare(self, conversations):
        from entrgi_kernels.rewards import PreparedPrompts

        return PreparedPrompts([list(turns) for turns in conversations])

    def score_embeddings(self, *args, **given):
        raise AssertionError("no gradient")

    def score_texts(self, conversations, responses, batch_size=8):
        return [values(text) for text in responses]


@pytest.mark.parametrize("potential", ["difference", "max", "sum"])
@pytest.mark.parametrize("resample_below", [0.5, 1.0])
def test_smc_samples_the_tilted_distribution(tokenizer, potential, resample_below):
    toy = Toy(tokenizer)
    sampler = GuidedSampler(toy, Known(), tokenizer, **UNGUIDED)
    settings = dict(search="smc", search_every=1, potential=potential, resample_below=resample_below)
    settings |= dict(steps=2, schedule="even", max_new_tokens=2, temperature=1.0)  # a slot a step
    counts: dict[str, float] = {}
    seeds, particles = 60, 64
    for seed in range(seeds):
        (result,) = sampler.generate("Two.", num_samples=particles, seed=seed, **settings)
        for sample in result.samples:
            counts[sample.text] = counts.get(sample.text, 0) + 1
    texts = ["".join(pair) for pair in itertools.product("ABC", repeat=2)]
    tilted = toy.joint() * torch.tensor([math.exp(values(text)) for text in texts], dtype=torch.float64)
    expected = tilted / tilted.sum() * seeds * particles
    found = torch.tensor([counts.get(text, 0) for text in texts], dtype=torch.float64)
    assert sum(counts.values()) == seeds * particles and set(counts) <= set(texts)
    # Particles of one run are dependent, so the bound is wider than chi-square's own of 8 degrees (26 at 1e-3).
    statistic = float(((found - expected).square() / expected).sum())
    plain = toy.joint() * seeds * particles
    assert statistic < 60 < float(((found - plain).square() / plain).sum())


def test_systematic_resampling_is_proportional_and_keeps_places():
    shares = torch.tensor([0.5, 0.1, 0.4, 0.0], dtype=torch.float64)
    totals = torch.zeros(4)
    for number in range(200):
        drawn = systematic(shares, (number + 0.5) / 200)
        assert len(drawn) == 4 and drawn.count(0) == 2 and 3 not in drawn and drawn[0] == 0
        assert all(drawn[place] == place for place in set(drawn))
        totals += torch.bincount(torch.tensor(drawn), minlength=4)
    torch.testing.assert_close(totals / 800, shares.float(), rtol=0, atol=1e-2)
    assert systematic(torch.full((5,), 0.2, dtype=torch.float64), 0.3) == list(range(5))


@pytest.mark.parametrize("method", ["none", "entrgi"])
@pytest.mark.parametrize("settings", [{}, {"block_length": 4}, {"confidence": "guided"}], ids=str)
def test_searches_that_search_nothing_change_nothing(sampler, method, settings):
    plain = tokens_of(sampler, method=method, **settings)
    assert tokens_of(sampler, method=method, search="svdd", candidates=1, **settings) == plain
    for every in (1, 3):
        smc = dict(search="smc", search_every=every, resample_below=0.0)
        assert tokens_of(sampler, method=method, **smc, **settings) == plain


@pytest.mark.parametrize("method", ["none", "entrgi", "aps"])
@pytest.mark.parametrize(
    "search",
    [
        {"search": "smc", "search_every": 2, "search_temperature": 0.05},
        {"search": "smc", "search_every": 3, "self_rewarding": True, "search_temperature": 0.3},
        {"search": "svdd", "candidates": 3},
        {"search": "svdd", "candidates": 2, "block_length": 4},
        {"search": "smc", "search_every": 1, "search_temperature": 0.01, "block_length": 4, "deprioritize_eos": False},
    ],
    ids=str,
)
def test_results_depend_on_seed_and_prompt_alone(sampler, method, search):
    found = tokens_of(sampler, method=method, **search)
    assert found == tokens_of(sampler, method=method, **search)
    assert tokens_of(sampler, method=method, **search, batch_size=1) == found
    assert tokens_of(sampler, list(reversed(PROMPTS)), method=method, **search) == found[::-1]
    assert tokens_of(sampler, method=method, **search, exact_savings="none") == found
    assert found != tokens_of(sampler, method=method, **{**search, "search": "best"})
    mask = sampler.model.mask_token_id
    assert not any(mask in sample for result in found for sample in result)


class Ending:
    """A model whose every slot is one of 32 words, or the end where the prompt's last letter says so."""

    shift, dtype, device, module = False, torch.float64, torch.device("cpu"), torch.nn.Linear(1, 1)

    def __init__(self, tokenizer):
        self.mask_token_id, self.vocab_size, self.eos = tokenizer.mask_token_id, len(tokenizer), tokenizer.eos_token_id
        self.end = tokenizer("!").input_ids[0]

    def masked_logits(self, canvas, attention_mask, masked):
        logits = torch.full((int(masked.sum()), self.vocab_size), -torch.inf, dtype=self.dtype)
        logits[:, 40:72] = torch.arange(32, dtype=self.dtype).remainder(7) / 4
        ends = (canvas == self.end).any(dim=1)[masked.nonzero()[:, 0]]
        logits[ends, self.eos] = 9.0
        return logits


class Letters(Known):
    """The sum of a text's characters, as far as there are any."""

    def score_texts(self, conversations, responses, batch_size=8):
        return [sum(map(ord, text)) % 97 / 9 for text in responses]


@pytest.mark.parametrize("potential", ["difference", "max", "sum"])
@pytest.mark.parametrize("search", ["smc", "svdd"])
@pytest.mark.parametrize(
    "settings",
    [
        {"block_length": 2},
        {"threshold": 0.9, "alg": "maskgit_plus"},  # whoever is sure is done after a step
        {"steps": 24, "search_every": 2},  # two steps of three commit nothing
        {"steps": 24, "search_every": 2, "confidence": "guided", "self_rewarding": True},
    ],
    ids=str,
)
def test_steps_that_are_none_to_a_prompt_do_not_search_it(tokenizer, settings, search, potential):
    """Such steps are taken for the sake of others in the batch, or because a saving is off."""
    chosen = {"search_every": 1, "temperature": 1.0, "deprioritize_eos": False, "num_samples": 4, "seed": 5, "steps": 8}
    chosen |= dict(search=search, potential=potential, candidates=2, max_new_tokens=8, resample_below=0.9, **settings)
    sampler = GuidedSampler(Ending(tokenizer), Letters(), tokenizer, **UNGUIDED)
    prompts = ["Ends!", "Goes on.", "Goes on and on."]
    found = tokens_of(sampler, prompts, **chosen)
    assert tokens_of(sampler, prompts, **chosen, batch_size=1) == found
    assert tokens_of(sampler, prompts, **chosen, exact_savings="none") == found
    assert found != tokens_of(sampler, prompts, **{**chosen, "search": "best"})


def test_who_had_ended_goes_on_by_the_plan_of_the_one_that_it_copies(tokenizer, monkeypatch):
    """Not all at once: a block of four slots takes its four steps."""
    wanted_of = []
    own = commits.best_positions

    def noted(ranking, masked, wanted):
        wanted_of.append((masked.any(dim=1).tolist(), wanted.tolist()))
        return own(ranking, masked, wanted)

    class Sometimes(Ending):
        def masked_logits(self, canvas, attention_mask, masked):
            logits = super().masked_logits(canvas, attention_mask, masked)
            logits[:, self.eos] = 2.5
            return logits

    class Long(Known):
        def score_texts(self, conversations, responses, batch_size=8):
            return [float(len(text)) for text in responses]

    monkeypatch.setattr(commits, "best_positions", noted)
    sampler = GuidedSampler(Sometimes(tokenizer), Long(), tokenizer, **UNGUIDED)
    chosen = dict(search="smc", search_every=1, resample_below=1.0, num_samples=8, max_new_tokens=16, steps=16)
    chosen |= dict(block_length=4, schedule="even", alg="maskgit_plus", deprioritize_eos=False, temperature=1.0)
    for seed in range(10):
        sampler.generate(["Why?"], seed=seed, **chosen)
    assert any(not all(going) for going, _ in wanted_of), "nothing had ended beside others"
    for going, wanted in wanted_of:
        assert {count for count, one in zip(wanted, going, strict=True) if one} <= {1}


@pytest.mark.parametrize("steps", [3, 8, 16])
@pytest.mark.parametrize(
    "settings",
    [
        {"search": "smc", "search_every": 1},
        {"search": "smc", "search_every": 1, "self_rewarding": True},
        {"search": "svdd", "candidates": 2, "confidence": "guided"},
        {"search": "best", "method": "first_order"},
        {"search": "best", "alg_temp": 0.5},
        {"search": "best", "alg": "origin"},
    ],
    ids=str,
)
@pytest.mark.parametrize("blocks", ["none", "setting", "model"])
def test_no_two_draws_share_their_numbers(parts, monkeypatch, steps, settings, blocks):
    """(Counter, row key) of all draws of a call; the model's blocks begin within the prompts, and so end behind."""
    diffusion, reward, tokenizer = parts
    drawn: list[tuple[int, int]] = []

    def noted(module, name, pairs):
        own = getattr(module, name)

        def call(*args, **given):
            for counter, keys in pairs(*args, **given):
                drawn.extend((int(counter), key) for key in keys.flatten().tolist())
            return own(*args, **given)

        monkeypatch.setattr(module, name, call)

    noted(commits, "sample_tokens", lambda phi, *, counter, keys, **rest: [(counter, keys)])
    for name in ("uniform", "exponential"):  # of positions, and of resampling
        noted(philox, name, lambda rng, keys, *rest: [(rng[1], keys)])
    inner = lambda self, phi, opened, response, rngs, *rest: [(rng[1], opened.keys) for rng in rngs]  # noqa: E731
    noted(InnerLoop, "run", inner)
    model = BlockCausal(diffusion, tokenizer.mask_token_id, 4) if blocks == "model" else diffusion
    sampler = GuidedSampler(model, reward, tokenizer, shift=None if blocks == "model" else True, **SETTINGS)
    chosen = {"max_new_tokens": 16, "steps": steps, "resample_below": 1.0, "deprioritize_eos": True, **settings}
    prompts = ["a" * n for n in range(1, 5)]
    sampler.generate(prompts, **chosen, block_length=4 if blocks == "setting" else None)
    if chosen["search"] == "smc":
        assert sum(counter % 256 == 253 for counter, _ in drawn) > len(prompts)
    assert len(set(drawn)) == len(drawn) > 0


def test_searches_find_higher_rewards(sampler):
    def mean(**settings):
        return sum(r.mean for r in sampler.generate([f"Question {i}?" for i in range(4)], **settings)) / 4

    plain = mean(method="none")
    assert mean(method="none", search="svdd", candidates=4) > plain
    assert mean(method="none", search="smc", search_every=1, search_temperature=0.05) > plain
    guided = mean()
    assert mean(search="svdd", candidates=2) > guided


def test_copies_part(sampler):
    """Particles of one ancestor draw their own tokens."""
    settings = dict(search="smc", search_every=2, search_temperature=1e-3, resample_below=1.0, method="none")
    (result,) = sampler.generate("Why?", trace=True, **settings)
    tokens = [tuple(sample.tokens) for sample in result.samples]
    # The last resampling leaves copies of the best; before it they had parted.
    before = {tuple(sample.trace[-2].tokens) for sample in result.samples}
    assert len(set(tokens)) <= 2 <= len(before) or len(before) == 1
    for sample in result.samples:
        slots = [slot for step in sample.trace for slot in step.committed]
        assert sorted(slots) == sorted(set(slots)) == list(range(8))  # one history, whose every slot was filled once


@pytest.mark.parametrize("kind", ["callable", "likelihood"])
def test_other_rewards_are_searched_with(parts, kind):
    diffusion, reward, tokenizer = parts
    if kind == "callable":
        table = torch.nn.Embedding.from_pretrained(torch.randn(len(tokenizer), 4, dtype=torch.float64))
        other = CallableReward(lambda e, mask, positions: (e * mask[..., None]).sum((1, 2)), table, tokenizer)
    else:
        other = LikelihoodReward(diffusion, tokenizer)
    sampler = GuidedSampler(diffusion, other, tokenizer, shift=True, **SETTINGS)
    for search in ({"search": "smc", "search_every": 2}, {"search": "svdd", "candidates": 2}):
        found = tokens_of(sampler, **search)
        assert tokens_of(sampler, **search, exact_savings="none", batch_size=1) == found


def test_kept_blocks_follow_their_rows(parts):
    diffusion, reward, tokenizer = parts
    for search in (
        {"search": "smc", "search_every": 1, "search_temperature": 0.05},
        {"search": "svdd", "candidates": 2},
    ):
        found = []
        for keeps in (True, False):
            model = BlockCausal(diffusion, tokenizer.mask_token_id, 4)
            model.keeps_blocks = keeps
            found.append(tokens_of(GuidedSampler(model, reward, tokenizer, **SETTINGS), **search))
        assert found[0] == found[1]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"search": "beam"}, "search='beam'"),
        ({"search_every": 0}, "search_every=0"),
        ({"search_temperature": 0}, "search_temperature=0"),
        ({"potential": "mean"}, "potential='mean'"),
        ({"resample_below": 1.5}, "resample_below=1.5"),
        ({"candidates": 0}, "candidates=0"),
        ({"search": "svdd", "candidates": 300}, "candidates=300 of num_samples=4"),
    ],
)
def test_settings_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        GuidanceConfig(**settings)
