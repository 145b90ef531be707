"""accelerate(): DiffusionGemma's loops on the fused operators, tokens as with their own arithmetic."""

from __future__ import annotations

import importlib.util
import inspect
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LogitsProcessor, LogitsProcessorList

import entrgi_kernels
from entrgi_kernels import ops

SCHEDULERS = ["BlockRefinementScheduler", "EntropyBoundScheduler", "DiscreteDDIMScheduler"]
# Sharp temperatures, so that a random network accepts some slots and is sure of some rows before others.
SHARP = dict(max_new_tokens=16, max_denoising_steps=5, t_min=0.02, t_max=0.05)
VARIANTS = [
    dict(max_new_tokens=16, max_denoising_steps=4),
    SHARP,
    {**SHARP, "confidence_threshold": 2.0, "stability_threshold": 0},
    {**SHARP, "t_min": None, "t_max": None},
]


@pytest.fixture
def make_gemma(tokenizer, standins):
    return lambda seed=0: standins.diffusion_gemma(tokenizer, seed)


@pytest.fixture
def call(chat):
    """Calls a model's own generate: sequences."""

    def generate(model, seed=0, **settings):
        torch.manual_seed(seed)
        mask = chat.attention_mask
        return model.generate(chat.input_ids, attention_mask=mask, **{**SHARP, **settings}).sequences

    return generate


class Processor(SimpleNamespace):
    """As much of a processor as the pipeline uses."""

    def apply_chat_template(self, *args, **kwargs):
        return self.tokenizer.apply_chat_template(*args, padding=True, **kwargs)


