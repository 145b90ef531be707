"""Savings of decoders' rewards: same rewards and gradients as the plain forward, less work, and said when not used."""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable
from contextlib import contextmanager

import pytest
import torch

from entrgi_kernels import rewards
from entrgi_kernels.rewards.decoding import savings
from entrgi_kernels.rewards.decoding.decoder import CachedDecoder
from entrgi_kernels.rewards.decoding.savings import ATTENTION, COMMITTED, DEAD, LAST_LAYER, NAMES, PREFIX

SHORT = [{"role": "user", "content": "Hello"}]
LONG = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Why is the food tasty? " * 3}]
SLOTS, COUNTS = 8, (0, 2, 2, 5)
BOTH = ["sliding_attention", "full_attention"]
# The window is shorter than prompt and response; grouped queries are conftest's default.
WINDOWED = {"sliding_window": 6, "layer_types": BOTH}
FAMILIES = {
    "Qwen3": ("Qwen3", {}),
    "Qwen2": ("Qwen2", {}),
    "Llama": ("Llama", {}),
    "Gemma": ("Gemma", {}),
    "Mistral": ("Mistral", {"sliding_window": None}),
    "Mistral, window": ("Mistral", {"sliding_window": 6}),
    "Qwen2, window": ("Qwen2", {**WINDOWED, "use_sliding_window": True}),
    "Qwen3, window last": ("Qwen3", {**WINDOWED, "use_sliding_window": True, "layer_types": BOTH[::-1]}),
    "Gemma2, window, caps": ("Gemma2", {**WINDOWED, "attn_logit_softcapping": 2.0}),
    "Gemma3Text, window": ("Gemma3Text", WINDOWED),
    "Gemma3Text, window last": ("Gemma3Text", {**WINDOWED, "layer_types": BOTH[::-1]}),
}
CASES = [
    (family, attention)
    for family, attention in itertools.product(FAMILIES, ("sdpa", "eager"))
    if not (family.startswith("Gemma2") and attention == "sdpa")  # which transformers does not offer
]
SUBSETS = [{PREFIX}, {DEAD}, {LAST_LAYER}, {ATTENTION}, {PREFIX, COMMITTED}, set(NAMES) - {PREFIX}, set(NAMES)]


@pytest.fixture
def make(tokenizer, classifier, in_double) -> Callable[..., rewards.SequenceClassifierReward]:
    def build(name: str = "Qwen3", attention: str = "sdpa", dtype=torch.float64, **changes):
        module = classifier(len(tokenizer), name, dtype=dtype, attn_implementation=attention, **changes)
        if dtype == torch.float64:
            in_double(module)
        return rewards.wrap(module, tokenizer)

    return build


def steps(samples: int, dtype: torch.dtype, prompts: int = 2, seed: int = 0) -> list[tuple]:
    """Calls of a run: (response, alive, committed per row); slots at the left stay as they are once committed."""
    generator = torch.Generator().manual_seed(seed)
    rows = prompts * samples
    response = torch.randn(rows, SLOTS, 32, generator=generator, dtype=torch.float64)
    alive = torch.rand(rows, SLOTS, generator=generator) > 0.2
    alive[:, 0] = True
    calls = []
    for count in COUNTS:
        response, alive = response.clone(), alive.clone()
        response[:, count:] = torch.randn(rows, SLOTS - count, 32, generator=generator, dtype=torch.float64)
        alive[:, count:] = torch.rand(rows, SLOTS - count, generator=generator) > 0.3
        alive[0, max(count, 6) :] = False  # an end of sequence inside
        alive[-1, count + 1 :] = False
        committed = torch.full((rows,), count)
        committed[0] += 1 if count < SLOTS else 0
        calls.append((response.to(dtype), alive, committed))
    return calls


