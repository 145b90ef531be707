"""DiffusionGemma: transformers' generate and the pipelines of diffusers, on tiny random models of the architecture."""

from __future__ import annotations

import inspect
from types import SimpleNamespace

import pytest
import torch
from transformers import LogitsProcessor, LogitsProcessorList

import entrgi_kernels

SETTINGS = dict(learning_rate=2.0, top_p=None, seed=3)


@pytest.fixture
def make_gemma(tokenizer, standins):
    return lambda seed=0: standins.diffusion_gemma(tokenizer, seed)


GENERATE = dict(max_new_tokens=16, max_denoising_steps=4, t_min=0.4, t_max=0.8)


def test_generate_is_guided_and_given_back(make_gemma, reward, tokenizer, chat):
    never, model = make_gemma(), make_gemma()

    def call(which, seed=0, **settings):
        torch.manual_seed(seed)
        output = which.generate(chat.input_ids, attention_mask=chat.attention_mask, **{**GENERATE, **settings})
        return output.sequences

    plain, before = call(never), dict(model.__dict__)
    assert entrgi_kernels.guide(model, reward, tokenizer, **SETTINGS) is model
    handle = model.entrgi
    guided = call(model)
    assert handle.integration == "diffusion-gemma" and len(handle.rewards) == 2
    # Two canvases of 8 slots, four steps each; a step of 3 inner ones.
    assert handle.stats.steps <= 8 and handle.stats.reward_evaluations == 3 * handle.stats.steps > 0
    assert guided.shape == plain.shape and torch.equal(guided[:, : chat.input_ids.shape[1]], chat.input_ids)
    assert torch.equal(call(model), guided)
    up = base = 0.0
    for seed in range(3):
        call(model, seed)
        up += sum(handle.rewards)
        base += sum(handle.score(call(never, seed)))
    assert up > base
    with handle.paused():
        assert torch.equal(call(model), plain)
    with torch.inference_mode():
        assert torch.equal(call(model), guided)
    with pytest.raises(ValueError, match="guided already"):
        entrgi_kernels.guide(model, reward, tokenizer)
    handle.remove()
    assert torch.equal(call(model), plain) and model.__dict__.keys() == before.keys()


def test_the_users_own_processors_come_after_and_see_guided_scores(make_gemma, reward, tokenizer, chat):
    model, seen = make_gemma(), []

    class Own(LogitsProcessor):
        def __call__(self, input_ids, scores, cur_step):
            seen.append((int(cur_step), scores.clone()))
            return scores

    own = Own()

    torch.manual_seed(0)
    model.generate(chat.input_ids, logits_processor=LogitsProcessorList([own]), **GENERATE)
    torch.manual_seed(0)
    plain = seen[0][1]
    seen.clear()
    entrgi_kernels.guide(model, reward, tokenizer, **SETTINGS)
    given = LogitsProcessorList([own])
    model.generate(chat.input_ids, logits_processor=given, **GENERATE)
    assert given == [own] and seen[0][0] == 4
    moved = (seen[0][1] - plain)[..., :256].abs()
    assert moved.mean(dim=(0, 2)).min() > 0.5  # every slot of the canvas, whatever it holds
    assert (seen[0][1][..., tokenizer.mask_token_id] == -torch.inf).all()


def test_what_it_cannot_do_is_said(make_gemma, reward, tokenizer):
    model = entrgi_kernels.guide(make_gemma(), reward, tokenizer)
    with pytest.raises(ValueError, match="input_ids=None"):
        model.generate()
    with pytest.raises(TypeError, match="own loop alone"):
        model.entrgi.generate("Why?", steps=2, max_new_tokens=2)


class Processor(SimpleNamespace):
    """As much of a processor as the pipeline uses."""

    def apply_chat_template(self, *args, **kwargs):
        return self.tokenizer.apply_chat_template(*args, padding=True, **kwargs)

    def batch_decode(self, *args, **kwargs):
        return self.tokenizer.batch_decode(*args, **kwargs)


@pytest.fixture(params=["BlockRefinementScheduler", "EntropyBoundScheduler", "DiscreteDDIMScheduler"])
def gemma_pipeline(request, make_gemma, tokenizer, of_a_working_pair):
    diffusers = pytest.importorskip("diffusers", reason="needs the extra entrgi_kernels[diffusers]")
    tokenizer.padding_side = "left"
    scheduler = getattr(diffusers, request.param)

    def make():
        pipe = diffusers.DiffusionGemmaPipeline(make_gemma(), scheduler(), Processor(tokenizer=tokenizer))
        pipe.set_progress_bar_config(disable=True)
        return pipe

    settings = dict(prompt=["Why?", "A longer question?"], gen_length=16, num_inference_steps=4, temperature=0.8)
    with of_a_working_pair():
        make()(**settings)
    return make, settings


@pytest.fixture
def llada2_pipeline(make_network, tokenizer):
    diffusers = pytest.importorskip("diffusers", reason="needs the extra entrgi_kernels[diffusers]")

    def make():
        pipe = diffusers.LLaDA2Pipeline(make_network(), diffusers.BlockRefinementScheduler(), tokenizer)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    settings = dict(prompt="A longer question?", gen_length=12, block_length=8, num_inference_steps=4, temperature=0.8)
    return make, settings


def guided_and_given_back(make, settings, reward, tokenizer):
    never, pipe = make(), make()

    def call(which, seed=0, **changes):
        generator = torch.Generator().manual_seed(seed)
        return which(generator=generator, output_type="seq", **{**settings, **changes}).sequences

    plain = call(never)
    assert torch.equal(call(pipe), plain)
    before = dict(vars(pipe)), dict(vars(pipe.scheduler))
    entrgi_kernels.guide(pipe, reward, reward_tokenizer=tokenizer, **SETTINGS)
    handle = pipe.entrgi
    guided = call(pipe)
    rows = len(guided)
    assert len(handle.score(guided)) == rows and handle.stats.reward_evaluations == 3 * handle.stats.steps > 0
    assert torch.equal(call(pipe), guided)
    up = sum(sum(handle.score(call(pipe, seed))) for seed in range(4))
    base = sum(sum(handle.score(call(never, seed))) for seed in range(4))
    assert up > base
    with handle.paused():
        assert torch.equal(call(pipe), plain)
    signature = inspect.signature(type(pipe.scheduler).step)
    assert list(inspect.signature(pipe.scheduler.step).parameters) == list(signature.parameters)[1:]
    handle.remove()
    assert torch.equal(call(pipe), plain)
    assert vars(pipe).keys() == before[0].keys() and vars(pipe.scheduler).keys() == before[1].keys()
    assert not pipe.model._forward_pre_hooks


def test_the_gemma_pipeline_is_guided_and_given_back(gemma_pipeline, reward, tokenizer):
    guided_and_given_back(*gemma_pipeline, reward, tokenizer)


@pytest.mark.parametrize("editing", [None, 0.5])
def test_the_llada2_pipeline_is_guided_and_given_back(llada2_pipeline, reward, tokenizer, editing):
    make, settings = llada2_pipeline
    guided_and_given_back(make, {**settings, "editing_threshold": editing}, reward, tokenizer)