@pytest.fixture
def make_pipeline(make_gemma, tokenizer, of_a_working_pair):
    diffusers = pytest.importorskip("diffusers", reason="needs the extra entrgi_kernels[diffusers]")
    tokenizer.padding_side = "left"

    def make(scheduler="EntropyBoundScheduler", **config):
        pipe = diffusers.DiffusionGemmaPipeline(
            make_gemma(), getattr(diffusers, scheduler)(**config), Processor(tokenizer=tokenizer)
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe

    with of_a_working_pair():
        run(make(), num_inference_steps=1)
    return make


def run(pipe, seed=0, **settings):
    own = dict(prompt=["Why?", "A longer question?"], gen_length=16, num_inference_steps=4, temperature=0.8)
    generator = torch.Generator().manual_seed(seed)
    return pipe(generator=generator, output_type="seq", **{**own, **settings}).sequences


@pytest.fixture
def keyed_draws(monkeypatch):
    """torch.multinomial as the package's keyed draws, on eager torch and given probabilities."""
    own = torch.multinomial

    def multinomial(probs, num_samples, replacement=False, *, generator=None):
        if probs.shape[-1] == 3:  # the routes of DiscreteDDIM
            return own(probs, num_samples, replacement, generator=generator)
        seed = int(torch.randint(1 << 62, (), generator=generator))
        return ops.sample_tokens(probs.log(), seed=seed, backend="eager")[:, None]

    def use(yes=True):
        monkeypatch.setattr(torch, "multinomial", multinomial if yes else own)

    return use


class Formed(TorchDispatchMode):
    """Which of torch's own operators gave tensors of a size at least."""

    def __init__(self, elements):
        super().__init__()
        self.elements, self.names = elements, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.numel() >= self.elements:
            self.names.add(function._schema.name.removeprefix("aten::"))
        return result


# ---- transformers


@pytest.mark.parametrize("settings", VARIANTS)
def test_generate_gives_the_tokens_that_it_gave(make_gemma, call, settings):
    never, model = make_gemma(), make_gemma()
    before, plain = dict(model.__dict__), call(never, **settings)
    assert entrgi_kernels.accelerate(model, draws="torch") is model
    assert torch.equal(call(model, **settings), plain)
    model.entrgi.remove()
    assert torch.equal(call(model, **settings), plain) and model.__dict__.keys() == before.keys()
    assert not model._forward_pre_hooks and not model.model.decoder._forward_pre_hooks


def test_rows_finish_at_different_steps_in_these_tests(make_gemma, chat):
    torch.manual_seed(0)
    output = make_gemma().generate(chat.input_ids, attention_mask=chat.attention_mask, **VARIANTS[2])
    assert len(set(output.tokens_per_forward.tolist())) > 1


@pytest.mark.parametrize("settings, backend", [(VARIANTS[0], "auto"), (SHARP, "eager"), (VARIANTS[2], "auto")])
def test_keyed_draws_are_those_of_the_own_arithmetic(make_gemma, call, keyed_draws, settings, backend):
    never, model = make_gemma(), make_gemma()
    entrgi_kernels.accelerate(model, backend=backend)
    found = call(model, 1, **settings)
    keyed_draws()
    assert torch.equal(found, call(never, 1, **settings))
    keyed_draws(False)
    assert torch.equal(found, call(model, 1, **settings))
    with model.entrgi.paused():
        assert torch.equal(call(model), call(never))


def test_a_with_block_removes_at_its_end(make_gemma, call):
    never, model = make_gemma(), make_gemma()
    with entrgi_kernels.accelerate(model).entrgi as handle:
        assert (handle.integration, handle.draws, handle.backend) == ("diffusion-gemma", "keyed", "auto")
        assert not torch.equal(call(model), call(never))  # draws of another kind
    assert torch.equal(call(model), call(never)) and not hasattr(model, "entrgi")


def test_probabilities_are_not_formed(make_gemma, call):
    never, model = make_gemma(), make_gemma()
    entrgi_kernels.accelerate(model)
    call(model)
    names = []
    for which in (model, never):
        with Formed(2 * 8 * model.config.text_config.vocab_size) as formed:
            call(which)
        names.append(formed.names)
    # What is left is the head, its cap, and the temperature of the step.
    assert names[0] <= {"mm", "_unsafe_view", "view", "div", "tanh", "mul", "t", "reshape", "_reshape_alias", "detach"}
    assert {"_softmax", "sub", "clamp"} <= names[1]


def test_processors_see_tensors_and_come_before(make_gemma, call):
    class Own(LogitsProcessor):
        def __call__(self, input_ids, scores, cur_step):
            assert type(scores) is torch.Tensor
            return scores.masked_fill(torch.arange(scores.shape[-1]) % 3 == 0, -torch.inf)

    never, model = make_gemma(), entrgi_kernels.accelerate(make_gemma(), draws="torch")
    given = LogitsProcessorList([Own()])
    found = call(model, logits_processor=LogitsProcessorList(given))
    assert torch.equal(found, call(never, logits_processor=given)) and (found[:, -16:] % 3 > 0).all()


def test_functions_that_the_model_has_compiled(make_gemma, call, monkeypatch):
    """With a static cache the model compiles parts and keeps them; here they run as they are, but are kept."""

    def compile(function, **_):
        def compiled(*args, **kwargs):
            assert not any(type(value).__name__ == "Deferred" for value in args)
            return function(*args, **kwargs)

        return compiled

    monkeypatch.setattr(torch, "compile", compile)
    never, model = make_gemma(), make_gemma()
    kept = {"cache_implementation": "static"}
    expected = call(never)
    assert torch.equal(call(model, **kept), expected)
    before = {name: value for name, value in model.__dict__.items() if name.startswith("_compiled")}
    assert "_compiled_decoder_forward" in before
    entrgi_kernels.accelerate(model, draws="torch")
    assert torch.equal(call(model, **kept), expected) and torch.equal(call(model, 1, **kept), call(never, 1))
    assert model._compiled_decoder_forward is not before["_compiled_decoder_forward"]
    model.entrgi.remove()
    assert before == {name: value for name, value in model.__dict__.items() if name.startswith("_compiled")}


def test_the_forward_itself_and_its_gradient(make_gemma, chat):
    never, model = make_gemma(), entrgi_kernels.accelerate(make_gemma())
    size = model.config.text_config.vocab_size
    g = torch.Generator().manual_seed(0)
    logits, canvas = 3 * torch.randn(2, 8, size, generator=g), torch.randint(size, (2, 8), generator=g)
    logits[0, 0, 5:] = -torch.inf
    for mask in (None, torch.tensor([True, False])):
        found = []
        for which in (never, model):
            leaf = logits.clone().requires_grad_()
            inputs = dict(input_ids=chat.input_ids, attention_mask=chat.attention_mask, decoder_input_ids=canvas)
            out = which(**inputs, self_conditioning_logits=leaf, self_conditioning_mask=mask).logits
            out.square().sum().backward()
            found.append((out.detach(), leaf.grad, which.model.decoder.embed_tokens.weight.grad))
            which.zero_grad()
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4 * float(other.abs().max()))


