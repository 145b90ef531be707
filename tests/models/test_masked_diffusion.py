"""Backbones run bidirectionally: every architecture's own logits, at the masked rows alone."""

from __future__ import annotations

import math

import pytest
import torch
import transformers
from torch import nn

from entrgi_kernels import models
from entrgi_kernels.models import MaskedDiffusion

V, MASK, PAD = 61, 60, 0
ARCHITECTURES = [
    ("Qwen3", "sdpa"), ("Qwen3", "eager"), ("Qwen2", "sdpa"), ("Llama", "sdpa"), ("Llama", "eager"), ("Gemma", "sdpa"),
    ("Gemma2", "eager"), ("Mistral", "sdpa"), ("GPT2", "sdpa"), ("Bert", "sdpa"), ("Bert", "eager"),
    ("Roberta", "sdpa"),
]  # fmt: skip


def network(name: str, attention: str = "sdpa", dtype: torch.dtype = torch.float32, **changes) -> nn.Module:
    """A tiny random network with a vocabulary head."""
    settings = dict(
        vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=PAD, bos_token_id=None, eos_token_id=None,
        initializer_range=0.2,
    )  # fmt: skip
    if name in ("Qwen3", "Gemma", "Gemma2"):
        settings["head_dim"] = 8
    if name == "Gemma2":
        settings.update(final_logit_softcapping=2.0, attn_logit_softcapping=5.0)
    if name == "GPT2":
        settings.update(n_embd=32, n_layer=2, n_head=4, n_positions=64)
    settings.update(changes)
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**settings)
    kind = {
        "Bert": "BertForMaskedLM",
        "Roberta": "RobertaForMaskedLM",
        "XLMRoberta": "XLMRobertaForMaskedLM",
        "GPT2": "GPT2LMHeadModel",
    }
    model_class = getattr(transformers, kind.get(name, f"{name}ForCausalLM"))
    return model_class._from_config(config, attn_implementation=attention).to(dtype).eval()


