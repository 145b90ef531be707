"""guide(): one line, the same object, and back again bit for bit."""

from __future__ import annotations

import types

import pytest
import torch

import entrgi_kernels
from entrgi_kernels.guidance import GuidedSampler

SETTINGS = dict(num_samples=2, max_new_tokens=8, steps=8, temperature=1.0, top_p=None)


def snapshot(model):
    return set(model.__dict__), {name: value.clone() for name, value in model.state_dict().items()}


def test_guided_rewards_exceed_base_rewards_and_a_seed_reproduces(diffusion, reward, tokenizer):
    prompts = [f"Question {i}?" for i in range(4)]
    model = entrgi_kernels.guide(
        diffusion, reward, tokenizer, shift=True, learning_rate=2.0, seed=5, num_samples=3, max_new_tokens=6, steps=6
    )
    assert model is diffusion
    guided = model.entrgi.generate(prompts, temperature=1.0, top_p=None)
    assert model.entrgi.rewards == [reward for result in guided for reward in result.rewards]
    assert model.entrgi.stats.reward_evaluations > 0
    again = model.entrgi.generate(prompts, temperature=1.0, top_p=None)
    assert [r.to_dict() for r in guided] == [r.to_dict() for r in again]
    base = model.entrgi.generate(prompts, temperature=1.0, top_p=None, method="none")
    assert sum(r.mean for r in guided) > sum(r.mean for r in base)


def test_without_a_seed_torchs_generator_decides(diffusion, reward, tokenizer):
    model = entrgi_kernels.guide(diffusion, reward, tokenizer, shift=True, **SETTINGS)
    torch.manual_seed(1)
    one, two = model.entrgi.generate("Why?"), model.entrgi.generate("Why?")
    torch.manual_seed(1)
    again = model.entrgi.generate("Why?")
    assert one[0].samples == again[0].samples != two[0].samples


def test_remove_restores_the_object(diffusion, reward, tokenizer):
    names, weights = snapshot(diffusion)
    forward = diffusion(torch.arange(5)[None]).logits
    model = entrgi_kernels.guide(diffusion, reward, tokenizer, shift=True, **SETTINGS)
    model.entrgi.generate("Why?")
    handle = model.entrgi
    handle.remove()
    handle.remove()
    after, weights_after = snapshot(diffusion)
    assert names == after and not hasattr(diffusion, "entrgi")
    assert all(torch.equal(weights[name], weights_after[name]) for name in weights)
    assert torch.equal(diffusion(torch.arange(5)[None]).logits, forward)


def test_with_removes(diffusion, reward, tokenizer):
    with entrgi_kernels.guide(diffusion, reward, tokenizer, shift=True, **SETTINGS).entrgi as guidance:
        assert guidance.generate("Why?")[0].rewards
    assert not hasattr(diffusion, "entrgi")


def test_guiding_twice_is_refused(diffusion, reward, tokenizer):
    model = entrgi_kernels.guide(diffusion, reward, tokenizer, shift=True)
    with pytest.raises(ValueError, match="guided already"):
        entrgi_kernels.guide(model, reward, tokenizer, shift=True)


def test_two_guided_models_do_not_disturb_each_other(make_diffusion, reward, tokenizer):
    one, two = make_diffusion(len(tokenizer), 1), make_diffusion(len(tokenizer), 7)
    alone = GuidedSampler(one, reward, tokenizer, shift=True).generate("Why?", **SETTINGS, seed=2)
    entrgi_kernels.guide(one, reward, tokenizer, shift=True, seed=2, **SETTINGS)
    entrgi_kernels.guide(two, reward, tokenizer, shift=True, seed=2, **SETTINGS)
    two.entrgi.generate("Why?")
    assert one.entrgi.generate("Why?")[0].samples == alone[0].samples


def test_a_model_that_is_no_module_is_refused(reward, tokenizer):
    with pytest.raises(TypeError, match="torch.nn.Module"):
        entrgi_kernels.guide(types.SimpleNamespace(), reward, tokenizer)


# Dream's convention: diffusion_generate(inputs, generation_config, attention_mask=, hooks).


@pytest.fixture
def dream(make_diffusion, tokenizer):
    base = type(make_diffusion(len(tokenizer)))

    class WithCall(base):
        """Brings the entry point of Dream's remote code; it must never run under guidance."""

        def diffusion_generate(self, inputs=None, generation_config=None, **kwargs):
            return "unguided"

    model = make_diffusion(len(tokenizer))
    model.__class__ = WithCall
    return model


@pytest.fixture
def chat(tokenizer):
    texts = [
        tokenizer.apply_chat_template([{"role": "user", "content": text}], add_generation_prompt=True, tokenize=False)
        for text in ("Why?", "A longer question?")
    ]
    return tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)


CALL = dict(max_new_tokens=6, steps=6, temperature=0.8, top_p=0.95, alg="entropy")


