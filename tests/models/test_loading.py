"""Recognising and loading: what is asked of a checkpoint, and what is never done without being asked."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from entrgi_kernels import models
from entrgi_kernels.models import MaskedDiffusion
from entrgi_kernels.models.loading import reading

WORDS = ["<pad>", "<eos>", "a", "b", "c", "d", "e", "f", "<mask>"]


def qwen(**changes) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=len(WORDS) + 3, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, initializer_range=0.2, pad_token_id=0, bos_token_id=None, eos_token_id=1,
        **changes,
    )  # fmt: skip
    return Qwen3ForCausalLM(config).eval()


def words(mask: bool = True) -> PreTrainedTokenizerFast:
    backend = Tokenizer(WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<pad>"))
    roles = {"mask_token": "<mask>"} if mask else {}
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>", **roles)


def test_mask_token_is_looked_for_in_order():
    mark = {"kind": "masked_diffusion", "mask_token_id": 5, "shift": True}
    marked = models.wrap(qwen(entrgi=mark, mask_token_id=6), words())
    assert (marked.mask_token_id, marked.shift) == (5, True)
    assert models.wrap(qwen(mask_token_id=6), words()).mask_token_id == 6
    assert models.wrap(qwen(), words()).mask_token_id == 8
    explicit = models.wrap(qwen(entrgi=mark, mask_token_id=6), words(), mask_token_id=7, shift=False)
    assert (explicit.mask_token_id, explicit.shift) == (7, False)
    assert models.wrap(qwen(), words()).shift is False


def test_a_missing_mask_token_says_what_to_pass():
    for tokenizer in (None, words(mask=False)):
        with pytest.raises(ValueError, match="mask_token_id="):
            models.wrap(qwen(), tokenizer)


def test_a_mark_of_another_kind_is_refused():
    with pytest.raises(ValueError, match="reward"):
        models.wrap(qwen(entrgi={"kind": "reward"}), words())


def test_wrapping_twice():
    model = models.wrap(qwen(), words())
    assert models.wrap(model) is model
    assert models.wrap(model, mask_token_id=8, shift=False) is model
    with pytest.raises(ValueError, match="shift=False.*shift=True"):
        models.wrap(model, shift=True)


@pytest.mark.parametrize(("given", "named"), [("org/model", "models.load"), (3, "int"), (None, "NoneType")])
def test_what_is_no_model(given, named):
    with pytest.raises(TypeError, match=named):
        models.wrap(given)


def save(folder, model, tokenizer, **config) -> str:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return str(folder)


def test_load(tmp_path):
    original = qwen(entrgi={"kind": "masked_diffusion", "mask_token_id": 8, "shift": True})
    path = save(tmp_path, original, words())
    model, tokenizer = models.load(path, dtype=torch.float64, device="cpu")
    assert isinstance(model, MaskedDiffusion) and model.shift and model.mask_token_id == 8
    assert model.dtype == torch.float64 and not model.module.training
    assert tokenizer.mask_token_id == 8
    ids = torch.tensor([[2, 3, 8, 8]])
    real = torch.ones_like(ids, dtype=torch.bool)
    expected = models.wrap(original.double()).masked_logits(ids, real, ids == 8)
    torch.testing.assert_close(model.masked_logits(ids, real, ids == 8), expected, rtol=1e-6, atol=1e-6)
    assert models.load(path)[0].dtype == torch.float32  # as stored


def test_load_takes_the_head_that_the_architecture_names(tmp_path):
    config = transformers.BertConfig(
        vocab_size=len(WORDS), hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    torch.manual_seed(0)
    path = save(tmp_path, transformers.BertForMaskedLM(config), words())
    model, _ = models.load(path)
    assert type(model.module).__name__ == "BertForMaskedLM" and model.mask_form == "2d"


REMOTE = """
import torch
from transformers import PretrainedConfig, PreTrainedModel
open({marker!r}, "w").write("ran")
class OwnConfig(PretrainedConfig):
    model_type = "own-diffusion"