def test_logits_that_hold_nan_are_an_error(make_gemma, call):
    class Broken(LogitsProcessor):
        def __call__(self, input_ids, scores, cur_step):
            scores[1, 3, 7] = torch.nan
            return scores

    for draws in ("keyed", "torch"):
        model = entrgi_kernels.accelerate(make_gemma(), draws=draws)
        with pytest.raises((ValueError, RuntimeError), match="NaN|nan|constraint"):
            call(model, logits_processor=LogitsProcessorList([Broken()]))


# ---- diffusers


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_the_pipeline_gives_the_tokens_that_it_gave(make_pipeline, keyed_draws, scheduler, temperature):
    never, pipe = make_pipeline(scheduler), make_pipeline(scheduler)
    settings = dict(temperature=temperature, confidence_threshold=7.5)  # some canvases end early
    plain = run(never, **settings)
    assert torch.equal(run(pipe, **settings), plain)
    before = vars(pipe).keys() | set(), vars(pipe.scheduler).keys() | set()
    for draws in ("torch", "keyed"):
        entrgi_kernels.accelerate(pipe, draws=draws)
        found = run(pipe, 1, **settings)
        keyed_draws(draws == "keyed")
        assert torch.equal(found, run(never, 1, **settings))
        keyed_draws(False)
        pipe.entrgi.remove()
    assert torch.equal(run(pipe, **settings), plain)
    assert (vars(pipe).keys(), vars(pipe.scheduler).keys()) == before
    assert not pipe.model._forward_pre_hooks and not pipe.model.model.decoder._forward_pre_hooks


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_the_decoder_is_conditioned_on_the_same(make_pipeline, scheduler):
    sharp = dict(t_max=0.05, t_min=0.02) if scheduler == "EntropyBoundScheduler" else {}
    seen = []
    for accelerated in (False, True):
        pipe = make_pipeline(scheduler, **sharp)
        if accelerated:
            entrgi_kernels.accelerate(pipe, draws="torch")
        logits = []
        run(
            pipe,
            callback_on_step_end=lambda pipe, step, timestep, tensors, logits=logits: (
                logits.append(tensors["logits"]) or {}
            ),
            callback_on_step_end_tensor_inputs=["logits"],
        )
        seen.append(torch.stack(logits))
    torch.testing.assert_close(seen[1], seen[0], rtol=1e-4, atol=1e-4)


def test_corrector_sweeps_stay_their_own(make_pipeline):
    never, pipe = (make_pipeline("DiscreteDDIMScheduler", corrector_steps=1) for _ in range(2))
    entrgi_kernels.accelerate(pipe, draws="torch")
    assert torch.equal(run(pipe), run(never))


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_the_pipeline_forms_no_probabilities(make_pipeline, scheduler):
    pipe = entrgi_kernels.accelerate(make_pipeline(scheduler))
    run(pipe)
    with Formed(2 * 8 * pipe.model.config.text_config.vocab_size) as formed:
        run(pipe)
    assert not formed.names & {"_softmax", "_log_softmax", "exponential_", "exp", "sub", "clamp", "add", "where"}


def test_filters_of_a_scheduler_take_the_plain_way(make_pipeline):
    never, pipe = make_pipeline("BlockRefinementScheduler"), make_pipeline("BlockRefinementScheduler")
    entrgi_kernels.accelerate(pipe, draws="torch")
    logits = 3 * torch.randn(2, 8, 50, generator=torch.Generator().manual_seed(0))
    for options in (dict(top_k=5), dict(top_p=0.7), dict(top_k=9, top_p=0.5), dict(mask_token_id=3)):
        found = []
        for which in (never, pipe):
            which.scheduler.set_timesteps(4, block_length=8)
            g = torch.Generator().manual_seed(1)
            canvas = torch.zeros(2, 8, dtype=torch.int64)
            found.append(which.scheduler.step(logits, 0, canvas, temperature=0.7, generator=g, **options))
        for name in ("prev_sample", "transfer_index", "sampled_tokens", "sampled_probs"):
            torch.testing.assert_close(found[0][name], found[1][name])


# ---- what is refused, and guide()