def test_diffusion_generate_is_guided_with_the_same_signature_and_return(dream, reward, tokenizer, chat):
    model = entrgi_kernels.guide(dream, reward, tokenizer, shift=True, seed=1)
    out = model.diffusion_generate(chat.input_ids, attention_mask=chat.attention_mask, **CALL)
    width = chat.input_ids.shape[1]
    assert out.shape == (2, width + 6) and torch.equal(out[:, :width], chat.input_ids)
    assert not (out == tokenizer.mask_token_id).any()
    rewards = model.entrgi.rewards
    assert len(rewards) == 2
    # The same prompts from text are the same draws: keys come from the prompt's ids.
    texts = model.entrgi.generate(["Why?", "A longer question?"], num_samples=1, seed=1, **CALL)
    assert [r.samples[0].tokens for r in texts] == out[:, width:].tolist()
    assert rewards == pytest.approx([result.rewards[0] for result in texts], abs=1e-4)


def test_diffusion_generate_returns_dicts_histories_and_sequences(dream, reward, tokenizer, chat):
    model = entrgi_kernels.guide(dream, reward, tokenizer, shift=True, seed=1)
    out = model.diffusion_generate(
        chat.input_ids,
        attention_mask=chat.attention_mask,
        num_return_sequences=2,
        return_dict=True,
        output_history=True,
        **CALL,
    )
    assert out.sequences.shape[0] == 4 and len(out.history) == 6
    assert torch.equal(out.history[-1], out.sequences)
    assert not torch.equal(out.sequences[0], out.sequences[1])
    assert len(model.entrgi.rewards) == 4


def test_the_users_own_hooks_are_called(dream, reward, tokenizer, chat):
    model = entrgi_kernels.guide(dream, reward, tokenizer, shift=True, seed=1)
    seen, width, wanted = [], chat.input_ids.shape[1], tokenizer.convert_tokens_to_ids("a")

    def tokens_hook(step, x, logits):
        seen.append((step, None if logits is None else tuple(logits.shape)))
        return x

    def logits_hook(step, x, logits):
        logits = logits.clone()
        logits[..., wanted] += 1000
        return logits

    out = model.diffusion_generate(
        chat.input_ids,
        attention_mask=chat.attention_mask,
        generation_tokens_hook_func=tokens_hook,
        generation_logits_hook_func=logits_hook,
        **CALL,
    )
    assert (out[:, width:] == wanted).all()
    assert seen[0] == (None, None) and [step for step, _ in seen[1:]] == list(range(6))
    assert seen[1][1] == (2, width + 6, len(tokenizer))


def test_a_generation_config_object_is_read(dream, reward, tokenizer, chat):
    model = entrgi_kernels.guide(dream, reward, tokenizer, shift=True, seed=1)
    config = types.SimpleNamespace(**CALL)
    mask = chat.attention_mask
    by_object = model.diffusion_generate(chat.input_ids, config, attention_mask=mask)
    by_words = model.diffusion_generate(chat.input_ids, attention_mask=mask, **CALL)
    assert torch.equal(by_object, by_words)


def test_diffusion_generate_refuses_what_it_cannot_do(dream, reward, tokenizer, chat):
    model = entrgi_kernels.guide(dream, reward, tokenizer, shift=True)
    with pytest.raises(ValueError, match="inputs=None"):
        model.diffusion_generate()
    with pytest.raises(ValueError, match="max_length=5"):
        model.diffusion_generate(chat.input_ids, max_length=5)


def test_remove_gives_the_models_own_call_back(dream, reward, tokenizer, chat):
    model = entrgi_kernels.guide(dream, reward, tokenizer, shift=True)
    model.entrgi.remove()
    assert model.diffusion_generate(chat.input_ids) == "unguided"
    assert "diffusion_generate" not in model.__dict__


def test_an_instances_own_attribute_comes_back(dream, reward, tokenizer):
    own = object()
    dream.__dict__["diffusion_generate"] = own
    entrgi_kernels.guide(dream, reward, tokenizer, shift=True).entrgi.remove()
    assert dream.__dict__["diffusion_generate"] is own


@pytest.mark.parametrize(
    "search",
    [{"search": "smc", "search_every": 2, "search_temperature": 0.1}, {"search": "svdd", "candidates": 2}],
    ids=lambda search: search["search"],
)
def test_dreams_own_call_searches(dream, reward, tokenizer, chat, search):
    model = entrgi_kernels.guide(dream, reward, tokenizer, shift=True, seed=1, **search)
    call = dict(CALL, attention_mask=chat.attention_mask, num_return_sequences=3)
    out = model.diffusion_generate(chat.input_ids, **call)
    width = chat.input_ids.shape[1]
    assert out.shape == (6, width + 6) and not (out == tokenizer.mask_token_id).any()
    assert model.entrgi.stats.search_evaluations > 0 and len(model.entrgi.rewards) == 6
    texts = model.entrgi.generate(["Why?", "A longer question?"], num_samples=3, seed=1, **CALL)
    assert [sample.tokens for result in texts for sample in result.samples] == out[:, width:].tolist()


def test_loops_that_keep_their_trajectories_are_refused(make_diffusion, reward, tokenizer, chat):
    model = make_diffusion(len(tokenizer))
    entrgi_kernels.guide(model, reward, tokenizer, shift=False, search="smc")
    tokens = torch.nn.functional.pad(chat.input_ids, (0, 4), value=tokenizer.mask_token_id)
    with torch.no_grad(), pytest.raises(ValueError, match="search='smc': this loop keeps its trajectories to itself"):
        model(tokens, attention_mask=torch.nn.functional.pad(chat.attention_mask, (0, 4), value=1))
