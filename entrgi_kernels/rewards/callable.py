"""A plain function as a reward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import nn

from ..models.modules import evaluating, frozen, plain_precision
from ..text.template import PLAIN, Conversation
from .base import reward_gradient
from .decoding.sequences import PreparedPrompts, assemble, wide
from .embedding import EmbeddingReward

RewardFunction = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class CallableReward(EmbeddingReward):
    """Any function ``(inputs_embeds [B, T, D], attention_mask [B, T], position_ids [B, T]) -> rewards [B]``.

    ::

        def brightness(inputs_embeds, attention_mask, position_ids):
            scores = network(inputs_embeds)                       # [B, T]
            return (scores * attention_mask).sum(1) / attention_mask.sum(1)

        reward = CallableReward(brightness, network.embed_tokens, tokenizer)
        GuidedSampler(model, reward, tokenizer).generate(["Why is the sky blue?"])

    The rows are the chat template's [prefix | response | suffix], in the dtype of the table. Padding (zeros) lies
    to the left of a row, or behind its response where suffixes differ in length; what is dead or padding has a 0 in
    ``attention_mask`` (int64), and must not change the reward.

    Args:
        function: differentiable in its first argument.
        table: an ``nn.Embedding`` (called, so it may scale), or its weights [R, D].
        tokenizer: whose ids these rows are.
        module: a network that the function uses, to be frozen and in evaluation mode while it runs; optional.
        unmatched: see :class:`VocabularyMap`.
        chat_template: a template to use instead of the tokenizer's own; a tokenizer without any is given the turns
            one below the other.

    Raises:
        TypeError: the function cannot be called, or the table is none.
        ValueError: as for :class:`EmbeddingReward`; in use, when the function returns anything but [B] numbers, or
            under guidance no gradient reaches ``inputs_embeds``.
    """

    def __init__(
        self,
        function: RewardFunction,
        table: nn.Module | torch.Tensor,
        tokenizer: Any,
        *,
        module: nn.Module | None = None,
        unmatched: str = "unk",
        chat_template: str | None = None,
    ) -> None:
        if not callable(function):
            raise TypeError(
                f"a reward function cannot be {type(function).__name__}: expected a callable of (inputs_embeds, "
                "attention_mask, position_ids) that returns rewards [B]"
            )
        if isinstance(table, torch.Tensor):
            if table.dim() != 2 or not table.is_floating_point():
                raise TypeError(f"table is {table.dtype} {tuple(table.shape)}: expected floating-point [R, D]")
            table = nn.Embedding.from_pretrained(table.detach())
        self.function = function
        self._network = module
        self._guides = False  # not seen yet to pass a gradient on
        if chat_template is None and not getattr(tokenizer, "chat_template", None):
            chat_template = PLAIN
        super().__init__(_Holder(cast(nn.Module, table)), tokenizer, unmatched=unmatched, chat_template=chat_template)

    def __repr__(self) -> str:
        return f"CallableReward({getattr(self.function, '__name__', type(self.function).__name__)})"

    def score_embeddings(
        self, prepared: PreparedPrompts, index: torch.Tensor, response: torch.Tensor, alive: torch.Tensor
    ) -> torch.Tensor:
        """The function's rewards [B] of [prefix | response | suffix]; see :meth:`Reward.score_embeddings`."""
        rows = assemble(prepared, index, response, alive)
        return self._call(rows.embeddings, rows.mask, rows.positions)

    @torch.no_grad()
    def score_texts(self, conversations: list[Conversation], responses: list[str], batch_size: int = 8) -> list[float]:
        """The function's rewards of finished responses, through the template and the tokenizer.

        Raises:
            ValueError, TypeError: as for :meth:`NetworkReward.score_texts`.
        """
        scores: list[float] = []
        for embeddings, mask in self._embedded(conversations, responses, batch_size):
            scores += self._call(embeddings, mask, (mask.long().cumsum(1) - 1).clamp_min(0)).tolist()
        return scores

    def _call(self, embeddings: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        network = self._network if self._network is not None else self.module
        with plain_precision(self.device), evaluating(network), frozen(network):
            rewards = self.function(embeddings, mask.long(), positions)
        if not isinstance(rewards, torch.Tensor) or rewards.shape != mask.shape[:1] or not rewards.is_floating_point():
            given = (
                f"{rewards.dtype} {tuple(rewards.shape)}"
                if isinstance(rewards, torch.Tensor)
                else type(rewards).__name__
            )
            raise ValueError(f"the reward function returned {given}: expected floating-point [B] = {(len(mask),)}")
        if torch.is_grad_enabled() and embeddings.requires_grad and not self._guides:
            # Once: in a sum, another part's gradient would hide that this one has none.
            reward_gradient(rewards.sum(), embeddings, "inputs_embeds", retain_graph=True)
            self._guides = True
        return wide(rewards)


class _Holder(nn.Module):
    """A network that is nothing but its embedding."""

    def __init__(self, embedding: nn.Module) -> None:
        super().__init__()
        if not isinstance(getattr(embedding, "weight", None), torch.Tensor):
            raise TypeError(f"table is {type(embedding).__name__}: expected an nn.Embedding or a tensor [R, D]")
        self.embedding = embedding

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding
