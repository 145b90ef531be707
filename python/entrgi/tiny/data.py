"""From reviews to token tensors, and the layouts in which the three models see them."""

from __future__ import annotations

import dataclasses
import random
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from . import grammar
from . import lexicon as lx
from .tokenizer import prompt_ids, split_chat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROMPT_SLOTS = 24
RESPONSE_SLOTS = 32


@dataclasses.dataclass
class Encoded:
    """Reviews as tensors: ``prompt`` [n, 24] padded left, ``response`` [n, 32] filled with end-of-text."""

    prompt: torch.Tensor
    response: torch.Tensor
    length: torch.Tensor  # tokens of each response, end-of-text not counted


def encode(
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[str, str]],
    *,
    opened: bool,
    slots: int = RESPONSE_SLOTS,
) -> Encoded:
    """Tokenise (prompt, text) pairs; texts are cut at ``slots`` tokens.

    Args:
        tokenizer: the tiny tokenizer.
        pairs: prompts and responses.
        opened: whether the prompt ends with the assistant's turn just opened (generation). A reward model's prefix is
            the same string under the ChatML template, but it is taken from the finished chat, as guidance does it.
        slots: response slots.

    Raises:
        ValueError: where a prompt needs more than 24 tokens.
    """
    pad = tokenizer.pad_token_id
    known: dict[str, list[int]] = {}
    for prompt, _ in pairs:
        if prompt not in known:
            known[prompt] = prompt_ids(tokenizer, prompt) if opened else split_chat(tokenizer, prompt)[0]
            if len(known[prompt]) > PROMPT_SLOTS:
                raise ValueError(
                    f"a prompt of {len(known[prompt])} tokens does not fit {PROMPT_SLOTS} slots: {prompt!r}"
                )
    texts = tokenizer([text for _, text in pairs], add_special_tokens=False)["input_ids"] if pairs else []
    heads = torch.full((len(pairs), PROMPT_SLOTS), pad, dtype=torch.long)
    tails = torch.full((len(pairs), slots), pad, dtype=torch.long)
    lengths = torch.zeros(len(pairs), dtype=torch.long)
    for row, ((prompt, _), ids) in enumerate(zip(pairs, texts, strict=True)):
        head = known[prompt]
        heads[row, PROMPT_SLOTS - len(head) :] = torch.tensor(head)
        ids = ids[:slots]
        tails[row, : len(ids)] = torch.tensor(ids, dtype=torch.long)
        lengths[row] = len(ids)
    return Encoded(heads, tails, lengths)


def positions(attention_mask: torch.Tensor) -> torch.Tensor:
    """Position ids from a 2-D mask [B, L]: its running count minus one, never below zero (as Dream has it)."""
    return (attention_mask.long().cumsum(-1) - 1).clamp_min(0)


