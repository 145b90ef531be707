"""Public loops that call the model on top of a cache, unedited: their own code, on small random networks."""

from __future__ import annotations

import contextlib
import importlib
import sys
import types

import pytest
import torch
from transformers import DynamicCache

import entrgi_kernels
from entrgi_kernels import models
from tests.models.test_block_causal_real import flash_attention

SETTINGS = dict(learning_rate=5.0, temperature=1.0, top_p=None, seed=3)


def import_from(request, folder, *names):
    """Modules of a folder that is no package of ours; forgotten after the test."""
    tops = {name.partition(".")[0] for name in names}

    def forget():
        for name in [name for name in sys.modules if name.partition(".")[0] in tops]:
            del sys.modules[name]

    forget()
    request.addfinalizer(forget)
    request.getfixturevalue("monkeypatch").syspath_prepend(str(folder))
    return [importlib.import_module(name) for name in names]


@pytest.fixture
def prompt(tokenizer):
    def make(text="A longer question?", length=None):
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )["input_ids"]
        return ids if length is None else torch.cat([ids[:, : length - 12], ids[:, -12:]], dim=1)

    return make


def sdar(request, repository):
    code = request.getfixturevalue("load_code")(
        request.getfixturevalue("integration_code")(repository, "generate.py"), f"{repository}_generate"
    )
    ids, mask = request.getfixturevalue("prompt")(), request.getfixturevalue("tokenizer").mask_token_id

    def call(model):
        told = dict(gen_length=12, block_length=4, denoising_steps=4, temperature=0.8, confidence_threshold=2.0)
        return code.block_diffusion_generate(model, {"input_ids": ids}, mask, **told)[:, ids.shape[1] :]

    # SDAR's own masks are for a network that is on the Hub alone.
    return request.getfixturevalue("make_cached") if repository == "sdar" else lambda: random_sdar(request), call


def random_sdar(request):
    source = request.getfixturevalue("integration_code")("dllm-rl", "models", "sdar")
    tokenizer = request.getfixturevalue("tokenizer")
    flash_attention(request.getfixturevalue("monkeypatch"))
    models.compat.provide_default_rope()
    models.compat.provide_older_names()
    monkeypatch = request.getfixturevalue("monkeypatch")
    pair = lambda cache, layer: (cache.layers[layer].keys, cache.layers[layer].values)  # noqa: E731
    monkeypatch.setattr(DynamicCache, "__getitem__", pair, raising=False)  # of transformers 4
    package = types.ModuleType("published_sdar")
    package.__path__ = [str(source)]
    monkeypatch.setitem(sys.modules, package.__name__, package)
    names = ("configuration_sdar", "modeling_sdar")
    configuration, modelling = (importlib.import_module(f"{package.__name__}.{name}") for name in names)
    config = configuration.SDARConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=256,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.3,
        fuse_cross_entropy=False,
        use_sliding_window=False,
    )
    config._attn_implementation = "sdpa"
    torch.manual_seed(0)
    model = modelling.SDARForCausalLM(config).eval()
    with torch.no_grad():
        model.lm_head.weight[tokenizer.eos_token_id] = 0
    return model


def fast_dllm(request, part):
    """A folder of Fast-dLLM: at its top at first, below v1 since there is a second version."""
    find = request.getfixturevalue("integration_code")
    return find("fast-dllm", part) if (find("fast-dllm") / part).exists() else find("fast-dllm", "v1", part)


def random_llada(request, configuration, network):
    def make():
        config = configuration(**request.getfixturevalue("llada_settings"))
        config.use_cache = False
        torch.manual_seed(0)
        model = network(config).eval()
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if weight.dim() > 1:
                    weight.normal_(std=0.2)
                else:
                    weight.fill_(1.0 if name.endswith("weight") else 0.0)
        return model

    return make


def fast_llada(request, function):
    pytest.importorskip("einops", reason="Fast-dLLM's LLaDA imports it")
    folder = fast_dllm(request, "llada")
    code, configuration, modelling = import_from(
        request, folder, "generate", "model.configuration_llada", "model.modeling_llada"
    )

    make = random_llada(request, configuration.LLaDAConfig, modelling.LLaDAModelLM)
    ids, mask = request.getfixturevalue("prompt")(), request.getfixturevalue("tokenizer").mask_token_id

    def call(model):
        told = dict(steps=8, gen_length=8, block_length=4, temperature=0.8, mask_id=mask)
        return getattr(code, function)(model, ids, **told)[0][:, ids.shape[1] :]

    return make, call


