"""--reward-kind: what the command line makes of models that are no classifiers."""

from __future__ import annotations

import json

import pytest
import torch
import transformers

from entrgi import tiny

SMALL = ["-K", "1", "-L", "4", "-T", "2", "-M", "1", "--quiet", "--format", "jsonl"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random causal LM and a random encoder, saved with a tokenizer that knows yes and no."""
    _, tokenizer = tiny.load_diffusion()
    tokenizer.add_tokens(["yes", "no"])
    small = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4)
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("models")
    for name, kind in (("causal", "LlamaForCausalLM"), ("encoder", "BertModel")):
        config = getattr(transformers, kind.removesuffix("ForCausalLM").removesuffix("Model") + "Config")
        getattr(transformers, kind)(config(vocab_size=len(tokenizer), **small)).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.mark.parametrize(
    "name, flags, low, high",
    [
        ("causal", ["--reward-kind", "likelihood"], -20, 0),
        ("causal", ["--reward-kind", "judge", "--question", "Is it kind?"], -5, 5),
        ("encoder", ["--reward-kind", "similarity", "--target", "A fine place."], -1, 1),
    ],
)
def test_other_kinds(tiny_weights, entrgi, folder, tmp_path, name, flags, low, high):
    out = tmp_path / "out.jsonl"
    models = ["--model", tiny.weights_path("diffusion"), "--reward", folder / name]
    assert entrgi("generate", "How was the inn?", *SMALL, "-o", out, *models, *flags) == 0
    record = json.loads(out.read_text())
    assert low < record["samples"][0]["reward"] < high


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--reward-kind", "judge"], "--question and --reward-kind judge go together"),
        (["--target", "x"], "--target and --reward-kind similarity go together"),
        (["--reward-kind", "likelihood"], "needs --model and --reward"),
    ],
)
def test_flags_that_do_not_fit(entrgi, capsys, flags, message):
    assert entrgi("generate", "a", *flags) == 2
    assert message in capsys.readouterr().err
