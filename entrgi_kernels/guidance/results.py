"""What guided generation returns: plain dataclasses that turn into dicts and JSON."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from .config import GuidanceConfig

Conversation = list[dict[str, str]]


class _Record:
    def to_dict(self) -> dict[str, Any]:
        """The content as JSON-safe dicts, lists, strings and numbers."""
        return {field.name: _plain(getattr(self, field.name)) for field in dataclasses.fields(self)}  # type: ignore[arg-type]

    def to_json(self, **kwargs: Any) -> str:
        """The content as JSON; keyword arguments go to :func:`json.dumps`."""
        return json.dumps(self.to_dict(), **kwargs)


def _plain(value: Any) -> Any:
    if hasattr(value, "to_dict"):
        return value.to_dict()
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


@dataclass(frozen=True)
class StepTrace(_Record):
    """One denoising step of one trajectory. Lists run over the response's slots; None where a slot was not masked.

    Attributes:
        step: index of the step, from 0.
        tokens: the response after the step; the mask token's id where still masked.
        entropy: nats, of the model's own distribution at temperature 1 before guidance.
        weight: the hard token's share in the first inner step; None throughout without guidance.
        committed: slots committed in this step.
        reward: the reward model's value of the response after the step, masks filled with the most likely tokens.
        reward_before: the value that the first inner step saw; None without guidance.
        reward_after: the value that the last inner step saw; None without guidance.
    """

    step: int
    tokens: list[int]
    entropy: list[float | None]
    weight: list[float | None]
    committed: list[int]
    reward: float
    reward_before: float | None
    reward_after: float | None


@dataclass(frozen=True)
class Sample(_Record):
    """One trajectory's outcome.

    Attributes:
        text: the response, special tokens removed.
        tokens: the response's ids, all slots.
        reward: the reward model's value of `text`, decoded and tokenised again.
        trace: every step, where asked for.
    """

    text: str
    tokens: list[int]
    reward: float
    trace: list[StepTrace] | None = None


@dataclass(frozen=True)
class GenerationResult(_Record):
    """All samples of one prompt.

    Attributes:
        prompt: as given: a string or a conversation.
        samples: K of them, in the order of the draw.
        config: the settings that produced them.
    """

    prompt: str | Conversation
    samples: list[Sample]
    config: GuidanceConfig

    @property
    def rewards(self) -> list[float]:
        """The samples' rewards, in order."""
        return [sample.reward for sample in self.samples]

    @property
    def best(self) -> Sample:
        """The sample of the highest reward (the first of ties)."""
        return max(self.samples, key=lambda sample: sample.reward)

    @property
    def top1(self) -> float:
        """The highest reward: Top@1 of this prompt."""
        return max(self.rewards)

    @property
    def mean(self) -> float:
        """The mean reward: Avg@N of this prompt."""
        return sum(self.rewards) / len(self.rewards)

    def to_dict(self) -> dict[str, Any]:
        """The content as JSON-safe dicts, with the summary figures."""
        return {**super().to_dict(), "top1": self.top1, "mean": self.mean}
