"""Sequence-classifier rewards: the model's own score, whatever the layout, and gradients to the response alone."""

from __future__ import annotations

import math

import pytest
import torch

from entrgi_kernels import rewards
from entrgi_kernels.rewards import SequenceClassifierReward
from entrgi_kernels.text import template

SHORT = [{"role": "user", "content": "Hello"}]
LONG = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Why is the food tasty? " * 3}]
HOSTILE = [{"role": "user", "content": "x <|im_end|> y"}]
TEXTS = ["Fine.", "", "The waiter was friendly and the place tiny, again and again!"]
DECODERS = ["Qwen3", "Qwen2", "Llama", "Gemma", "Gemma2", "Gemma3Text", "Mistral", "GPT2"]
ENCODERS = ["Bert", "Roberta", "DebertaV2"]


def own_score(module, ids: list[int]) -> float:
    with torch.no_grad():
        return module(torch.tensor([ids], device=next(module.parameters()).device)).logits[0, 0].item()


def changes_for(name: str) -> dict:
    # RoBERTa counts positions from its pad token on, and leaves out the places that hold it: one no text has.
    return {"pad_token_id": 4} if name == "Roberta" else {}


@pytest.fixture
def reward(tokenizer, classifier) -> SequenceClassifierReward:
    return SequenceClassifierReward(classifier(len(tokenizer), dtype=torch.float64), tokenizer)


@pytest.mark.parametrize("name", DECODERS + ENCODERS)
def test_texts_score_as_the_model_scores_them_alone(tokenizer, classifier, name):
    module = classifier(len(tokenizer), name, **changes_for(name))
    reward = rewards.wrap(module, tokenizer)
    assert reward.pooling == ("last" if name in DECODERS else "whole")
    conversations = [SHORT, LONG, HOSTILE]
    expected = [
        own_score(module, template.encode_answered(tokenizer, turns, text))
        for turns, text in zip(conversations, TEXTS, strict=True)
    ]
    assert len({round(value, 4) for value in expected}) == 3
    for batch_size in (1, 2, 8):
        assert reward.score_texts(conversations, TEXTS, batch_size=batch_size) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("name", DECODERS + ENCODERS)
def test_embeddings_score_as_the_tokens_they_come_from(tokenizer, classifier, name):
    module = classifier(len(tokenizer), name, **changes_for(name))
    reward = rewards.wrap(module, tokenizer)
    response = tokenizer("The food was tasty!", add_special_tokens=False)["input_ids"]
    table = reward.embedding_table(tokenizer, len(tokenizer))
    conversations = [SHORT, LONG]
    prepared = reward.prepare(conversations)
    index = torch.tensor([1, 0, 1])
    embedded = table[torch.tensor([response] * 3)]
    alive = torch.ones(3, len(response), dtype=torch.bool)
    found = reward.score_embeddings(prepared, index, embedded, alive)
    expected = []
    for prompt in index.tolist():
        prefix, suffix = template.split_template(tokenizer, conversations[prompt])
        expected.append(own_score(module, prefix + response + suffix))
    assert found.tolist() == pytest.approx(expected, abs=1e-4)
    assert reward.score_texts([LONG, SHORT, LONG], ["The food was tasty!"] * 3) == pytest.approx(expected, abs=1e-4)


def test_dead_positions_are_unseen_but_keep_their_places(reward, tokenizer):
    """Against a forward of the model itself in which the dead positions are cut out and positions are given."""
    module, dead = reward.module, [2, 3, 6]
    response = list(range(30, 38))
    prefix, suffix = template.split_template(tokenizer, SHORT)
    prepared = reward.prepare([SHORT, LONG])
    table = reward.embedding_table(tokenizer, len(tokenizer))
    alive = torch.ones(1, 8, dtype=torch.bool)
    alive[0, dead] = False
    found = reward.score_embeddings(prepared, torch.tensor([0]), table[torch.tensor([response])], alive)

    ids = prefix + response + suffix
    kept = [i for i in range(len(ids)) if i - len(prefix) not in dead]
    with torch.no_grad():
        hidden = module.model(
            torch.tensor([[ids[i] for i in kept]]), position_ids=torch.tensor([kept])
        ).last_hidden_state
        expected = module.score(hidden[:, -1])[0, 0]
        closed_up = module(torch.tensor([[ids[i] for i in kept]])).logits[0, 0]
    assert found.item() == pytest.approx(expected.item(), abs=1e-10)
    assert abs(found.item() - closed_up.item()) > 1e-6  # places matter, or this test would show nothing
    other = table[torch.tensor([response])].clone()
    other[0, dead] = 99.0
    assert reward.score_embeddings(prepared, torch.tensor([0]), other, alive).item() == found.item()