class OwnModel(PreTrainedModel):
    config_class = OwnConfig
    def __init__(self, config):
        super().__init__(config)
        self.embed = torch.nn.Embedding(12, 8)
        self.head = torch.nn.Linear(8, 12)
        self.post_init()
    def _init_weights(self, module):
        pass
    def get_input_embeddings(self):
        return self.embed
    def forward(self, input_ids, attention_mask=None):
        x = self.embed(input_ids)
        keep = attention_mask[:, :, None].to(x.dtype) if attention_mask.dim() == 2 else torch.ones_like(x[..., :1])
        return (self.head(x + (x * keep).sum(1, keepdim=True)),)
"""


def test_remote_code_runs_only_when_asked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder, marker = tmp_path / "checkpoint", tmp_path / "ran"
    folder.mkdir()
    (folder / "own.py").write_text(REMOTE.format(marker=str(marker)))
    (folder / "config.json").write_text(
        json.dumps({"model_type": "own-diffusion", "mask_token_id": 8,
                    "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel"}})
    )  # fmt: skip
    words().save_pretrained(folder)
    from safetensors.torch import save_file

    torch.manual_seed(0)
    weights = {"embed.weight": torch.randn(12, 8), "head.weight": torch.randn(12, 8), "head.bias": torch.zeros(12)}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(ValueError, match="own modelling code.*trust_remote_code=True"):
        models.load(str(folder))
    assert not marker.exists()
    model, _ = models.load(str(folder), trust_remote_code=True)
    assert marker.exists() and model.mask_token_id == 8 and model.vocab_size == 12
    torch.testing.assert_close(model.module.embed.weight.detach(), weights["embed.weight"])


def test_unknown_types_without_code(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "nobody-knows"}))
    with pytest.raises(ValueError, match="nobody-knows.*trust_remote_code"):
        models.load(str(tmp_path))


def test_bad_arguments_of_load(tmp_path):
    with pytest.raises(TypeError, match="int"):
        models.load(7)
    with pytest.raises(TypeError, match="'yes'"):
        models.load(str(tmp_path), trust_remote_code="yes")
    with pytest.raises(OSError, match="there is no folder .*nothing"):
        models.load(str(tmp_path / "nothing"))
    with pytest.raises(OSError, match="has no config.json"):
        models.load(str(tmp_path))


def rewrite(path: str, change) -> None:
    """Change the tensors in a checkpoint's file."""
    from safetensors.torch import load_file, save_file

    file = f"{path}/model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def cut(name: str, count: int = 40):
    def damage(folder) -> None:
        file = folder / name
        file.write_bytes(file.read_bytes()[:count])

    return damage


