"""What guided generation returns: plain dataclasses that turn into dicts and JSON."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from .config import GuidanceConfig

logger = logging.getLogger("entrgi_kernels")

Conversation = list[dict[str, str]]


class _Record:
    def to_dict(self) -> dict[str, Any]:
        """The content as JSON-safe dicts, lists, strings and numbers; what is not finite becomes None."""
        return {field.name: _plain(getattr(self, field.name)) for field in dataclasses.fields(self)}  # type: ignore[arg-type]

    def to_json(self, **kwargs: Any) -> str:
        """The content as JSON; keyword arguments go to :func:`json.dumps`."""
        return json.dumps(self.to_dict(), **kwargs)


def _plain(value: Any) -> Any:
    if hasattr(value, "to_dict"):
        return value.to_dict()
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


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
        reward: the reward model's value of `text`, decoded and tokenised again. NaN and infinities are no reward: such
            a sample is never the best, and left out of means.
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
    def rewarded(self) -> list[Sample]:
        """The samples that have a reward: a finite one."""
        return [sample for sample in self.samples if math.isfinite(sample.reward)]

    @property
    def best(self) -> Sample:
        """The sample of the highest reward (the first of ties).

        Raises:
            ValueError: no sample has a finite reward.
        """
        found = self.rewarded
        if not found:
            raise ValueError(f"no sample of {named(self.prompt)} has a finite reward: they are {self.rewards}")
        return max(found, key=lambda sample: sample.reward)

    @property
    def top1(self) -> float:
        """The highest finite reward: Top@1 of this prompt; NaN where there is none."""
        return max((sample.reward for sample in self.rewarded), default=math.nan)

    @property
    def mean(self) -> float:
        """The mean of the finite rewards: Avg@N of this prompt; NaN where there is none."""
        found = self.rewarded
        return sum(sample.reward for sample in found) / len(found) if found else math.nan

    def to_dict(self) -> dict[str, Any]:
        """The content as JSON-safe dicts, with the summary figures."""
        return {**super().to_dict(), "top1": _plain(self.top1), "mean": _plain(self.mean)}


@dataclass(frozen=True)
class Progress:
    """A batch after a denoising step, as the `watch` of :meth:`GuidedSampler.stream` sees it.

    Attributes:
        prompts: indices of the batch's prompts; their trajectories are contiguous rows.
        step: index of the step, from 0, of `config.steps`.
        responses: int64 [R, L], the mask token's id where a slot is open. Good until the next step; to be read alone.
        traces: the steps of each of the R trajectories so far, where they are kept. Those of "svdd" come at the end.
    """

    prompts: tuple[int, ...]
    step: int
    responses: torch.Tensor
    traces: list[list[StepTrace]] | None


@dataclass
class Stats:
    """What a run did.

    Attributes:
        steps: denoising steps taken (those that commit nothing are skipped).
        model_forwards: forwards of the diffusion model, batches.
        reward_evaluations: forwards and backwards of the reward model under guidance, batches.
        search_evaluations: forwards of the reward, or of texts, that a search asked for, batches.
        mean_weight: mean share of the hard token over all rows and inner steps; None without guidance.
        seconds: wall-clock time of the whole run, models included.
        work: for each block (the response, without blocks), of finished batches: trajectories that were run, their
            candidates and whoever has ended beside others among them; the sum of their steps; and of the slots that
            were open in those.
    """

    steps: int = 0
    model_forwards: int = 0
    reward_evaluations: int = 0
    search_evaluations: int = 0
    mean_weight: float | None = None
    seconds: float = 0.0
    work: list[list[int]] = field(default_factory=list)
    _weights: list[torch.Tensor] = field(default_factory=list, repr=False)

    def add_work(self, block: int, rows: int, slots: int, first: bool) -> None:
        """Note a step of a block, of `rows` trajectories with `slots` open slots together."""
        self.work += [[0, 0, 0] for _ in range(len(self.work), block + 1)]
        more = rows * first, rows, slots
        self.work[block] = [count + one for count, one in zip(self.work[block], more, strict=True)]

    def add_weights(self, weights: torch.Tensor) -> None:
        """Note the weights [M, N] of a denoising step's inner steps, without waiting for the device."""
        self._weights.append(weights.mean(dim=1))

    def finish(self, seconds: float) -> None:
        """Close the run: read what was gathered on the device."""
        self.seconds = seconds
        self.mean_weight = torch.cat(self._weights).mean().item() if self._weights else None

    def to_dict(self) -> dict[str, Any]:
        """The figures as a JSON-safe dict."""
        counts = ("steps", "model_forwards", "reward_evaluations", "search_evaluations", "work")
        return {name: getattr(self, name) for name in (*counts, "mean_weight", "seconds")}


def named(prompt: str | Conversation) -> str:
    """A prompt as messages name it: the start of its last turn."""
    return f"prompt {prompt if isinstance(prompt, str) else prompt[-1]['content']!r:.80}"


def warn_of_missing(prompt: str | Conversation, rewards: Sequence[float], first: int = 0) -> None:
    """Warn of the samples of a prompt whose reward is not finite.

    Args:
        prompt: theirs.
        rewards: of all its samples.
        first: number of the first of them.
    """
    bad = [f"{reward} for sample {first + k}" for k, reward in enumerate(rewards) if not math.isfinite(reward)]
    if bad:
        logger.warning(
            "the reward model gives %s of %s: that is no reward, it is never the best and left out of means",
            ", ".join(bad),
            named(prompt),
        )
