"""The likelihood reward: against log-probabilities written out, over every layout, vocabulary and kind of head."""

from __future__ import annotations

import pytest
import torch

from entrgi_kernels import rewards
from entrgi_kernels.rewards import LikelihoodReward, Targets
from entrgi_kernels.rewards.decoding import causal
from entrgi_kernels.rewards.decoding.savings import ATTENTION, COMMITTED, DEAD, LAST_LAYER, NAMES, PREFIX
from entrgi_kernels.text import template

SHORT = [{"role": "user", "content": "Hello"}]
LONG = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Why is the food tasty? " * 3}]
TEXTS = ["Fine.", "", "The waiter was friendly and the place tiny, again and again!"]
# Untied, tied, scaled inside the embedding, capped, scaled logits, a bias, and a network of another build.
HEADS = {
    "Qwen3": {}, "Qwen2": {"tie_word_embeddings": True}, "Llama": {}, "Mistral": {"sliding_window": None}, "Gemma": {},
    "Gemma2": {"final_logit_softcapping": 3.0, "attn_implementation": "eager"}, "Gemma3Text": {},
    "Granite": {"logits_scaling": 4.0}, "Phi": {}, "GPT2": {},
}  # fmt: skip
SLOTS = 6


def own_mean(module, ids: list[int], start: int) -> float:
    """Mean log-likelihood of ids[start:] by the model's own forward."""
    with torch.no_grad():
        logits = module(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return logits[start - 1 : -1].gather(1, torch.tensor(ids[start:])[:, None]).mean().item()


def expected_by_hand(module, prefix, suffix, embedded, alive, shares) -> torch.Tensor:
    """One row's reward from one whole forward: shares [L, R] are what each slot is expected to hold."""
    rows = module.get_input_embeddings()
    before, after = rows(torch.tensor([prefix])), rows(torch.tensor([suffix]))
    kept = [i for i in range(len(prefix) + len(alive) + len(suffix)) if not (0 <= i - len(prefix) < len(alive)) or
            alive[i - len(prefix)]]  # fmt: skip
    sequence = torch.cat([before, embedded[None], after], dim=1)[:, kept]
    logits = module(inputs_embeds=sequence, position_ids=torch.tensor([kept])).logits[0].log_softmax(-1)
    wanted = torch.zeros(len(prefix), logits.shape[1]), shares, torch.eye(logits.shape[1])[suffix]
    wanted = torch.cat([part.to(logits) for part in wanted])[kept]
    scored = sum(place >= len(prefix) for place in kept)
    return (logits[:-1] * wanted[1:]).sum(-1)[-scored:].mean()


@pytest.mark.parametrize("name", HEADS)
def test_texts_score_as_the_model_predicts_them(tokenizer, causal_lm, name):
    module = causal_lm(len(tokenizer), name, **HEADS[name])
    reward = rewards.wrap(module, tokenizer)
    assert isinstance(reward, LikelihoodReward) and reward.pooling == "last"
    conversations = [SHORT, LONG, SHORT]
    expected = []
    for turns, text in zip(conversations, TEXTS, strict=True):
        ids, (prefix, _) = template.encode_answered(tokenizer, turns, text), template.split_template(tokenizer, turns)
        assert ids[: len(prefix)] == prefix
        expected.append(own_mean(module, ids, len(prefix)))
    assert len({round(value, 4) for value in expected}) == 3
    for batch_size in (1, 8):
        assert reward.score_texts(conversations, TEXTS, batch_size=batch_size) == pytest.approx(expected, abs=1e-4)
    reward.exact_savings = None
    assert reward.score_texts(conversations, TEXTS) == pytest.approx(expected, abs=1e-4)


def open_targets(tokenizer, size: int, rows: int, seed: int = 0) -> Targets:
    """Committed tokens, open slots in the middle with their logits, and an end of sequence in the first row."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(10, size, (rows, SLOTS), generator=generator)
    tokens[0, 4] = tokenizer.eos_token_id
    places = [
        (row, slot) for row in range(rows) for slot in (1, 2, 3 + 2 * row) if slot < SLOTS and (row, slot) != (0, 4)
    ]
    where = torch.tensor(places).T
    logits = 3 * torch.randn(len(places), size, generator=generator, dtype=torch.float64)
    logits[:, 3] = -torch.inf
    tokens[where[0], where[1]] = logits.argmax(-1)
    return Targets(tokenizer, size, tokens, where[0], where[1], logits, 0.7)


@pytest.mark.parametrize("unmatched", ["unk", "zero", "pieces"])
@pytest.mark.parametrize("name", ["Qwen3", "Gemma2", "Phi"])
def test_open_slots_are_expected_to_hold_p(build, tokenizer, causal_lm, in_double, name, unmatched):
    """Across tokenizers, with every way of dealing with unknown tokens, gradients included."""
    theirs = build["metaspace"](size=700)
    size = len(theirs) + 3
    module = causal_lm(len(tokenizer), name, dtype=torch.float64, **HEADS[name])
    reward = LikelihoodReward(module, tokenizer, unmatched=unmatched)
    vocabulary = reward.vocabulary_map(theirs, size)
    assert 0 < vocabulary.coverage < 1
    assert vocabulary.complete == (unmatched != "zero")
    targets = open_targets(theirs, size, rows=2)
    ended = targets.tokens == theirs.eos_token_id
    alive = torch.ones(2, SLOTS, dtype=torch.bool)
    alive[0, 5] = alive[1, 1] = False
    response = torch.randn(2, SLOTS, 32, dtype=torch.float64, requires_grad=True)
    prepared, index = reward.prepare([SHORT, LONG]), torch.arange(2)
    found = reward.score_embeddings(prepared, index, response, alive, ended=ended, targets=targets)
    matrix = vocabulary.matrix(len(tokenizer)).to_dense().double()
    sums = matrix.sum(0)
    assert ((sums - 1).abs() < 1e-12).logical_or(sums == 0).all() and bool((sums == 0).any()) == (unmatched == "zero")
    for row, turns in enumerate((SHORT, LONG)):
        p = torch.nn.functional.one_hot(targets.tokens[row], size).double()
        for n, (r, slot) in enumerate(zip(targets.rows, targets.slots, strict=True)):
            if r == row:
                p[slot] = (targets.logits[n] / 0.7).softmax(-1)
        shares = p @ matrix.T
        unknown = shares.sum(-1) == 0
        shares = shares / shares.sum(-1, keepdim=True).clamp_min(1e-300)
        live = alive[row] & ~ended[row]
        prefix, suffix = template.split_template(tokenizer, turns)
        if row == 0:
            assert not live[4] and not unknown[live].any() or unmatched == "zero"
        by_hand = expected_by_hand(module, prefix, suffix, response[row], live, shares)
        counted = int(live.sum()) + len(suffix)
        by_hand = by_hand * counted / (counted - int(unknown[live].sum()))
        assert found[row].item() == pytest.approx(by_hand.item(), rel=2e-6)
        gradient = torch.autograd.grad(found[row], response, retain_graph=True)[0][row]
        plain = torch.autograd.grad(by_hand, response)[0][row]
        assert (gradient - plain).norm() <= 1e-5 * plain.norm() and plain.norm() > 0
        assert (gradient[~live] == 0).all() and (gradient[live].abs().amax(-1) > 0).all()


FAMILIES = {
    "Qwen3": {}, "Qwen2": {}, "Llama": {}, "Gemma": {}, "Mistral": {"sliding_window": 6},
    "Gemma3Text": {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]},
    "Gemma2": {"attn_implementation": "eager", "final_logit_softcapping": 3.0},
}  # fmt: skip
SUBSETS = [{PREFIX}, {DEAD}, {LAST_LAYER}, {ATTENTION}, {PREFIX, COMMITTED}, set(NAMES) - {PREFIX}, set(NAMES)]


@pytest.mark.parametrize("name", FAMILIES)
def test_savings_change_nothing(tokenizer, causal_lm, in_double, name):
    size, module = len(tokenizer), causal_lm(len(tokenizer), name, dtype=torch.float64, **FAMILIES[name])
    in_double(module)
    reward = LikelihoodReward(module, tokenizer)
    assert set(reward.savings) == set(NAMES) - ({ATTENTION} if name == "Gemma2" else set())
    generator = torch.Generator().manual_seed(1)
    index = torch.tensor([0, 0, 1, 1])
    response = torch.randn(4, SLOTS, 32, generator=generator, dtype=torch.float64)
    tokens = torch.randint(10, size, (4, SLOTS), generator=generator)
    calls = []
    for count in (0, 2, 2, 3, 1, 5):
        fresh = [torch.randn(4, SLOTS, 32, generator=generator, dtype=torch.float64)]
        fresh += [torch.randint(10, size, (4, SLOTS), generator=generator)]
        response, tokens = response.clone(), tokens.clone()
        response[:, count:], tokens[:, count:] = fresh[0][:, count:], fresh[1][:, count:]
        alive = torch.ones(4, SLOTS, dtype=torch.bool)
        alive[0, 1] = alive[2, 0] = alive[1, 5] = False
        rows, slots = torch.arange(4).repeat_interleave(SLOTS - count), torch.arange(count, SLOTS).repeat(4)
        logits = torch.randn(len(rows), size, generator=generator, dtype=torch.float64)
        targets = Targets(tokenizer, size, tokens, rows, slots, logits)
        calls.append((count, response, alive, targets))

    def measure(names) -> list[torch.Tensor]:
        reward.exact_savings, found = names, []
        prepared = reward.prepare([SHORT, LONG])
        for count, given, alive, targets in calls:
            given = given.clone().requires_grad_()
            value = reward.score_embeddings(prepared, index, given, alive, committed=count, targets=targets)
            found += [value.detach(), torch.autograd.grad(value.sum(), given)[0][:, count:]]
            served = set(names) & set(reward.savings)
            assert reward.last_savings == (served if PREFIX in names else served - {COMMITTED})
        return found

    plain = measure(set())
    tolerance = 2e-6 if name == "Gemma2" else 1e-10  # eager attention takes its softmax in float32
    for names in SUBSETS:
        for ours, theirs in zip(measure(names), plain, strict=True):
            assert theirs.abs().max() > 0 and (ours - theirs).abs().max() <= tolerance * theirs.abs().max()


def test_committed_slots_are_not_run_again(tokenizer, causal_lm):
    """With everything committed but one slot, only that slot and the suffix go through the network and the head."""
    module = causal_lm(len(tokenizer), dtype=torch.float64)
    reward = LikelihoodReward(module, tokenizer)
    prepared = reward.prepare([LONG])
    suffix = len(prepared.suffix_ids[0])
    run = {"network": [], "head": []}
    module.model.layers[0].mlp.register_forward_pre_hook(lambda _, args: run["network"].append(args[0].shape[1]))
    module.lm_head.register_forward_pre_hook(lambda _, args: run["head"].append(args[0].shape[0]))
    index, response = torch.tensor([0]), torch.randn(1, SLOTS, 32, dtype=torch.float64)
    ids, alive = torch.arange(20, 20 + SLOTS)[None], torch.ones(1, SLOTS, dtype=torch.bool)
    for _ in range(2):
        reward.score_embeddings(prepared, index, response, alive, committed=SLOTS - 1, targets=ids)
    assert run["network"] == [len(prepared.prefix_ids[0]), SLOTS + suffix, 1 + suffix]
    assert run["head"] == [SLOTS + suffix, 1 + suffix]


class Whole(torch.nn.Module):
    """A causal LM of which one sees no parts."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.inner.get_input_embeddings()

    def forward(self, input_ids=None, inputs_embeds=None, attention_mask=None, position_ids=None):
        return self.inner(input_ids, attention_mask, position_ids, inputs_embeds=inputs_embeds)


def test_other_networks_are_run_plainly_and_say_so(tokenizer, causal_lm):
    other = LikelihoodReward(Whole(causal_lm(len(tokenizer), dtype=torch.float64)), tokenizer)
    assert other.pooling == "whole"
    assert other.savings == () and set(other.savings_off) == set(NAMES)
    assert "savings in use: none" in repr(other)
    reward = LikelihoodReward(causal_lm(len(tokenizer), dtype=torch.float64), tokenizer)
    targets = open_targets(tokenizer, len(tokenizer), 2)
    response, alive = torch.randn(2, SLOTS, 32, dtype=torch.float64), torch.ones(2, SLOTS, dtype=torch.bool)
    index = torch.tensor([1, 0])
    values = [
        one.score_embeddings(one.prepare([SHORT, LONG]), index, response, alive, targets=targets).tolist()
        for one in (other, reward)
    ]
    assert values[0] == pytest.approx(values[1], rel=2e-6)
    assert other.score_texts([SHORT, LONG], TEXTS[1:]) == pytest.approx(reward.score_texts([SHORT, LONG], TEXTS[1:]))


def test_a_sum_of_rows_is_never_wider_than_a_chunk(monkeypatch):
    states = torch.randn(10, 3, dtype=torch.float64, requires_grad=True)
    weight, seen = torch.randn(3, 5, dtype=torch.float64), []

    def score(rows: torch.Tensor, some: slice) -> torch.Tensor:
        seen.append((len(rows), some.start))
        return (rows @ weight).logsumexp(-1)

    monkeypatch.setattr(causal, "CHUNK_BYTES", 4 * 5 * 4)
    values = causal.by_chunks(states, 5, score)
    assert seen == [(4, 0), (4, 4), (2, 8)]
    upstream = torch.randn(10, dtype=torch.float64)
    (found,) = torch.autograd.grad(values, states, upstream)
    assert len(seen) == 3  # nothing is computed again
    (expected,) = torch.autograd.grad((states @ weight).logsumexp(-1), states, upstream)
    torch.testing.assert_close(found, expected)
    with torch.no_grad():
        assert not causal.by_chunks(states, 5, score).requires_grad
    assert causal.by_chunks(states[:0], 5, score).shape == (0,)


def test_input_and_output_embeddings_that_are_one_share_a_table(tokenizer, causal_lm):
    size = len(tokenizer)
    tied = LikelihoodReward(causal_lm(size, "Qwen2", tie_word_embeddings=True), tokenizer)
    assert tied.head_table(tokenizer, size) is tied.embedding_table(tokenizer, size)
    scaled = LikelihoodReward(causal_lm(size, "Gemma"), tokenizer)  # tied too, but scaled inside the embedding
    assert not torch.equal(scaled.head_table(tokenizer, size), scaled.embedding_table(tokenizer, size))
    assert scaled.head_table(tokenizer, size) is scaled.head_table(tokenizer, size)
    untied = LikelihoodReward(causal_lm(size, "Qwen3", tie_word_embeddings=False), tokenizer)
    torch.testing.assert_close(untied.head_table(tokenizer, size), untied.module.lm_head.weight.detach())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes(tokenizer, causal_lm, dtype):
    module = causal_lm(len(tokenizer), dtype=torch.float64)
    exact, rounded = (LikelihoodReward(m, tokenizer) for m in (module, causal_lm(len(tokenizer), dtype=dtype)))
    targets = open_targets(tokenizer, len(tokenizer), 2)
    response, alive = torch.randn(2, SLOTS, 32), torch.ones(2, SLOTS, dtype=torch.bool)
    found = []
    for reward in (exact, rounded):
        given = response.to(reward.dtype).requires_grad_()
        value = reward.score_embeddings(reward.prepare([SHORT]), torch.tensor([0, 0]), given, alive, targets=targets)
        (gradient,) = torch.autograd.grad(value.sum(), given)
        assert gradient.dtype == reward.dtype and value.dtype == (torch.float64 if reward is exact else torch.float32)
        found.append((value.double(), gradient.double()))
        targets.logits = targets.logits.to(dtype)
    for ours, best in zip(found[1], found[0], strict=True):
        assert (ours - best).norm() <= (1e-4 if dtype == torch.float32 else 0.1) * best.norm()


def test_errors_say_what_is_accepted(tokenizer, causal_lm):
    reward = LikelihoodReward(causal_lm(len(tokenizer)), tokenizer)
    prepared, alive = reward.prepare([SHORT]), torch.ones(1, SLOTS, dtype=torch.bool)
    with pytest.raises(ValueError, match="pass targets="):
        reward.score_embeddings(prepared, torch.tensor([0]), torch.randn(1, SLOTS, 32), alive)
    with pytest.raises(ValueError, match=r"targets has shape .*expected \[B, L\] = \(1, 6\)"):
        wrong = torch.zeros(1, SLOTS + 1, dtype=torch.long)
        reward.score_embeddings(prepared, torch.tensor([0]), torch.randn(1, SLOTS, 32), alive, targets=wrong)
    bare = "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ m['content'] }}<|im_end|>{% endif %}{% endfor %}"
    with pytest.raises(ValueError, match="puts nothing before the response"):
        LikelihoodReward(reward.module, tokenizer, chat_template=bare).prepare([SHORT])
    import transformers

    settings = dict(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2)
    bert = transformers.BertForMaskedLM(transformers.BertConfig(**settings, num_attention_heads=4)).eval()
    with pytest.raises(ValueError, match="BertForMaskedLM sees the tokens that follow"):
        rewards.wrap(bert, tokenizer)
    with torch.no_grad():
        reward.module.lm_head.weight[3, 3] = torch.nan
    with pytest.raises(ValueError, match="lm_head.weight.* holds NaN"):
        rewards.wrap(reward.module, tokenizer)