def test_what_it_cannot_serve_is_said(make_gemma, make_network, tokenizer):
    model = make_gemma()
    for target in (make_network(), torch.nn.Linear(2, 2), type(model), None, model.model):
        with pytest.raises(TypeError, match="cannot serve .*expected transformers' DiffusionGemmaForBlockDiffusion"):
            entrgi_kernels.accelerate(target)
    with pytest.raises(ValueError, match="draws='gumbel': expected one of 'keyed', 'torch'"):
        entrgi_kernels.accelerate(model, draws="gumbel")
    with pytest.raises(ValueError, match="backend='fast': expected 'auto' or one of"):
        entrgi_kernels.accelerate(model, backend="fast")
    if not torch.cuda.is_available():
        with pytest.raises(ops.BackendUnavailableError, match="triton"):
            entrgi_kernels.accelerate(model, backend="triton")
    meta = make_gemma().to("meta")
    with pytest.raises(TypeError, match="embeddings .* on meta: expected"):
        entrgi_kernels.accelerate(meta)
    for untouched in (model, meta):
        assert not hasattr(untouched, "entrgi") and not untouched._forward_pre_hooks
    model.entrgi = 3
    with pytest.raises(ValueError, match="attribute 'entrgi' of its own"):
        entrgi_kernels.accelerate(model)


def test_a_target_has_one_handle(make_gemma, reward, tokenizer):
    model = entrgi_kernels.accelerate(make_gemma())
    with pytest.raises(ValueError, match="accelerated already: call its .entrgi.remove"):
        entrgi_kernels.accelerate(model)
    with pytest.raises(ValueError, match="accelerated already: call its .entrgi.remove"):
        entrgi_kernels.guide(model, reward, tokenizer)
    model.entrgi.remove()
    entrgi_kernels.guide(model, reward, tokenizer)
    with pytest.raises(ValueError, match="guided already: call its .entrgi.remove"):
        entrgi_kernels.accelerate(model)


def test_two_targets_of_one_network(make_pipeline, reward, tokenizer):
    never, pipe = make_pipeline(), make_pipeline()
    entrgi_kernels.accelerate(pipe)
    with pytest.raises(ValueError, match="accelerated already, through DiffusionGemmaPipeline"):
        entrgi_kernels.accelerate(pipe.model)
    pipe.entrgi.remove()
    # A guided pipeline of an accelerated network: the guided logits are what the decoder is conditioned on.
    guided = [
        entrgi_kernels.guide(which, reward, reward_tokenizer=tokenizer, learning_rate=2.0, seed=3)
        for which in (never, pipe)
    ]
    entrgi_kernels.accelerate(pipe.model)
    assert torch.equal(run(guided[1]), run(guided[0]))
    pipe.entrgi.remove()
    never.entrgi.remove()
    assert torch.equal(run(pipe), run(never))
    pipe.model.entrgi.remove()
    assert torch.equal(run(pipe), run(never)) and not pipe.model._forward_pre_hooks


def test_no_wait_for_the_device_is_added(make_gemma, call):
    path = Path(__file__).parents[1] / "guidance" / "simulated_device.py"
    spec = importlib.util.spec_from_file_location("simulated_device", path)
    simulated = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(simulated)
    waits = []
    for accelerated in (False, True):
        with simulated.SimulatedDevice() as device:
            model = make_gemma()
            if accelerated:
                entrgi_kernels.accelerate(model, backend="eager")
            logits = torch.randn(2, 8, 50).to(simulated.DEVICE)
            # The step alone: a simulated device does not run attention.
            step_of(model, logits)
            with device.counting() as found:
                step_of(model, logits)
        waits.append(sum(found.values()))
    assert 0 < waits[1] <= waits[0], waits


def step_of(model, logits):
    """One denoising step of transformers' loop on given logits, without a network."""
    config, _ = model._prepare_generation_config(None, max_denoising_steps=4)
    model.config.text_config.vocab_size = logits.shape[-1]
    sampler = model._prepare_sampler(config)
    canvas = sampler.initialize_canvas(2, logits.device)
    names = inspect.signature(type(model)._denoising_step).parameters
    cache = "cache" if "cache" in names else "past_key_values"  # its name since transformers 5.24, and before
    return model._denoising_step(
        decoder_forward=lambda **_: SimpleNamespace(logits=logits),
        current_canvas=canvas,
        argmax_canvas=canvas,
        input_ids=canvas,
        decoder_position_ids=None,
        self_conditioning_logits=None,
        mask_mapping=None,
        finished_denoising=torch.zeros(2, dtype=torch.bool, device=logits.device),
        cur_step=3,
        sampler=sampler,
        logits_processor=model._prepare_logits_processor(config),
        diffusion_stopping_criteria=model._prepare_diffusion_stopping_criteria(config),
        **{cache: None},
    )