def measure(reward, prepared, index, calls, committing: bool = True) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Rewards of all calls, and gradients at the slots that are not committed in all rows."""
    found, gradients = [], []
    for response, alive, committed in calls:
        given = response.clone().requires_grad_()
        value = reward.score_embeddings(prepared, index, given, alive, committed=committed if committing else None)
        gradients.append(torch.autograd.grad(value.sum(), given)[0][:, int(committed.min()) :])
        found.append(value.detach())
    return torch.stack(found), gradients


def assert_same(found, expected, tolerance: float) -> None:
    """Rewards, and gradients call by call, within a relative tolerance."""
    scale = expected[0].abs().max()
    assert (found[0] - expected[0]).abs().max() <= tolerance * scale
    for ours, plain in zip(found[1], expected[1], strict=True):
        assert plain.abs().max() > 0
        assert (ours - plain).abs().max() <= tolerance * plain.abs().max()


@contextmanager
def tokens_run(module):
    """Positions that enter each layer's feed-forward network and key projection while inside."""
    counted = {"mlp": [0] * len(module.model.layers), "keys": [0] * len(module.model.layers)}
    handles = []
    for number, layer in enumerate(module.model.layers):
        for name, part in (("mlp", layer.mlp), ("keys", layer.self_attn.k_proj)):

            def count(_module, args, number=number, name=name):
                counted[name][number] += args[0].shape[0] * args[0].shape[1]

            handles.append(part.register_forward_pre_hook(count))
    try:
        yield counted
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("family, attention", CASES)
def test_rewards_and_gradients_are_those_of_the_plain_forward(make, family, attention):
    name, changes = FAMILIES[family]
    # A dead slot whose window holds none but dead ones sees nothing: plainly NaN in float64 under eager attention.
    dtype = torch.float32 if attention == "eager" and "window" in family else torch.float64
    reward = make(name, attention, dtype, **changes)
    if attention == "sdpa":
        assert reward.savings == NAMES and reward.savings_off == {}
    else:
        assert reward.savings == NAMES[:-1] and "'eager'" in reward.savings_off[ATTENTION]
    # Eager attention takes its softmax in float32 whatever the network's dtype.
    tolerance = 1e-10 if attention == "sdpa" else 1e-5 if dtype == torch.float32 else 2e-6
    for samples in (1, 4):
        calls = steps(samples, dtype)
        index = torch.arange(2).repeat_interleave(samples)
        reward.exact_savings = None
        expected = measure(reward, reward.prepare([SHORT, LONG]), index, calls)
        assert reward.last_savings == frozenset()
        for subset in SUBSETS if samples == 4 else SUBSETS[-1:]:
            reward.exact_savings = subset
            prepared = reward.prepare([SHORT, LONG])
            assert_same(measure(reward, prepared, index, calls), expected, tolerance)
            served = subset & set(reward.savings)
            assert reward.last_savings == (served if PREFIX in subset else served - {COMMITTED})
            assert_same(measure(reward, prepared, index, calls), expected, tolerance)  # again, with what was kept


@pytest.mark.parametrize("family", ["Qwen3", "Llama", "Mistral, window"])
def test_single_precision(make, family):
    name, changes = FAMILIES[family]
    reward = make(name, "sdpa", torch.float32, **changes)
    index, calls = torch.arange(2).repeat_interleave(4), steps(4, torch.float32)
    saved = measure(reward, reward.prepare([SHORT, LONG]), index, calls)
    assert reward.last_savings == set(NAMES)
    reward.exact_savings = set()
    assert_same(saved, measure(reward, reward.prepare([SHORT, LONG]), index, calls), 1e-5)


def test_each_saving_saves(make):
    """Positions that pass through the layers: (count in all but the last layer, in the last layer)."""
    reward = make(num_hidden_layers=3)
    prompts = [SHORT, LONG]
    prepared = reward.prepare(prompts)
    before, after = prepared.prefix.shape[1], prepared.suffix.shape[1]
    index = torch.arange(2).repeat_interleave(2)
    response = torch.randn(4, SLOTS, 32, dtype=torch.float64)
    alive = torch.ones(4, SLOTS, dtype=torch.bool)
    alive[:, 6:] = alive[1:, 4:] = False
    committed = torch.tensor([3, 5, 4, 3])
    whole = 4 * (before + SLOTS + after)
    expected = {
        frozenset(): (whole, whole),
        frozenset({LAST_LAYER}): (whole, 4),
        frozenset({DEAD}): (whole - 4 * 2, whole - 4 * 2),
        frozenset({PREFIX}): (4 * (SLOTS + after),) * 2,
        frozenset({PREFIX, COMMITTED}): (4 * (SLOTS - 3 + after),) * 2,
        frozenset({COMMITTED}): (whole, whole),  # nothing to build on
        frozenset(NAMES): (4 * (3 + after), 4),
    }
    for names, (inner, last) in expected.items():
        reward.exact_savings = names
        prepared = reward.prepare(prompts)
        with tokens_run(reward.module) as warm:
            reward.score_embeddings(prepared, index, response, alive, committed=committed)
        for again in (committed, committed.clone(), 3):  # the first call computes what the others find
            with tokens_run(reward.module) as counted:
                reward.score_embeddings(prepared, index, response, alive, committed=again)
            assert counted["mlp"] == [inner, inner, last], names
            assert counted["keys"][:2] == [inner, inner] and counted["keys"][2] <= inner + 4
        prefix = 2 * before if PREFIX in names else 0
        grown = 4 * 3 if {PREFIX, COMMITTED} <= names else 0
        assert warm["mlp"][0] == inner + prefix + grown


