"""Loading what the flags name: adapters as rewards, damaged files, and what is said of them."""

from __future__ import annotations

import json
import shutil
import sys

import pytest
import torch
import transformers

from entrgi import loading, tiny
from entrgi.errors import UsageError
from entrgi_kernels import rewards

pytestmark = pytest.mark.usefixtures("tiny_weights")

CPU = torch.device("cpu")
ASKED = [[{"role": "user", "content": "How was the inn?"}]] * 2
TEXTS = ["It was fine.", "The soup was cold."]
SMALL = ["-K", "1", "-L", "4", "-T", "2", "-M", "1", "--quiet"]


def adapted(folder, auto: str, base: str, task: str, **options):
    """(an adapter in memory, its tokenizer), saved in a folder."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    path = tiny.weights_path(base)
    module = getattr(transformers, auto).from_pretrained(path, **options)
    settings = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type=task, init_lora_weights=False)
    module = peft.get_peft_model(module, settings).eval()
    module.save_pretrained(folder)
    return module, transformers.AutoTokenizer.from_pretrained(path)


@pytest.mark.parametrize(
    ("kind", "auto", "base", "task", "options"),
    [
        ("classifier", "AutoModelForSequenceClassification", "reward", "SEQ_CLS", {}),
        # A causal LM below, whose config knows nothing of one label; the adapter brings the head.
        ("classifier", "AutoModelForSequenceClassification", "diffusion", "SEQ_CLS", {"num_labels": 1}),
        ("likelihood", "AutoModelForCausalLM", "diffusion", "CAUSAL_LM", {}),
    ],
)
def test_an_adapter_scores_as_the_model_in_memory(tmp_path, kind, auto, base, task, options):
    module, tokenizer = adapted(tmp_path, auto, base, task, **options)
    expected = rewards.wrap(module, tokenizer).score_texts(ASKED, TEXTS)
    plain = rewards.wrap(module.unload(), tokenizer).score_texts(ASKED, TEXTS)
    loaded, own = loading.load_reward(str(tmp_path), "auto", CPU, kind=kind)
    assert rewards.wrap(loaded, own).score_texts(ASKED, TEXTS) == expected
    assert expected != plain


def test_adapters_that_cannot_serve(tmp_path, monkeypatch, entrgi, capsys):
    whole = tmp_path / "whole"
    adapted(whole, "AutoModelForSequenceClassification", "reward", "SEQ_CLS")

    def refused(message: str, kind: str = "classifier", folder=whole) -> None:
        with pytest.raises(UsageError, match=message) as caught:
            loading.load_reward(str(folder), "auto", CPU, kind=kind)
        assert "\n" not in str(caught.value) and str(folder) in str(caught.value)

    refused("task_type SEQ_CLS.*AutoModelForCausalLM", "likelihood")
    refused("is an adapter: expected one of a classifier or a causal LM", "similarity")
    assert entrgi("generate", "a", *SMALL, "--model", whole, "--reward", tiny.weights_path("reward")) == 2
    assert f"{whole} is an adapter, expected a whole model: use {whole}/merged" in capsys.readouterr().err

    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(whole, broken)
    tensors = load_file(broken / "adapter_model.safetensors")
    name = next(name for name in tensors if "lora_B" in name)
    save_file({key: value for key, value in tensors.items() if key != name}, broken / "adapter_model.safetensors")
    with pytest.warns(UserWarning, match="missing adapter keys"):
        refused(f"lack {name}", folder=broken)
    (broken / "adapter_model.safetensors").write_bytes(b"12345")
    refused("adapter_model.safetensors is damaged", folder=broken)
    (broken / "adapter_model.safetensors").unlink()
    refused("has no adapter_model.safetensors", folder=broken)
    settings = json.loads((whole / "adapter_config.json").read_text())
    (whole / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": "./gone"}))
    refused("its base model: there is no folder './gone'")
    monkeypatch.setitem(sys.modules, "peft", None)
    refused("needs peft: pip install")


@pytest.mark.parametrize("side", ["model", "reward"])
def test_damaged_models_are_one_line(entrgi, capsys, tmp_path, side):
    places = {name: tiny.weights_path("diffusion" if name == "model" else name) for name in ("model", "reward")}
    shutil.copytree(places[side], tmp_path / "copy")
    places[side] = tmp_path / "copy"
    flags = [word for name, place in places.items() for word in (f"--{name}", place)]

    def refused(message: str) -> None:
        assert entrgi("generate", "a", *SMALL, *flags) == 2
        err = capsys.readouterr().err
        assert err.startswith(f"entrgi generate: error: cannot load --{side} ") and err.count("\n") == 1
        assert message in err

    from safetensors.torch import load_file, save_file

    file = tmp_path / "copy" / "model.safetensors"
    tensors = load_file(file)
    save_file({k: v for k, v in tensors.items() if k != "model.norm.weight"}, file, metadata={"format": "pt"})
    refused("lack model.norm.weight of Qwen3For")
    save_file(tensors | {"model.norm.weight": torch.ones(3)}, file, metadata={"format": "pt"})
    refused(f"model.norm.weight in {file} is [3]")
    file.write_bytes(file.read_bytes()[:-100])
    refused(f"{file} is damaged")


def without_system(folder) -> None:
    """A reward model whose chat template refuses system messages."""
    shutil.copytree(tiny.weights_path("reward"), folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    refusal = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role here') }}{% endif %}"
    tokenizer.chat_template = refusal + tokenizer.chat_template
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize("command", ["generate", "compare", "evaluate", "train"])
def test_a_prompt_that_the_rewards_template_refuses(tmp_path, entrgi, capsys, command):
    without_system(tmp_path / "reward")
    file, out = tmp_path / "p.jsonl", tmp_path / "out"
    system = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "How was the inn?"}]
    rows = [*({"prompt": f"How was inn {i}?"} for i in range(5)), {"prompt": system}, {"prompt": "And?"}]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    sizes = ["-K", "1", "-L", "4", "-T", "2", "-M", "1", "--quiet", "--model", tiny.weights_path("diffusion")]
    own = {
        "generate": ["-f", file, "-o", out, "--overwrite", "--batch-size", "1", "--reward", tmp_path / "reward"],
        "compare": ["-f", file, "--json", out, "--reward", tmp_path / "reward"],
        # The first reward reads them all: it is not run before the second one is asked.
        "evaluate": ["--datasets", file, "-o", out, "--set", "judges=[]", "--no-report", "--rewards",
                     f"{tiny.weights_path('reward')},{tmp_path / 'reward'}"],
        "train": ["--data", file, "-o", out, "--max-steps", "1", "--eval-prompts", "0", "--device", "cpu",
                  "--reward", tmp_path / "reward"],
    }  # fmt: skip
    if command == "train":
        pytest.importorskip("peft")
    if command == "generate":
        out.write_text("kept")
    config = ["tiny"] if command == "evaluate" else []
    assert entrgi(command, *config, *sizes, *own[command]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"entrgi {command}: error: {file}, line 6, for the reward model: the chat template refuses")
    assert last.endswith("no system role here")
    if command == "generate":
        assert out.read_text() == "kept"
    else:
        assert not (out.is_file() or (out / "config.json").exists() or (out / "run.json").exists())


def test_a_missing_chat_template_says_what_to_do_here(tmp_path, entrgi, capsys):
    folder = tmp_path / "reward"
    shutil.copytree(tiny.weights_path("reward"), folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    template, tokenizer.chat_template = tokenizer.chat_template, None
    tokenizer.save_pretrained(folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    command = ["generate", "a", *SMALL, "-o", tmp_path / "o", "--model", tiny.weights_path("diffusion")]
    assert entrgi(*command, "--reward", folder) == 2
    err = capsys.readouterr().err
    assert f"the tokenizer of the reward model {folder} has no chat template: write" in err and err.count("\n") == 1
    data = ["--datasets", "tiny", "-n", "1", "-o", tmp_path / "e", "--model", tiny.weights_path("diffusion")]
    assert entrgi("evaluate", "tiny", *data, "--rewards", folder, "--set", "judges=[]", "--quiet", "--no-report") == 2
    assert f"the tokenizer of the reward model {folder} has no chat template: write" in capsys.readouterr().err
    (folder / "chat_template.jinja").write_text(template)  # as it says
    assert entrgi(*command, "--reward", folder) == 0
