"""Anything that calls ``model(x, ...).logits`` on a canvas with mask tokens: LLaDA's functions and loops like them.

A forward hook replaces the logits of the masked rows; the loop draws, ranks and commits as it always does. All masked
slots of a row's response are guided, also those that a block-wise (semi-autoregressive) loop will not commit yet: the
reward model reads the whole response, and the method moves every open slot of it.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..models.base import logits_of
from .base import Guidance, Integration, Parts
from .steering import Steering

logger = logging.getLogger("entrgi_kernels")


class ForwardIntegration(Integration):
    """A network whose callers look at its logits; the way in for everything that brings no call of its own."""

    name = "forward"

    @staticmethod
    def recognises(target: Any) -> bool:
        return isinstance(target, nn.Module)

    @staticmethod
    def attach(target: Any, guidance: Guidance, parts: Parts) -> None:
        guidance.sampler = parts.sampler(target)
        guidance.steering = Steering(guidance.sampler)
        guidance.claim(target)
        hook = LogitsHook(guidance, cfg_scale=parts.cfg_scale, canvas=parts.canvas)
        guidance.on_remove(target.register_forward_hook(hook, with_kwargs=True).remove)


@dataclass
class _Run:
    """One of the loop's calls, as far as its forwards show it.

    Attributes:
        tokens, masked: [B, S], at the last forward.
        start, end: [B] int64, first response column of each row and the first one behind it.
    """

    tokens: torch.Tensor
    masked: torch.Tensor
    start: torch.Tensor
    end: torch.Tensor

    def continues(self, tokens: torch.Tensor, masked: torch.Tensor) -> bool:
        """Whether a canvas is this run's.

        It has the same prompts, any columns beyond the last ones are fresh masks, and it is not all masks again.
        """
        width = self.tokens.shape[1]
        if tokens.shape[0] != self.tokens.shape[0] or tokens.shape[1] < width:
            return False
        place = torch.arange(width, device=tokens.device)
        prompt, response = place < self.start[:, None], (place >= self.start[:, None]) & (place < self.end[:, None])
        same = ((tokens[:, :width] == self.tokens) & ~masked[:, :width]) | ~prompt
        begun = (response & ~self.masked).any()
        again = begun & (masked[:, :width] | ~response).all()
        return bool(same.all() & masked[:, width:].all() & ~again)


class LogitsHook:
    """A forward hook that guides the logits of masked rows, in place.

    Calls with gradients enabled, without mask tokens, or whose logits are not those of the canvas are left alone.

    Args:
        guidance: the handle.
        shift: True when slot i's logits are read at position i - 1; None is the model's own way.
        cfg_scale: the scale s of a loop that puts an unconditional copy of the canvas (prompts masked) below the
            conditional one and combines ``u + (s + 1) (c - u)``. With it the combined logits are guided, and both
            halves set to them, which any scale leaves as they are. None: where such a batch is seen, the shift is
            computed at the conditional logits and added to both halves.
        canvas: for loops that pass the model a part of the canvas only: a callable of (input ids, keyword arguments)
            that returns (the whole canvas [B, S], the column at which the part begins).
        prompts: token ids of each row's prompt, for loops that tell; None takes what stands before the first mask.
        edited: how many of the last columns hold response slots that the loop may change although they are committed;
            they are guided like masked ones, lest the model's own predictions edit guidance away.
        settings: of :class:`GuidanceConfig`, the loop's own.
    """

    def __init__(
        self,
        guidance: Guidance,
        *,
        shift: bool | None = None,
        cfg_scale: float | None = None,
        canvas: Any = None,
        prompts: Sequence[list[int]] | None = None,
        edited: int | None = None,
        **settings: Any,
    ) -> None:
        assert guidance.sampler is not None and guidance.steering is not None
        self._guidance = guidance
        self._steering = guidance.steering
        self._mask = guidance.sampler.model.mask_token_id
        self._pad = guidance.sampler.pad_token_id
        self._shift = guidance.sampler.model.shift if shift is None else shift
        self._cfg_scale = cfg_scale
        self._canvas = canvas
        self._prompts = prompts
        self._edited = edited or 0
        self._settings = settings
        self._signature: inspect.Signature | None = None
        self._run: _Run | None = None
        self._said: set[str] = set()

    @property
    def used(self) -> bool:
        """Whether anything was guided yet."""
        return self._run is not None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Guide one forward's output, in place."""
        if not self._guidance.active or torch.is_grad_enabled():
            return
        given = self._arguments(module, args, kwargs)
        ids = given.get("input_ids")
        if not isinstance(ids, torch.Tensor) or ids.dim() != 2:
            return
        if not (self._edited and self._run is not None) and not bool((ids == self._mask).any()):
            return
        logits = logits_of(output)
        if logits.shape[:2] != ids.shape:
            return
        tokens, offset = (ids, 0) if self._canvas is None else self._canvas(ids, given)
        if self._canvas is None and _cached(given):
            raise ValueError(
                f"this call hands {type(module).__name__} {ids.shape[1]} positions on top of a cache, so the rest of "
                "the canvas, which the reward model must read, is hidden. Switch the loop's cache off, or pass "
                "guide(..., canvas=f): f(input_ids, arguments) -> (whole canvas [B, S], column of the part)"
            )
        half = len(tokens) // 2
        if _doubled(tokens, self._mask):
            self._guide_doubled(tokens[:half], _visible(given, tokens)[:half], logits[:half], logits[half:], offset)
        else:
            self._guide(tokens, _visible(given, tokens), logits, offset)

    def _guide(self, tokens: torch.Tensor, visible: torch.Tensor, logits: torch.Tensor, offset: int) -> None:
        rows, columns, steer = self._open(tokens, visible, offset, logits.shape[1])
        if len(rows):
            logits[rows, columns] = steer(logits[rows, columns])

    def _guide_doubled(
        self,
        tokens: torch.Tensor,
        visible: torch.Tensor,
        conditional: torch.Tensor,
        unconditional: torch.Tensor,
        offset: int,
    ) -> None:
        """Guide a batch that holds every canvas twice, the second time without its prompt."""
        rows, columns, steer = self._open(tokens, visible, offset, conditional.shape[1])
        if not len(rows):
            return
        cond, uncond = conditional[rows, columns], unconditional[rows, columns]
        if self._cfg_scale is not None:
            moved = steer(uncond + (self._cfg_scale + 1) * (cond - uncond))
            shifted = moved
        else:
            self._say_once(
                "a doubled batch (classifier-free guidance) whose scale does not show: the shift is computed at the "
                "conditional logits and added to both halves; guide(..., cfg_scale=) guides the combined ones"
            )
            moved = steer(cond.clone())
            shifted = uncond + (moved - cond)
        # Where a token is ruled out both halves say so with one finite number: the loop subtracts them.
        lowest = torch.finfo(moved.dtype).min
        ruled_out = moved == -torch.inf
        conditional[rows, columns] = moved.masked_fill(ruled_out, lowest)
        unconditional[rows, columns] = shifted.masked_fill(ruled_out, lowest)

    def _open(self, tokens: torch.Tensor, visible: torch.Tensor, offset: int, width: int) -> tuple[Any, Any, Any]:
        """The guided slots: (rows [N], columns [N] of the logits, a function that moves the logits read there)."""
        masked = (tokens == self._mask) & visible
        run = self._follow(tokens, visible, masked)
        slots = int((run.end - run.start).max())
        place = torch.arange(tokens.shape[1], device=tokens.device)
        column = run.start[:, None] + torch.arange(slots, device=tokens.device)
        exists = column < run.end[:, None]
        column = column.clamp(max=tokens.shape[1] - 1)
        # A shifting model reads slot i at i - 1; slot 0 has no position of its own and stays the loop's.
        source = column - int(self._shift) - offset
        changeable = masked | (visible & (place >= tokens.shape[1] - self._edited)) if self._edited else masked
        opened = changeable.gather(1, column) & exists & (source >= 0) & (source < width)
        response = tokens.gather(1, column).masked_fill(~exists, self._pad)
        rows, places = opened.nonzero(as_tuple=True)
        return rows, source[rows, places], lambda phi: self._steering(phi, response, opened)

    def _follow(self, tokens: torch.Tensor, visible: torch.Tensor, masked: torch.Tensor) -> _Run:
        """The run that a canvas belongs to; a new one where the prompts are other ones."""
        if self._run is None or not self._run.continues(tokens, masked):
            place = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
            beyond = tokens.shape[1]
            start = torch.where(masked, place, beyond).amin(dim=1)
            prompt = visible & (place < start[:, None])
            if self._prompts is not None:
                # Rows are aligned left or right; their first visible column tells.
                first = torch.where(visible, place, beyond).amin(dim=1)
                start = first + torch.tensor([len(ids) for ids in self._prompts], device=tokens.device)
            prompts = self._prompts or [ids[keep].tolist() for ids, keep in zip(tokens, prompt, strict=True)]
            end = torch.where(visible, place, -1).amax(dim=1) + 1
            self._steering.begin(prompts, start.tolist(), seed=self._guidance.seed(), **self._settings)
            self._run = _Run(tokens, masked, start, end)
        # What a block-wise loop passes grows with its blocks.
        run = self._run
        if tokens.shape[1] > run.tokens.shape[1]:
            place = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
            run.end = torch.where(visible, place, -1).amax(dim=1) + 1
        run.tokens, run.masked = tokens.clone(), masked
        return run

    def _arguments(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """A call's arguments by name."""
        if self._signature is None:
            self._signature = inspect.signature(module.forward)
        bound = self._signature.bind_partial(*args, **kwargs).arguments
        for name, value in list(bound.items()):
            kind = self._signature.parameters[name].kind
            if kind is inspect.Parameter.VAR_KEYWORD:
                bound.update(bound.pop(name))
            elif kind is inspect.Parameter.VAR_POSITIONAL and value:  # a wrapper that hands everything on
                bound["input_ids"] = value[0]
        return bound

    def _say_once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            logger.warning(text)


def _visible(given: dict[str, Any], tokens: torch.Tensor) -> torch.Tensor:
    """[B, S] bool: positions that anything attends to, from whatever form of attention mask the call carries."""
    mask = given.get("attention_mask")
    if not isinstance(mask, torch.Tensor) or mask.dim() not in (2, 4) or mask.shape[-1] != tokens.shape[1]:
        return torch.ones_like(tokens, dtype=torch.bool)
    if mask.dim() == 2:
        seen = mask.bool()
    else:
        allowed = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
        seen = allowed.any(dim=2)[:, 0]
    return seen.expand_as(tokens)


def _doubled(tokens: torch.Tensor, mask_token_id: int) -> bool:
    """Whether the second half of a batch is the first with more tokens of each row masked."""
    if len(tokens) % 2:
        return False
    one, two = tokens.chunk(2)
    differs = one != two
    return bool((~differs | (two == mask_token_id)).all() & differs.any(dim=1).all())


def _cached(given: dict[str, Any]) -> bool:
    """Whether a call builds on keys and values of earlier ones, whatever the argument that holds them is called."""
    return any(_holds_keys(value) for value in given.values())


def _holds_keys(value: Any) -> bool:
    """Whether an argument is a cache that is not empty: an object with a length, or tensors by layer."""
    length = getattr(value, "get_seq_length", None)
    if callable(length):
        return bool(length())
    if isinstance(value, Mapping):
        value = list(value.values())
    elif callable(getattr(value, "update", None)):  # a class of the loop's own; one without a length counts as filled
        return not isinstance(value, Sized) or len(value) > 0
    if not isinstance(value, (list, tuple)) or not value:
        return False
    # One (keys, values) for each layer. A flat tuple of tensors is something else: position embeddings, say.
    layers = [layer for layer in value if isinstance(layer, (list, tuple))]
    return any(isinstance(tensor, torch.Tensor) for layer in layers for tensor in layer)