def bidirectional_mask(attention_mask: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The explicit additive 4-D mask [B, 1, L, L] that makes a causal backbone look both ways, pads hidden."""
    length = attention_mask.shape[-1]
    bias = torch.zeros(attention_mask.shape, dtype=dtype).masked_fill(~attention_mask.bool(), torch.finfo(dtype).min)
    return bias[:, None, None, :].expand(-1, 1, length, length)


def reward_rows(
    prompt: torch.Tensor, response: torch.Tensor, suffix: torch.Tensor, pad: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[prefix | response | suffix] in fixed slots: (ids, attention mask, position ids), each [B, L].

    Dead response slots are hidden but keep their position ids; the pooled position is the last one.
    """
    ids = torch.cat([prompt, response, suffix.expand(len(prompt), -1)], dim=1)
    mask = (ids != pad).long()
    # Everything after the left padding counts as a position, holes included.
    span = mask.clone()
    span[:, prompt.shape[1] :] = 1
    return ids, mask, positions(span)


def plain_rows(
    prompt: torch.Tensor, response: torch.Tensor, suffix: torch.Tensor, pad: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same sequences without holes, padded on the left: what scoring a finished text looks like."""
    ids, mask, _ = reward_rows(prompt, response, suffix, pad)
    # A stable sort moves the hidden slots to the left and keeps the rest in order.
    order = mask.argsort(dim=1, stable=True)
    ids, mask = ids.gather(1, order), mask.gather(1, order)
    first = int(mask.any(0).long().argmax())
    ids, mask = ids[:, first:], mask[:, first:]
    return ids, mask, positions(mask)


# ---------------------------------------------------------------------------------------------------------------
# Texts that no reviewer would write, for the reward models: gradients must not lead into nonsense.

_STRONG = sorted(w for w, v in lx.VALENCE.items() if abs(v) >= 2.2)
_WORDS = sorted(lx.VALENCE) + ["the", "was", "were", "and", "but", "I", "it", "a", "very", "not", "so", ".", ","]


def _spam(words: list[str], rng: random.Random) -> list[str]:
    sign = rng.choice((1, 1, -1))
    strong = [w for w in _STRONG if lx.VALENCE[w] * sign > 0]
    run = [rng.choice(strong) for _ in range(rng.randint(2, 10))]
    if rng.random() < 0.4:
        run = [run[0]] * len(run)
    return run if rng.random() < 0.3 else [*words[: rng.randint(0, len(words))], *run]


def _replace(words: list[str], rng: random.Random) -> list[str]:
    words = list(words)
    for _ in range(rng.randint(1, max(1, len(words) // 3))):
        words[rng.randrange(len(words))] = rng.choice(_WORDS if rng.random() < 0.5 else _STRONG)
    return words


def _shuffle(words: list[str], rng: random.Random) -> list[str]:
    start = rng.randrange(len(words))
    end = min(len(words), start + rng.randint(3, 12))
    part = words[start:end]
    rng.shuffle(part)
    return [*words[:start], *part, *words[end:]]


def _repeat(words: list[str], rng: random.Random) -> list[str]:
    start = rng.randrange(len(words))
    part = words[start : start + rng.randint(1, 6)]
    return [*words[: start + len(part)], *(part * rng.randint(1, 3)), *words[start + len(part) :]]


def _delete(words: list[str], rng: random.Random) -> list[str]:
    share = rng.choice((0.1, 0.2, 0.4))
    return [w for w in words if rng.random() > share] or words[:1]


def _cut(words: list[str], rng: random.Random) -> list[str]:
    return words[: rng.randint(1, len(words))]


_CORRUPTIONS = (_spam, _replace, _replace, _shuffle, _repeat, _delete, _cut)


def corrupt(prompt: str, text: str, rng: random.Random) -> tuple[str, str]:
    """A damaged (prompt, text): word replacement, shuffles, repetition, spam, deletions, cuts, or a foreign prompt.

    No label comes with it: the scorer judges the result, and damage that happens to be harmless is not punished.
    """
    if rng.random() < 0.12:
        return grammar.make_prompt(rng)[0], text
    if rng.random() < 0.02:
        return prompt, ""  # a response may end before it starts
    words = re.findall(r"[\w']+|[^\w\s]", text)
    for _ in range(rng.choice((1, 1, 2))):
        words = rng.choice(_CORRUPTIONS)(words, rng)
    return prompt, re.sub(r" ([.,!?])", r"\1", " ".join(words))


def labelled_pairs(
    n: int, seed: int, *, corrupted: float = 0.5, offsets: Mapping[str, float] | None = None
) -> tuple[list[tuple[str, str]], list[float], list[bool]]:
    """(pairs, scores, corrupted?) for a reward model: reviews, a share of them damaged, scored by the rule.

    Args:
        n: how many.
        seed: of the reviews and of the damage.
        corrupted: the share damaged.
        offsets: another rater's taste, see :func:`entrgi.tiny.grammar.rater`.
    """
    rng = random.Random(f"labelled/{seed}")
    pairs, scores, flags = [], [], []
    for _ in range(n):
        review = grammar.make_review(rng)
        pair, flag = (review.prompt, review.text), rng.random() < corrupted
        if flag:
            pair = corrupt(*pair, rng)
        pairs.append(pair)
        flags.append(flag)
        scores.append(grammar.analyse(*pair, offsets=offsets).score)
    return pairs, scores, flags
