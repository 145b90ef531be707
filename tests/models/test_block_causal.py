"""Block-causal models: whole canvases against each row alone, and kept blocks against whole canvases."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path

import pytest
import torch
import transformers
from torch import nn

from entrgi_kernels import models
from entrgi_kernels.models import BlockCausal, MaskedDiffusion, forwards_of
from tests.models.test_masked_diffusion import MASK, PAD, V, network

B = 4
PROMPTS = (5, 3, 8, 1)  # a full block and one more, less than a block, two blocks, next to nothing


def mixture(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.Qwen3MoeConfig(
        vocab_size=V, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_experts=4,
        num_experts_per_tok=2, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        pad_token_id=PAD, initializer_range=0.2,
    )  # fmt: skip
    # The grouped product of experts knows no doubles.
    kind = transformers.Qwen3MoeForCausalLM
    return kind._from_config(config, attn_implementation="sdpa", experts_implementation="eager").to(dtype).eval()


class Wrapper(nn.Module):
    """A network around another; subclasses call it their own way."""

    def __init__(self, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.inner = network("Qwen3", dtype=torch.float64) if inner is None else inner
        self.config = self.inner.config

    def get_input_embeddings(self):
        return self.inner.get_input_embeddings()

    def get_output_embeddings(self):
        return self.inner.get_output_embeddings()


class OwnMask(Wrapper):
    """As Fast-dLLM v2: ignores the mask it is given, counts its own blocks, stores only what it is told to."""

    def forward(
        self, input_ids, attention_mask=None, position_ids=None, past_key_values=None, use_cache=None,
        update_past_key_values=False, block_size=32,
    ):  # fmt: skip
        kept = 0 if past_key_values is None else past_key_values.get_seq_length()
        assert past_key_values is None or update_past_key_values, "would need to read the cache without adding to it"
        block = torch.arange(kept + input_ids.shape[1]) // block_size
        seen = (block <= block[kept:, None])[None, None].expand(len(input_ids), -1, -1, -1)
        return self.inner(
            input_ids, attention_mask=seen, position_ids=position_ids, past_key_values=past_key_values,
            use_cache=use_cache,
        )  # fmt: skip


class StoresWhenTold(Wrapper):
    """As SDAR: keys are stored with ``store_kv`` only."""

    def forward(
        self, input_ids, attention_mask=None, position_ids=None, past_key_values=None, use_cache=None, store_kv=False
    ):
        assert past_key_values is None or store_kv
        return self.inner(
            input_ids, attention_mask=attention_mask, position_ids=position_ids, past_key_values=past_key_values,
            use_cache=use_cache,
        )  # fmt: skip


class NoCache(Wrapper):
    def forward(self, input_ids, attention_mask=None, position_ids=None):
        return self.inner(input_ids, attention_mask=attention_mask, position_ids=position_ids, use_cache=False)


class ForgetsTheCache(Wrapper):
    """Takes a cache, fills it, and does not read it."""

    def forward(self, input_ids, attention_mask=None, position_ids=None, past_key_values=None, use_cache=None):
        if past_key_values is not None:
            kept, past_key_values = past_key_values.get_seq_length(), past_key_values
            fresh = transformers.DynamicCache()
            attention_mask = attention_mask[..., kept:]
            result = self.inner(
                input_ids, attention_mask=attention_mask, position_ids=position_ids, past_key_values=fresh
            )
            for index, layer in enumerate(fresh.layers):
                past_key_values.update(layer.keys, layer.values, index)
            return result
        return self.inner(input_ids, attention_mask=attention_mask, position_ids=position_ids)


class Counting:
    """The shapes of the ids that a network is called with."""

    def __init__(self, module: nn.Module) -> None:
        self.shapes: list[tuple[int, ...]] = []
        module.register_forward_pre_hook(lambda _module, args: self.shapes.append(tuple(args[0].shape)))


def canvases(prompts=PROMPTS, repeats: int = 1, length: int = 13):
    """Tokens, attention and the column at which responses begin; `repeats` rows of each prompt."""
    generator = torch.Generator().manual_seed(1)
    start = max(prompts)
    tokens = torch.full((len(prompts), start + length), MASK)
    attention = torch.ones_like(tokens, dtype=torch.bool)
    for row, prompt in enumerate(prompts):
        tokens[row, : start - prompt], attention[row, : start - prompt] = PAD, False
        tokens[row, start - prompt : start] = torch.randint(1, V - 1, (prompt,), generator=generator)
    return tokens.repeat_interleave(repeats, 0), attention.repeat_interleave(repeats, 0), start


def alone(module: nn.Module, text: torch.Tensor, block: int, shift: bool) -> torch.Tensor:
    """Logits [S, V] of one text without padding, under an additive mask: the plainest call there is."""
    number = torch.arange(len(text)) // block
    dtype = next(module.parameters()).dtype
    mask = torch.zeros(len(text), len(text), dtype=dtype).masked_fill(number > number[:, None], torch.finfo(dtype).min)
    with torch.no_grad():
        logits = module(text[None], attention_mask=mask[None, None]).logits[0]
    return torch.cat([logits[:1], logits[:-1]]) if shift else logits


def generate(model, forwards, tokens, attention, start, check, block: int = B, rearrange: bool = True):
    """Denoise block after block; `check(tokens, attention, masked, logits)` sees every forward's logits."""
    generator = torch.Generator().manual_seed(2)
    offsets = model.block_offsets(attention[:, :start].sum(dim=1).tolist())
    first, column, rows = start - torch.tensor(offsets), torch.arange(tokens.shape[1]), None
    for count in range(99):
        forwards.open(tokens, first, rows)
        inside = (column >= first[:, None]) & (column < first[:, None] + block) & (column >= start)
        for step in range(99):
            masked = inside & (tokens == MASK)
            if not masked.any():
                break
            logits = forwards.masked_logits(tokens, masked)
            check(tokens, attention, masked, logits)
            drawn = torch.multinomial(logits.float().softmax(-1), 1, generator=generator)[:, 0]
            drawn = torch.where(drawn == MASK, 1, drawn)
            kept = (torch.rand(len(drawn), generator=generator) < 0.5) | (step > 1)
            tokens = tokens.masked_scatter(masked, torch.where(kept, drawn, MASK))
        first = first + block
        rows = (first < tokens.shape[1]).nonzero()[:, 0]
        if rows.numel() == 0:
            return count + 1
        if rearrange:  # some finished ones are dropped already; now in another order, then one of them twice
            rows = rows[torch.randperm(len(rows), generator=generator)]
            if count == 1:
                rows = torch.cat([rows[:1], rows[:-1]])
        else:
            rows = torch.arange(len(tokens))
        tokens, attention, first = tokens[rows], attention[rows], first[rows]
    raise AssertionError("it does not end")