def test_final_rewards_use_the_last_layer_at_one_position(make):
    reward = make()
    texts = ["Fine.", "", "The waiter was friendly!"]
    with tokens_run(reward.module) as counted:
        saved = reward.score_texts([SHORT, LONG, SHORT], texts)
    assert counted["mlp"][1] == 3 < counted["mlp"][0]
    reward.exact_savings = None
    assert reward.score_texts([SHORT, LONG, SHORT], texts) == pytest.approx(saved, abs=1e-10)


def test_switching_off_restores(make):
    reward = make()
    module = reward.module
    module.train()
    module.model.norm.eval()  # a mode of its own
    modes = [child.training for child in module.modules()]
    requires = [parameter.requires_grad for parameter in module.parameters()]
    forwards = [child.__dict__.get("forward") for child in module.modules()]
    index, calls = torch.tensor([0, 1]), steps(1, torch.float64)
    for names in (set(NAMES), None):
        reward.exact_savings = names
        measure(reward, reward.prepare([SHORT, LONG]), index, calls)
        assert [child.training for child in module.modules()] == modes
        assert [parameter.requires_grad for parameter in module.parameters()] == requires and all(requires)
        assert [child.__dict__.get("forward") for child in module.modules()] == forwards
        assert not any(child._forward_pre_hooks for child in module.modules())
    assert reward.savings == () and set(reward.savings_off) == set(NAMES)


def test_names_are_checked(make, tokenizer, classifier):
    reward = make()
    reward.exact_savings = [DEAD]
    assert reward.exact_savings == {DEAD} and reward.savings == (DEAD,)
    assert reward.savings_off[PREFIX] == "switched off"
    for given, meant in (("none", ()), (LAST_LAYER, (LAST_LAYER,)), ("all", NAMES), (None, ()), ([DEAD], (DEAD,))):
        reward.exact_savings = given
        assert reward.savings == meant
    for wrong in ({"prefix"}, "dead", {DEAD, "all"}):
        with pytest.raises(ValueError, match="reward_last_layer"):
            reward.exact_savings = wrong
        with pytest.raises(ValueError, match="reward_last_layer"):
            rewards.wrap(reward.module, tokenizer, exact_savings=wrong)
    with pytest.raises(TypeError, match="7"):
        reward.exact_savings = 7
    assert reward.exact_savings == {DEAD}
    chosen = rewards.wrap(reward.module, tokenizer, exact_savings={PREFIX, COMMITTED})
    assert chosen.savings == (PREFIX, COMMITTED)
    without = rewards.wrap(reward.module, tokenizer, exact_savings={COMMITTED})
    assert without.savings == () and "builds on reward_prefix" in without.savings_off[COMMITTED]


def test_changed_weights_are_seen_when_prompts_are_prepared_again(make):
    reward = make()
    index, calls = torch.tensor([0, 1]), steps(1, torch.float64)
    first = measure(reward, reward.prepare([SHORT, LONG]), index, calls)
    with torch.no_grad():
        for parameter in reward.module.parameters():
            parameter.mul_(1.1)
    saved = measure(reward, reward.prepare([SHORT, LONG]), index, calls)
    reward.exact_savings = None
    assert_same(saved, measure(reward, reward.prepare([SHORT, LONG]), index, calls), 1e-10)
    assert (saved[0] - first[0]).abs().max() > 1e-3


