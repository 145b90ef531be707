"""Rewards that are read at one position: the last one of a conversation."""

from __future__ import annotations

import torch

from .decoding.sequences import PreparedPrompts, Sequences, wide
from .network import NetworkReward


class PooledReward(NetworkReward):
    """Base of the rewards that a decoder gives at its last position, and other networks by their own forward.

    A subclass says what is read: :meth:`_head` off the last position's final states, :meth:`_whole` off what the
    network returns.
    """

    def _head(self, states: torch.Tensor) -> torch.Tensor:
        """Rewards [B] of final states [B, D]."""
        raise NotImplementedError

    def _whole(self, sequences: Sequences) -> torch.Tensor:
        """Rewards [B] of rows without padding, by the network's own forward."""
        raise NotImplementedError

    def _plain(self, sequences: Sequences, last: torch.Tensor | None = None) -> torch.Tensor:
        if self.pooling != "last":
            return wide(self._whole(sequences))
        hidden = self._hidden(sequences)
        states = hidden[:, -1] if last is None else hidden[torch.arange(len(last), device=last.device), last]
        return wide(self._head(states))

    def _partial(
        self,
        use: frozenset[str],
        prepared: PreparedPrompts,
        index: torch.Tensor,
        sequences: Sequences,
        committed: torch.Tensor | int | None,
    ) -> torch.Tensor:
        assert self._savings is not None
        run = self._savings.run(use, prepared, index, sequences, committed)
        run.keep()
        return wide(self._head(run.hidden[:, 0]))

    def _ends(self, sequences: Sequences) -> torch.Tensor:
        assert self._savings is not None
        return wide(self._head(self._savings.end_of_texts(sequences, 1)[:, 0]))