# ---- whole canvases


@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize(
    ("name", "attention"),
    [("Qwen3", "sdpa"), ("Qwen3", "eager"), ("Llama", "sdpa"), ("Gemma2", "eager"), ("GPT2", "sdpa")],
)
def test_whole_canvases_give_each_row_s_own_logits(name, attention, shift):
    module = network(name, attention)
    model = BlockCausal(module, MASK, B, shift)
    assert model.pad_invariant and model.head_on_masked_rows and not model.runs_apart
    assert model.mask_form == ("added" if attention == "eager" else "bool")
    tokens, real, _start = canvases(length=9)
    tokens[:, -3] = 7
    masked = (tokens == MASK) & real
    expected = [
        alone(module, row[seen], B, shift)[hit[seen]] for row, seen, hit in zip(tokens, real, masked, strict=True)
    ]
    torch.testing.assert_close(model.masked_logits(tokens, real, masked), torch.cat(expected))


def test_blocks_are_counted_from_a_text_s_first_token():
    model = BlockCausal(network("Qwen3"), MASK, B)
    assert model.block_length == B and model.block_offsets([5, 3, 8, 1]) == [1, 3, 0, 1]


# ---- kept blocks


@pytest.mark.parametrize("repeats", [1, 3])
@pytest.mark.parametrize("shift", [False, True])
@pytest.mark.parametrize("make", [lambda: network("Qwen3", dtype=torch.float64), mixture], ids=["Qwen3", "mixture"])
def test_kept_blocks_change_nothing(make, shift, repeats):
    model = BlockCausal(make(), MASK, B, shift)
    assert model.keeps_blocks
    tokens, attention, start = canvases(repeats=repeats)

    def check(tokens, attention, masked, logits):
        expected = model.masked_logits(tokens, attention, masked)
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-10)

    assert generate(model, model.forwards(tokens, attention, start, repeats), tokens, attention, start, check) == 4