@pytest.mark.parametrize("as_number", [False, True])
def test_committed_slots_that_change_after_all_are_computed_anew(make, as_number):
    reward = make()
    prepared, index = reward.prepare([SHORT, LONG]), torch.tensor([0, 1])
    response = torch.randn(2, SLOTS, 32, dtype=torch.float64)
    alive = torch.ones(2, SLOTS, dtype=torch.bool)
    committed = 4 if as_number else torch.tensor([4, 5])

    def check() -> None:
        reward.exact_savings = "all"
        saved = reward.score_embeddings(prepared, index, response, alive, committed=committed)
        assert COMMITTED in reward.last_savings
        reward.exact_savings = None
        plain = reward.score_embeddings(prepared, index, response, alive)
        assert saved.tolist() == pytest.approx(plain.tolist(), abs=1e-10)

    check()
    response = response.clone()
    response[1, 3] += 1  # a loop that replaces tokens
    check()
    alive = alive.clone()
    alive[0, 2] = False
    check()
    response = response.clone()
    response[0, 2] += 5  # dead: of no account, and not compared
    kept = prepared.extra["committed"].layers
    check()
    assert prepared.extra["committed"].layers is kept
    committed = 2 if as_number else torch.tensor([2, 3])  # fewer than before
    check()
    assert prepared.extra["committed"].count == 2
    index = torch.tensor([1, 0])  # other rows
    check()


def test_rows_in_any_order_and_number(make):
    reward = make()
    prepared = reward.prepare([SHORT, LONG, SHORT + [{"role": "assistant", "content": "Yes?"}] + SHORT])
    for index in ([1, 0, 1], [2], [0, 1, 2], [0, 0, 1, 1, 2, 2], [1, 1], [2, 1, 0, 0]):
        rows = torch.tensor(index)
        response = torch.randn(len(index), SLOTS, 32, dtype=torch.float64)
        alive = torch.rand(len(index), SLOTS) > 0.3
        reward.exact_savings = "all"
        saved = reward.score_embeddings(prepared, rows, response, alive, committed=2)
        reward.exact_savings = None
        plain = reward.score_embeddings(prepared, rows, response, alive)
        assert saved.tolist() == pytest.approx(plain.tolist(), abs=1e-10)


@pytest.mark.parametrize("dead", ["none", "rest", "all"])
def test_reward_depends_on_the_response_whatever_is_committed(make, dead):
    """The guidance loop takes a gradient even where nothing is left to move."""
    reward = make()
    index = torch.tensor([0, 1])
    response = torch.randn(2, SLOTS, 32, dtype=torch.float64, requires_grad=True)
    alive = torch.ones(2, SLOTS, dtype=torch.bool)
    alive[:, {"none": SLOTS, "rest": 3, "all": 0}[dead] :] = False
    prepared = reward.prepare([SHORT, LONG])
    for _ in range(2):
        value = reward.score_embeddings(prepared, index, response, alive, committed=SLOTS)
        (gradient,) = torch.autograd.grad(value.sum(), response)
        assert gradient.isfinite().all() and (gradient == 0).all()
    reward.exact_savings = None
    plain = reward.score_embeddings(prepared, index, response, alive)
    assert value.tolist() == pytest.approx(plain.tolist(), abs=1e-10)


@pytest.mark.parametrize("family", ["Qwen3", "Mistral, window"])
def test_suffixes_of_different_lengths_and_empty_ones(make, family, tokenizer):
    chat_template = (
        "{% for m in messages %}{{ m['content'] }}{% endfor %}"
        "{% if 'two' in messages[0]['content'] %}<|im_end|>\n\n<|im_end|>{% elif 'one' in messages[0]['content'] %}"
        "<|im_end|>{% endif %}"
    )
    name, changes = FAMILIES[family]
    module = make(name, **changes).module
    reward = rewards.wrap(module, tokenizer, chat_template=chat_template)
    conversations = [[{"role": "user", "content": text}] for text in ("two!", "one, but long enough", "bare")]
    response = torch.randn(3, SLOTS, 32, dtype=torch.float64)
    alive = torch.ones(3, SLOTS, dtype=torch.bool)
    alive[0, 3:5] = alive[2, 4:] = False
    alive[1] = False

    for chosen in ([0, 1], [0, 1, 2]):
        prepared = reward.prepare([conversations[row] for row in chosen])
        reward.exact_savings = "all"
        rows = torch.arange(len(chosen))
        saved = reward.score_embeddings(prepared, rows, response[chosen], alive[chosen], committed=1)
        assert reward.last_savings == (set(NAMES) if chosen == [0, 1] else {DEAD, LAST_LAYER, ATTENTION})
        reward.exact_savings = None
        plain = reward.score_embeddings(prepared, rows, response[chosen], alive[chosen])
        alone = [
            reward.score_embeddings(
                reward.prepare([conversations[row]]), torch.tensor([0]), response[[row]], alive[[row]]
            ).item()
            for row in chosen
        ]
        assert saved.tolist() == pytest.approx(alone, abs=1e-10)
        assert plain.tolist() == pytest.approx(alone, abs=1e-10)


