"""Dream (Dream-org/Dream-v0-*): remote code with its own mask convention, logits shifted right by one."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .base import BackboneModel
from .compat import mend_generation_config
from .masked_diffusion import position_ids


class Dream(BackboneModel):
    """Dream's remote code: ``model(x, attention_mask, position_ids)`` with the mask ``"full"`` or 4-D bool.

    Dream has no causal mask to overcome. Without padding it wants the string ``"full"`` (the fast attention path);
    with padding a bool mask, since its attention takes floats to be additive in one release and converts them to
    bool in another, which turns an additive mask inside out. Some forks call the positions ``tok_idx``.
    Under transformers 5 Dream loads with uninitialised rotary frequencies and cannot make its generation config: both
    are mended, with a warning (:mod:`.compat`).

    Args:
        module: Dream's model object.
        mask_token_id: id of the mask token (``config.mask_token_id``, 151666 in the released models).
        shift: Dream predicts the token to the right of each position; False only for derivatives retrained in place.

    Raises:
        TypeError, ValueError: see :class:`BackboneModel`.
    """

    def __init__(self, module: nn.Module, mask_token_id: int, shift: bool = True) -> None:
        if isinstance(module, nn.Module):
            mend_generation_config(module)
        super().__init__(module, mask_token_id, shift)

    def inputs(self, attention_mask: torch.Tensor, padded: bool) -> dict[str, Any]:
        """``"full"`` without padding, else a bool mask [B, 1, S, S] and position ids counting real tokens."""
        arguments: dict[str, Any] = {"attention_mask": "full"}
        if padded:
            batch, length = attention_mask.shape
            # Rows of padding look at the real tokens: a row that sees nothing may turn into NaN and spread.
            arguments["attention_mask"] = attention_mask[:, None, None, :].expand(batch, 1, length, length)
            positions = "tok_idx" if "tok_idx" in self._accepted else "position_ids"
            arguments[positions] = position_ids(attention_mask)
        if "use_cache" in self._accepted:
            arguments["use_cache"] = False
        return arguments