@pytest.mark.parametrize(
    ("block", "prompts", "length"), [(1, (3, 1), 3), (2, (2, 2), 5), (8, (3, 2), 4), (3, (4, 0), 5), (5, (6,), 1)]
)
@pytest.mark.parametrize("shift", [False, True])
def test_any_block_length(block, prompts, length, shift):
    model = BlockCausal(network("Llama", dtype=torch.float64), MASK, block, shift)
    tokens, attention, start = canvases(prompts, 2, length)

    def check(tokens, attention, masked, logits):
        expected = model.masked_logits(tokens, attention, masked)
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-10)

    generate(model, model.forwards(tokens, attention, start, 2), tokens, attention, start, check, block)


@pytest.mark.parametrize(
    "make", [OwnMask, StoresWhenTold, NoCache, ForgetsTheCache, lambda: network("Qwen3", "eager")],
    ids=["own mask", "stores when told", "no cache", "forgets the cache", "eager"],
)  # fmt: skip
@pytest.mark.parametrize("shift", [False, True])
def test_whatever_a_network_s_cache_is_like(make, shift):
    module = make()
    model = BlockCausal(module, MASK, B, shift)
    assert model.mask_form == {OwnMask: "own"}.get(type(module), model.mask_form)
    tokens, attention, start = canvases(repeats=2)
    inner = getattr(module, "inner", module)

    def check(tokens, attention, masked, logits):
        expected = [
            alone(inner, row[seen], B, shift)[hit[seen]]
            for row, seen, hit in zip(tokens, attention, masked, strict=True)
        ]
        torch.testing.assert_close(logits, torch.cat(expected), rtol=1e-5, atol=1e-5)

    generate(model, model.forwards(tokens, attention, start, 2), tokens, attention, start, check)


def test_only_what_is_new_is_run():
    module = network("Qwen3", dtype=torch.float64)
    model, counting = BlockCausal(module, MASK, B), Counting(module)
    tokens, attention, start = canvases((9, 7), repeats=3, length=8)
    forwards = model.forwards(tokens, attention, start, 3)
    counting.shapes.clear()
    first = start - torch.tensor(model.block_offsets([9] * 3 + [7] * 3))
    column = torch.arange(tokens.shape[1])
    for _ in range(2):
        forwards.open(tokens, first)
        for _ in range(2):
            inside = (column >= first[:, None]) & (column < first[:, None] + B) & (column >= start)
            forwards.masked_logits(tokens, inside)
        tokens = tokens.masked_fill(inside, 5)
        first = first + B
    # The two prompts' finished blocks, once for all rows; then blocks, the second with the first before it.
    assert counting.shapes == [(2, 8), (6, B), (6, B), (6, 2 * B), (6, B)]


