"""Models trained with block-causal attention: every position sees all earlier blocks and its whole own block."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from .base import SAME, BackboneModel, check_canvas, embedding_rows, same_result
from .block_forwards import HIDDEN, BlockForwards, CroppedCanvas, visible
from .forwards import Forwards, wanted_places
from .masked_diffusion import position_ids
from .modules import accepted_arguments, evaluating, plain_precision

logger = logging.getLogger("entrgi_kernels")

# What networks call the order to store keys and values in the cache that they are given.
_STORE = ("store_kv", "update_past_key_values")

# What a network may raise that takes no cache, or another kind of mask than it is handed.
_REFUSALS = (RuntimeError, ValueError, IndexError, TypeError, AttributeError, KeyError, NotImplementedError)


class BlockCausal(BackboneModel):
    """A network under block-causal attention: SDAR, TraDo, LLaDA2, Fast-dLLM v2, or any decoder trained this way.

    Blocks are counted from a text's first token, as those models' own loops count them; a prompt's last, incomplete
    block is completed by the response. How the network wants its mask is found out by trying (``mask_form``): a 4-D
    one of bools or numbers, or none, because it makes its own.

    :meth:`masked_logits` runs whole canvases. :meth:`forwards` keeps the keys and values of finished blocks in a cache:
    nothing after a block is seen from within it, so what is kept is what would be computed again, and the logits are
    the same. Whether the network's cache does that is found out at construction; where it does not, whole canvases are
    run, with a warning.

    Args:
        module: the network; its forward takes ``input_ids`` and ``attention_mask``.
        mask_token_id: id of the mask token.
        block_length: tokens of a block, as the model was trained with.
        shift: True when slot i's logits are read at position i - 1 (Fast-dLLM v2); a block's first slot is then read
            at the last position of the block before it.
        causal_context: True where finished tokens see only what is before them, and only the open block sees all of
            itself (Nemotron diffusion). Blocks then begin where the response does, slots are read in place, and a
            block's first one at the last position before it, where such models read the token that they begin with.

    Attributes:
        block_length, causal_context: as given.
        mask_form: ``"bool"``; ``"added"``, 0 where a key is seen; ``"ones"``, 1 where it is; or ``"own"``: the network
            makes its mask, and rows of unequal padding run apart.
        keeps_blocks: whether :meth:`forwards` keeps finished blocks.

    Raises:
        TypeError, ValueError: see :class:`BackboneModel`; among them: a later block is seen, or the rest of the own one
            is not.
    """

    def __init__(
        self,
        module: nn.Module,
        mask_token_id: int,
        block_length: int,
        shift: bool = False,
        causal_context: bool = False,
    ) -> None:
        if not isinstance(block_length, int) or isinstance(block_length, bool):
            raise TypeError(f"block_length must be an int, got {block_length!r}")
        if block_length < 1:
            raise ValueError(f"block_length must be at least 1, got {block_length}")
        if causal_context and shift:
            raise ValueError("causal_context=True reads slots in place: expected shift=False, got True")
        self.block_length: int = block_length
        self.causal_context = causal_context
        self.mask_form = "bool"
        self.keeps_blocks = False
        self._positions = False
        self._store: tuple[str, ...] = ()
        super().__init__(module, mask_token_id, shift)

    def __repr__(self) -> str:
        kept = f"block_length={self.block_length}, keeps_blocks={self.keeps_blocks}"
        return f"{super().__repr__()[:-1]}, {kept})"

    @property
    def runs_apart(self) -> bool:
        """Whether rows of unequal padding or unequal blocks cannot share a forward."""
        return self.mask_form == "own" or not self._positions or not self.pad_invariant

    def block_offsets(self, prompt_lengths: list[int]) -> list[int]:
        """How many of each prompt's last tokens stand in the block that its response begins in."""
        return [0 if self.causal_context else length % self.block_length for length in prompt_lengths]

    def forwards(self, tokens: torch.Tensor, attention: torch.Tensor, start: int, repeats: int = 1) -> Forwards:
        """See :meth:`BackboneModel.forwards`; a prompt's finished blocks are run once for all rows that share it."""
        if not self.keeps_blocks:
            return CroppedCanvas(self, attention)
        return BlockForwards(self, tokens, attention, start, repeats)

    def inputs(self, attention_mask: torch.Tensor, padded: bool) -> dict[str, Any]:
        """The block-causal mask in the form that this network wants, positions where it takes them, no cache.

        Behind a causal context the last block is the open one.
        """
        positions, block = position_ids(attention_mask), self.block_length
        begins = (attention_mask.sum(dim=1, keepdim=True) - 1).div(block, rounding_mode="floor") * block
        return self.call_arguments(positions, visible(self.groups(positions, attention_mask, begins)))

    def groups(self, positions: torch.Tensor, real: torch.Tensor, begins: torch.Tensor) -> torch.Tensor:
        """Int64 [B, Q], what sees what: a position sees those of its own number and of lower ones.

        Args:
            positions: [B, Q] int64, counted from each text's first token.
            real: [B, Q] bool; what is not real gets ``HIDDEN``.
            begins: [B, 1] int64, the position at which each text's open block begins.
        """
        number = positions.div(self.block_length, rounding_mode="floor")
        if self.causal_context:
            open_block = (positions >= begins) & (positions < begins + self.block_length)
            number = torch.where(open_block, begins, positions)
        return number.masked_fill(~real, HIDDEN)

    def masked_logits(
        self,
        canvas: torch.Tensor,
        attention_mask: torch.Tensor,
        masked: torch.Tensor,
        *,
        positions: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
        first: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See :meth:`BackboneModel.masked_logits`.

        Args:
            canvas, attention_mask, masked, positions, out: as there.
            first: [B] int64, the columns at which the open blocks begin; needed behind a causal context alone, where
                they tell what is finished.

        Raises:
            ValueError: see there; or `first` is missing.
        """
        if not self.causal_context:
            return super().masked_logits(canvas, attention_mask, masked, positions=positions, out=out)
        check_canvas(canvas, attention_mask, masked)
        if first is None:
            raise ValueError(
                "behind a causal context masked_logits() needs first=, the columns at which the open blocks begin; "
                "forwards() knows them"
            )
        positions = wanted_places(masked, positions)
        counted, pads = position_ids(attention_mask), (~attention_mask).sum(dim=1)
        seen = visible(self.groups(counted, attention_mask, (first - pads)[:, None]))
        row, column = positions.div(canvas.shape[1], rounding_mode="floor"), positions % canvas.shape[1]
        positions = torch.where((column == first[row]) & (column > pads[row]), positions - 1, positions)
        with torch.no_grad(), plain_precision(canvas.device), evaluating(self.module):
            if positions.numel() == 0:
                return torch.empty(0, self.vocab_size, device=canvas.device, dtype=self.dtype)
            return self._rows(canvas, self.call_arguments(counted, seen), positions, out)

    def call_arguments(self, positions: torch.Tensor, seen: torch.Tensor, cache: Any = None) -> dict[str, Any]:
        """The network's keyword arguments beside the ids.

        Args:
            positions: [B, Q] int64, counted from each text's first token.
            seen: [B, Q, K] bool, which keys each query sees, those in the cache first.
            cache: a cache that is to grow by all Q positions; None for none.
        """
        arguments: dict[str, Any] = {}
        if self.mask_form == "bool":
            arguments["attention_mask"] = seen[:, None]
        elif self.mask_form == "ones":
            arguments["attention_mask"] = seen[:, None].to(self.dtype)
        elif self.mask_form == "added":
            zero = torch.zeros((), dtype=self.dtype, device=seen.device)
            arguments["attention_mask"] = torch.where(seen, zero, torch.finfo(self.dtype).min)[:, None]
        elif "block_size" in self._accepted:
            arguments["block_size"] = self.block_length
        if self._positions:
            arguments["position_ids"] = positions
        if cache is not None:
            arguments |= {"past_key_values": cache} | dict.fromkeys(self._store, True)
        if self.accepts("use_cache"):
            arguments["use_cache"] = cache is not None
        return arguments

    def _probe_canvas(self, tokens: list[int]) -> list[int]:
        length = self.block_length * max(2, -(-5 // self.block_length))
        ordinary = [tokens[0], tokens[1]] * length
        return [ordinary[i // 2] if i % 2 == 0 else self.mask_token_id for i in range(length - 1)] + [tokens[2]]

    def _probe(self, rows: int | None) -> None:
        inner = [accepted_arguments(part) for part in self.module.children() if hasattr(part, "forward")]
        self._store = tuple(name for name in _STORE if any(name in names for names in (self._accepted, *inner)))
        eager = getattr(getattr(self.module, "config", None), "_attn_implementation", None) == "eager"
        # transformers' eager attention adds the mask, so one of bools would be wrong.
        forms = ("added", "ones", "own") if eager else ("bool", "added", "ones", "own")
        refusal: Exception | None = None
        imperfect: tuple[str, bool] | None = None
        for form in forms:
            for positions in (True, False) if self.accepts("position_ids") else (False,):
                self.mask_form, self._positions = form, positions
                try:
                    super()._probe(rows)
                except _REFUSALS as error:
                    refusal = refusal or error
                    continue
                if not self.runs_apart:
                    self._probe_cache()
                    return
                if self.causal_context:
                    refusal = ValueError(
                        f"{type(self.module).__name__} takes no mask or no positions, or padding disturbs it: it "
                        "cannot be run behind a causal context"
                    )
                    continue
                imperfect = imperfect or (form, positions)
        if imperfect is None:
            if isinstance(refusal, ValueError):
                raise refusal
            raise ValueError(
                f"{type(self.module).__name__} cannot be run under block-causal attention: {refusal}"
            ) from refusal
        self.mask_form, self._positions = imperfect  # usable, rows of unequal padding being run apart
        super()._probe(rows)
        self._probe_cache()

    def _check_attention(self, first: torch.Tensor, logits: torch.Tensor, tokens: list[int]) -> None:
        """Raise ValueError unless a block sees all of itself and nothing after it."""
        name, block, length = type(self.module).__name__, self.block_length, first.shape[1]
        real, later = torch.ones_like(first, dtype=torch.bool), length - block
        reached = torch.zeros((), dtype=logits.dtype, device=logits.device)
        for token in sorted(set(tokens) - {tokens[2]}) if block > 1 else ():
            other = first.clone()
            other[0, -1] = token
            reached = (self._full(other, real)[:, later] - logits[:, later]).abs().amax()
            if bool(reached > 0):
                break
        else:
            if block > 1 and len(set(tokens)) > 1:
                raise ValueError(
                    f"{name} does not see the rest of a block: changing the last of {block} tokens leaves the logits "
                    "of the first as they were. Either it attends causally, or its blocks are shorter than "
                    f"block_length={block}" + self._advice()
                )
        other = first.clone()
        other[:, later:] = torch.tensor([tokens[3], tokens[4]], device=first.device).repeat(length)[:block]
        leak = (self._full(other, real)[:, :later] - logits[:, :later]).abs().amax()
        # Rounding differs where tokens are sorted by experts; what is seen moves the logits as the own block does.
        scale = reached if block > 1 else logits.abs().amax()
        if bool(leak > SAME.get(logits.dtype, 0.1) * scale):
            raise ValueError(
                f"{name} sees later blocks: changing the tokens of a block changes logits before it, so its attention "
                f"is not causal over blocks of block_length={block}" + self._advice()
            )

    def _advice(self) -> str:
        implementation = getattr(getattr(self.module, "config", None), "_attn_implementation", None)
        return (
            f". Its attention implementation is {implementation!r}; those known to honour an explicit 4-D mask are "
            "'sdpa' and 'eager' (load the model with attn_implementation='sdpa'). A model that sees all positions is "
            "wrapped with block_length=0"
        )

    def _probe_cache(self) -> None:
        """Find out whether blocks on a cache give what whole canvases give."""
        self.keeps_blocks = False
        refusal = f"{type(self.module).__name__} takes no past_key_values"
        if self.accepts("past_key_values"):
            try:
                self.keeps_blocks = self._cache_agrees()
                refusal = "its logits on a cache are not those of whole canvases"
            except _REFUSALS as error:
                refusal = f"{type(error).__name__}: {error}"
        if not self.keeps_blocks:
            logger.warning(
                "%s: finished blocks are not kept but computed again, whole canvases at a time (%s)",
                type(self.module).__name__,
                " ".join(refusal.split()),
            )

    def _cache_agrees(self) -> bool:
        """Two rows of unequal prompts, two blocks; the first is denoised in two forwards."""
        block, device = self.block_length, self.device
        start, width = block + 1, 3 * block + 1
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(0, _certain_ids(self), (2, width), generator=generator)
        tokens = tokens.to(device).masked_fill(torch.arange(width, device=device) >= start, self.mask_token_id)
        attention = torch.ones_like(tokens, dtype=torch.bool)
        attention[1, 0] = False
        prompts = [start, start - 1]
        first = torch.tensor([start - n for n in self.block_offsets(prompts)], device=device)
        column = torch.arange(width, device=device)
        forwards = BlockForwards(self, tokens, attention, start, 1)
        for _ in range(2):
            forwards.open(tokens, first)
            inside = (column >= first[:, None].clamp_min(start)) & (column < first[:, None] + block)
            for masked in (inside, inside & (column > first[:, None].clamp_min(start))):
                if not bool(masked.any()):
                    continue
                found = forwards.masked_logits(tokens, masked)
                if not same_result(found, self.masked_logits(tokens, attention, masked, first=first)):
                    return False
                tokens = torch.where(inside & (column == first[:, None].clamp_min(start)), tokens[:, :1], tokens)
            tokens = torch.where(inside, tokens[:, 1:2], tokens)
            first = first + block
        return True


def _certain_ids(model: BackboneModel) -> int:
    """How many ids, from 0, are certain to be in the vocabulary."""
    return min(embedding_rows(model.module) or model.vocab_size, model.vocab_size)
