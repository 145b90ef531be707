"""First-order guidance of a denoising step: the reward's linear part around drawn tokens, added to the logits once."""

from __future__ import annotations

from typing import Any

import torch

from ..ops import first_order_update_, sample_tokens
from .memory import Memory


class FirstOrder:
    """Tilts logits by what a reward gains, to first order, when a slot's drawn token is replaced (arXiv 2412.10193).

    The published method linearises a classifier of noised text at that text, mask tokens and all. A reward model knows
    no mask token, so here the masked slots hold tokens drawn from the filtered softmax: what straight-through guidance
    ("aps") shows the reward at its first step. No soft embedding is formed, and no moments are kept.

    Args:
        phi: [N, V] logits; changed in place by :meth:`step`.
        table: [V, D] embeddings, a row per vocabulary entry.
        scale: gamma.
        temperature, top_k, top_p: of the draw; 0 takes the argmax.
        rng: int64 [2], (seed, counter) of the draw. keys: int64 [N], what each row's is keyed by.
        memory: for :meth:`moved_rows`.
        backend: "auto" or the name of a backend.

    Attributes:
        argmax: [N] int64, each row's most likely token, once :meth:`fill` has been called.
    """

    argmax: torch.Tensor

    def __init__(
        self,
        phi: torch.Tensor,
        table: torch.Tensor,
        *,
        scale: float,
        temperature: float,
        top_k: int | None,
        top_p: float | None,
        rng: torch.Tensor,
        keys: torch.Tensor,
        memory: Memory,
        backend: str,
    ) -> None:
        self.phi, self.table, self.memory = phi, table, memory
        self._scale, self._backend = scale, backend
        self._temperature, self._filters = temperature, (top_k, top_p)
        self._rng, self._keys = rng, keys

    @torch.no_grad()
    def fill(self, out: torch.Tensor, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw a token a row and write its embedding to ``out[index]``.

        Args:
            out: [M, D] of the table's dtype. index: int64 [N].

        Returns:
            ([N] float32, the hard token's share: 1; [N] bool, rows that hold a NaN or +inf, or no finite entry).
        """
        phi, (top_k, top_p) = self.phi, self._filters
        how: dict[str, Any] = dict(seed=self._rng, keys=self._keys, backend=self._backend)
        self._tokens = best = sample_tokens(phi, temperature=0.0, **how)
        if self._temperature:
            self._tokens = sample_tokens(phi, temperature=self._temperature, top_k=top_k, top_p=top_p, **how)
        self.argmax = best.clamp(min=0)
        out.index_copy_(0, index, self.table[self._tokens.clamp(min=0)])
        return torch.ones(len(phi), device=phi.device), best < 0

    @torch.no_grad()
    def step(self, grad: torch.Tensor, last: bool = True) -> None:
        """Move phi in place, from `grad` = d loss/d embedding [N, D]; the only step there is."""
        self._move(self.phi, grad, self._tokens)

    @torch.no_grad()
    def moved_rows(self, grad: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """What :meth:`step` would make of some rows, int64 [n]: a copy [n, V], good until the next call."""
        moved = self.memory.rows("moved phi", self.phi, rows)
        self._move(moved, grad[rows], self._tokens[rows])
        return moved

    def _move(self, phi: torch.Tensor, grad: torch.Tensor, tokens: torch.Tensor) -> None:
        # The gradient is the loss's, minus the reward's.
        first_order_update_(phi, grad, self.table, tokens, scale=-self._scale, backend=self._backend)
