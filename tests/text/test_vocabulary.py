"""The vocabulary map: by the text that tokens stand for, whatever the tokenizers' kinds."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from entrgi_kernels.rewards import VocabularyMap, undrawable_ids
from entrgi_kernels.text.tokens import spellings, token_kind

KINDS = ["byte-level", "metaspace first", "metaspace always", "wordpiece"]


@pytest.mark.parametrize(
    ("kind", "expected"), list(zip(KINDS, ["byte-level", "metaspace", "metaspace", "wordpiece"], strict=True))
)
def test_kind_with_and_without_a_decoder(tokenizers_by_kind, kind, expected):
    tokenizer = tokenizers_by_kind[kind]
    assert token_kind(tokenizer) == expected

    class WithoutBackend:
        get_vocab = staticmethod(tokenizer.get_vocab)

    assert token_kind(WithoutBackend()) == expected


@pytest.mark.parametrize(
    ("token", "kind", "text"),
    [
        ("Ġfood", "byte-level", b" food"),
        ("Ċ", "byte-level", b"\n"),
        ("Ã©", "byte-level", "é".encode()),
        ("▁food", "metaspace", b" food"),
        ("<0x0A>", "metaspace", b"\n"),
        ("é", "metaspace", "é".encode()),
        ("food", "wordpiece", b" food"),
        ("##ing", "wordpiece", b"ing"),
        (",", "wordpiece", b","),
        ("food", "plain", b"food"),
    ],
)
def test_spellings(token, kind, text):
    assert spellings(token, kind)[0] == text


def test_byte_alphabet_covers_every_byte_once(tokenizer):
    alphabet = [spellings(token, "byte-level")[0] for token in tokenizer.get_vocab() if len(token) == 1]
    assert sorted(alphabet) == [bytes([byte]) for byte in range(256)]


@pytest.mark.parametrize("first", KINDS)
@pytest.mark.parametrize("second", KINDS)
def test_matched_tokens_stand_for_the_same_text(tokenizers_by_kind, first, second):
    tokenizer, reward = tokenizers_by_kind[first], tokenizers_by_kind[second]
    built = VocabularyMap(tokenizer, len(tokenizer), reward)
    names, reward_names = (
        tokenizer.convert_ids_to_tokens(range(len(tokenizer))),
        reward.convert_ids_to_tokens(range(len(reward))),
    )
    added, matched = set(tokenizer.added_tokens_decoder), 0
    roles = {tokenizer.eos_token_id, tokenizer.unk_token_id}
    for index, other in enumerate(built.ids.tolist()):
        if other < 0 or index in roles:
            continue
        if index in added:
            assert names[index] == reward_names[other]
            continue
        matched += 1
        mine = set(spellings(names[index], token_kind(tokenizer)))
        assert mine & set(spellings(reward_names[other], token_kind(reward)))
    assert matched > 40
    # Every word-like token that the other tokenizer has too is found.
    theirs = {s for n in reward_names if reward.get_vocab()[n] not in reward.added_tokens_decoder
              for s in spellings(n, token_kind(reward))[:1]}  # fmt: skip
    for index, name in enumerate(names):
        if index not in added and spellings(name, token_kind(tokenizer))[0] in theirs:
            assert built.ids[index] >= 0


def test_space_marks_of_two_kinds_are_one(tokenizers_by_kind):
    tokenizer, reward = tokenizers_by_kind["byte-level"], tokenizers_by_kind["metaspace first"]
    ids = VocabularyMap(tokenizer, len(tokenizer), reward).ids
    vocabulary, other = tokenizer.get_vocab(), reward.get_vocab()
    assert ids[vocabulary["Ġthe"]] == other["▁the"]
    assert ids[vocabulary["Ċ"]] == other["<0x0A>"]
    assert ids[vocabulary["<|im_end|>"]] == other["<|im_end|>"]


def test_same_vocabulary_is_the_identity(tokenizer):
    built = VocabularyMap(tokenizer, len(tokenizer), tokenizer)
    assert built.identical and torch.equal(built.ids, torch.arange(len(tokenizer)))
    assert built.coverage == 1.0


def test_added_specials_do_not_change_the_other_ids(build):
    plain, extended = build["byte-level"](), build["byte-level"]()
    extended.add_special_tokens({"additional_special_tokens": ["<|beginoftext|>"]})
    built = VocabularyMap(extended, len(extended), plain)
    assert not built.identical
    assert torch.equal(built.ids[: len(plain)], torch.arange(len(plain)))
    assert built.ids[len(plain)] == -1


def test_ends_fall_back_to_the_reward_end(build):
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|mask|>"]
    tokenizer, reward = build["byte-level"](specials=specials), build["byte-level"](specials=specials)
    tokenizer.add_special_tokens({"eos_token": "</s>", "pad_token": "[PAD]", "unk_token": "[U]", "bos_token": "[B]"})
    reward.add_special_tokens({"unk_token": "<unknown>"})
    ids = VocabularyMap(tokenizer, len(tokenizer), reward).ids
    assert ids[tokenizer.eos_token_id] == ids[tokenizer.pad_token_id] == reward.eos_token_id
    assert ids[tokenizer.unk_token_id] == reward.unk_token_id
    assert ids[tokenizer.bos_token_id] == -1  # the reward tokenizer has none


def test_padded_heads_and_the_mask_token_cannot_be_drawn(tokenizer):
    size = len(tokenizer) + 5
    expected = [tokenizer.mask_token_id, *range(len(tokenizer), size)]
    built = VocabularyMap(tokenizer, size, tokenizer)
    assert built.undrawable_ids.tolist() == expected
    assert undrawable_ids(tokenizer, size).tolist() == expected
    assert undrawable_ids(tokenizer, size, mask_token_id=7).tolist() == sorted({*expected, 7})
    assert (built.ids[len(tokenizer) :] == -1).all()
    assert built.coverage == 1.0  # ids that cannot be drawn do not count
    assert "same vocabulary" in repr(built)


def test_head_smaller_than_the_tokenizer(tokenizer):
    assert VocabularyMap(tokenizer, 100, tokenizer).ids.tolist() == [*range(100)]
    assert VocabularyMap(tokenizer, len(tokenizer), tokenizer, reward_vocab_size=100).ids[100:].eq(-1).all()


def embedding(rows: int, width: int = 8, dtype: torch.dtype = torch.float32) -> nn.Embedding:
    torch.manual_seed(0)
    return nn.Embedding(rows, width).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("unmatched", ["unk", "zero", "pieces"])
def test_table(tokenizers_by_kind, unmatched, dtype):
    tokenizer, reward = tokenizers_by_kind["byte-level"], tokenizers_by_kind["metaspace first"]
    table = embedding(len(reward), dtype=dtype)
    size = len(tokenizer) + 3
    built = VocabularyMap(tokenizer, size, reward, unmatched=unmatched)
    found = built.table(table)
    assert found.shape == (size, 8) and found.dtype == dtype and not found.requires_grad
    known = built.ids >= 0
    assert torch.equal(found[known], table.weight[built.ids[known]])
    rest = (~known).nonzero().squeeze(1).tolist()
    assert rest
    substitute = table.weight[reward.unk_token_id]
    if unmatched == "unk":
        assert all(torch.equal(found[index], substitute) for index in rest)
    elif unmatched == "zero":
        assert (found[rest] == 0).all()
    else:
        assert set(built.pieces) <= set(rest) and len(built.pieces) > 10
        names = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
        for index, pieces in built.pieces.items():
            text = spellings(names[index], "byte-level")[0].decode()
            assert reward.decode(pieces).strip() == text.strip()
            mean = table.weight[pieces].double().mean(0)
            torch.testing.assert_close(found[index].double(), mean, rtol=0.01 if dtype == torch.bfloat16 else 1e-6,
                                       atol=1e-2 if dtype == torch.bfloat16 else 1e-6)  # fmt: skip
        for index in set(rest) - set(built.pieces):
            assert torch.equal(found[index], substitute)


def test_pieces_have_no_space_that_the_token_has_not(tokenizers_by_kind):
    tokenizer, reward = tokenizers_by_kind["byte-level"], tokenizers_by_kind["metaspace first"]
    built = VocabularyMap(tokenizer, len(tokenizer), reward, unmatched="pieces")
    names = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    spaced = [i for i in built.pieces if names[i].startswith("Ġ")]
    bare = [i for i in built.pieces if names[i][0].isalpha() and not names[i].startswith("Ġ") and names[i][0] != "Ċ"]
    assert spaced and bare

    def first(index: int) -> str:
        return reward.convert_ids_to_tokens(built.pieces[index])[0]

    assert all(first(index).startswith("▁") and not first(index).startswith("▁▁") for index in spaced)
    assert not any(first(index).startswith("▁") for index in bare)


def test_the_embedding_is_called_not_read(tokenizer):
    class Scaled(nn.Embedding):
        def forward(self, ids):
            return super().forward(ids) * 3

    table = Scaled(len(tokenizer), 4)
    found = VocabularyMap(tokenizer, len(tokenizer), tokenizer).table(table)
    assert torch.equal(found, table.weight * 3)


def test_without_any_substitute_unk_is_refused_and_zero_is_not(build):
    specials = ["<|im_start|>", "<|im_end|>"]
    reward = build["byte-level"](specials=specials)
    tokenizer = build["byte-level"]()
    assert reward.unk_token_id is None and reward.eos_token_id is None
    with pytest.raises(ValueError, match="unmatched='zero'"):
        VocabularyMap(tokenizer, len(tokenizer), reward)
    built = VocabularyMap(tokenizer, len(tokenizer), reward, unmatched="zero")
    assert (built.table(embedding(len(reward)))[built.ids < 0] == 0).all()


@pytest.mark.parametrize(
    ("changes", "error", "named"),
    [
        ({"unmatched": "none"}, ValueError, "'none'"),
        ({"vocab_size": 0}, ValueError, "0"),
        ({"vocab_size": 2.5}, ValueError, "2.5"),
        ({"tokenizer": None}, TypeError, "tokenizer"),
        ({"reward_tokenizer": "gpt2"}, TypeError, "str"),
    ],
)
def test_bad_arguments_are_named(tokenizer, changes, error, named):
    arguments = {"tokenizer": tokenizer, "vocab_size": 10, "reward_tokenizer": tokenizer, **changes}
    positional = [arguments.pop(name) for name in ("tokenizer", "vocab_size", "reward_tokenizer")]
    with pytest.raises(error, match=named):
        VocabularyMap(*positional, **arguments)
