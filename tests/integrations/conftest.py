"""Third-party loops to guide: their real code where `--integrations FOLDER` gives it, the stand-ins everywhere."""

from __future__ import annotations

import importlib
import importlib.util
import json
import shutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import save_file

from tests.guidance import conftest as small

# Small models of that folder, used here too.
diffusion, reward, tokenizer, padded_diffusion = small.diffusion, small.reward, small.tokenizer, small.padded_diffusion
make_diffusion, make_reward = small.make_diffusion_fixture, small.make_reward_fixture

EXAMPLES = Path(__file__).parents[2] / "examples" / "integrations"
LLADA = dict(
    d_model=32,
    n_heads=4,
    n_kv_heads=4,
    n_layers=2,
    mlp_hidden_size=48,
    mlp_ratio=4,
    max_sequence_length=256,
    rope=True,
    rope_full_precision=True,
    rope_theta=10000.0,
    alibi=False,
    include_bias=False,
    include_qkv_bias=False,
    block_type="llama",
    activation_type="silu",
    layer_norm_type="rms",
    layer_norm_with_affine=True,
    attention_layer_norm=False,
    weight_tying=False,
    flash_attention=False,
    input_emb_norm=False,
    scale_logits=False,
    attention_dropout=0.0,
    residual_dropout=0.0,
    embedding_dropout=0.0,
    init_device="cpu",
)


def _load(path: Path, name: str) -> ModuleType:
    """A Python file as a module."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


@contextmanager
def _of_a_working_pair() -> Iterator[None]:
    try:
        yield
    except TypeError as error:
        if "past_key_values" not in str(error):
            raise
        pytest.skip(f"diffusers' own pipeline fails with this transformers (docs/compatibility.md): {error}")


@pytest.fixture(scope="session")
def of_a_working_pair():
    """Skips where diffusers hands transformers the argument that 5.24 renamed, which nothing of ours does."""
    return _of_a_working_pair


@pytest.fixture(scope="session")
def load_code():
    """Loads a Python file as a module."""
    return _load


@pytest.fixture(scope="session")
def standins() -> ModuleType:
    """examples/integrations/standins.py."""
    return _load(EXAMPLES / "standins.py", "standins")


@pytest.fixture(scope="session")
def integration_code(request: pytest.FixtureRequest):
    """Finds a file of a loop's code; skips where the folder is not given or lacks it."""

    def find(*parts: str) -> Path:
        folder = request.config.getoption("--integrations")
        if folder is None:
            pytest.skip("needs the loop's own code: pytest --integrations FOLDER (docs/integrations.md)")
        path = Path(folder, *parts)
        if not path.exists():
            pytest.skip(f"needs {'/'.join(parts)} in the folder of --integrations (docs/integrations.md)")
        return path

    return find