def fast_dream(request, dual):
    folder = fast_dllm(request, "dream")
    tokenizer, ids = request.getfixturevalue("tokenizer"), request.getfixturevalue("prompt")()
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("mask", "pad", "eos")}
    models.compat.provide_default_rope()
    names = ("configuration_dream", "modeling_dream", "generation_utils_block", "generation_utils")
    configuration, modelling, generation, older = import_from(request, folder, *(f"model.{name}" for name in names))

    # Written for older versions of transformers, which do not hand it arguments.
    monkeypatch = request.getfixturevalue("monkeypatch")
    for code in (generation, older):
        monkeypatch.setattr(code.DreamGenerationConfig, "validate", lambda self, **kwargs: None)

    def make():
        torch.manual_seed(0)
        config = configuration.DreamConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=256,
            initializer_range=0.2,
            **special,
        )
        model = modelling.DreamModel(config).eval()
        model.generation_config = generation.DreamGenerationConfig(**special)
        for name in ("diffusion_generate", "_sample"):
            setattr(model, name, types.MethodType(getattr(generation.DreamGenerationMixin, name), model))
        models.compat.mend_generation_config(model)
        return model

    def call(model):
        told = dict(max_new_tokens=8, steps=8, block_length=4, temperature=0.8, alg="confidence_threshold")
        return model.diffusion_generate(ids, threshold=2.0, dual_cache=dual, **told)[:, ids.shape[1] :]

    return make, call


def fast_v2(request, batch, **more):
    path = request.getfixturevalue("integration_code")("fast-dllm", "v2", "generation_functions.py")
    code = request.getfixturevalue("load_code")(path, "fast_dllm_v2")
    tokenizer, prompt = request.getfixturevalue("tokenizer"), request.getfixturevalue("prompt")

    def sample(self, logits, top_p=0.95, temperature=1.0):  # of the checkpoint's own file
        probabilities = (logits / temperature).softmax(dim=-1)
        return torch.multinomial(probabilities.flatten(0, 1), 1).view(logits.shape[:2]), probabilities

    def make():
        model = request.getfixturevalue("make_cached")(False)
        model.sample_with_top_p = types.MethodType(sample, model)
        functions = code.Fast_dLLM_QwenForCausalLM
        for name in ("batch_sample", "mdm_sample_with_visualization"):
            setattr(model, name, types.MethodType(getattr(functions, name), model))
        return model

    told = dict(mask_id=tokenizer.mask_token_id, threshold=2.0, stop_token=9999, temperature=0.8, block_size=8)
    if not batch:
        ids, seen = prompt(), {}

        def call(model):
            model.model.bd_size = 8
            with contextlib.suppress(KeyError):
                for state in model.mdm_sample_with_visualization(
                    ids, tokenizer, max_new_tokens=16, small_block_size=4, **told
                ):
                    seen["state"] = state
            return torch.tensor([tokenizer(seen["state"], add_special_tokens=False)["input_ids"]])

        return make, call
    ids = torch.cat([prompt(length=40), prompt("What else is there?", length=40)])

    def call(model):
        rows = model.batch_sample(
            ids.clone(),
            tokenizer,
            max_new_tokens=16,
            small_block_size=4,
            min_len=40,
            seq_len=torch.tensor([40, 40]),
            **{"reuse_k": 1, **told, **more},
        )
        return torch.stack([rows[0], rows[1]])[:, 40:]

    return make, call


def llada2(request, version, **told):
    source = request.getfixturevalue("integration_code")("dllm", "dllm", "pipelines", version, "models")
    tokenizer, ids = request.getfixturevalue("tokenizer"), request.getfixturevalue("prompt")()
    models.compat.provide_default_rope()
    # Of older versions of transformers, asked for at import alone.
    request.getfixturevalue("monkeypatch").setattr(
        "transformers.utils.import_utils.is_torch_fx_available", lambda: False, raising=False
    )
    suffix = "21" if version == "llada21" else "2"
    package = types.ModuleType(f"{version}_models")
    package.__path__ = [str(source)]
    sys.modules[package.__name__] = package
    configuration = importlib.import_module(f"{package.__name__}.configuration_llada{suffix}_moe")
    modelling = importlib.import_module(f"{package.__name__}.modeling_llada{suffix}_moe")

    def make():
        torch.manual_seed(0)
        kind = next(value for name, value in vars(configuration).items() if name.endswith("MoeConfig"))
        config = kind(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            num_experts=4,
            num_shared_experts=1,
            num_experts_per_tok=2,
            n_group=1,
            topk_group=1,
            moe_intermediate_size=16,
            first_k_dense_replace=1,
            max_position_embeddings=256,
            initializer_range=0.3,
            pad_token_id=tokenizer.pad_token_id,
            attn_implementation="sdpa",
        )
        kind = next(value for name, value in vars(modelling).items() if name.endswith("MoeModelLM"))
        model = kind(config).to(torch.bfloat16).eval()
        with torch.no_grad():  # where the end is likeliest, nothing behind it is guided
            model.lm_head.weight[tokenizer.eos_token_id] = 0
        return model

    def call(model):
        mask = tokenizer.mask_token_id
        given = dict(temperature=0.8, block_length=8, gen_length=16, steps=8, threshold=2.0, eos_id=9999, mask_id=mask)
        return model.generate(ids, **given, **told)

    return make, call