@pytest.mark.parametrize("shift", [False, True])
def test_within_a_block_nothing_waits_for_the_device(shift):
    _spec = importlib.util.spec_from_file_location(
        "simulated_device", Path(__file__).parents[1] / "guidance" / "simulated_device.py"
    )
    simulated = importlib.util.module_from_spec(_spec)
    _spec.loader.exec_module(simulated)
    device = simulated.SimulatedDevice()
    tokens, attention, start = canvases(repeats=2)
    first = start - torch.tensor([1, 1, 3, 3, 0, 0, 1, 1])
    column = torch.arange(tokens.shape[1])
    waits, here = [], BlockCausal(network("Qwen3", dtype=torch.float64), MASK, B, shift)
    with device:
        model = BlockCausal(simulated.to_device(network("Qwen3", dtype=torch.float64)), MASK, B, shift)
        forwards = model.forwards(tokens.to(model.device), attention.to(model.device), start, 2)
        for _ in range(2):
            masked = (column >= start) & (column >= first[:, None]) & (column < first[:, None] + B)
            positions = masked.flatten().nonzero().squeeze(1).to(model.device)
            given = tokens.to(model.device), masked.to(model.device)
            forwards.open(given[0], first.to(model.device))
            for _ in range(3):
                with device.counting():
                    found = forwards.masked_logits(*given, positions=positions)
                waits.append(sum(device.waits.values()))
            expected = here.masked_logits(tokens, attention, masked)
            torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=1e-10)
            tokens, first = tokens.masked_fill(masked, 5), first + B
    assert model.keeps_blocks and waits[1:3] == waits[4:6] == [0, 0] and max(waits) <= 3, waits


def test_a_block_is_opened_again_with_more_rows():
    """One forward for the K samples of a prompt, which then go on by themselves."""
    model = BlockCausal(network("Qwen3", dtype=torch.float64), MASK, B, shift=True)
    tokens, attention, start = canvases((8, 5), repeats=2, length=6)
    forwards = model.forwards(tokens, attention, start, 2)
    column = torch.arange(tokens.shape[1])
    leaders, first = torch.tensor([0, 2]), torch.tensor([8, 7])
    forwards.open(tokens[leaders], first, leaders)
    masked = (column >= start) & (column < first[:, None] + B)
    shared = forwards.masked_logits(tokens[leaders], masked)
    forwards.open(tokens, first.repeat_interleave(2), torch.tensor([0, 0, 1, 1]))
    again = forwards.masked_logits(tokens, masked.repeat_interleave(2, 0))
    expected = model.masked_logits(tokens, attention, masked.repeat_interleave(2, 0))
    torch.testing.assert_close(again, expected, rtol=0, atol=1e-10)
    torch.testing.assert_close(shared, model.masked_logits(tokens[leaders], attention[leaders], masked))


@pytest.mark.parametrize("make", [lambda: network("Qwen3", dtype=torch.float64), OwnMask], ids=["Qwen3", "own mask"])
@pytest.mark.parametrize("shift", [False, True])
def test_rows_need_not_keep_step(make, shift):
    """A row whose block holds nothing to decide is opened further on, while others stay."""
    model = BlockCausal(make(), MASK, B, shift)
    tokens, attention, start = canvases((6, 6, 9), length=16)
    tokens[:, start : start + 12] = torch.randint(1, V - 1, (3, 12))
    forwards, column = model.forwards(tokens, attention, start), torch.arange(tokens.shape[1])
    begins = torch.tensor([7, 7, 8])
    for steps in ([0, 0, 0], [1, 0, 0], [0, 1, 2], [2, 0, 1], [0, 2, 0]):
        begins = begins + B * torch.tensor(steps)
        forwards.open(tokens, begins)
        masked = (column >= begins[:, None]) & (column < begins[:, None] + B)
        blanked = tokens.masked_fill(masked, MASK)
        logits = forwards.masked_logits(blanked, masked)
        expected = model.masked_logits(blanked, attention, masked)
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-10)