def test_rows_do_not_depend_on_their_batch(reward, tokenizer):
    prepared = reward.prepare([SHORT, LONG, HOSTILE])
    table = reward.embedding_table(tokenizer, len(tokenizer))
    torch.manual_seed(0)
    index = torch.tensor([0, 1, 2, 1, 0])
    response = table[torch.randint(len(tokenizer), (5, 6))]
    alive = torch.rand(5, 6) > 0.3
    together = reward.score_embeddings(prepared, index, response, alive)
    for row in range(5):
        one = reward.prepare([[SHORT, LONG, HOSTILE][index[row]]])
        alone = reward.score_embeddings(one, torch.tensor([0]), response[row : row + 1], alive[row : row + 1])
        assert alone.item() == pytest.approx(together[row].item(), abs=1e-12)


def test_gradient_reaches_the_response_alone(reward, tokenizer):
    prepared = reward.prepare([SHORT, LONG])
    torch.manual_seed(1)
    response = torch.randn(2, 4, 32, dtype=torch.float64, requires_grad=True)
    alive = torch.tensor([[True] * 4, [True, True, False, True]])
    before = [parameter.requires_grad for parameter in reward.module.parameters()]
    reward.score_embeddings(prepared, torch.tensor([0, 1]), response, alive).sum().backward()
    assert (response.grad[alive].abs().amax(-1) > 0).all()
    assert (response.grad[~alive] == 0).all()
    assert all(parameter.grad is None for parameter in reward.module.parameters())
    assert [parameter.requires_grad for parameter in reward.module.parameters()] == before and all(before)


def test_gradient_against_differences(tokenizer, classifier):
    reward = rewards.wrap(classifier(len(tokenizer), "GPT2", dtype=torch.float64), tokenizer)  # fp64 throughout
    prepared = reward.prepare([SHORT])
    torch.manual_seed(1)
    response = torch.randn(1, 3, 32, dtype=torch.float64, requires_grad=True)
    alive = torch.tensor([[True, False, True]])

    def score(given):
        return reward.score_embeddings(prepared, torch.tensor([0]), given, alive)

    assert torch.autograd.gradcheck(score, (response,), fast_mode=True)


def test_model_and_config_are_left_as_they_were(tokenizer, classifier):
    for name in ("Qwen3", "Bert"):
        module = classifier(len(tokenizer), name, pad_token_id=None)
        module.train()
        module.get_input_embeddings().eval()  # a mode of its own
        config, modes = module.config.to_json_string(), [child.training for child in module.modules()]
        reward = rewards.wrap(module, tokenizer)
        scores = reward.score_texts([SHORT, LONG], TEXTS[:2])
        prepared = reward.prepare([SHORT, LONG])
        reward.score_embeddings(prepared, torch.tensor([0, 1]), torch.randn(2, 3, 32), torch.ones(2, 3).bool())
        assert module.config.to_json_string() == config
        assert [child.training for child in module.modules()] == modes
        assert reward.score_texts([SHORT, LONG], TEXTS[:2]) == scores  # no dropout in between


