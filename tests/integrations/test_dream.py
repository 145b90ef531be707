"""Dream: the real modelling and generation code where given, a stand-in of its loop elsewhere; the pair of hooks."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch

import entrgi_kernels
from entrgi_kernels import models
from entrgi_kernels.integrations import DreamHooks


@pytest.fixture(scope="session")
def dream_checkpoint(integration_code, tokenizer, tmp_path_factory) -> Path:
    """A random Dream checkpoint with its real code beside it, as on the Hub."""
    source = integration_code("dllm", "dllm", "pipelines", "dream", "models")
    folder = tmp_path_factory.mktemp("dream")
    for name in ("configuration_dream.py", "modeling_dream.py", "generation_utils.py"):
        shutil.copy(source / name, folder)
    tokenizer.save_pretrained(folder)
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("mask", "pad", "eos")}
    config = dict(
        model_type="Dream",
        architectures=["DreamModel"],
        auto_map={"AutoConfig": "configuration_dream.DreamConfig", "AutoModel": "modeling_dream.DreamModel"},
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
        tie_word_embeddings=False,
        torch_dtype="float32",
        **special,
    )
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps(special))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        models.compat.provide_default_rope()
    from transformers import AutoConfig, AutoModel

    torch.manual_seed(0)
    network = AutoModel.from_config(AutoConfig.from_pretrained(folder, trust_remote_code=True), trust_remote_code=True)
    from safetensors.torch import save_file

    save_file(network.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(params=["stand-in", "real"])
def make_dream(request, standins, make_network):
    """Makes Dream networks in float64."""
    if request.param == "stand-in":

        def make():
            model = make_network(in_place=False)
            model.__class__ = standins.Dream
            return model.double()

        return make
    folder = request.getfixturevalue("dream_checkpoint")

    def load():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            return models.load(folder, trust_remote_code=True, dtype=torch.float64)[0].module

    return load


def call(model, chat, seed=0, **settings):
    torch.manual_seed(seed)
    arguments = dict(max_new_tokens=6, steps=6, temperature=0.8, top_k=1, alg="entropy")
    return model.diffusion_generate(chat.input_ids, attention_mask=chat.attention_mask, **{**arguments, **settings})


def stable_topk(monkeypatch):
    """Ties of Dream's ranking go by position, as ours do."""
    topk = torch.topk

    def stable(x, k, *args, **kwargs):
        if args or kwargs or x.dtype is torch.int64 or k == 1:
            return topk(x, k, *args, **kwargs)
        order = x.argsort(dim=-1, descending=True, stable=True)[..., : int(k)]
        return torch.return_types.topk((x.gather(-1, order), order))

    monkeypatch.setattr(torch, "topk", stable)


@pytest.mark.parametrize("alg", ["maskgit_plus", "entropy"])
def test_dream_token_for_token(make_dream, reward, tokenizer, chat, monkeypatch, alg):
    """The fused loop, unguided, is Dream's own; and guided it is Dream's own loop with the pair of hooks."""
    stable_topk(monkeypatch)
    settings = {"alg": alg, "temperature": 0.0, "top_k": None}  # the best token: no draw, no ties
    model = make_dream()
    plain = call(model, chat, **settings)
    temperature = {**{"temperature": 0.8, "top_k": 1}, **settings}
    common = dict(confidence="guided", deprioritize_eos=False, learning_rate=1.0, suppress_undrawable=False, seed=1)
    sampling = {name: temperature[name] for name in ("temperature", "top_k")}
    hooks = DreamHooks(model, reward.double(), tokenizer, **common, **sampling, top_p=None)
    by_hooks = call(model, chat, **settings, **hooks)
    assert len(hooks.rewards) == 2 and not torch.equal(by_hooks, plain)
    entrgi_kernels.guide(model, reward, tokenizer, method="none", **common)
    assert torch.equal(call(model, chat, **settings), plain)
    model.entrgi.remove()
    entrgi_kernels.guide(model, reward, tokenizer, **common)
    assert torch.equal(call(model, chat, **settings), by_hooks)
    assert model.entrgi.rewards == pytest.approx(hooks.rewards)
    model.entrgi.remove()
    assert torch.equal(call(model, chat, **settings), plain)


@pytest.mark.parametrize("in_place", [True, False])
def test_what_a_hook_masks_is_filled_again_as_in_dreams_own_loop(make_dream, reward, tokenizer, chat, in_place):
    model, mask, start = make_dream(), tokenizer.mask_token_id, chat.input_ids.shape[1]
    counts = []

    def hook(step, x, logits):
        if step is None:
            return x
        x = x if in_place else x.clone()
        counts.append((x[:, start:] == mask).sum().item())
        if step == 3:
            x[:, start:] = mask
        elif step == 4:
            x[:, start + 1] = 70  # filled by the hook: not to be drawn again
        return x

    settings = dict(temperature=0.0, top_k=None, alg="maskgit_plus", generation_tokens_hook_func=hook)
    plain = call(model, chat, **settings)
    theirs = list(counts)
    counts.clear()
    entrgi_kernels.guide(model, reward.double(), tokenizer, method="none", seed=0, deprioritize_eos=False)
    model.entrgi.sampler.config = model.entrgi.sampler.config.replace(suppress_undrawable=False)
    assert torch.equal(call(model, chat, **settings), plain) and counts == theirs
    assert counts[4] > counts[3] and counts[-1] == 0 and (plain[:, start + 1] == 70).all()


def test_dreams_rewards_go_up(make_dream, reward, tokenizer, chat):
    model, settings = make_dream(), dict(temperature=1.0, top_k=None)
    turns = [[{"role": "user", "content": text}] for text in ("Why?", "A longer question?")]
    base = fused = 0.0
    for seed in range(4):
        plain = call(model, chat, seed, **settings)[:, chat.input_ids.shape[1] :].tolist()
        with entrgi_kernels.guide(
            model, reward.double(), tokenizer, learning_rate=5.0, top_p=None, seed=seed
        ).entrgi as guidance:
            call(model, chat, **settings)
            fused += sum(guidance.rewards)
            base += sum(guidance.sampler.score(turns, plain))
    assert fused > base


def test_histories_hooks_and_outputs_of_dreams_own(make_dream, reward, tokenizer, chat):
    model = make_dream()
    seen = []

    def tokens_hook(step, x, logits):
        seen.append(step)
        return x

    wanted = dict(return_dict=True, output_history=True, generation_tokens_hook_func=tokens_hook)
    plain = call(model, chat, **wanted)
    steps = list(seen)
    seen.clear()
    entrgi_kernels.guide(model, reward.double(), tokenizer, seed=0)
    guided = call(model, chat, **wanted)
    assert type(guided).__name__ == type(plain).__name__
    assert seen == steps and len(guided.history) == len(plain.history)
    assert guided.sequences.shape == plain.sequences.shape


def test_dream_as_loaded_by_the_user_is_repaired_in_passing(dream_checkpoint, reward, tokenizer, chat):
    """from_pretrained of the user's own: the logits are those of the weights once the model is wrapped."""
    from safetensors.torch import load_file
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.from_pretrained(dream_checkpoint, trust_remote_code=True)
    built = AutoModel.from_config(config, trust_remote_code=True).eval()
    built.load_state_dict(load_file(dream_checkpoint / "model.safetensors"))
    loaded = AutoModel.from_pretrained(dream_checkpoint, trust_remote_code=True).eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        entrgi_kernels.guide(loaded, reward, tokenizer)
    ids = chat.input_ids[:1, -8:]
    with torch.no_grad():
        torch.testing.assert_close(loaded(ids).logits, built(ids).logits)
