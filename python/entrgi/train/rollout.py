"""Completions drawn for training, with what the objectives need of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from entrgi_kernels import GuidedSampler
from entrgi_kernels.guidance.config import GuidanceConfig
from entrgi_kernels.guidance.keys import prompt_keys
from entrgi_kernels.guidance.results import Stats, warn_of_missing
from entrgi_kernels.text.template import conversation_from, encode_prompt

from .objectives import completion_mask


@dataclass
class Rollout:
    """R completions, K contiguous ones a prompt.

    Attributes:
        index: which rollout of the run this is, from 0.
        tokens: [R, S] int64, left-padded prompts, then the completions, all slots.
        attention: [R, S] bool, real prompt tokens and `mask`.
        start: first completion slot.
        mask: [R, L] bool, completion tokens up to and including the first end of sequence.
        keys: [R] int64, from which each row's prompt masks are drawn.
        rewards: [R] float32; what is not finite is no reward.
        terminated: [R] bool, an end of sequence was drawn.
        entropy_weight: mean share of the hard token; None without guidance.
        seed: of the sampler. mask_seeds: of the prompt masks, one an inner iteration.
        old, reference: [R, I, L] log-probabilities under the policy that drew the completions and under the
            reference, for each of the I mask seeds; None where the objective needs none.
    """

    index: int
    tokens: torch.Tensor
    attention: torch.Tensor
    start: int
    mask: torch.Tensor
    keys: torch.Tensor
    rewards: torch.Tensor
    terminated: torch.Tensor
    entropy_weight: float | None
    seed: int
    mask_seeds: list[int]
    old: torch.Tensor | None = None
    reference: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def trained(self) -> torch.Tensor:
        """[R, L] bool: `mask`, without completions that have no reward."""
        return self.mask & self.rewards.isfinite()[:, None]

    @property
    def completions(self) -> torch.Tensor:
        """[R, L] int64."""
        return self.tokens[:, self.start :]

    def rows(self, part: slice) -> Rollout:
        """The rollout of some of the rows."""
        names = ("tokens", "attention", "mask", "keys", "rewards", "terminated", "old", "reference")
        taken = {name: getattr(self, name) for name in names}
        return dataclasses.replace(self, **{k: None if v is None else v[part] for k, v in taken.items()})

    def state_dict(self) -> dict[str, Any]:
        """The content as tensors and plain values, for :func:`torch.save`."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    @classmethod
    def from_state(cls, state: dict[str, Any], device: torch.device) -> Rollout:
        """The rollout of a :meth:`state_dict`, its tensors on `device`."""
        return cls(**{name: v.to(device) if isinstance(v, torch.Tensor) else v for name, v in state.items()})


def sample_rollout(
    sampler: GuidedSampler, prompts: Sequence[Any], config: GuidanceConfig, *, index: int, mask_seeds: list[int]
) -> Rollout:
    """Draw K completions for every prompt and score them.

    Args:
        sampler: draws in evaluation mode, whatever mode its model is in.
        prompts: strings or conversations; at least one.
        config: settings; `batch_size` prompts are denoised together, which changes no draw.
        index, mask_seeds: see :class:`Rollout`.
    """
    conversations = [conversation_from(prompt) for prompt in prompts]
    encoded = [encode_prompt(sampler.tokenizer, conversation) for conversation in conversations]
    keys = prompt_keys(encoded)
    device, k, slots = sampler.model.device, config.num_samples, config.max_new_tokens
    start = max(map(len, encoded))
    # One canvas for all, so that every row has the same width; its parts are denoised in turn.
    whole = sampler.canvas(encoded, keys, k, slots, device)
    stats = Stats()
    for first in range(0, len(prompts), config.batch_size):
        part = slice(first, first + config.batch_size)
        canvas = sampler.canvas(encoded[part], keys[part], k, slots, device)
        which = torch.arange(len(encoded[part]), device=device).repeat_interleave(k)
        found = sampler.denoise(canvas, conversations[part], which, config, stats=stats)
        whole.tokens[first * k : first * k + len(found), start:] = found
    stats.finish(0.0)
    completions = whole.tokens[:, start:]
    values = sampler.score([c for c in conversations for _ in range(k)], completions.tolist())
    for number, conversation in enumerate(conversations):
        warn_of_missing(conversation, values[number * k : (number + 1) * k])
    eos = sampler.tokenizer.eos_token_id
    mask = completion_mask(completions, eos)
    return Rollout(
        index=index,
        tokens=whole.tokens,
        attention=torch.cat([whole.attention[:, :start], mask], dim=1),
        start=start,
        mask=mask,
        keys=whole.keys[:, 0].clone(),
        rewards=torch.tensor(values, dtype=torch.float32, device=device),
        terminated=(completions == eos).any(dim=1),
        entropy_weight=stats.mean_weight,
        seed=config.seed,
        mask_seeds=mask_seeds,
    )
