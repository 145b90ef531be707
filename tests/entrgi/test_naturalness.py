"""Nats per token: exact where the answer is known."""

from __future__ import annotations

import math
import types

import pytest
import torch

from entrgi import naturalness

V, EOS, MASK = 11, 0, 10


class Model:
    """Knows nothing (uniform), or knows everything (`truth` gets all the mass)."""

    mask_token_id = MASK
    device = torch.device("cpu")

    def __init__(self, sharp: float = 0.0) -> None:
        self.sharp = sharp
        self.hidden: list[int] = []

    def masked_logits(self, canvas, attention, masked):
        assert (canvas[masked] == MASK).all() and not (canvas[~masked] == MASK).any()
        assert attention[masked].all()
        assert (attention.long().diff(dim=1) >= 0).all() and attention[
            :, -1
        ].all()  # padded on the left, as adapters ask
        self.hidden += masked.sum(dim=1).tolist()
        logits = torch.zeros(int(masked.sum()), V)
        logits[:, 3] = self.sharp
        return logits


TOKENIZER = types.SimpleNamespace(eos_token_id=EOS, pad_token_id=EOS)


@pytest.fixture(autouse=True)
def _prompt_ids(monkeypatch):
    from entrgi_kernels.text import template

    monkeypatch.setattr(template, "encode_prompt", lambda tokenizer, turns: [5] * len(turns[0]["content"]))


def test_a_uniform_model_needs_log_v_for_every_slot() -> None:
    responses = [[3, 3, 3, EOS, EOS, EOS, EOS, EOS], [3] * 8]
    got = naturalness.nats_per_token(Model(), TOKENIZER, ["ab", "abcdef"], responses, rows_per_pass=3)
    # All 8 slots cost log V; they count for 3 tokens and the end, or for 8 tokens.
    assert got == pytest.approx([8 * math.log(V) / 4, math.log(V)], rel=1e-5)


def test_a_model_that_knows_the_text_needs_nothing() -> None:
    got = naturalness.nats_per_token(Model(50.0), TOKENIZER, ["a"], [[3, 3, 3, 3]])
    assert got == pytest.approx([0.0], abs=1e-6)


def test_the_estimate_is_unbiased() -> None:
    """One slot that costs 50 nats whenever it is hidden: 50 over the four tokens, on average over choices."""
    tries = [
        naturalness.nats_per_token(Model(50.0), TOKENIZER, ["a"], [[3, 4, 3, 3]], seed=seed)[0] for seed in range(300)
    ]
    assert sum(tries) / 300 == pytest.approx(50 / 4, rel=0.1)


def test_hidden_slots_are_spread_over_all_counts() -> None:
    model = Model()
    naturalness.nats_per_token(model, TOKENIZER, ["a"], [[3] * 32], samples=8)
    counts = sorted(model.hidden)
    assert all(4 * i + 1 <= count <= 4 * i + 4 for i, count in enumerate(counts)), counts


def test_refusals() -> None:
    with pytest.raises(ValueError, match="one prompt per response"):
        naturalness.nats_per_token(Model(), TOKENIZER, ["a"], [])
    with pytest.raises(ValueError, match="response 0 is empty"):
        naturalness.nats_per_token(Model(), TOKENIZER, ["a"], [[]])
