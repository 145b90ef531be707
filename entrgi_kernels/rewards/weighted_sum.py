"""Several rewards at once."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from ..text.template import Conversation
from .base import Reward, Targets
from .decoding.savings import parse_savings
from .decoding.sequences import PreparedPrompts


class Combinable:
    """Rewards that are written into sums: ``0.7 * a + 0.3 * b - c`` is a :class:`WeightedSum`."""

    def __mul__(self, weight: float) -> Any:
        if isinstance(weight, bool) or not isinstance(weight, (int, float)):
            return NotImplemented
        return WeightedSum([(weight, self)])  # type: ignore[list-item]

    __rmul__ = __mul__

    def __add__(self, other: Any) -> Any:
        if isinstance(other, type) or not isinstance(other, Reward):
            return NotImplemented
        return WeightedSum([(1.0, self), (1.0, other)])  # type: ignore[list-item]

    def __neg__(self) -> Any:
        return self * -1.0

    def __sub__(self, other: Any) -> Any:
        return self + -1.0 * other if isinstance(other, Combinable) else NotImplemented


class WeightedSum(Combinable):
    """A weighted sum of rewards, each with a network, a tokenizer and a template of its own.

    ::

        polite = JudgeReward(lm, lm_tokenizer, "Is the response polite?")
        near = SimilarityReward(encoder, encoder_tokenizer, "The soup was cold.")
        reward = 0.7 * polite + 5 * near - 0.1 * LikelihoodReward(lm, lm_tokenizer)
        reward = WeightedSum([(0.7, polite), (5, near)], names=["polite", "near"])       # the same, with names

        reward.score_components(conversations, texts)          # {"polite": [...], "near": [...]}, unweighted
        reward.last_components                                  # of the last guidance step

    The parts' embedding tables stand side by side, E [V, D1 + D2 + ...], and a response's embedding is cut up again,
    so that any number of rewards costs one soft embedding and the parts' own forwards. Gradients add up by the
    weights: rewards of different scales want weights that level them.

    Args:
        parts: (weight, reward) pairs; a part that is a sum itself is taken apart.
        names: of the parts, for reports; by default the classes' names, numbered where they repeat.

    Attributes:
        weights, rewards, names: of the parts.
        last_components: unweighted rewards [B] of each part in the last :meth:`score_embeddings`, by name.
        exact_savings: of the parts, by name; may be set to one setting for all, or to a mapping of parts' names.

    Raises:
        TypeError: a part is no reward, or a weight no number.
        ValueError: no parts, a weight that is not finite, or names that do not fit.
    """

    takes_committed = True
    takes_ended = True

    def __init__(self, parts: Iterable[tuple[float, Reward]], *, names: Sequence[str] | None = None) -> None:
        self.weights: list[float] = []
        self.rewards: list[Reward] = []
        for part in parts:
            if not isinstance(part, (tuple, list)) or len(part) != 2:
                raise TypeError(f"part={part!r:.100}: expected (weight, reward)")
            weight, reward = part
            if isinstance(weight, bool) or not isinstance(weight, (int, float)):
                raise TypeError(f"weight={weight!r:.100}: expected a number")
            if not math.isfinite(weight):
                raise ValueError(f"weight={weight}: expected a finite number")
            if isinstance(reward, type) or not isinstance(reward, Reward):
                raise TypeError(
                    f"a part of a sum cannot be {type(reward).__name__}: expected rewards (make one of a model with "
                    "entrgi_kernels.rewards.wrap)"
                )
            inner = list(zip(reward.weights, reward.rewards, strict=True)) if isinstance(reward, WeightedSum) else None
            for factor, one in inner if inner is not None else [(1.0, reward)]:
                self.weights.append(float(weight) * factor)
                self.rewards.append(one)
        if not self.rewards:
            raise ValueError("a sum of no rewards: expected at least one (weight, reward)")
        self.names = _names(self.rewards) if names is None else [str(name) for name in names]
        if len(self.names) != len(self.rewards) or len(set(self.names)) != len(self.names):
            raise ValueError(f"names={self.names}: expected {len(self.rewards)} different ones")
        self.last_components: dict[str, torch.Tensor] = {}
        self._tables: dict[tuple[int, int], tuple[list[torch.Tensor], torch.Tensor]] = {}

    def __repr__(self) -> str:
        terms = (f"{weight:g} * {reward!r}" for weight, reward in zip(self.weights, self.rewards, strict=True))
        return f"WeightedSum({' + '.join(terms)})"

    @property
    def differentiable(self) -> bool:
        """Whether it can guide: every part has a gradient."""
        return all(getattr(reward, "differentiable", True) for reward in self.rewards)

    @property
    def takes_targets(self) -> bool:
        """Whether a part looks at tokens."""
        return any(getattr(reward, "takes_targets", False) for reward in self.rewards)

    @property
    def exact_savings(self) -> dict[str, frozenset[str]]:
        """The savings that each part was asked for, by its name; parts that know none are left out."""
        found = {
            name: getattr(part, "exact_savings", None) for name, part in zip(self.names, self.rewards, strict=True)
        }
        return {name: own for name, own in found.items() if own is not None}

    @exact_savings.setter
    def exact_savings(self, names: str | Iterable[str] | Mapping[str, Any] | None) -> None:
        known = self.exact_savings
        each = names if isinstance(names, Mapping) else dict.fromkeys(known, names)
        if not each.keys() <= known.keys():
            raise ValueError(f"exact_savings={names!r}: expected the names of parts that know savings, {sorted(known)}")
        asked = {name: parse_savings(own) for name, own in each.items()}  # all are right before any is set
        for name, part in zip(self.names, self.rewards, strict=True):
            if name in asked:
                part.exact_savings = asked[name]  # type: ignore[attr-defined]

    def embedding_table(self, tokenizer: Any, vocab_size: int) -> torch.Tensor:
        """E [V, D1 + D2 + ...] in the widest of the parts' dtypes; cached until a part's table changes."""
        tables = [reward.embedding_table(tokenizer, vocab_size) for reward in self.rewards]
        key = id(tokenizer), vocab_size
        known = self._tables.get(key)
        if known is None or any(a is not b for a, b in zip(known[0], tables, strict=True)):
            # A part without embeddings, [V, 0], is nowhere.
            placed = [table for table in tables if table.shape[1]] or tables
            dtype, device = placed[0].dtype, placed[0].device
            for table in placed:
                dtype = torch.promote_types(dtype, table.dtype)
                if table.device != device:
                    raise ValueError(f"the parts of a sum are on {device} and on {table.device}: expected one device")
            self._tables[key] = known = tables, torch.cat([table.to(device, dtype) for table in tables], dim=1)
        return known[1]

    def prepare(self, conversations: list[Conversation]) -> PreparedPrompts:
        """Each part's own view of the prompts."""
        parts = [reward.prepare(conversations) for reward in self.rewards]
        return PreparedPrompts([list(turns) for turns in conversations], extra={"parts": parts})

    def check_length(self, conversations: list[Conversation], slots: int) -> None:
        """Raise ValueError where a prompt leaves no room for so many response slots in one of the parts."""
        for reward in self.rewards:
            if hasattr(reward, "check_length"):
                reward.check_length(conversations, slots)

    def score_embeddings(
        self,
        prepared: PreparedPrompts,
        index: torch.Tensor,
        response: torch.Tensor,
        alive: torch.Tensor,
        *,
        committed: torch.Tensor | int | None = None,
        ended: torch.Tensor | None = None,
        targets: Targets | None = None,
    ) -> torch.Tensor:
        """Weighted rewards [B], differentiable in ``response`` [B, L, D1 + D2 + ...].

        See :meth:`Reward.score_embeddings`; ``committed``, ``ended`` and ``targets`` go to the parts that take them.
        """
        total, start = None, 0
        self.last_components = {}
        parts = prepared.extra["parts"]
        offered = {"committed": committed, "ended": ended, "targets": targets}
        for name, weight, reward, part in zip(self.names, self.weights, self.rewards, parts, strict=True):
            width = _width(part, reward)
            given = {name: value for name, value in offered.items() if getattr(reward, f"takes_{name}", False)}
            value = reward.score_embeddings(part, index, response[..., start : start + width], alive, **given)
            start += width
            self.last_components[name] = value.detach()
            total = weight * value if total is None else total + weight * value
        if start != response.shape[-1]:
            raise ValueError(f"response has shape {tuple(response.shape)}: expected [B, L, {start}]")
        assert total is not None
        return total

    def permute(self, prepared: PreparedPrompts, index: torch.Tensor) -> None:
        """See :meth:`NetworkReward.permute`."""
        for reward, part in zip(self.rewards, prepared.extra["parts"], strict=True):
            if getattr(reward, "takes_committed", False):
                reward.permute(part, index)  # type: ignore[attr-defined]

    def score_texts(self, conversations: list[Conversation], responses: list[str], batch_size: int = 8) -> list[float]:
        """Weighted rewards of finished responses."""
        found = self.score_components(conversations, responses, batch_size)
        return [
            sum(weight * value for weight, value in zip(self.weights, values, strict=True))
            for values in zip(*found.values(), strict=True)
        ]

    def score_components(
        self, conversations: list[Conversation], responses: list[str], batch_size: int = 8
    ) -> dict[str, list[float]]:
        """Unweighted rewards of finished responses, by part."""
        return {
            name: reward.score_texts(conversations, responses, batch_size=batch_size)
            for name, reward in zip(self.names, self.rewards, strict=True)
        }


def _names(rewards: list[Reward]) -> list[str]:
    kinds = [type(reward).__name__.removesuffix("Reward") for reward in rewards]
    return [
        kind if kinds.count(kind) == 1 else f"{kind} {kinds[: place + 1].count(kind)}"
        for place, kind in enumerate(kinds)
    ]


def _width(prepared: PreparedPrompts, reward: Reward) -> int:
    """D of a part."""
    if prepared.prefix is not None:
        return prepared.prefix.shape[-1]
    raise ValueError(
        f"{type(reward).__name__}.prepare left no prefix embeddings, by which a sum knows its width: expected "
        "PreparedPrompts with prefix [P, A, D]"
    )
