"""What a token id stands for, whatever kind of tokenizer it comes from.

Byte-level BPEs spell a leading space ``Ġ``, SentencePiece ones ``▁``, and WordPiece marks the tokens that do *not*
begin a word. Two tokenizers can only be compared after these spellings are undone, so tokens are compared here as
the bytes of the text they stand for.
"""

from __future__ import annotations

import re
import unicodedata
import weakref
from collections.abc import Iterable
from functools import cache
from typing import Any

BYTE_LEVEL, METASPACE, WORDPIECE, PLAIN = "byte-level", "metaspace", "wordpiece", "plain"

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPECIAL_ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


@cache
def _byte_alphabet() -> dict[str, int]:
    """Character -> byte of the alphabet that byte-level BPEs write their tokens in (Radford et al. 2019).

    Printable bytes stand for themselves; the others, the space among them, are moved up to 256 and beyond in order.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    alphabet = {chr(byte): byte for byte in printable}
    moved = (byte for byte in range(256) if byte not in set(printable))
    alphabet.update({chr(256 + rank): byte for rank, byte in enumerate(moved)})
    return alphabet


def token_kind(tokenizer: Any) -> str:
    """How a tokenizer spells its tokens: ``"byte-level"``, ``"metaspace"``, ``"wordpiece"`` or ``"plain"``.

    Read from the fast tokenizer's decoder; without one, from which marks its vocabulary is full of.
    """
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    if decoder is not None:
        try:
            described = decoder.__getstate__().decode("utf-8")
        except (AttributeError, TypeError, UnicodeDecodeError):
            described = repr(decoder)
        if "ByteLevel" in described:
            return BYTE_LEVEL
        if "WordPiece" in described:
            return WORDPIECE
        if "Metaspace" in described or "▁" in described:
            return METASPACE
    kind = _kinds.get(tokenizer)
    if kind is None:  # asked for every text, and a vocabulary is long to look through
        _kinds[tokenizer] = kind = _kind_of_vocabulary(tokenizer.get_vocab())
    return kind


_kinds: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()


def _kind_of_vocabulary(tokens: Iterable[str]) -> str:
    counts = dict.fromkeys((BYTE_LEVEL, METASPACE, WORDPIECE), 0)
    for token in tokens:
        counts[BYTE_LEVEL] += token.startswith("Ġ")
        counts[METASPACE] += token.startswith("▁")
        counts[WORDPIECE] += token.startswith("##") and len(token) > 2
    kind = max(counts, key=lambda name: counts[name])
    return kind if counts[kind] else PLAIN


def added_tokens(tokenizer: Any) -> dict[str, tuple[int, bool]]:
    """Tokens matched as whole strings before any splitting: content -> (id, whether it is a special token)."""
    added = {}
    for index, token in getattr(tokenizer, "added_tokens_decoder", {}).items():
        added[str(token)] = (int(index), bool(getattr(token, "special", False)))
    for content, index in zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=False):
        if index is not None:
            added[str(content)] = (int(index), True)
    return added


def special_roles(tokenizer: Any) -> dict[str, int]:
    """Ids of the special tokens that have a role: ``{"eos": 2, "unk": 0, ...}``."""
    ids = {role: getattr(tokenizer, f"{role}_token_id", None) for role in _SPECIAL_ROLES}
    return {role: int(index) for role, index in ids.items() if index is not None}


def spellings(token: str, kind: str) -> tuple[bytes, ...]:
    """The texts that an ordinary token may stand for, likeliest first, as UTF-8 bytes.

    Only WordPiece is ambiguous: a word-initial token stands for itself behind a space or at a beginning.
    """
    if kind == BYTE_LEVEL:
        alphabet = _byte_alphabet()
        if all(character in alphabet for character in token):
            return (bytes(alphabet[character] for character in token),)
        return (token.encode("utf-8"),)
    if kind == METASPACE:
        byte = _BYTE_TOKEN.fullmatch(token)
        return (bytes([int(byte.group(1), 16)]) if byte else token.replace("▁", " ").encode("utf-8"),)
    if kind == WORDPIECE:
        if token.startswith("##") and len(token) > 2:
            return (token[2:].encode("utf-8"),)
        bare, spaced = token.encode("utf-8"), f" {token}".encode()
        # WordPiece cuts at punctuation without a mark, where no space need be.
        punctuation = bool(token) and not token[0].isalnum() and unicodedata.category(token[0])[0] in "PS"
        return (bare, spaced) if punctuation else (spaced, bare)
    return (token.encode("utf-8"),)
