"""Dream's and LLaDA's calling conventions, on stand-ins that are as strict as the real code."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from entrgi_kernels import models
from entrgi_kernels.models import Dream, LLaDA

V, MASK, WIDTH = 41, 40, 16


class Attention(nn.Module):
    """One bidirectional attention layer with a rotary-like dependence on positions."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(V, WIDTH)
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.frequencies = nn.Parameter(torch.linspace(0.1, 1.0, WIDTH // 2), requires_grad=False)

    def rotate(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        angle = positions[..., None] * self.frequencies
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()], dim=-1)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor | None, positions: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q, k = self.rotate(q, positions), self.rotate(k, positions)
        return x + nn.functional.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None], attn_mask=mask)[:, 0]


class DreamLike(nn.Module):
    """Takes ``"full"`` or a bool mask [B, 1, S, S], position ids, and no keyword arguments beyond its own."""

    def __init__(self, positions_name: str = "position_ids") -> None:
        super().__init__()
        self.model = Attention()
        self.lm_head = nn.Linear(WIDTH, V, bias=False)
        self.config = SimpleNamespace(model_type="Dream", mask_token_id=MASK, pad_token_id=0, vocab_size=V)
        self.calls: list[str] = []

    def forward(self, input_ids, attention_mask=None, position_ids=None, use_cache=None, num_logits_to_keep=0):
        assert use_cache is False
        batch, length = input_ids.shape
        if isinstance(attention_mask, str):
            assert attention_mask == "full" and position_ids is None
            self.calls.append("full")
            attention_mask, position_ids = None, torch.arange(length).expand(batch, -1)
        else:
            assert attention_mask.dtype == torch.bool and attention_mask.shape == (batch, 1, length, length)
            assert position_ids.shape == (batch, length) and position_ids.min() >= 0
            self.calls.append("mask")
        hidden = self.model(input_ids, attention_mask, position_ids)
        return SimpleNamespace(logits=self.lm_head(hidden[:, -num_logits_to_keep:, :]))

    def get_input_embeddings(self):
        return self.model.embed

    def get_output_embeddings(self):
        return self.lm_head


class DreamWithTokIdx(DreamLike):
    def forward(self, input_ids, attention_mask=None, tok_idx=None, use_cache=None):
        return super().forward(input_ids, attention_mask, tok_idx, use_cache)


class LLaDALike(nn.Module):
    """Takes a 2-D mask or none, counts positions from the left edge, and projects inside."""

    def __init__(self, heeds_mask: bool = True) -> None:
        super().__init__()
        self.model = Attention()
        self.ff_out = nn.Linear(WIDTH, V, bias=False)
        self.config = SimpleNamespace(model_type="llada", mask_token_id=MASK, pad_token_id=0, vocab_size=V)
        self.heeds_mask = heeds_mask
        self.masks: list[torch.Tensor | None] = []

    def forward(self, input_ids, attention_mask=None, use_cache=None):
        assert use_cache is False
        batch, length = input_ids.shape
        self.masks.append(attention_mask)
        if attention_mask is not None:
            assert attention_mask.shape == (batch, length)
            bias = (1.0 - attention_mask.to(torch.float)) * torch.finfo(torch.float).min
            attention_mask = bias[:, None, None, :] if self.heeds_mask else None
        hidden = self.model(input_ids, attention_mask, torch.arange(length).expand(batch, -1))
        return (self.ff_out(hidden),)

    def get_input_embeddings(self):
        return self.model.embed

    def get_output_embeddings(self):
        return self.ff_out


def canvas(pads: tuple[int, ...] = (0, 3)):
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(1, V - 1, (len(pads), 8), generator=generator)
    ids[:, 5:] = MASK
    real = torch.ones_like(ids, dtype=torch.bool)
    for row, count in enumerate(pads):
        ids[row, :count], real[row, :count] = 0, False
    return ids, real, ids == MASK


def expected_rows(module: nn.Module, head: nn.Module, ids, real, masked, shift: bool) -> torch.Tensor:
    rows = []
    for row, valid, hit in zip(ids, real, masked, strict=True):
        alone = row[valid][None]
        with torch.no_grad():
            logits = head(module.model(alone, None, torch.arange(alone.shape[1])[None]))[0]
        rows.append((torch.cat([logits[:1], logits[:-1]]) if shift else logits)[hit[valid]])
    return torch.cat(rows)


@pytest.mark.parametrize("network", [DreamLike, DreamWithTokIdx])
@pytest.mark.parametrize("pads", [(0, 0), (0, 3), (2, 2)])
def test_dream(network, pads):
    module = network()
    model = models.wrap(module)
    assert isinstance(model, Dream) and model.shift and model.mask_token_id == MASK
    assert model.pad_invariant and model.head_on_masked_rows and model.vocab_size == V
    ids, real, masked = canvas(pads)
    module.calls.clear()
    found = model.masked_logits(ids, real, masked)
    assert module.calls == ["mask" if any(pads) else "full"]
    torch.testing.assert_close(found, expected_rows(module, module.lm_head, ids, real, masked, shift=True))


@pytest.mark.parametrize("pads", [(0, 0), (0, 3)])
def test_llada(pads):
    module = LLaDALike()
    model = models.wrap(module)
    assert isinstance(model, LLaDA) and not model.shift and model.mask_token_id == MASK
    assert model.pad_invariant and model.head_on_masked_rows
    ids, real, masked = canvas(pads)
    module.masks.clear()
    found = model.masked_logits(ids, real, masked)
    assert (module.masks[0] is None) == (not any(pads))
    torch.testing.assert_close(found, expected_rows(module, module.ff_out, ids, real, masked, shift=False))


def test_llada_that_ignores_the_mask_is_run_without_padding():
    module = LLaDALike(heeds_mask=False)
    model = models.wrap(module)
    assert not model.pad_invariant
    ids, real, masked = canvas((0, 3))
    found = model.masked_logits(ids, real, masked)
    torch.testing.assert_close(found, expected_rows(module, module.ff_out, ids, real, masked, shift=False))


def test_the_first_slot_of_a_shifting_model_reads_itself():
    module = DreamLike()
    model = Dream(module, MASK)
    ids = torch.full((1, 3), MASK)
    real = torch.ones_like(ids, dtype=torch.bool)
    logits = model.masked_logits(ids, real, real)
    assert torch.equal(logits[0], logits[1]) and not torch.equal(logits[1], logits[2])