def test_a_causal_context():
    """Finished tokens see what is before them, the open block sees all of itself; its first slot is read before it."""
    module = network("Qwen3", dtype=torch.float64)
    model = BlockCausal(module, MASK, B, causal_context=True)
    assert model.keeps_blocks and model.block_offsets(list(PROMPTS)) == [0] * 4
    tokens, attention, start = canvases(repeats=2, length=10)
    forwards, column = model.forwards(tokens, attention, start, 2), torch.arange(tokens.shape[1])
    rows = None
    for begin in (start, start + B, start + 2 * B):
        first = torch.full((len(tokens),), begin)
        forwards.open(tokens, first, rows)
        for masked in ((column >= begin) & (column < begin + B), (column >= begin) & (column < begin + 2)):
            masked = masked & (tokens == MASK)
            expected = []
            for text, real, hit in zip(tokens, attention, masked, strict=True):
                text, real, hit = text[: begin + B], real[: begin + B], hit[: begin + B]
                position = torch.arange(int(real.sum())).clamp_max(begin - int((~real).sum()))
                seen = torch.zeros(len(position), len(position), dtype=torch.float64)
                seen.masked_fill_(position > position[:, None], torch.finfo(torch.float64).min)
                with torch.no_grad():
                    logits = module(text[real][None], attention_mask=seen[None, None]).logits[0]
                logits[int(position.max())] = logits[int(position.max()) - 1].clone()
                expected.append(logits[hit[real]])
            given = model.masked_logits(tokens, attention, masked, first=first)
            torch.testing.assert_close(given, torch.cat(expected), rtol=0, atol=1e-10)
            torch.testing.assert_close(forwards.masked_logits(tokens, masked), given, rtol=0, atol=1e-10)
        tokens = tokens.masked_fill((column >= begin) & (column < begin + B), begin)
        rows = torch.randperm(len(tokens))[:-1]
        tokens, attention = tokens[rows], attention[rows]
    with pytest.raises(ValueError, match="needs first="):
        model.masked_logits(tokens, attention, attention)
    with pytest.raises(ValueError, match="cannot be run behind a causal context"):
        BlockCausal(OwnMask(), MASK, B, causal_context=True)
    with pytest.raises(ValueError, match="expected shift=False"):
        BlockCausal(module, MASK, B, shift=True, causal_context=True)


def test_edited_tokens_are_run_again():
    model = BlockCausal(network("Qwen3", dtype=torch.float64), MASK, B)
    tokens, attention, start = canvases((5, 8), repeats=1, length=8)
    forwards = model.forwards(tokens, attention, start, 1)
    first, column = torch.tensor([7, 8]), torch.arange(tokens.shape[1])
    for edit in range(2):
        forwards.open(tokens, first)
        masked = (column >= first[:, None]) & (column < first[:, None] + B) & (column >= start)
        logits = forwards.masked_logits(tokens, masked)
        expected = model.masked_logits(tokens, attention, masked)
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-10)
        tokens, first = tokens.masked_fill(masked, 9), first + B
        tokens[edit, 6] += 1  # of a block whose keys are kept


def test_given_positions_and_memory_are_used():
    model = BlockCausal(network("Qwen3"), MASK, B)
    tokens, attention, start = canvases(length=6)
    for forwards in (model.forwards(tokens, attention, start), forwards_of(model, tokens, attention, start)):
        first = start - torch.tensor(model.block_offsets(list(PROMPTS)))
        forwards.open(tokens, first)
        column = torch.arange(tokens.shape[1])
        masked = (column >= start) & (column < first[:, None] + B)
        positions = masked.flatten().nonzero().squeeze(1)
        out = torch.empty(len(positions), V)
        expected = forwards.masked_logits(tokens, masked)
        found = forwards.masked_logits(tokens, masked, positions=positions, out=out)
        assert found.data_ptr() == out.data_ptr() and torch.equal(found, expected)
        assert forwards.masked_logits(tokens, masked & False).shape == (0, V)


# ---- refusals, and what is done instead


@pytest.mark.parametrize(
    ("make", "said"),
    [(NoCache, "takes no past_key_values"), (ForgetsTheCache, "not those of whole canvases")],
)
def test_a_cache_that_cannot_be_used_is_named_once(make, said, caplog):
    with caplog.at_level(logging.WARNING, "entrgi_kernels"):
        model = BlockCausal(make(), MASK, B)
    (record,) = caplog.records
    assert said in record.getMessage() and make.__name__ in record.getMessage() and not model.keeps_blocks


def test_what_lies_behind_the_block_is_not_run_without_a_cache():
    module = NoCache()
    model, counting = BlockCausal(module, MASK, B), Counting(module)
    tokens, attention, start = canvases((5, 8), length=12)
    forwards = model.forwards(tokens, attention, start)
    forwards.open(tokens, torch.tensor([7, 8]))
    counting.shapes.clear()
    forwards.masked_logits(tokens, (torch.arange(20) >= 8) & (torch.arange(20) < 11).expand(2, -1))
    assert counting.shapes == [(2, 12)]