def test_double_precision_under_eager_attention_bears_padding(make):
    """A padding position sees nothing, which that combination answers with NaN."""
    reward = make("Gemma2", "eager")
    reward.exact_savings = None
    texts = ["Fine.", "The waiter was friendly!"]
    alone = [reward.score_texts([turns], [text])[0] for turns, text in zip([SHORT, LONG], texts, strict=True)]
    assert reward.score_texts([SHORT, LONG], texts) == pytest.approx(alone, abs=1e-6)
    response, alive = torch.randn(2, 3, 32, dtype=torch.float64), torch.ones(2, 3, dtype=torch.bool)
    together = reward.score_embeddings(reward.prepare([SHORT, LONG]), torch.tensor([0, 1]), response, alive)
    assert together.isfinite().all()


def test_an_accelerator_is_not_waited_for(make, monkeypatch):
    """Its rules, tried here: one look at each new tensor of counts and at each new index, none in between."""
    reward = make()
    monkeypatch.setattr(savings, "reads_are_free", lambda device: False)
    assert reward.savings == (PREFIX, COMMITTED, LAST_LAYER, ATTENTION) and "waiting" in reward.savings_off[DEAD]
    prepared, index = reward.prepare([SHORT, LONG]), torch.arange(2).repeat_interleave(2)
    response, alive = torch.randn(4, SLOTS, 32, dtype=torch.float64), torch.ones(4, SLOTS, dtype=torch.bool)
    looks = []
    for owner, name in [(torch.Tensor, n) for n in ("item", "tolist", "cpu", "nonzero", "__bool__", "__int__")] + [
        (torch, "equal")
    ]:
        original = getattr(owner, name)

        def look(*args, original=original, name=name, **kwargs):
            looks.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, look)

    def looked(committed) -> int:
        looks.clear()
        given = response.clone().requires_grad_()
        value = reward.score_embeddings(prepared, index, given, alive, committed=committed)
        torch.autograd.grad(value.sum(), given)
        return len(looks)

    none, some, more = torch.zeros(4).long(), torch.full((4,), 2), torch.full((4,), 3)
    assert [looked(none), looked(none)] == [2, 0]
    assert [looked(some), looked(some), looked(more), looked(more)] == [1, 0, 1, 0]
    assert [looked(4), looked(4), looked(5), looked(None)] == [0] * 4
    more += 1
    assert [looked(more), looked(more)] == [1, 0]
    assert prepared.extra["committed"].count == 4
    response[2, 1] += 1
    assert looked(more.clone()) == 1  # noticed with the next tensor of counts
    monkeypatch.undo()
    saved = reward.score_embeddings(prepared, index, response, alive, committed=4)
    reward.exact_savings = None
    assert saved.tolist() == pytest.approx(
        reward.score_embeddings(prepared, index, response, alive).tolist(), abs=1e-10
    )


