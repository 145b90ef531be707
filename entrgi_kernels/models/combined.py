"""Forwards whose logits are combined of two: classifier-free guidance, and a model against a reference model."""

from __future__ import annotations

from collections.abc import Callable

import torch

from .forwards import Forwards, wanted_places

Make = Callable[[torch.Tensor, torch.Tensor], Forwards]


class ClassifierFree:
    """Logits u + (w + 1)(c - u): c of the canvas, u of the same with its prompt masked, both in one batch.

    Source: LLaDA (arXiv 2502.09992, appendix A.2) and its generate function.

    Args:
        make: makes the forwards of a canvas: (tokens [R, S], attention [R, S]) -> forwards.
        tokens, attention, start: the canvas, see :func:`.forwards.forwards_of`.
        mask_token_id: takes the prompt's place.
        scale: w > 0.
    """

    def __init__(
        self,
        make: Make,
        tokens: torch.Tensor,
        attention: torch.Tensor,
        start: int,
        mask_token_id: int,
        scale: float,
    ) -> None:
        self._hidden = attention & (torch.arange(tokens.shape[1], device=tokens.device) < start)
        self._mask, self._scale = mask_token_id, scale
        self._both = make(self._twice(tokens), torch.cat([attention, attention]))

    def open(self, tokens: torch.Tensor, first: torch.Tensor, rows: torch.Tensor | None = None) -> None:
        """See :class:`.forwards.Forwards`."""
        both = None
        if rows is not None:
            both = torch.cat([rows, rows + len(self._hidden)])
            self._hidden = self._hidden.index_select(0, rows)
        self._both.open(self._twice(tokens), torch.cat([first, first]), both)

    def masked_logits(
        self,
        tokens: torch.Tensor,
        masked: torch.Tensor,
        *,
        positions: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See :class:`.forwards.Forwards`."""
        positions = wanted_places(masked, positions)
        both = torch.cat([positions, positions + tokens.numel()])
        logits = self._both.masked_logits(self._twice(tokens), torch.cat([masked, masked]), positions=both)
        own, hidden = logits.chunk(2)
        return combine(own, hidden, self._scale, out)

    def _twice(self, tokens: torch.Tensor) -> torch.Tensor:
        return torch.cat([tokens, tokens.masked_fill(self._hidden, self._mask)])


class AgainstReference:
    """Logits (1 + w) log p - w log p_ref, of a model and a reference model over the same vocabulary.

    Source: reward-free guidance (RFG, arXiv 2509.25604): the model is what a reward made of the reference.

    Args:
        model, reference: forwards of the same canvas.
        scale: w > 0.
    """

    def __init__(self, model: Forwards, reference: Forwards, scale: float) -> None:
        self._model, self._reference, self._scale = model, reference, scale

    def open(self, tokens: torch.Tensor, first: torch.Tensor, rows: torch.Tensor | None = None) -> None:
        """See :class:`.forwards.Forwards`."""
        self._model.open(tokens, first, rows)
        self._reference.open(tokens, first, rows)

    def masked_logits(
        self,
        tokens: torch.Tensor,
        masked: torch.Tensor,
        *,
        positions: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See :class:`.forwards.Forwards`."""
        found = [
            forwards.masked_logits(tokens, masked, positions=positions) for forwards in (self._model, self._reference)
        ]
        wide = torch.promote_types(found[0].dtype, torch.float32)
        own, reference = (torch.log_softmax(logits, dim=-1, dtype=wide) for logits in found)
        return combine(own, reference.to(own.device), self._scale, out, found[0].dtype)


def combine(
    logits: torch.Tensor,
    other: torch.Tensor,
    scale: float,
    out: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """``other + (scale + 1) (logits - other)`` [N, V], the logits' own where either is -inf."""
    combined = torch.lerp(other, logits, scale + 1)
    combined = torch.where(logits.isinf() | other.isinf(), logits, combined).to(dtype or logits.dtype)
    return combined if out is None or out.dtype != combined.dtype else out.copy_(combined)