class Deaf(Wrapper):
    """Ignores the mask it is given."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.causal = causal

    def forward(self, input_ids, attention_mask=None):
        length = input_ids.shape[1]
        mask = torch.ones(len(input_ids), 1, length, length, dtype=torch.bool)
        return self.inner(input_ids, attention_mask=mask.tril() if self.causal else mask).logits


def test_attention_of_another_kind_is_refused():
    with pytest.raises(ValueError, match="does not see the rest of a block.*block_length=4.*'sdpa'"):
        BlockCausal(Deaf(causal=True), MASK, B)
    with pytest.raises(ValueError, match="sees later blocks.*block_length=4.*block_length=0"):
        BlockCausal(Deaf(causal=False), MASK, B)

    class ShorterBlocks(OwnMask):
        def forward(self, input_ids, attention_mask=None, position_ids=None):
            return super().forward(input_ids, attention_mask, position_ids, block_size=2)

    with pytest.raises(ValueError, match="its blocks are shorter"):
        BlockCausal(ShorterBlocks(), MASK, B)


@pytest.mark.parametrize(
    ("length", "error", "named"),
    [(0, ValueError, "at least 1, got 0"), (-4, ValueError, "-4"), (2.0, TypeError, "2.0"), (True, TypeError, "True")],
)
def test_bad_block_lengths_are_named(length, error, named):
    with pytest.raises(error, match=named):
        BlockCausal(network("Qwen3"), MASK, length)


def opened(repeats: int = 1):
    """A batch with a first block that was denoised once, and the caches that its network was handed."""
    module = network("Qwen3", dtype=torch.float64)
    model = BlockCausal(module, MASK, B)
    caches = []
    module.register_forward_pre_hook(lambda _m, _a, given: caches.append(given["past_key_values"]), with_kwargs=True)
    tokens, attention, start = canvases((5, 8), length=8)
    forwards, first = model.forwards(tokens, attention, start, repeats), torch.tensor([7, 8])
    forwards.open(tokens, first)
    masked = (torch.arange(16) >= 8) & (torch.arange(16) < first[:, None] + B)
    forwards.masked_logits(tokens, masked)
    return forwards, tokens, first, masked, caches[-1]


def test_a_cache_cropped_by_somebody_else_is_an_error():
    forwards, tokens, first, masked, cache = opened()
    cache.crop(-2)
    with pytest.raises(RuntimeError, match="holds 6 positions, 8 were left"):
        forwards.masked_logits(tokens, masked)
    with pytest.raises(RuntimeError, match="somebody else cropped or grew it"):
        forwards.open(tokens[:1], first[:1], torch.tensor([0]))


@pytest.mark.parametrize("make", [lambda: network("Qwen3"), NoCache])
def test_a_block_is_opened_first(make):
    tokens, attention, start = canvases()
    forwards = BlockCausal(make(), MASK, B).forwards(tokens, attention, start)
    with pytest.raises(RuntimeError, match="no block is open"):
        forwards.masked_logits(tokens, tokens == MASK)


def test_blocks_that_cannot_be_opened_are_named():
    forwards, tokens, first, masked, _cache = opened()
    for given, named in (
        ((tokens, first + 1), "a block begins at column 8.*multiple of 4"),
        ((tokens, first - B), "a block begins at column 3.*not before what is done"),
        ((tokens[:1], first[:1], torch.tensor([2])), "0 to 1; got 2"),
        ((tokens, first, torch.tensor([0])), r"tokens must be.*\(1, 16\)"),
        ((tokens, first[:1]), r"first must be.*\(2,\)"),
        ((tokens, first, first.float()), "rows must be int64"),
    ):
        with pytest.raises(ValueError, match=named):
            forwards.open(*given)
    with pytest.raises(ValueError, match="1 masked slots lie outside.*5 columns behind"):
        forwards.masked_logits(tokens, masked | (torch.arange(16) == 12) & torch.tensor([[True], [False]]))
    forwards.open(tokens, first + B)
    with pytest.raises(ValueError, match="7 masked slots lie outside.*3 columns before.*slots 0 to 3"):
        forwards.masked_logits(tokens, masked)


# ---- models without blocks


def test_other_models_run_whole_canvases():
    model = MaskedDiffusion(network("Qwen3"), MASK)
    assert model.block_length is None and model.block_offsets([5, 3]) == [0, 0]

    class Foreign:
        """Has nothing but what the protocol asks for."""

        def masked_logits(self, canvas, attention_mask, masked):
            return model.masked_logits(canvas, attention_mask, masked)

    tokens, attention, start = canvases()
    masked = (tokens == MASK) & attention
    rows = torch.tensor([2, 0, 2])
    for adapter in (model, Foreign()):
        forwards = forwards_of(adapter, tokens, attention, start)
        forwards.open(tokens, torch.full((4,), start))
        given = {"positions": masked.flatten().nonzero().squeeze(1), "out": None}
        found = forwards.masked_logits(tokens, masked, **given)
        assert torch.equal(found, model.masked_logits(tokens, attention, masked))
        forwards.open(tokens[rows], torch.full((3,), start), rows)
        found = forwards.masked_logits(tokens[rows], masked[rows])
        assert torch.equal(found, model.masked_logits(tokens[rows], attention[rows], masked[rows]))


# ---- recognition


def remote(module: nn.Module, kind: str, **settings) -> nn.Module:
    module.config.model_type = kind
    for name, value in settings.items():
        setattr(module.config, name, value)
    return module


def test_a_block_length_is_found_in_configs():
    plain = network("Qwen3", mask_token_id=MASK)
    assert isinstance(models.wrap(plain), MaskedDiffusion)
    for module in (
        network("Qwen3", mask_token_id=MASK, block_length=B),
        network("Qwen3", mask_token_id=MASK, entrgi={"kind": "masked_diffusion", "block_length": B}, block_length=8),
        remote(network("Qwen3", mask_token_id=MASK), "some_remote_code", block_size=B),
        remote(network("Qwen3", mask_token_id=MASK), "Fast_dLLM_Qwen", bd_size=B),
        remote(network("Qwen3", mask_token_id=MASK), "nemotron_labs_diffusion", block_size=B),
    ):
        model = models.wrap(module)
        assert isinstance(model, BlockCausal) and model.block_length == B
        assert model.shift is (module.config.model_type == "Fast_dLLM_Qwen")
        assert model.causal_context is (module.config.model_type == "nemotron_labs_diffusion")
        assert isinstance(models.wrap(module, block_length=0), MaskedDiffusion)
        assert models.wrap(module, block_length=2).block_length == 2
    for kind, length in (("qwen3", B), ("some_remote_code", 64)):  # sparse attention's blocks; nanoGPT's context
        module = remote(network("Qwen3", mask_token_id=MASK), kind, block_size=length)
        assert isinstance(models.wrap(module), MaskedDiffusion)


def test_a_model_s_own_generate_is_asked():
    class LLaDA2(Wrapper):
        def forward(self, input_ids, attention_mask=None, position_ids=None):
            return self.inner(input_ids, attention_mask=attention_mask, position_ids=position_ids)

        def generate(self, inputs=None, block_length: int = B, mask_id: int = MASK):
            raise NotImplementedError

    model = models.wrap(LLaDA2())
    assert (model.block_length, model.mask_token_id) == (B, MASK)


def test_a_model_trained_with_blocks_is_not_run_without_them():
    module = remote(network("Qwen3", mask_token_id=MASK), "sdar")
    with pytest.raises(ValueError, match="names no length of them; pass block_length="):
        models.wrap(module)
    model = models.wrap(module, block_length=B)
    assert models.wrap(model) is model and models.wrap(model, block_length=B) is model
    with pytest.raises(ValueError, match="already wrapped with block_length=4, got block_length=8"):
        models.wrap(model, block_length=8)