class Renamed(torch.nn.Module):
    """A backbone, and layers in it, that take their cache by names of their own."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone, self.config = backbone, backbone.config
        theirs = "cache" if "cache" in inspect.signature(backbone.forward).parameters else "past_key_values"
        for layer in backbone.layers:
            layer.forward = functools.partial(self._layer, layer.forward, theirs)
        self._theirs = theirs

    @staticmethod
    def _layer(forward, theirs, hidden_states, kept_states=None, **kwargs):
        # What the backbone hands on under its name was put under ours by the hook below.
        return forward(hidden_states, **{**kwargs, theirs: kept_states})

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        audio=None,
        memory=None,
        inputs_embeds=None,
        use_cache=None,
        **ignored,
    ):
        if audio is not None:
            raise ValueError("audio must be a waveform")
        handles = [
            layer.register_forward_pre_hook(
                lambda _, args, kwargs: (
                    args,
                    {"kept_states" if k == self._theirs else k: v for k, v in kwargs.items()},
                ),
                with_kwargs=True,
                prepend=True,
            )
            for layer in self.backbone.layers
        ]
        try:
            arguments = {"attention_mask": attention_mask, "position_ids": position_ids, self._theirs: memory}
            return self.backbone(input_ids, inputs_embeds=inputs_embeds, use_cache=use_cache, **arguments)
        finally:
            for handle in handles:
                handle.remove()

    def get_input_embeddings(self):
        return self.backbone.get_input_embeddings()


def test_a_cache_is_handed_over_by_whatever_name_it_is_taken(make, tokenizer):
    module = make().module
    module.model = Renamed(module.model)
    reward = rewards.wrap(module, tokenizer)
    assert reward.savings == NAMES, reward.savings_off
    index, calls = torch.arange(2).repeat_interleave(4), steps(4, torch.float64)
    saved = measure(reward, reward.prepare([SHORT, LONG]), index, calls)
    assert reward.last_savings == set(NAMES)
    reward.exact_savings = None
    assert_same(saved, measure(reward, reward.prepare([SHORT, LONG]), index, calls), 1e-10)


def test_a_known_family_without_its_savings_is_warned_of_once(make, tokenizer, caplog):
    module = make().module
    own = module.model.forward

    def forward(input_ids=None, attention_mask=None, position_ids=None, inputs_embeds=None, use_cache=None, **ignored):
        return own(input_ids, attention_mask, position_ids, inputs_embeds=inputs_embeds, use_cache=False)

    module.model.forward = forward
    savings.warn_once.cache_clear()
    with caplog.at_level("WARNING", "entrgi_kernels"):
        reward = [rewards.wrap(module, tokenizer) for _ in range(2)][0]
    assert reward.savings == () and len(caplog.records) == 1
    said = caplog.text
    assert all(name in said for name in NAMES) and "takes a cache" in said and "docs/savings.md" in said
    caplog.clear()
    module.config.model_type = "unheard_of"  # other networks are tried, with no promise
    savings.warn_once.cache_clear()
    rewards.wrap(module, tokenizer, exact_savings="none")
    make("Qwen3", attention="eager")  # its reward_attention is the configuration's choice
    assert not caplog.records


# ---- networks that cannot be served


def test_attention_that_is_not_causal_is_run_plainly(make):
    reward = make("Gemma3Text", use_bidirectional_attention=True)
    assert reward.savings == () and all("not exact" in reason for reason in reward.savings_off.values())
    assert "not exact" in repr(reward)
    response, alive = torch.randn(2, 4, 32, dtype=torch.float64), torch.ones(2, 4, dtype=torch.bool)
    reward.score_embeddings(reward.prepare([SHORT, LONG]), torch.tensor([0, 1]), response, alive, committed=2)
    assert reward.last_savings == frozenset()


def test_a_saving_that_is_not_exact_is_left_out_alone(make, tokenizer):
    """A last layer that looks at all its positions cannot be run at one; prefix states do not mind."""
    module = make().module
    last = module.model.layers[-1]
    original = last.forward

    def forward(hidden_states, **kwargs):
        out = original(hidden_states, **kwargs)
        return out + 0.3 * hidden_states.shape[1] ** 0 * (hidden_states.shape[1] > 1)

    last.forward = forward
    reward = rewards.wrap(module, tokenizer)
    assert reward.savings == (PREFIX, COMMITTED, DEAD, ATTENTION)
    assert "rewards differ by" in reward.savings_off[LAST_LAYER]
    index, calls = torch.tensor([0, 1]), steps(1, torch.float64)
    saved = measure(reward, reward.prepare([SHORT, LONG]), index, calls)
    reward.exact_savings = None
    assert_same(saved, measure(reward, reward.prepare([SHORT, LONG]), index, calls), 1e-10)


def test_frequencies_that_depend_on_the_length_keep_no_prefix(make):
    reward = make("Llama", rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0})
    assert reward.savings == (DEAD, LAST_LAYER, ATTENTION)
    assert "'dynamic'" in reward.savings_off[PREFIX] and "'dynamic'" in reward.savings_off[COMMITTED]


def test_reasons_without_trying(make, tokenizer, classifier):
    bert = rewards.wrap(classifier(len(tokenizer), "Bert"), tokenizer)
    assert bert.savings == () and all("no decoder" in reason for reason in bert.savings_off.values())
    bert.exact_savings = {DEAD}
    assert bert.savings_off[PREFIX] == "switched off" and "no decoder" in bert.savings_off[DEAD]
    module = make().module
    module.config._attn_implementation = "sdpa"
    decoder = CachedDecoder(module.model)
    assert decoder.why_not is None and decoder.window is None and decoder.serves(10**6)
    module.model.config._attn_implementation_internal = "flash_attention_2"
    assert "flash_attention_2" in CachedDecoder(module.model).why_not
    windowed = make("Mistral", sliding_window=6).module
    windowed.config.model_type = "unheard_of"
    decoder = CachedDecoder(windowed.model)
    assert decoder.window == 6 and decoder.serves(6) and not decoder.serves(7)
