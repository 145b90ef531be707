"""What a reward's network is run on: prompts prepared once, and rows of [prefix | response | suffix]."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from ...text.template import Conversation

# What a sum keeps no embeddings in place of; its parts have their own.
_NOTHING: Any = None


@dataclass
class PreparedPrompts:
    """Prompts as a reward model reads them: what comes before and after the response, computed once per run.

    Attributes:
        conversations: the prompts.
        prefix_ids, suffix_ids: token ids before and after the response, per prompt.
        prefix: [P, A, D] embeddings of the prefixes, left-padded with zeros to the longest.
        prefix_valid: [P, A] bool, False at padding.
        suffix: [P, Z, D] embeddings of the suffixes, right-aligned, so that every suffix ends at the last position.
        suffix_valid: [P, Z] bool.
        extra: room for what a kind of reward keeps per prompt beyond these (a prefix cache, the parts of a sum).
    """

    conversations: list[Conversation]
    prefix_ids: list[list[int]] = field(default_factory=list)
    suffix_ids: list[list[int]] = field(default_factory=list)
    prefix: torch.Tensor = _NOTHING
    prefix_valid: torch.Tensor = _NOTHING
    suffix: torch.Tensor = _NOTHING
    suffix_valid: torch.Tensor = _NOTHING
    extra: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.conversations)


@dataclass
class Sequences:
    """A batch of [prefix | response | suffix] rows as a network takes it.

    Attributes:
        embeddings: [B, T, D].
        mask: [B, T] bool, False at padding and at dead slots.
        positions: [B, T] int64.
        expected: [B, T] int64, what a reward that predicts tokens expects at each place, in a code of its own; -1
            where nothing is predicted. None for other rewards.
        book: what ``expected`` refers to.
    """

    embeddings: torch.Tensor
    mask: torch.Tensor
    positions: torch.Tensor
    expected: torch.Tensor | None = None
    book: Any = None

    def without_padding(self, rows: torch.Tensor, columns: torch.Tensor) -> Sequences:
        """Some rows, cut to the columns in which they hold no padding, with positions counted from 0."""
        positions = torch.arange(len(columns), device=columns.device).expand(len(rows), -1)
        expected = None if self.expected is None else self.expected[rows][:, columns]
        return Sequences(self.embeddings[rows][:, columns], self.mask[rows][:, columns], positions, expected, self.book)


def assemble(prepared: PreparedPrompts, index: torch.Tensor, response: torch.Tensor, alive: torch.Tensor) -> Sequences:
    """Lay out [prefix | response | suffix] for a batch of responses.

    Positions are counted as if nothing were dead and nothing padded: a prefix starts at 0 behind its left padding, a
    dead response slot keeps its own number, and a short suffix follows the response directly although padding lies
    between them. So a row's positions depend on that row alone.

    Args:
        prepared: P prompts.
        index: [B] int64, prompt of each row.
        response: [B, L, D].
        alive: [B, L] bool.

    Returns:
        The rows; the last position is each row's last real token, whatever the lengths, unless the suffix is empty.

    Raises:
        ValueError: shapes do not fit together.
    """
    if prepared.prefix is None or prepared.suffix is None:
        raise ValueError("these prompts were prepared without embeddings")
    width = prepared.prefix.shape[-1]
    if response.dim() != 3 or response.shape[-1] != width:
        raise ValueError(f"response has shape {tuple(response.shape)}: expected [B, L, {width}]")
    if alive.shape != response.shape[:2] or alive.dtype != torch.bool:
        raise ValueError(
            f"alive is {alive.dtype} {tuple(alive.shape)}: expected bool [B, L] = {tuple(response.shape[:2])}"
        )
    if index.shape != response.shape[:1]:
        raise ValueError(f"index has shape {tuple(index.shape)}: expected [B] = {tuple(response.shape[:1])}")
    device, length = prepared.prefix.device, response.shape[1]
    index = index.to(device)
    prefix_valid, suffix_valid = prepared.prefix_valid[index], prepared.suffix_valid[index]
    response = response.to(device=device, dtype=prepared.prefix.dtype)
    embeddings = torch.cat([prepared.prefix[index], response, prepared.suffix[index]], dim=1)
    mask = torch.cat([prefix_valid, alive.to(device), suffix_valid], dim=1)
    counted = torch.cat([prefix_valid, prefix_valid.new_ones(len(index), length), suffix_valid], dim=1)
    positions = (counted.long().cumsum(1) - 1).clamp_min(0)
    return Sequences(embeddings, mask, positions)


def last_real(mask: torch.Tensor) -> torch.Tensor:
    """Last True position [B] of each row of a mask [B, T]."""
    return mask.shape[1] - 1 - mask.long().flip(1).argmax(1)


def wide(values: torch.Tensor) -> torch.Tensor:
    """Float32, or float64 where they are."""
    return values if values.dtype == torch.float64 else values.float()