def dllm(request, module, name, make_model, more=(), **told):
    code, _, *others = request.getfixturevalue("dllm_code")("dllm", module, "dllm.core.schedulers", *more)
    tokenizer, prompt = request.getfixturevalue("tokenizer"), request.getfixturevalue("prompt")
    inputs = [prompt(length=40)[0].tolist(), prompt("What else is there?", length=40)[0].tolist()]
    if name == "BD3LMSampler":
        inputs[1] = prompt("Why?")[0].tolist()

    def make():
        return getattr(code, name)(make_model(*others), tokenizer)

    def call(sampler):
        tokens = sampler.sample(inputs, **told)
        return getattr(tokens, "sequences", tokens)[:, -told["max_new_tokens"] :]

    return make, call


def dllm_llada(request, cache):
    def make(configuration, modelling):
        return random_llada(request, configuration.FastdLLMLLaDAConfig, modelling.FastdLLMLLaDAModelLM)()

    given = dict(max_new_tokens=8, block_size=4, steps=8, temperature=0.8, return_dict=False, use_cache=cache)
    folder = "dllm.pipelines.fastdllm.llada"
    more = [f"{folder}.models.{name}_llada" for name in ("configuration", "modeling")]
    return dllm(request, f"{folder}.sampler", "FastdLLMLLaDASampler", make, more, **given)


def nemotron(request):
    def make():
        model = request.getfixturevalue("make_cached")(True)
        model.mask_token_id, model.encoder = model.config.mask_token_id, types.SimpleNamespace(layers=[])
        return model

    told = dict(max_new_tokens=12, block_length=4, temperature=0.8, threshold=2.0, max_thinking_tokens=None)
    module = "dllm.pipelines.nemotron_diffusion.sampler"
    return dllm(request, module, "NemotronDiffusionSampler", make, eos_token_id=9999, **told)


def bd3lm(request, **told):
    given = dict(max_new_tokens=12, block_size=4, steps=12, temperature=0.8, return_dict=False)
    make_cached = request.getfixturevalue("make_cached")
    return dllm(request, "dllm.core.samplers.bd3lm", "BD3LMSampler", make_cached, **given, **told)


LOOPS = {
    "dllm, Nemotron diffusion": nemotron,
    "dllm, BD3LM": bd3lm,
    "dllm, BD3LM, scaled": lambda request: bd3lm(request, cfg_scale=0.5),
    "dllm, LLaDA, prefix cache": lambda request: dllm_llada(request, "prefix"),
    "dllm, LLaDA, dual cache": lambda request: dllm_llada(request, "dual"),
    "LLaDA2.0": lambda request: llada2(request, "llada2"),
    "LLaDA2.1": lambda request: llada2(request, "llada21", editing_threshold=0.3, max_post_steps=2),
    "SDAR": lambda request: sdar(request, "sdar"),
    "TraDo": lambda request: sdar(request, "dllm-rl"),
    "Fast-dLLM, LLaDA, prefix cache": lambda request: fast_llada(request, "generate_with_prefix_cache"),
    "Fast-dLLM, LLaDA, dual cache": lambda request: fast_llada(request, "generate_with_dual_cache"),
    "Fast-dLLM, Dream, prefix cache": lambda request: fast_dream(request, False),
    "Fast-dLLM, Dream, dual cache": lambda request: fast_dream(request, True),
    "Fast-dLLM v2": lambda request: fast_v2(request, False),
    "Fast-dLLM v2, a batch": lambda request: fast_v2(request, True),
    "Fast-dLLM v2, a block cache": lambda request: fast_v2(request, True, use_block_cache=True, reuse_k=4),
}


@pytest.mark.parametrize("name", LOOPS)
def test_a_public_loop_is_guided_and_given_back(name, request, tokenizer, liking, record_property):
    make, run = LOOPS[name](request)
    reward, count = liking
    never, model = make(), make()

    def call(which, seed=0):
        torch.manual_seed(seed)
        return run(which)

    plain = [call(never, seed) for seed in range(3)]
    entrgi_kernels.guide(model, reward, tokenizer, mask_token_id=tokenizer.mask_token_id, **SETTINGS)
    assert model.entrgi.integration == ("dllm" if name.startswith("dllm") else "forward")
    guided = [call(model, seed) for seed in range(3)]
    assert torch.equal(call(model), guided[0])
    up, base = sum(map(count, guided)), sum(map(count, plain))
    slots = sum(tokens.numel() for tokens in guided)
    print(f"{name}: {base} liked tokens of {slots} as it was, {up} guided; {model.entrgi.stats}")
    assert up > base
    with model.entrgi.paused():
        assert torch.equal(call(model), plain[0])
    model.entrgi.remove()
    assert torch.equal(call(model), plain[0]) and "forward" not in vars(model)
