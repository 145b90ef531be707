"""Keys and values kept within a block by models that see the whole canvas: Fast-dLLM's caches, which are not exact.

The first forward of a block runs the whole canvas and keeps its keys and values. Those that follow run a part of it
against them, as if the tokens that changed since had changed nothing elsewhere: all from the block on ("prefix"), or
the block alone ("dual"). The next block begins with a whole canvas again.

Source: Wu et al., Fast-dLLM, arXiv 2505.22618, sections 3.2 and 3.3.
"""

from __future__ import annotations

from typing import Any

import torch

from ..names import MODEL_CACHES
from .base import BackboneModel, same_result
from .forwards import check_open, wanted_places
from .masked_diffusion import position_ids
from .modules import evaluating, plain_precision


class CachedCanvas:
    """Forwards that run whole canvases once a block; see the module's text and :class:`.forwards.Forwards`.

    Args:
        model: the adapter, of a network that sees the whole canvas.
        attention: [R, S] bool, True at real tokens.
        kind: "prefix" or "dual".
        block_length: columns of a block.

    Raises:
        ValueError: no such kind, or a network that takes no cache or does something else with it.
    """

    def __init__(self, model: Any, attention: torch.Tensor, kind: str, block_length: int) -> None:
        if kind not in MODEL_CACHES:
            raise ValueError(f"model_cache={kind!r}: expected None or one of {', '.join(map(repr, MODEL_CACHES))}")
        _check_serves(model, kind)
        self._set(model, attention, kind, block_length)

    def _set(self, model: BackboneModel, attention: torch.Tensor, kind: str, block_length: int) -> None:
        self._model, self._attention, self._kind, self._block = model, attention, kind, block_length
        self._begin = 0
        self._cache: Any = None

    @classmethod
    def _unchecked(cls, *given: Any) -> CachedCanvas:
        made = cls.__new__(cls)
        made._set(*given)
        return made

    def open(self, tokens: torch.Tensor, first: torch.Tensor, rows: torch.Tensor | None = None) -> None:
        """See :class:`.forwards.Forwards`; all rows' blocks begin at one column. Waits for the device."""
        if rows is not None:
            self._attention = self._attention.index_select(0, rows)
        check_open(tokens, first, self._attention.shape)
        begins = set(first.tolist())
        if len(begins) > 1:
            raise ValueError(f"blocks begin at columns {sorted(begins)}: expected one column for all rows")
        self._begin = begins.pop() if begins else 0
        self._cache = None

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
        model, width = self._model, tokens.shape[1]
        if positions.numel() == 0:
            return torch.empty(0, model.vocab_size, device=tokens.device, dtype=model.dtype)
        row, column = positions // width, positions % width
        if model.shift:
            # What a row begins with reads itself: padding has nothing to say.
            inside = (column > 0) & self._attention.flatten()[positions - 1]
            column = torch.where(inside, column - 1, column)
        with torch.no_grad(), plain_precision(tokens.device), evaluating(model.module):
            if self._cache is None:
                return self._whole(tokens, row * width + column, out)
            return self._part(tokens, row, column, out)

    def _whole(self, tokens: torch.Tensor, at: torch.Tensor, out: torch.Tensor | None) -> torch.Tensor:
        """Run all columns, and keep the keys and values of those that are not run again in this block."""
        from .kept_keys import KeptKeys

        width = tokens.shape[1]
        # Logits that are read one column to the left need the one before the block too.
        first = max(0, self._begin - self._model.shift)
        last = width if self._kind == "prefix" else min(width, self._begin + self._block)
        cache, everywhere = KeptKeys(2 * width), torch.arange(width, device=tokens.device)
        logits = self._run(tokens, everywhere, self._attention, cache, at, out)
        kept = torch.cat([everywhere[:first], everywhere[last:]])
        cache.keep(kept)
        self._cache = cache
        self._span = first, last
        seen = torch.cat([self._attention[:, kept], self._attention[:, first:last]], dim=1)
        self._again = everywhere[first:last], seen
        return logits

    def _part(
        self, tokens: torch.Tensor, row: torch.Tensor, column: torch.Tensor, out: torch.Tensor | None
    ) -> torch.Tensor:
        """Run the columns of the span alone, against what is kept."""
        first, last = self._span
        columns, seen = self._again
        at = row * (last - first) + column - first
        kept = self._cache.length()
        try:
            return self._run(tokens[:, first:last], columns, seen, self._cache, at, out)
        finally:
            self._cache.cut(kept)

    def _run(
        self,
        ids: torch.Tensor,
        columns: torch.Tensor,
        seen: torch.Tensor,
        cache: Any,
        at: torch.Tensor,
        out: torch.Tensor | None,
    ) -> torch.Tensor:
        model = self._model
        places = position_ids(self._attention).index_select(1, columns)
        mask = seen[:, None, None, :].expand(-1, 1, ids.shape[1], -1)
        if getattr(getattr(model.module, "config", None), "_attn_implementation", None) == "eager":
            # transformers' eager attention adds the mask.
            zero = torch.zeros((), dtype=model.dtype, device=ids.device)
            mask = torch.where(mask, zero, torch.finfo(model.dtype).min)
        positions = "tok_idx" if model.accepts("tok_idx") and not model.accepts("position_ids") else "position_ids"
        given = {"attention_mask": mask, positions: places, "past_key_values": cache, "use_cache": True}
        return model._picked(ids, given, lambda rows: rows.index_select(0, at.to(rows.device)), out)


def _check_serves(model: Any, kind: str) -> None:
    """Raise ValueError unless a part that is run where nothing has changed gives what the whole canvas gives."""
    known: dict[str, str | None] = model.__dict__.setdefault("_cached_canvases", {})
    if kind not in known:
        known[kind] = _why_not(model, kind)
    if known[kind] is not None:
        raise ValueError(
            f"model_cache={kind!r}: not for {type(getattr(model, 'module', model)).__name__}, {known[kind]}; expected "
            "a network that sees the whole canvas and takes past_key_values and a 4-D mask, or model_cache=None"
        )


def _why_not(model: Any, kind: str) -> str | None:
    if getattr(model, "block_length", None) is not None:
        return "whose finished blocks are kept already, and exactly"
    if not isinstance(model, BackboneModel) or not model.accepts("past_key_values") or not model.pad_invariant:
        return "which takes no past_key_values, or is disturbed by padding"
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, min(model.vocab_size, 64), (2, 9), generator=generator).to(model.device)
    tokens[:, 5:] = model.mask_token_id
    attention = torch.ones_like(tokens, dtype=torch.bool)
    attention[1, :2] = False
    masked = torch.zeros_like(attention)
    masked[:, 5:7] = True
    forwards = CachedCanvas._unchecked(model, attention, kind, 2)
    try:
        plain = model.masked_logits(tokens, attention, masked)
        forwards.open(tokens, torch.tensor([5, 5], device=tokens.device))
        found = [forwards.masked_logits(tokens, masked) for _ in range(2)]
    except (RuntimeError, ValueError, IndexError, TypeError, AttributeError, KeyError, NotImplementedError) as error:
        return f"which does not run on one ({type(error).__name__}: {error})"[:300]
    if all(same_result(logits, plain) for logits in found):
        return None
    return "whose logits on one are others, with nothing changed in between"
