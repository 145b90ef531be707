"""The reward of a batch's trajectories, as the loop asks for it."""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from typing import Any

import torch

from ..rewards import PreparedPrompts, Reward, Targets
from ..rewards.base import check_differentiable
from .canvas import OpenSlots
from .config import GuidanceConfig


@dataclass(frozen=True)
class Scorer:
    """The reward of a batch's trajectories. :meth:`GuidedSampler.scorer` makes one.

    Attributes:
        reward: the adapter.
        prepared: the prompts on its side.
        index: int64 [R], each trajectory's prompt in `prepared`.
        config: settings.
        eos_token_id, pad_token_id: of the diffusion model's vocabulary.
        tokenizer, vocab_size: of the diffusion model, for rewards that look at tokens.
        ends: ids that end a response beside `eos_token_id`.
    """

    reward: Reward
    prepared: PreparedPrompts
    index: torch.Tensor
    config: GuidanceConfig
    eos_token_id: int
    pad_token_id: int
    tokenizer: Any
    vocab_size: int
    ends: tuple[int, ...] = ()

    @property
    def takes_committed(self) -> bool:
        """Whether the reward makes use of how much of the responses' left part is settled."""
        return takes(self.reward, "committed")

    def select(self, rows: torch.Tensor) -> Scorer:
        """Of some trajectories only."""
        return dataclasses.replace(self, index=self.index[rows])

    def permute(self, rows: torch.Tensor) -> None:
        """Trajectory i is a copy of trajectory rows[i], of the same prompt, from now on: so is what is kept of it."""
        if self.takes_committed:
            self.reward.permute(self.prepared, rows)  # type: ignore[attr-defined]

    def of_tokens(self, tokens: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
        """Rewards [R] of responses given as tokens [R, L] alone; of their texts, where the reward has no gradient.

        Args:
            table: [V, D].
        """
        if getattr(self.reward, "differentiable", True):
            return self(table[tokens], tokens)
        return self.of_texts(tokens)

    def of_texts(self, tokens: torch.Tensor) -> torch.Tensor:
        """Rewards [R] of finished responses [R, L], decoded and tokenised again."""
        turns = [self.prepared.conversations[prompt] for prompt in self.index.tolist()]
        texts = [self.decode(response) for response in tokens.tolist()]
        return torch.tensor(self.reward.score_texts(turns, texts, batch_size=max(1, len(texts))), dtype=torch.float64)

    def decode(self, response: list[int]) -> str:
        """The text of a response's ids: up to the first that ends it, special tokens removed."""
        ends = {self.eos_token_id, *self.ends}
        cut = list(itertools.takewhile(lambda token: token not in ends, response))
        return str(self.tokenizer.decode(cut, skip_special_tokens=True))

    def __call__(
        self,
        response: torch.Tensor,
        best: torch.Tensor,
        settled: int | None = None,
        opened: OpenSlots | None = None,
        phi: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Rewards [R] of response embeddings [R, L, D] whose tokens are, most likely, `best` [R, L].

        Args:
            settled: leading slots of every response that nothing can change any more; None tells nothing.
            opened, phi: the slots still open, and their logits [N, V]; None when there are none.
        """
        ended = self._ended(best)
        given: dict[str, Any] = {} if settled is None else {"committed": settled}
        if takes(self.reward, "ended"):
            given["ended"] = ended
        if takes(self.reward, "targets"):
            rows, slots = (None, None) if opened is None else (opened.rows, opened.slots)
            of_loop = self.config.temperature, self.config.backend
            given["targets"] = Targets(self.tokenizer, self.vocab_size, best, rows, slots, phi, *of_loop)
        alive = ~(_behind(ended) | (best == self.pad_token_id))
        return self.reward.score_embeddings(self.prepared, self.index, response, alive, **given)

    def settled(self, tokens: torch.Tensor, open_slots: torch.Tensor) -> torch.Tensor:
        """How many leading slots of every response [R, L] are settled, int64 [1]: committed, or behind such an EOS."""
        fixed = ~open_slots | _behind(self._ended(tokens) & ~open_slots)
        return fixed.long().cumprod(dim=1).sum(dim=1).amin(dim=0, keepdim=True)

    def _ended(self, tokens: torch.Tensor) -> torch.Tensor:
        """[R, L] bool: slots whose token ends the response."""
        ended = tokens == self.eos_token_id
        for other in self.ends:
            ended = ended | (tokens == other)
        return ended


def takes(reward: Any, name: str) -> bool:
    """Whether a reward's ``score_embeddings`` takes an optional argument: its class says so, as ``takes_<name>``."""
    return bool(getattr(reward, f"takes_{name}", False))


def check_guides(reward: Any, config: GuidanceConfig) -> None:
    """Raise ValueError where these settings guide by a reward that has no gradient."""
    if config.guided:
        check_differentiable(reward)


def _behind(ended: torch.Tensor) -> torch.Tensor:
    """[R, L] bool: slots with an end before them."""
    return (ended.cumsum(dim=1) - ended.long()) > 0
