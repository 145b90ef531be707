"""Tokenising text as the plain text it is, whatever control tokens it spells."""

from __future__ import annotations

import re
import weakref
from collections.abc import Sequence
from typing import Any

from .tokens import METASPACE, added_tokens, token_kind


def ids_of_parts(tokenizer: Any, parts: Sequence[tuple[str, bool]], *, continuation: bool = False) -> list[int]:
    """Token ids of template text and contents, where only template text can become control tokens.

    Text between two control tokens is tokenised in one piece whoever wrote it, so that words merge as they do in an
    ordinary prompt.
    """
    continuation = continuation and token_kind(tokenizer) == METASPACE
    if not continuation and not any(written for _, written in parts):
        text = "".join(text for text, _ in parts)
        return list(tokenizer(text, add_special_tokens=False)["input_ids"]) if text else []
    ids: list[int] = []
    run, control = "", ""
    added = added_tokens(tokenizer)
    strips = _strips(tokenizer)
    pattern = control_pattern(tokenizer, special_only=False)

    def flush() -> None:
        nonlocal run
        if run:
            follows = _goes_on_after(tokenizer, control) if control else continuation
            ids.extend(plain_ids(tokenizer, run, continuation=follows))
        run = ""

    eat_left = False  # the last control token swallows white space to its right
    for text, written in parts:
        pieces = [text] if written or pattern is None else [piece for piece in pattern.split(text) if piece]
        for piece in pieces:
            if not written and piece in added:
                left, right = strips.get(piece, (False, False))
                run = run.rstrip() if left else run
                flush()
                ids.append(added[piece][0])
                control, eat_left = piece, right
                continue
            run += piece.lstrip() if eat_left else piece
            eat_left = eat_left and not run
    flush()
    return ids


def plain_ids(tokenizer: Any, text: str, *, continuation: bool = False) -> list[int]:
    """Token ids of a text in which nothing is a control token, however much it looks like one.

    Args:
        tokenizer: any Hugging Face tokenizer.
        text: the text.
        continuation: the text goes on from something before it, so a tokenizer that puts a space before every text
            (SentencePiece) must not do so here.
    """
    if not text:
        return []
    if continuation and token_kind(tokenizer) == METASPACE:
        # Behind an anchor the text is tokenised as a continuation; the anchor's own tokens are then cut off.
        for anchor in ("\n", "a", "0", "."):
            head, whole = _split_ids(tokenizer, anchor), _split_ids(tokenizer, anchor + text)
            if whole[: len(head)] == head:
                return whole[len(head) :]
    return _split_ids(tokenizer, text)


def _goes_on_after(tokenizer: Any, control: str) -> bool:
    """Whether this tokenizer treats text behind a control token as a continuation (puts no space before it)."""
    if token_kind(tokenizer) != METASPACE:
        return False
    joint = list(tokenizer(control + "a", add_special_tokens=False)["input_ids"])
    return joint[1:] != _split_ids(tokenizer, "a")


def _split_ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text with every control token in it taken apart."""
    ids = list(tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])
    pattern = control_pattern(tokenizer, special_only=False)
    if pattern is None or not pattern.search(text):
        return ids
    control = {added_tokens(tokenizer)[token][0] for token in set(pattern.findall(text))}
    if not control.intersection(ids):
        return ids
    # split_special_tokens leaves added tokens that are not "special" whole (<tool_call> and its like).
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        if backend.normalizer is not None:
            text = backend.normalizer.normalize_str(text)
        words = [text]
        if backend.pre_tokenizer is not None:
            words = [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
        return [token.id for word in words for token in backend.model.tokenize(word)]
    cut = pattern.sub(lambda found: found.group()[0] + "\0" + found.group()[1:], text)
    return [
        index
        for piece in cut.split("\0")
        if piece
        for index in tokenizer(piece, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    ]


_patterns: weakref.WeakKeyDictionary[Any, tuple[tuple[int, int], dict[bool, re.Pattern[str] | None]]] = (
    weakref.WeakKeyDictionary()
)


def control_pattern(tokenizer: Any, *, special_only: bool) -> re.Pattern[str] | None:
    """Matches the string of any control token, the longest first; None when there are none.

    Added tokens that are ordinary text (words, runs of spaces) are no control tokens.
    """
    state = len(tokenizer), len(tokenizer.all_special_tokens)
    cached = _patterns.get(tokenizer)
    if cached is None or cached[0] != state:
        by_kind: dict[bool, re.Pattern[str] | None] = {}
        added = added_tokens(tokenizer)
        for only in (False, True):
            strings = [
                content
                for content, (_, special) in added.items()
                if content and (special or (not only and content.strip() and not content.strip().isalnum()))
            ]
            strings.sort(key=len, reverse=True)
            by_kind[only] = re.compile("(" + "|".join(map(re.escape, strings)) + ")") if strings else None
        cached = state, by_kind
        _patterns[tokenizer] = cached
    return cached[1][special_only]


def _strips(tokenizer: Any) -> dict[str, tuple[bool, bool]]:
    """Control tokens that swallow the white space beside them: content -> (to the left, to the right)."""
    return {
        str(token): (bool(getattr(token, "lstrip", False)), bool(getattr(token, "rstrip", False)))
        for token in getattr(tokenizer, "added_tokens_decoder", {}).values()
    }
