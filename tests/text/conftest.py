"""Tokenizers of every kind, built here: byte-level BPE, SentencePiece-like, WordPiece."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers, trainers
from tokenizers import models as bpe
from transformers import PreTrainedTokenizerFast

from entrgi_kernels.text import template

CORPUS = [
    "Hello world, this is a short review of the tiny place.",
    "The food was tasty and the waiter friendly; I would go again!",
    "user assistant system model Human Assistant be kind why not",
    "zabcdefghijklmnopqrstuvwxyz a0123456789",
    "Nothing else to say, 0 1 2 3 4 5 6 7 8 9. Why? Because: a b c d e f g h i j k l m n o p q r s t u v w x y z",
] * 20

LLAMA3_LIKE = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] }}<|im_end|>\n\n{{ m['content'] | trim }}<|eot|>"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant<|im_end|>\n\n{% endif %}"
)
DEFAULT_SYSTEM = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}" + template.CHATML
)
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role here') }}{% endif %}" + template.CHATML
)
TEMPLATES = {"chatml": template.CHATML, "stripping": LLAMA3_LIKE, "default system": DEFAULT_SYSTEM}
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|eot|>", "<|mask|>", "<|bos|>"]


def byte_level(size: int = 420, specials: list[str] = SPECIALS, chat_template: str | None = template.CHATML):
    """A byte-level BPE as Qwen and Dream have."""
    tokenizer = Tokenizer(bpe.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, special_tokens=specials)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return _fast(tokenizer, specials, chat_template)


def metaspace(
    size: int = 300, scheme: str = "first", specials: list[str] = SPECIALS, chat_template: str | None = template.CHATML
):
    """A SentencePiece-like BPE with byte fallback, as Llama 2 and Mistral have; ``scheme`` says where it adds "▁"."""
    tokenizer = Tokenizer(bpe.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    trainer = trainers.BpeTrainer(vocab_size=size, special_tokens=["<unk>", *specials])
    tokenizer.train_from_iterator(CORPUS, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    vocabulary = model["vocab"]
    for byte in range(256):  # ordinary tokens, as in SentencePiece models; a trainer can only add special ones
        vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
    merges = [tuple(pair) for pair in model["merges"]]
    tokenizer.model = bpe.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True)
    fast = _fast(tokenizer, specials, chat_template)
    fast.add_special_tokens({"unk_token": "<unk>"})
    return fast


def wordpiece(size: int = 300, specials: list[str] = SPECIALS, chat_template: str | None = template.CHATML):
    """A WordPiece as BERT has."""
    tokenizer = Tokenizer(bpe.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.train_from_iterator(
        CORPUS, trainers.WordPieceTrainer(vocab_size=size, special_tokens=["[UNK]", *specials])
    )
    fast = _fast(tokenizer, specials, chat_template)
    fast.add_special_tokens({"unk_token": "[UNK]"})
    return fast


def _fast(tokenizer: Tokenizer, specials: list[str], chat_template: str | None) -> PreTrainedTokenizerFast:
    roles = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>", "bos_token": "<|bos|>"}
    roles = {role: token for role, token in roles.items() if token in specials}
    if "<|mask|>" in specials:
        roles["mask_token"] = "<|mask|>"
    tokenizer.add_tokens([AddedToken("<tool_call>", special=False)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **roles)
    fast.chat_template = chat_template
    return fast


@pytest.fixture(scope="session")
def build() -> dict[str, Callable[..., PreTrainedTokenizerFast]]:
    """The builders, for tests that need a tokenizer of their own."""
    return {"byte-level": byte_level, "metaspace": metaspace, "wordpiece": wordpiece}


@pytest.fixture(scope="session")
def tokenizers_by_kind() -> dict[str, PreTrainedTokenizerFast]:
    """One of each kind; not to be changed."""
    return {
        "byte-level": byte_level(),
        "metaspace first": metaspace(),
        "metaspace always": metaspace(scheme="always"),
        "wordpiece": wordpiece(),
    }


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """A fresh byte-level tokenizer with ChatML."""
    return byte_level()


@pytest.fixture(scope="session")
def templates() -> dict[str, str]:
    """Chat templates by name."""
    return TEMPLATES


@pytest.fixture(scope="session")
def no_system_template() -> str:
    """A template that refuses system messages."""
    return NO_SYSTEM