def test_suffixes_of_different_lengths_and_empty_ones(tokenizer, classifier):
    """Templates may close a conversation differently; each row's score is read at its own last token."""
    chat_template = (
        "{% for m in messages %}{{ m['content'] }}{% endfor %}"
        "{% if 'two' in messages[0]['content'] %}<|im_end|>\n\n<|im_end|>{% elif 'one' in messages[0]['content'] %}"
        "<|im_end|>{% endif %}"
    )
    module = classifier(len(tokenizer), dtype=torch.float64)
    reward = rewards.wrap(module, tokenizer, chat_template=chat_template)
    conversations = [[{"role": "user", "content": text}] for text in ("two!", "one, but long", "bare")]
    prepared = reward.prepare(conversations)
    assert [len(ids) for ids in prepared.suffix_ids] == [4, 1, 0]
    response = [40, 41, 42]
    table = reward.embedding_table(tokenizer, len(tokenizer))
    alive = torch.ones(3, 3, dtype=torch.bool)
    found = reward.score_embeddings(prepared, torch.arange(3), table[torch.tensor([response] * 3)], alive)
    splits = [template.split_template(tokenizer, turns, chat_template=chat_template) for turns in conversations]
    expected = [own_score(module, prefix + response + suffix) for prefix, suffix in splits]
    assert found.tolist() == pytest.approx(expected, abs=1e-10)
    alive[2, 1:] = False  # behind an empty suffix the last live slot is read
    found = reward.score_embeddings(prepared, torch.arange(3), table[torch.tensor([response] * 3)], alive)
    ids = prepared.prefix_ids[2] + response[:1]
    assert found[2].item() == pytest.approx(own_score(module, ids), abs=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_dtypes(tokenizer, classifier, dtype):
    reward = rewards.wrap(classifier(len(tokenizer), dtype=dtype), tokenizer)
    table = reward.embedding_table(tokenizer, len(tokenizer))
    assert table.dtype == reward.dtype == dtype
    response = table[torch.arange(5)[None]].clone().requires_grad_()
    value = reward.score_embeddings(
        reward.prepare([SHORT]), torch.tensor([0]), response, torch.ones(1, 5, dtype=torch.bool)
    )
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    value.sum().backward()
    assert response.grad.dtype == dtype and response.grad.isfinite().all()
    exact = rewards.wrap(classifier(len(tokenizer), dtype=torch.float64), tokenizer)
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float64: 1e-12}[dtype]
    scores = exact.score_texts([SHORT], TEXTS[:1])
    assert reward.score_texts([SHORT], TEXTS[:1]) == pytest.approx(scores, abs=tolerance * max(1, abs(scores[0])))


def test_served_under_inference_mode_and_autocast(reward, tokenizer):
    expected = reward.score_texts([SHORT], TEXTS[:1])
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        fresh = SequenceClassifierReward(reward.module, tokenizer)
        table, prepared = fresh.embedding_table(tokenizer, len(tokenizer)), fresh.prepare([SHORT])
        assert fresh.score_texts([SHORT], TEXTS[:1]) == pytest.approx(expected, abs=1e-12)
    assert not table.is_inference() and not prepared.prefix.is_inference()
    response = table[torch.arange(4)[None]].clone().requires_grad_()
    fresh.score_embeddings(prepared, torch.tensor([0]), response, torch.ones(1, 4).bool()).sum().backward()
    assert response.grad.abs().sum() > 0
    with torch.no_grad():
        value = fresh.score_embeddings(prepared, torch.tensor([0]), response, torch.ones(1, 4).bool())
    assert not value.requires_grad


def test_table_is_kept_until_the_embedding_changes(reward, tokenizer, build):
    first = reward.embedding_table(tokenizer, 300)
    assert reward.embedding_table(tokenizer, 300) is first
    assert reward.embedding_table(tokenizer, 301).shape[0] == 301
    assert reward.embedding_table(build["byte-level"](), 300) is not first
    with torch.no_grad():
        reward.module.get_input_embeddings().weight[7] += 1
    changed = reward.embedding_table(tokenizer, 300)
    assert changed is not first and not torch.equal(changed[7], first[7])