def canvas(batch: int = 3, length: int = 9, pads: tuple[int, ...] = (0, 2, 4)):
    """Token ids with masks strewn in and padding on the left, the mask of real tokens, and the masked slots."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, V - 1, (batch, length), generator=generator)
    ids[torch.rand(batch, length, generator=generator) < 0.4] = MASK
    real = torch.ones_like(ids, dtype=torch.bool)
    for row, count in enumerate(pads):
        ids[row, :count], real[row, :count] = PAD, False
    return ids, real, (ids == MASK) & real


def reference(module: nn.Module, ids: torch.Tensor, real: torch.Tensor, shift: bool) -> list[torch.Tensor]:
    """Logits of each row run alone and without its padding, through the plainest call that is bidirectional."""
    rows = []
    for row, valid in zip(ids, real, strict=True):
        alone = row[valid][None]
        length = alone.shape[1]
        mask = torch.zeros(1, 1, length, length, dtype=next(module.parameters()).dtype)  # additive: nothing is hidden
        with torch.no_grad():
            logits = module(alone, attention_mask=mask).logits[0]
        rows.append(torch.cat([logits[:1], logits[:-1]]) if shift else logits)
    return rows


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize(("name", "attention"), ARCHITECTURES)
def test_logits_are_the_network_s_own(name, attention, shift):
    module = network(name, attention)
    model = MaskedDiffusion(module, MASK, shift=shift)
    assert model.pad_invariant and model.vocab_size == V
    ids, real, masked = canvas()
    found = model.masked_logits(ids, real, masked)
    expected = torch.cat(
        [
            logits[hit[valid]]
            for logits, hit, valid in zip(reference(module, ids, real, shift), masked, real, strict=True)
        ]
    )
    assert found.shape == expected.shape == (int(masked.sum()), V)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["Qwen3", "Gemma2", "Bert"])
def test_head_runs_on_the_masked_rows_alone(name):
    module = network(name, "eager")
    model = MaskedDiffusion(module, MASK, shift=True)
    assert model.head_on_masked_rows
    ids, real, masked = canvas()
    rows_seen = []
    head = module.get_output_embeddings()
    handle = head.register_forward_hook(lambda _m, _args, out: rows_seen.append(out.shape[:-1].numel()))
    alone = model.masked_logits(ids, real, masked)
    model.head_on_masked_rows = False
    full = model.masked_logits(ids, real, masked)
    handle.remove()
    assert rows_seen == [int(masked.sum()), ids.numel()]
    torch.testing.assert_close(alone, full, rtol=1e-5, atol=1e-6)
    assert not head._forward_pre_hooks  # nothing is left on the user's model


def test_soft_capping_reaches_the_selected_rows():
    module = network("Gemma2", "eager", final_logit_softcapping=0.01)
    model = MaskedDiffusion(module, MASK)
    ids, real, masked = canvas()
    assert model.head_on_masked_rows and model.masked_logits(ids, real, masked).abs().max() <= 0.01


def test_a_head_that_mixes_positions_is_run_on_all_of_them():
    class Mixing(nn.Linear):
        def forward(self, hidden):
            return super().forward(hidden - hidden.mean(dim=-2, keepdim=True))

    module = network("Qwen3")
    mixing = Mixing(32, V, bias=False)
    mixing.weight = module.lm_head.weight
    module.lm_head = mixing
    model = MaskedDiffusion(module, MASK)
    assert not model.head_on_masked_rows
    ids, real, masked = canvas(pads=())
    with torch.no_grad():
        expected = module(ids, attention_mask=torch.zeros(3, 1, 9, 9)).logits[masked]
    torch.testing.assert_close(model.masked_logits(ids, real, masked), expected)


def test_a_tied_head_is_not_confused_with_the_embedding():
    module = network("Qwen3", tie_word_embeddings=True)

    def tied(ids=None, **kwargs):
        hidden = module.model(ids, **kwargs).last_hidden_state
        return hidden @ module.model.embed_tokens.weight.T

    class Bare(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.config = module, module.config

        def forward(self, input_ids, attention_mask=None, position_ids=None):
            return tied(input_ids, attention_mask=attention_mask, position_ids=position_ids)

        def get_input_embeddings(self):
            return module.model.embed_tokens

        get_output_embeddings = get_input_embeddings  # the table serves both ends, called with ids only

    model = MaskedDiffusion(Bare(), MASK)
    assert not model.head_on_masked_rows
    ids, real, masked = canvas()
    expected = MaskedDiffusion(module, MASK).masked_logits(ids, real, masked)
    torch.testing.assert_close(model.masked_logits(ids, real, masked), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtype_is_the_network_s_even_under_autocast(dtype):
    module = network("Qwen3", dtype=dtype)
    model = MaskedDiffusion(module, MASK)
    ids, real, masked = canvas()
    expected = model.masked_logits(ids, real, masked)
    assert expected.dtype == model.dtype == dtype and not expected.requires_grad
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode():
        found = model.masked_logits(ids.clone(), real.clone(), masked.clone())
    assert torch.equal(found, expected)
    assert not found.is_inference()
    found.add_(1)  # guidance writes into its logits


def test_grad_mode_is_left_as_it_was():
    model = MaskedDiffusion(network("Qwen3"), MASK)
    for enabled in (True, False):
        with torch.set_grad_enabled(enabled):
            assert not model.masked_logits(*canvas()).requires_grad
            assert torch.is_grad_enabled() == enabled


def test_no_masked_slot_and_given_positions():
    model = MaskedDiffusion(network("Qwen3"), MASK)
    ids, real, masked = canvas()
    none = model.masked_logits(ids, real, torch.zeros_like(masked))
    assert none.shape == (0, V) and none.dtype == torch.float32
    positions = masked.flatten().nonzero().squeeze(1)
    expected = model.masked_logits(ids, real, masked)
    assert torch.equal(model.masked_logits(ids, real, masked, positions=positions), expected)


def test_attention_mask_may_change_in_place():
    """The prepared mask is kept from step to step, so a change of the tensor must be noticed."""
    model = MaskedDiffusion(network("Qwen3"), MASK)
    ids, real, masked = canvas(pads=())
    before = model.masked_logits(ids, real, masked)
    assert torch.equal(model.masked_logits(ids, real, masked), before)
    real[:, 0] = False
    after = model.masked_logits(ids, real, masked)
    assert not torch.allclose(after, before)
    assert torch.equal(after, model.masked_logits(ids, real.clone(), masked))


def test_modes_are_given_back_and_dropout_is_off():
    module = network("Llama", attention_dropout=0.5)
    module.train()
    module.model.norm.eval()
    modes = [child.training for child in module.modules()]
    model = MaskedDiffusion(module, MASK)
    ids, real, masked = canvas()
    assert torch.equal(model.masked_logits(ids, real, masked), model.masked_logits(ids, real, masked))
    assert [child.training for child in module.modules()] == modes


def test_padding_that_disturbs_is_cut_off():
    """A network that counts positions from the left edge and takes none: rows are run in groups of equal padding."""

    class Positional(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.tokens, self.places = nn.Embedding(V, 16), nn.Embedding(32, 16)
            self.head = nn.Linear(16, V)

        def forward(self, input_ids, attention_mask=None):
            x = self.tokens(input_ids) + self.places(torch.arange(input_ids.shape[1]))
            return self.head(x + x.mean(1, keepdim=True))

        def get_input_embeddings(self):
            return self.tokens

    module = Positional()
    for shift in (False, True):
        model = MaskedDiffusion(module, MASK, shift=shift)
        assert not model.pad_invariant
        ids, real, masked = canvas()
        found = model.masked_logits(ids, real, masked)
        expected = []
        for row, valid, hit in zip(ids, real, masked, strict=True):
            with torch.no_grad():
                logits = module(row[valid][None])[0]
            expected.append((torch.cat([logits[:1], logits[:-1]]) if shift else logits)[hit[valid]])
        torch.testing.assert_close(found, torch.cat(expected))


@pytest.mark.parametrize("name", ["Roberta", "XLMRoberta", "Bert", "Qwen3"])
def test_what_stands_in_the_padding_is_not_read(name):
    """Sampler and tokenizer may pad with another id than the config's, by which RoBERTa counts positions."""
    model = MaskedDiffusion(network(name), MASK)
    ids, real, masked = canvas()
    expected = model.masked_logits(ids, real, masked)
    for other in (7, MASK):
        changed = ids.masked_fill(~real, other)
        kept = changed.clone()
        torch.testing.assert_close(model.masked_logits(changed, real, masked), expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(changed, kept)


@pytest.mark.parametrize(("name", "limit"), [("Bert", 64), ("Roberta", 63), ("GPT2", 64), ("Qwen3", None)])
def test_learned_positions_are_counted(name, limit):
    model = MaskedDiffusion(network(name), MASK)
    assert model.position_limit == limit
    ids, real, masked = canvas(2, 64, pads=(2, 1))  # 63 tokens at most
    assert model.masked_logits(ids, real, masked).isfinite().all()
    ids, real, masked = canvas(2, 67, pads=(1, 2))
    if limit is None:
        assert model.masked_logits(ids, real, masked).isfinite().all()
        return
    with pytest.raises(ValueError, match=f"learned {limit} positions.* 66 tokens: expected at most {limit}"):
        model.masked_logits(ids, real, masked)


# ---- refusals


def test_causal_networks_are_refused():
    class Deaf(nn.Module):
        """Ignores whatever mask it is given."""

        def __init__(self):
            super().__init__()
            self.inner = network("Qwen3")
            self.config = self.inner.config

        def forward(self, input_ids, attention_mask=None):
            return self.inner(input_ids).logits

        def get_input_embeddings(self):
            return self.inner.get_input_embeddings()

    with pytest.raises(ValueError, match="causally.*attn_implementation='sdpa'"):
        MaskedDiffusion(Deaf(), MASK)
    MaskedDiffusion(network("Qwen3"), MASK)  # the same network, when the mask reaches it


def test_recurrent_networks_are_refused():
    torch.manual_seed(0)
    config = transformers.MambaConfig(vocab_size=V, hidden_size=16, num_hidden_layers=1, state_size=4)
    with pytest.raises(ValueError, match="MambaForCausalLM"):
        MaskedDiffusion(transformers.MambaForCausalLM(config), MASK)


def test_damaged_weights_are_named():
    module = network("Qwen3")
    with torch.no_grad():
        module.model.embed_tokens.weight[17, 3] = math.nan  # a token that no probe uses
    with pytest.raises(ValueError, match=r"embed_tokens\.weight.*NaN"):
        MaskedDiffusion(module, MASK)


@pytest.mark.parametrize(
    ("arguments", "error", "named"),
    [
        ({"mask_token_id": V}, ValueError, f"{V}.*0 to {V - 1}"),
        ({"mask_token_id": -1}, ValueError, "-1"),
        ({"mask_token_id": "<mask>"}, TypeError, "'<mask>'"),
        ({"mask_token_id": MASK, "shift": 1}, TypeError, "1"),
        ({"mask_token_id": MASK, "module": "gpt2"}, TypeError, "str"),
    ],
)
def test_bad_arguments_are_named(arguments, error, named):
    arguments = {"module": network("Qwen3"), **arguments}
    with pytest.raises(error, match=named):
        MaskedDiffusion(**arguments)


def test_bad_canvases_are_named():
    model = MaskedDiffusion(network("Qwen3"), MASK)
    ids, real, masked = canvas()
    for given, named in (
        ((ids[0], real, masked), r"\(9,\)"),
        ((ids.float(), real, masked), "float32"),
        ((ids, real.long(), masked), "int64"),
        ((ids, real, masked[:, :4]), r"\(3, 4\)"),
    ):
        with pytest.raises(ValueError, match=named):
            model.masked_logits(*given)


def test_protocol():
    model = MaskedDiffusion(network("Qwen3"), MASK)
    assert isinstance(model, models.DiffusionModel)
    assert model.device == torch.device("cpu")
