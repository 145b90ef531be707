"""What the guided sampler asks of a reward, and what every reward checks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch

from ..text.template import Conversation, check_unicode
from .decoding.sequences import PreparedPrompts


@dataclass
class Targets:
    """What each slot of a batch of responses holds, or may come to hold, in the diffusion LM's own tokens.

    Attributes:
        tokenizer: of the diffusion LM.
        vocab_size: V, the rows of its head.
        tokens: [B, L] int64, the tokens; at open slots the likeliest ones.
        rows, slots: [N] int64, the slots still open; None when none is. A row of B stands for none of the responses.
        logits: [N, V], their logits; p = softmax(logits / temperature). No gradient reaches them from here.
        temperature: 0 stands for 1, as in the soft embedding.
        backend: of the operators of :mod:`entrgi_kernels.ops`.
    """

    tokenizer: Any
    vocab_size: int
    tokens: torch.Tensor
    rows: torch.Tensor | None = None
    slots: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    temperature: float = 1.0
    backend: str = "auto"


@runtime_checkable
class Reward(Protocol):
    """A reward as the guided sampler sees it: differentiable in the response's embeddings, and able to score texts.

    One whose class says ``differentiable = False`` scores texts alone, and guidance refuses it.
    """

    def embedding_table(self, tokenizer: Any, vocab_size: int) -> torch.Tensor:
        """E [V, D]: the embedding that stands for each token of the diffusion LM; cached."""
        ...

    def prepare(self, conversations: list[Conversation]) -> PreparedPrompts:
        """Everything about the prompts that stays the same during a run."""
        ...

    def score_embeddings(
        self, prepared: PreparedPrompts, index: torch.Tensor, response: torch.Tensor, alive: torch.Tensor
    ) -> torch.Tensor:
        """Rewards [B] of responses given as embeddings.

        Args:
            prepared: what :meth:`prepare` returned.
            index: [B] int64, the prompt of each row.
            response: [B, L, D] embeddings of the response slots; the result is differentiable in them. The sampler's
                own memory, which its next inner step writes to again: clone what is to be kept.
            alive: [B, L] bool, False at slots after the end of the response: nothing attends to them, and they keep
                their position ids.

        A reward with the attribute ``takes_committed`` also takes ``committed=``, how many leading slots of each row
        are the same in all later calls, and has ``permute``; see :class:`NetworkReward`. One with ``takes_ended`` also
        takes ``ended=``, [B, L] bool, the slots whose token ends the response: a template that closes it itself leaves
        them out. One with ``takes_targets`` also takes ``targets=``, the tokens themselves (:class:`Targets`): a
        likelihood is one of tokens.
        """
        ...

    def score_texts(self, conversations: list[Conversation], responses: list[str], batch_size: int = 8) -> list[float]:
        """Rewards of finished responses, through the chat template and the reward model's own tokenizer."""
        ...


def reward_gradient(
    value: torch.Tensor, embeddings: torch.Tensor, name: str, *, retain_graph: bool = False
) -> torch.Tensor:
    """d value / d embeddings, of a value [] made of rewards.

    Args:
        value, embeddings: as for ``torch.autograd.grad``, as is ``retain_graph``.
        name: what the embeddings are called where the reward is made.

    Raises:
        ValueError: no gradient gets from one to the other.
    """
    gradient = None
    if value.requires_grad:
        (gradient,) = torch.autograd.grad(value, embeddings, retain_graph=retain_graph, allow_unused=True)
    if gradient is None:
        raise ValueError(
            f"the reward's value does not depend on {name} (no gradient: detach, argmax, no_grad or numpy on the way); "
            "use it for ranking (method='none'), not for guidance"
        )
    return gradient


def check_differentiable(reward: Any) -> None:
    """Raise ValueError for a reward that cannot guide; its class says so, as ``differentiable = False``."""
    parts = [part for part in getattr(reward, "rewards", [reward]) if not getattr(part, "differentiable", True)]
    if parts:
        whole = "" if parts == [reward] else f", nor can the sum {reward!r:.200}"
        raise ValueError(
            f"{', '.join(map(repr, parts))} has no gradient and cannot guide{whole}: expected method='none' (or "
            "guidance_steps=0), which ranks samples by it and, with search=, searches; to guide as well, guide by a "
            "reward with a gradient and rank its samples with score_texts"
        )


def check_texts(conversations: list[Conversation], responses: list[str], batch_size: int) -> None:
    """Raise ValueError or TypeError unless these are texts to score."""
    if len(conversations) != len(responses):
        raise ValueError(f"{len(conversations)} conversations, {len(responses)} responses: expected as many")
    if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
        raise ValueError(f"batch_size={batch_size!r}: expected a positive int")
    for response in responses:
        if not isinstance(response, str):
            raise TypeError(f"a response is {type(response).__name__}: expected a string")
        check_unicode(response, "a response")
    for turn in (turn for turns in conversations for turn in turns):
        check_unicode(turn["content"], f"a conversation's {turn['role']} turn")