def test_other_vocabulary(classifier, build):
    diffusion, tokenizer = build["byte-level"](), build["metaspace"]()
    module = classifier(len(tokenizer))
    for unmatched in ("unk", "zero", "pieces"):
        reward = rewards.wrap(module, tokenizer, unmatched=unmatched)
        table = reward.embedding_table(diffusion, len(diffusion) + 9)
        assert table.shape == (len(diffusion) + 9, 32) and table.isfinite().all()
        assert 0.2 < reward.vocabulary_map(diffusion, len(diffusion) + 9).coverage < 1


ENDING = "{% for m in messages %}{{ m['content'] }}{% if m['role'] == 'assistant' %}<|im_end|>{% endif %}{% endfor %}"


@pytest.mark.parametrize("name", ["Qwen3", "Llama", "Mistral", "Gemma2", "GPT2"])
@pytest.mark.parametrize("ending", ["<|im_end|>", "<|im_end|><|im_end|>", "<|eot|><|im_end|>"])
def test_a_pad_that_ends_the_template_is_passed_over_as_the_model_does(tokenizer, classifier, name, ending):
    """pad_token_id is often the eos with which templates end: transformers reads at the token before it."""
    pad = tokenizer.convert_tokens_to_ids("<|im_end|>")
    module = classifier(len(tokenizer), name, pad_token_id=pad)
    chat_template = ENDING.replace("<|im_end|>", ending)
    reward = rewards.wrap(module, tokenizer, chat_template=chat_template)
    conversations = [SHORT, LONG, SHORT]
    whole = [
        template.encode_answered(tokenizer, turns, text, chat_template=chat_template)
        for turns, text in zip(conversations, TEXTS, strict=True)
    ]
    assert all(ids[-1] == pad for ids in whole)
    expected = [own_score(module, ids) for ids in whole]
    assert reward.score_texts(conversations, TEXTS) == pytest.approx(expected, abs=1e-4)
    # The guided path: an eos in the response, at its end, is passed over too where nothing else follows.
    response = torch.tensor([[40, 41, 42, 43], [40, 41, 42, pad], [40, 41, pad, 43], [pad, pad, pad, pad]])
    alive = torch.ones(4, 4, dtype=torch.bool)
    prompts, index = [SHORT, LONG], torch.tensor([0, 1, 0, 0])
    splits = [template.split_template(tokenizer, turns, chat_template=chat_template) for turns in prompts]
    rows = [splits[i][0] + tokens + splits[i][1] for i, tokens in zip(index.tolist(), response.tolist(), strict=True)]
    given = reward.embedding_table(tokenizer, len(tokenizer))[response].clone().requires_grad_()
    for savings in ("all", "none"):
        reward.exact_savings = savings
        found = reward.score_embeddings(reward.prepare(prompts), index, given, alive)
        assert found.tolist() == pytest.approx([own_score(module, ids) for ids in rows], abs=1e-4)
    alive[:2, 2:] = False  # dead slots as ever
    found = reward.score_embeddings(reward.prepare(prompts), index, given, alive)
    if "eot" not in ending:
        assert found[1].item() == pytest.approx(own_score(module, splits[1][0] + [40, 41]), abs=1e-4)


def test_a_pad_inside_a_text_is_refused_where_positions_are_counted_by_it(tokenizer, classifier):
    """RoBERTa numbers places by the ids that are not padding; embeddings do not tell."""
    pad = tokenizer.convert_tokens_to_ids("<|im_end|>")
    for name, refused in (("Roberta", True), ("Bert", False), ("Qwen3", False)):
        module = classifier(len(tokenizer), name, pad_token_id=pad)
        reward = rewards.wrap(module, tokenizer)
        if refused:
            for run in (lambda r=reward: r.score_texts([SHORT], ["x"]), lambda r=reward: r.prepare([SHORT])):
                with pytest.raises(ValueError, match=r"writes the token '<\|im_end\|>' \(id .*Roberta.*pad_token_id"):
                    run()
            continue
        expected = own_score(module, template.encode_answered(tokenizer, SHORT, "x"))
        assert reward.score_texts([SHORT], ["x"]) == pytest.approx([expected], abs=1e-4)


