"""LLaDA (GSAI-ML/LLaDA-8B-*): remote code, logits in place, a 2-D padding mask or none."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .base import BackboneModel


class LLaDA(BackboneModel):
    """LLaDA's remote code: ``model(x, attention_mask=)`` with a 2-D mask, 1 at real tokens; no positions, no cache.

    Positions cannot be given, but its rotary embedding sees differences only, so left padding shifts nothing that
    matters. Early releases ignored the mask; where padding turns out to change the logits, rows are run in groups
    of equal padding.

    Args:
        module: LLaDA's model object.
        mask_token_id: id of the mask token (``config.mask_token_id``, 126336 in the released models).
        shift: LLaDA predicts in place; True only for derivatives trained otherwise.

    Raises:
        TypeError, ValueError: see :class:`BackboneModel`.
    """

    def __init__(self, module: nn.Module, mask_token_id: int, shift: bool = False) -> None:
        super().__init__(module, mask_token_id, shift)

    def inputs(self, attention_mask: torch.Tensor, padded: bool) -> dict[str, Any]:
        """The 2-D mask where there is padding, nothing otherwise: without a mask LLaDA skips its attention bias."""
        arguments: dict[str, Any] = {}
        if padded:
            arguments["attention_mask"] = attention_mask.long()
        if "use_cache" in self._accepted:
            arguments["use_cache"] = False
        return arguments
