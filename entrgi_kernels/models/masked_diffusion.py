"""Any Hugging Face backbone run bidirectionally: decoders under an explicit mask, encoders as they are."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .base import BackboneModel, same_result


class MaskedDiffusion(BackboneModel):
    """A backbone with a mask token: Qwen2, Qwen3, Llama, Gemma, ... under a 4-D mask, or a BERT-like encoder.

    A decoder's causal mask gives way when it is handed a full 4-D one; an encoder needs only the 2-D padding mask.
    Which of the two this network wants, and whether it lets positions be given, is found out by trying
    (:class:`BackboneModel` describes the checks), so an architecture that ignores the mask is refused instead of
    being run causally.

    Position ids count real tokens only (``cumsum - 1``); padding gets a legal id, 1, that nothing looks at.

    Args:
        module: the network; its forward takes ``input_ids`` and ``attention_mask``.
        mask_token_id: id of the mask token.
        shift: True when the logits of slot i are read at position i - 1 (models adapted from autoregressive ones as
            Dream was); False for those trained to predict in place.

    Attributes:
        mask_form: ``"4d"`` or ``"2d"``, the attention mask that is passed.

    Raises:
        TypeError, ValueError: see :class:`BackboneModel`; among them: attention stays causal.
    """

    def __init__(self, module: nn.Module, mask_token_id: int, shift: bool = False) -> None:
        self.mask_form = "4d"
        self._positions = False
        super().__init__(module, mask_token_id, shift)

    def inputs(self, attention_mask: torch.Tensor, padded: bool) -> dict[str, Any]:
        """``attention_mask`` in the form this network wants, position ids where it takes them, no cache."""
        arguments: dict[str, Any] = {}
        if self.mask_form == "4d":
            arguments["attention_mask"] = self._mask_4d(attention_mask)
        else:
            arguments["attention_mask"] = attention_mask.long()
        if self._positions:
            arguments["position_ids"] = position_ids(attention_mask)
        if self.accepts("use_cache"):
            arguments["use_cache"] = False
        return arguments

    def _mask_4d(self, attention_mask: torch.Tensor) -> torch.Tensor:
        """[B, 1, S, S]: every position may look at every real token.

        Padding rows may too: a row that sees nothing yields NaN in some attention kernels, and a NaN value spreads
        through a zero weight.
        """
        batch, length = attention_mask.shape
        keys = attention_mask[:, None, None, :].expand(batch, 1, length, length)
        if getattr(getattr(self.module, "config", None), "_attn_implementation", None) != "eager":
            return keys
        # transformers' eager attention *adds* the mask, so a bool one would be wrong without a word.
        zero = torch.zeros((), dtype=self.dtype, device=attention_mask.device)
        return torch.where(keys, zero, torch.finfo(self.dtype).min)

    def _probe(self, rows: int | None) -> None:
        refusal: Exception | None = None
        imperfect: tuple[str, bool] | None = None
        forms = ("2d", "4d") if "MaskedLM" in type(self.module).__name__ else ("4d", "2d")
        for form in forms:
            for positions in (True, False) if self.accepts("position_ids") else (False,):
                self.mask_form, self._positions = form, positions
                try:
                    if positions and not self._positions_are_neutral():
                        continue
                    super()._probe(rows)
                except (RuntimeError, ValueError, IndexError, TypeError, AttributeError) as error:
                    refusal = refusal or error
                    continue
                if self.pad_invariant:
                    return
                imperfect = imperfect or (form, positions)
        if imperfect is not None:  # usable, padding being cut off row by row
            self.mask_form, self._positions = imperfect
            super()._probe(rows)
            return
        if isinstance(refusal, ValueError):
            raise refusal
        raise ValueError(
            f"{type(self.module).__name__} cannot be run as a masked diffusion model: {refusal}"
        ) from refusal

    def _positions_are_neutral(self) -> bool:
        """Whether positions counted from 0 are what this network uses of itself (RoBERTa counts from its pad id)."""
        canvas = torch.full((1, 4), self.mask_token_id, device=self.device)
        real = torch.ones_like(canvas, dtype=torch.bool)
        given = self._full(canvas, real)
        self._positions = False
        try:
            return same_result(self._full(canvas, real), given)
        finally:
            self._positions = True

    def causal_message(self) -> str:
        """Say which attention implementations take a 4-D mask, when this one ignored it."""
        implementation = getattr(getattr(self.module, "config", None), "_attn_implementation", None)
        return super().causal_message() + (
            f". Its attention implementation is {implementation!r}; those known to honour an explicit 4-D mask are "
            "'sdpa' and 'eager' (load the model with attn_implementation='sdpa')"
        )


def position_ids(attention_mask: torch.Tensor) -> torch.Tensor:
    """Position ids [B, S] that count real tokens from 0; padding gets 1, as in Dream's own generation code."""
    return (attention_mask.long().cumsum(-1) - 1).masked_fill(~attention_mask, 1)
