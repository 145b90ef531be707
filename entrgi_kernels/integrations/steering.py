"""Guidance inside a loop that is somebody else's: it runs its model, draws and commits; its logits are moved."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch

from ..guidance.canvas import OpenSlots
from ..guidance.config import GuidanceConfig
from ..guidance.errors import NonFiniteLogitsError, NonFiniteRewardError
from ..guidance.inner import InnerLoop
from ..guidance.keys import prompt_keys, row_keys
from ..guidance.memory import Memory
from ..guidance.results import Conversation, Stats, named, warn_of_missing
from ..guidance.sampler import GuidedSampler
from ..guidance.scoring import Scorer, check_guides
from ..rewards import PreparedPrompts
from ..text.template import conversation_from_ids


class Steering:
    """Moves the logits that a loop is about to draw from, by the steps that the guided sampler itself would take.

    ::

        steering = Steering(sampler)
        steering.begin(prompts, seed=0)            # at the start of each of the loop's calls
        phi = steering(phi, response, opened)      # at each denoising step
        steering.score(sequences)

    Args:
        sampler: holds the models and settings. Its own adapter of the diffusion model is not run.

    Attributes:
        prompts: token ids of each row's prompt, of the call at hand.
    """

    def __init__(self, sampler: GuidedSampler) -> None:
        self.sampler = sampler
        self.started = False
        self._step = 0
        self._prepared: PreparedPrompts | None = None
        self._memory = Memory()
        self._starts: list[int] = []
        self.prompts: list[list[int]] = []

    def begin(
        self,
        prompts: Sequence[list[int]],
        starts: Sequence[int],
        *,
        seed: int,
        ends: Sequence[int] = (),
        **settings: Any,
    ) -> None:
        """A call of the loop starts.

        Args:
            prompts: token ids of each row's prompt, without padding.
            starts: the column of each row's first response slot, in the sequences that the loop returns.
            ends: ids that end a response beside the tokenizer's end-of-sequence token.
            seed, settings: of :class:`GuidanceConfig`, for this call.

        Raises:
            ValueError: a prompt without tokens, settings out of range, or a reward that has no gradient to guide by.
        """
        self.config: GuidanceConfig = self.sampler.config.replace(seed=seed, **settings)
        check_guides(self.sampler.reward, self.config)
        if self.config.search != "best":
            raise ValueError(
                f"search={self.config.search!r}: this loop keeps its trajectories to itself, expected search='best' "
                "here; GuidedSampler, and guide() where it runs the loop, search"
            )
        self._ends = tuple(set(ends) - {self.sampler.eos_token_id})
        self.prolong(prompts, starts)
        self._step, self.started = 0, True
        self.sampler.stats = Stats()

    def prolong(self, prompts: Sequence[list[int]], starts: Sequence[int]) -> None:
        """Within a call: some prompts turn out to be longer than :meth:`begin` was told."""
        distinct = list(dict.fromkeys(map(tuple, prompts)))
        place = {ids: number for number, ids in enumerate(distinct)}
        self._conversations = [conversation_from_ids(self.sampler.tokenizer, list(ids)) for ids in distinct]
        self.prompts = [list(ids) for ids in prompts]
        self._rows = [place[tuple(ids)] for ids in prompts]
        self._keys = prompt_keys(prompts)
        self._starts = list(starts)
        self._prepared = None
        self._kept = 0, torch.empty(0)

    def select(self, rows: Sequence[int]) -> None:
        """Within a call: the loop goes on with these rows of its batch."""
        self.prompts = [self.prompts[row] for row in rows]
        self._rows, self._keys, self._starts = (
            [values[row] for row in rows] for values in (self._rows, self._keys, self._starts)
        )
        self._prepared = None
        self._kept = 0, torch.empty(0)

    @property
    def conversations(self) -> list[Conversation]:
        """The prompt of each row."""
        return [self._conversations[number] for number in self._rows]

    def __call__(
        self, phi: torch.Tensor, response: torch.Tensor, opened: torch.Tensor, temperature: float | None = None
    ) -> torch.Tensor:
        """One denoising step.

        Args:
            phi: [N, V] logits of the open slots, row-major, in memory of their own; moved in place.
            response: [R, L] int64 tokens; what the open slots hold does not matter. The pad token where a row is short.
            opened: [R, L] bool, the slots that the loop may fill or change in this step.
            temperature: the loop's in this step; None is the setting's.

        Returns:
            [N, V], phi.

        Raises:
            NonFiniteLogitsError: NaN or infinite logits.
            NonFiniteRewardError: a NaN or infinite reward, or its gradient.
        """
        config = self.config if temperature is None else self.config.replace(temperature=temperature)
        stats, sampler = self.sampler.stats, self.sampler
        stats.steps += 1
        stats.model_forwards += 1
        self._step += 1
        with sampler.running(config):
            # Callers under torch.inference_mode() hand over tensors of that kind, which nothing may write to here.
            phi = phi.clone() if phi.is_inference() else phi
            response, opened = response.clone(), opened.clone()
            table, undrawable = sampler.table(config, phi.device)
            if config.suppress_undrawable:
                phi.index_fill_(1, undrawable, -torch.inf)
            if not config.guided:
                return phi
            if self._prepared is None:
                self._prepared = sampler.reward.prepare(self._conversations)
                self._index = torch.tensor(self._rows, device=phi.device)
            score = sampler.scorer(self._prepared, self._index, config, self._ends)
            keys = row_keys(self._keys, 1, response.shape[1], phi.device)
            opened_slots = OpenSlots.of(opened, keys, opened.sum(dim=1).tolist())
            settled = self._settled(score, response, opened) if score.takes_committed else None
            loop = InnerLoop(score, table, config, self._memory)
            guided = loop(phi, opened_slots, response, self._step - 1, settled)
            stats.reward_evaluations += config.inner_steps
            stats.add_weights(guided.weights)
            unreadable = torch.zeros_like(self._index).index_add_(0, opened_slots.rows, guided.unreadable.long()) > 0
            faulty, rewards = guided.faults(opened_slots.rows)
            if (unreadable | faulty).any():
                row = int((unreadable | faulty).nonzero()[0])
                where = f"trajectory {row} of the batch, {named(self.conversations[row])}"
                if unreadable[row]:
                    raise NonFiniteLogitsError(self._step - 1, row, where)
                raise NonFiniteRewardError(self._step - 1, row, where, rewards[row].item())
        return phi

    def _settled(self, score: Scorer, response: torch.Tensor, opened: torch.Tensor) -> int:
        """How many leading slots of all responses are settled; 0 where one that was has changed: loops may edit."""
        count, before = self._kept
        same = (response[:, :count] == before).all() if count else torch.ones((), device=response.device)
        settled, same = torch.cat([score.settled(response, opened), same.long()[None]]).tolist()
        settled = settled if same else 0
        self._kept = settled, response[:, :settled]
        return settled

    def score(self, sequences: torch.Tensor) -> list[float]:
        """Final rewards of finished sequences [R, S], prompts included."""
        if len(sequences) != len(self._rows):
            raise ValueError(f"sequences has {len(sequences)} rows: expected {len(self._rows)}, as in the loop's call")
        return self.score_responses([row[start:] for row, start in zip(sequences.tolist(), self._starts, strict=True)])

    def score_responses(self, responses: list[list[int]]) -> list[float]:
        """Final rewards of finished responses, token ids without the prompts."""
        ends = set(self._ends)
        cut = [list(itertools.takewhile(lambda token: token not in ends, row)) for row in responses]
        rewards = self.sampler.score(self.conversations, cut)
        for row, (conversation, reward) in enumerate(zip(self.conversations, rewards, strict=True)):
            warn_of_missing(conversation, [reward], row)
        return rewards