# ---- bad input


def test_two_labels_are_refused_by_name(tokenizer, classifier):
    with pytest.raises(ValueError, match="num_labels=2.*num_labels=1"):
        rewards.wrap(classifier(len(tokenizer), num_labels=2), tokenizer)


def test_nan_weights_are_named(tokenizer, classifier):
    module = classifier(len(tokenizer))
    with torch.no_grad():
        module.model.layers[1].mlp.up_proj.weight[3, 5] = math.nan
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.weight.*NaN"):
        rewards.wrap(module, tokenizer)


def test_tokenizer_without_template_says_what_to_pass(build, classifier):
    tokenizer = build["byte-level"](chat_template=None)
    module = classifier(len(tokenizer))
    with pytest.raises(ValueError, match="no chat template.*chat_template="):
        rewards.wrap(module, tokenizer)
    reward = rewards.wrap(module, tokenizer, chat_template=template.CHATML)
    assert math.isfinite(reward.score_texts([SHORT], ["x"])[0])


def test_what_is_no_reward(tokenizer, classifier):
    module = classifier(len(tokenizer))
    for given, named in ((7, "int"), ("Skywork/Skywork", "Skywork"), (None, "NoneType")):
        with pytest.raises(TypeError, match=named):
            rewards.wrap(given, tokenizer)
    with pytest.raises(TypeError, match="tokenizer"):
        rewards.wrap(module)
    with pytest.raises(TypeError, match="str"):
        rewards.wrap(module, "gpt2")
    with pytest.raises(ValueError, match="'mean'"):
        rewards.wrap(module, tokenizer, unmatched="mean")
    with pytest.raises(TypeError, match="no input embedding"):
        rewards.wrap(torch.nn.Linear(2, 2), tokenizer)


def test_models_that_hide_something_from_embeddings_are_refused(tokenizer, classifier):
    module = classifier(len(tokenizer))
    backbone = module.model
    original = backbone.forward

    def forward(input_ids=None, inputs_embeds=None, **kwargs):
        if input_ids is not None:  # what a per-layer embedding does: it needs the ids
            inputs_embeds = module.get_input_embeddings()(input_ids) * 2
        return original(inputs_embeds=inputs_embeds, **kwargs)

    backbone.forward = forward
    with pytest.raises(ValueError, match="same score"):
        rewards.wrap(module, tokenizer)


def test_a_reward_is_returned_as_it_is(reward):
    assert rewards.wrap(reward) is reward

    class Own:
        def embedding_table(self, tokenizer, vocab_size): ...
        def prepare(self, conversations): ...
        def score_embeddings(self, prepared, index, response, alive): ...
        def score_texts(self, conversations, responses, batch_size=8): ...

    own = Own()
    assert rewards.wrap(own) is own


def test_bad_shapes_are_named(reward):
    prepared = reward.prepare([SHORT])
    response, alive, index = torch.randn(2, 3, 32), torch.ones(2, 3, dtype=torch.bool), torch.zeros(2, dtype=torch.long)
    for arguments, named in (
        ((index, response[..., :5], alive), r"\(2, 3, 5\)"),
        ((index, response, alive[:, :2]), r"\(2, 2\)"),
        ((index, response, alive.float()), "float32"),
        ((index[:1], response, alive), r"\(1,\)"),
    ):
        with pytest.raises(ValueError, match=named):
            reward.score_embeddings(prepared, *arguments)
    with pytest.raises(ValueError, match="no prompts"):
        reward.prepare([])
    with pytest.raises(ValueError, match="2 conversations, 1 responses"):
        reward.score_texts([SHORT, SHORT], ["x"])
    with pytest.raises(ValueError, match="batch_size.*0"):
        reward.score_texts([SHORT], ["x"], batch_size=0)
    with pytest.raises(TypeError, match="int"):
        reward.score_texts([SHORT], [3])
    assert reward.score_texts([], []) == []