@pytest.fixture(scope="session")
def llada_checkpoint(integration_code, tokenizer, tmp_path_factory) -> Path:
    """A random LLaDA checkpoint with its real code beside it, as on the Hub."""
    source = integration_code("dllm", "dllm", "pipelines", "llada", "models")
    folder = tmp_path_factory.mktemp("llada")
    for name in ("configuration_llada.py", "modeling_llada.py"):
        shutil.copy(source / name, folder)
    tokenizer.save_pretrained(folder)
    size = len(tokenizer)
    config = dict(
        model_type="llada",
        architectures=["LLaDAModelLM"],
        auto_map={
            "AutoConfig": "configuration_llada.LLaDAConfig",
            "AutoModel": "modeling_llada.LLaDAModelLM",
            "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM",
        },
        vocab_size=size,
        embedding_size=size,
        mask_token_id=tokenizer.mask_token_id,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        **LLADA,
    )
    (folder / "config.json").write_text(json.dumps(config))
    width, hidden = LLADA["d_model"], LLADA["mlp_hidden_size"]
    generator = torch.Generator().manual_seed(0)
    shapes = {"wte": (size, width), "ff_out": (size, width)}
    for layer in range(LLADA["n_layers"]):
        shapes |= {f"blocks.{layer}.{name}_proj": (width, width) for name in ("q", "k", "v")}
        shapes |= {f"blocks.{layer}.{name}": (hidden, width) for name in ("ff_proj", "up_proj")}
        shapes |= {f"blocks.{layer}.attn_out": (width, width), f"blocks.{layer}.ff_out": (width, hidden)}
        shapes |= {f"blocks.{layer}.{name}": (width,) for name in ("attn_norm", "ff_norm")}
    shapes["ln_f"] = (width,)
    weights = {
        f"model.transformer.{name}.weight": 0.2 * torch.randn(shape, generator=generator)
        if len(shape) == 2
        else torch.ones(shape)
        for name, shape in shapes.items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def dllm_code(integration_code, monkeypatch):
    """Imports modules of dllm, without what its packages import beside them; given back afterwards."""

    def load(repository: str, *names: str) -> list[ModuleType]:
        root = integration_code(repository, "dllm") / "dllm"
        root = root if (root / "core").exists() else root.parent
        held = {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == "dllm"}
        packages = {".".join(name.split(".")[:depth]) for name in names for depth in range(1, name.count(".") + 1)}
        packages |= {"dllm", "dllm.core", "dllm.core.samplers", "dllm.pipelines", "dllm.pipelines.dream"}
        packages |= {"dllm.pipelines.dream.models"}
        for package in packages:
            stub = ModuleType(package)
            stub.__path__ = [str(root.joinpath(*package.split(".")[1:]))]
            monkeypatch.setitem(sys.modules, package, stub)
        loaded = [importlib.import_module(name) for name in names]
        for name in [name for name in sys.modules if name.partition(".")[0] == "dllm" and name not in packages]:
            # Out of the way of the next repository of that name, yet there while this test runs.
            monkeypatch.setitem(sys.modules, name, sys.modules.pop(name))
        assert not held, "another copy of dllm is loaded"
        return loaded

    return load


@pytest.fixture(scope="session")
def llada_settings(tokenizer) -> dict[str, object]:
    """Of a small LLaDA's config."""
    special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("mask", "pad", "eos")}
    return dict(vocab_size=len(tokenizer), embedding_size=len(tokenizer), **special, **LLADA)


@pytest.fixture
def make_network(standins, make_diffusion, tokenizer):
    """Random networks behind those loops' way of calling, logits in place (LLaDA) or at i - 1 (Dream)."""

    def make(in_place: bool = True, seed: int = 1):
        model = make_diffusion(len(tokenizer), seed)
        model.__class__ = standins.Network
        model.in_place = in_place
        model.config.mask_token_id = tokenizer.mask_token_id
        model.config.entrgi = {"kind": "masked_diffusion", "shift": not in_place}
        return model

    return make


@pytest.fixture
def make_cached(standins, make_network):
    """The same on top of keys and values."""

    def make(in_place: bool = True, seed: int = 1):
        model = make_network(in_place, seed)
        model.__class__ = standins.CachedNetwork
        return model

    return make


@pytest.fixture(scope="session")
def liking(tokenizer):
    """(a reward that likes capital letters, how many of them a sequence holds)."""
    from entrgi_kernels.rewards import CallableReward

    table = torch.zeros(len(tokenizer), 4)
    liked = tokenizer.convert_tokens_to_ids([chr(letter) for letter in range(65, 91)])
    table[liked, 0] = 1.0

    def score(embeddings, mask, positions):
        return 30 * (embeddings[..., 0] * mask).sum(dim=1) / mask.sum(dim=1)

    def count(tokens) -> int:
        return int(torch.isin(tokens, torch.tensor(liked)).sum())

    return CallableReward(score, table, tokenizer), count


@pytest.fixture(params=["stand-in", "real"])
def llada(request, standins, make_network):
    """(make a LLaDA network, LLaDA's generate)."""
    if request.param == "stand-in":
        return make_network, standins.llada_generate
    checkpoint = request.getfixturevalue("llada_checkpoint")
    code = _load(request.getfixturevalue("integration_code")("llada", "generate.py"), "llada_generate")

    def make():
        from entrgi_kernels import models

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            return models.load(checkpoint, trust_remote_code=True)[0].module

    return make, code.generate


@pytest.fixture
def chat(tokenizer):
    """Two prompts of different lengths, left-padded."""
    turns = [[{"role": "user", "content": text}] for text in ("Why?", "A longer question?")]
    tokenizer.padding_side = "left"
    return tokenizer.apply_chat_template(
        turns, add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt"
    )
