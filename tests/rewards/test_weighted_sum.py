"""Sums of rewards, and plain functions as rewards."""

from __future__ import annotations

import pytest
import torch

from entrgi_kernels import rewards
from entrgi_kernels.rewards import CallableReward, LikelihoodReward, Targets, WeightedSum
from entrgi_kernels.rewards.decoding.savings import NAMES

SHORT = [{"role": "user", "content": "Hello"}]
LONG = [{"role": "user", "content": "Why is the food tasty? " * 3}]
SLOTS = 5


def mean_square(inputs_embeds, attention_mask, position_ids):
    weights = attention_mask * (1 + position_ids)
    return (inputs_embeds.square().mean(-1) * weights).sum(1) / weights.sum(1)


@pytest.fixture
def parts(build, tokenizer, classifier, causal_lm):
    """Three rewards with different tokenizers, widths and dtypes."""
    theirs = build["metaspace"]()
    return [
        rewards.wrap(classifier(len(tokenizer), dtype=torch.float64), tokenizer),
        LikelihoodReward(causal_lm(len(theirs), "Llama", hidden_size=16, dtype=torch.float64), theirs),
        CallableReward(mean_square, torch.randn(len(theirs), 8), theirs),
    ]


def test_a_sum_is_the_sum(parts, tokenizer):
    size = len(tokenizer)
    total = WeightedSum([(0.7, parts[0]), (2, parts[1]), (-1.5, parts[2])], names=["score", "likely", "square"])
    table = total.embedding_table(tokenizer, size)
    assert table.shape == (size, 32 + 16 + 8) and table.dtype == torch.float64
    assert total.embedding_table(tokenizer, size) is table
    tokens = torch.randint(10, size, (3, SLOTS))
    ended = torch.zeros(3, SLOTS, dtype=torch.bool)
    ended[1, 3] = True
    targets = Targets(tokenizer, size, tokens)
    alive, index = torch.ones(3, SLOTS, dtype=torch.bool), torch.tensor([0, 1, 1])
    given = table[tokens].clone().requires_grad_()
    prepared = total.prepare([SHORT, LONG])
    assert len(prepared) == 2
    value = total.score_embeddings(prepared, index, given, alive, committed=1, ended=ended, targets=targets)
    gradient = torch.autograd.grad(value.sum(), given)[0]
    separate, start = [], 0
    for weight, part in zip((0.7, 2, -1.5), parts, strict=True):
        alone = part.embedding_table(tokenizer, size)[tokens].clone().requires_grad_()
        takes = {"ended": ended, "targets": targets} if isinstance(part, LikelihoodReward) else {}
        single = part.score_embeddings(part.prepare([SHORT, LONG]), index, alone, alive, **takes)
        width = alone.shape[-1]
        expected = weight * torch.autograd.grad(single.sum(), alone)[0]
        torch.testing.assert_close(
            gradient[:, 1:, start : start + width], expected[:, 1:].double(), rtol=1e-5, atol=1e-7
        )
        start += width
        separate.append(single.detach().double())
    for name, single in zip(total.names, separate, strict=True):
        torch.testing.assert_close(total.last_components[name].double(), single, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(value, 0.7 * separate[0] + 2 * separate[1] - 1.5 * separate[2], rtol=1e-6, atol=1e-8)
    texts = total.score_components([SHORT, LONG], ["a", "tasty"])
    assert list(texts) == ["score", "likely", "square"] and texts["score"] == parts[0].score_texts(
        [SHORT, LONG], ["a", "tasty"]
    )
    scores = total.score_texts([SHORT, LONG], ["a", "tasty"])
    by_hand = [0.7 * a + 2 * b - 1.5 * c for a, b, c in zip(*texts.values(), strict=True)]
    assert scores == pytest.approx(by_hand) and scores[0] != scores[1]


def test_written_as_arithmetic(parts):
    a, b, c = parts
    total = 0.7 * a + b * 2 - c
    assert isinstance(total, WeightedSum) and total.rewards == [a, b, c] and total.weights == [0.7, 2.0, -1.0]
    assert (3 * total).weights == pytest.approx([2.1, 6.0, -3.0]) and (-a).weights == [-1.0]
    assert (a + a).names == ["SequenceClassifier 1", "SequenceClassifier 2"]
    assert rewards.wrap(total) is total and isinstance(total, rewards.Reward)
    for wrong in (lambda: a * "x", lambda: a + 1, lambda: a * True, lambda: a - 1):
        with pytest.raises(TypeError):
            wrong()


def test_savings_go_to_the_parts_and_come_back(parts):
    from entrgi_kernels.guidance.savings import reward_savings

    total = WeightedSum(list(zip((1, 1, 1), parts, strict=True)), names=["a", "b", "c"])
    parts[1].exact_savings = {"reward_dead"}
    before = total.exact_savings
    assert before == {"a": set(NAMES), "b": {"reward_dead"}}
    with reward_savings(total, "none"):
        assert parts[0].savings == parts[1].savings == ()
    assert total.exact_savings == before
    total.exact_savings = "all"
    assert parts[1].savings == NAMES
    total.exact_savings = ("reward_prefix", "reward_dead")  # names, as everywhere: not one a part
    assert parts[0].exact_savings == parts[1].exact_savings == {"reward_prefix", "reward_dead"}
    for wrong in ({"a": "none", "c": "all"}, {"a": "none", "b": "reward_nothing"}, "reward_nothing"):
        with pytest.raises(ValueError, match="expected"):
            total.exact_savings = wrong
    assert total.exact_savings == dict.fromkeys("ab", {"reward_prefix", "reward_dead"})


def test_what_is_no_sum(parts):
    for wrong, named in (([], "no rewards"), ([(float("nan"), parts[0])], "finite")):
        with pytest.raises(ValueError, match=named):
            WeightedSum(wrong)
    for wrong in ([parts[0]], [("1", parts[0])], [(1, "reward")], [(1, WeightedSum)]):
        with pytest.raises(TypeError):
            WeightedSum(wrong)
    with pytest.raises(ValueError, match="names=.*: expected 2 different ones"):
        WeightedSum([(1, parts[0]), (1, parts[1])], names=["a", "a"])
    with pytest.raises(TypeError, match=r"WeightedSum\(\[\(weight, reward\)"):
        rewards.wrap([(0.5, parts[0])])


def test_a_function_sees_rows_masks_and_positions(tokenizer):
    seen = []

    def function(inputs_embeds, attention_mask, position_ids):
        seen.append((inputs_embeds, attention_mask, position_ids))
        return mean_square(inputs_embeds, attention_mask, position_ids)

    weights = torch.randn(len(tokenizer), 8, dtype=torch.float64)
    reward = CallableReward(function, weights, tokenizer)
    tokens = torch.tensor([[30, 31, 32]])
    given = reward.embedding_table(tokenizer, len(tokenizer))[tokens].clone().requires_grad_()
    alive = torch.tensor([[True, False, True]])
    value = reward.score_embeddings(reward.prepare([SHORT, LONG]), torch.tensor([0]), given, alive)
    rows, mask, positions = seen[0]
    before, after = (len(ids) for ids in reward.split(SHORT))
    width = rows.shape[1]
    assert mask[0].tolist() == [0] * (width - before - after - 3) + [1] * before + [1, 0, 1] + [1] * after
    assert positions[0, -after - 3 :].tolist() == [*range(before, before + 3 + after)] and mask.dtype == torch.int64
    value.sum().backward()
    assert (given.grad[0, 1] == 0).all() and (given.grad[0, 0] != 0).all()
    ids = torch.tensor([reward.encode(SHORT, "tasty")])
    alone = mean_square(weights[ids], torch.ones_like(ids), torch.arange(ids.shape[1])[None])
    found = reward.score_texts([LONG, SHORT], ["x", "tasty"])
    assert found[1] == pytest.approx(alone.item()) and found[0] != found[1]
    tokenizer.chat_template = None
    assert tokenizer.decode(CallableReward(function, weights, tokenizer).encode(SHORT, "tasty")) == "Hello\ntasty"


def test_what_is_no_function(tokenizer):
    weights = torch.randn(len(tokenizer), 8)
    with pytest.raises(TypeError, match="table is .*: expected floating-point"):
        CallableReward(mean_square, torch.ones(3, dtype=torch.long), tokenizer)
    with pytest.raises(TypeError, match="table is .*: expected an nn.Embedding"):
        CallableReward(mean_square, "weights", tokenizer)
    with pytest.raises(TypeError, match="a reward function cannot be int"):
        CallableReward(3, weights, tokenizer)
    with pytest.raises(TypeError, match=r"mean_square\) needs an embedding table.*CallableReward"):
        rewards.wrap(mean_square, tokenizer)
    wrong = CallableReward(lambda embeds, mask, positions: embeds.mean(), weights, tokenizer)
    with pytest.raises(ValueError, match=r"returned torch.float32 \(\): expected floating-point \[B\] = \(1,\)"):
        wrong.score_texts([SHORT], ["x"])


def test_a_function_without_a_gradient_says_so(tokenizer):
    weights = torch.randn(len(tokenizer), 8)
    free = torch.nn.Parameter(torch.ones(()))
    functions = {
        "detach": lambda e, m, p: (e.detach() * m[..., None]).mean((1, 2)),
        "argmax": lambda e, m, p: e.argmax(-1).float().mean(1),
        "another's gradient": lambda e, m, p: free * e.detach().mean((1, 2)),
    }
    for function in functions.values():
        dull = CallableReward(function, weights, tokenizer)
        assert len(dull.score_texts([SHORT], ["x"])) == 1  # for ranking, it serves
        for reward in (dull, 0.5 * dull + CallableReward(mean_square, weights, tokenizer)):
            response = torch.randn(1, 3, len(reward.embedding_table(tokenizer, 300)[0]), requires_grad=True)
            with pytest.raises(
                ValueError, match="not depend on inputs_embeds .no gradient.*for ranking.*not for guidance"
            ):
                reward.score_embeddings(reward.prepare([SHORT]), torch.tensor([0]), response, torch.ones(1, 3).bool())
            with torch.no_grad():
                reward.score_embeddings(reward.prepare([SHORT]), torch.tensor([0]), response, torch.ones(1, 3).bool())