def shard(folder) -> None:
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    index = {"weight_map": {"model.norm.weight": "model-1.safetensors", "lm_head.weight": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def unlink(*names: str):
    def damage(folder) -> None:
        for name in names:
            (folder / name).unlink()

    return damage


def overwrite(name: str, text: str):
    return lambda folder: (folder / name).write_text(text)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut("model.safetensors", 4), r"model\.safetensors is damaged: .*header too small"),
        (cut("model.safetensors", 5000), r"model\.safetensors is damaged: .*"),
        (cut("config.json"), r"config\.json is damaged"),
        (cut("tokenizer.json"), r"tokenizer\.json is damaged"),
        (cut("tokenizer_config.json"), r"tokenizer_config\.json is damaged"),
        (overwrite("config.json", "[1]"), r"config\.json is damaged: it holds a list"),
        (overwrite("config.json", "{}"), r"names no model_type"),
        (overwrite("tokenizer.json", "{}"), r"tokenizer\.json is damaged: Model missing"),
        (overwrite("config.json", '{"model_type": "qwen3", "hidden_size": "many"}'), r"cannot be read: .*hidden_size"),
        (unlink("tokenizer.json"), r"holds no vocabulary of a tokenizer"),
        (shard, r"index\.json is damaged: it names model-2\.safetensors, which is not there"),
    ],
)
def test_a_damaged_file_is_named(tmp_path, damage, message):
    path = save(tmp_path, qwen(), words())
    damage(tmp_path)
    with pytest.raises(ValueError, match=message) as caught:
        models.load(path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_checkpoint_that_lacks_tensors_is_refused(tmp_path):
    path = save(tmp_path, qwen(), words())
    rewrite(path, lambda tensors: tensors.pop("model.layers.0.mlp.up_proj.weight"))
    with pytest.raises(ValueError, match=r"lack model\.layers\.0\.mlp\.up_proj\.weight of Qwen3ForCausalLM"):
        models.load(path)


def test_a_tensor_of_another_shape_is_refused(tmp_path):
    path = save(tmp_path, qwen(), words())
    rewrite(path, lambda tensors: tensors.update({"model.norm.weight": torch.ones(15)}))
    with pytest.raises(
        ValueError, match=r"model\.norm\.weight in .*model\.safetensors is \[15\], but \[16\] in a Qwen3"
    ):
        models.load(path)


def test_a_config_of_fewer_layers_is_refused(tmp_path):
    path = save(tmp_path, qwen(), words())

    def deepen(tensors) -> None:
        tensors.update({key.replace(".0.", ".1."): value.clone() for key, value in tensors.items() if ".0." in key})

    rewrite(path, deepen)
    with pytest.raises(ValueError, match=r"hold model\.layers\.1\..* and \d+ more, but Qwen3ForCausalLM has fewer"):
        models.load(path)


def test_tied_and_surplus_tensors_are_no_fault(tmp_path, caplog):
    original = qwen(tie_word_embeddings=True)
    path = save(tmp_path, original, words())
    rewrite(path, lambda tensors: tensors.update({"surplus.weight": torch.ones(2)}))
    model, _ = models.load(path)
    assert torch.equal(model.module.lm_head.weight, original.lm_head.weight)
    assert "holds tensors that Qwen3ForCausalLM has not: surplus.weight" in caplog.text


def test_ties_that_only_the_modelling_code_knows_are_no_fault(tmp_path, monkeypatch):
    """Older remote code ties its head by hand, and transformers then counts the head as missing."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    code = REMOTE.format(marker=str(tmp_path / "ran")).replace("Linear(8, 12)", "Linear(8, 12, bias=False)")
    code += "    def tie_weights(self, **kwargs):\n        self.head.weight = self.embed.weight\n"
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "own.py").write_text(code)
    (folder / "config.json").write_text(
        json.dumps({"model_type": "own-diffusion", "mask_token_id": 8,
                    "auto_map": {"AutoConfig": "own.OwnConfig", "AutoModel": "own.OwnModel"}})
    )  # fmt: skip
    words().save_pretrained(folder)
    from safetensors.torch import save_file

    save_file({"embed.weight": torch.randn(12, 8)}, folder / "model.safetensors", metadata={"format": "pt"})
    model, _ = models.load(str(folder), trust_remote_code=True)
    assert model.module.head.weight is model.module.embed.weight


def test_an_adapter_is_no_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "somewhere"}')
    with pytest.raises(ValueError, match="is an adapter.*use .*merged .*--save-merged"):
        models.load(str(tmp_path))


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 2 GiB"),
        RuntimeError("unable to mmap 400001414 bytes from file </m/a.bin>: Cannot allocate memory (12)"),
        OSError("Cannot allocate memory (os error 12)"),
        MemoryError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_want_of_memory_is_no_fault_of_the_files(tmp_path, error):
    with pytest.raises(MemoryError, match=str(tmp_path)), reading(str(tmp_path)):
        raise error


def test_want_of_the_device_s_memory_comes_as_torch_says_it(tmp_path):
    """Callers catch that class, or RuntimeError."""
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    with pytest.raises(torch.OutOfMemoryError) as caught, reading(str(tmp_path)):
        raise error
    assert caught.value is error


@pytest.mark.parametrize("number", [121, 122])
def test_other_faults_of_the_disk_are_not_want_of_memory(tmp_path, number):
    with pytest.raises(OSError, match=f"os error {number}"), reading(str(tmp_path / "none")):
        raise OSError(f"Disk quota exceeded (os error {number})")
