"""Anything that calls ``model(x, ...).logits`` on a canvas with mask tokens: LLaDA's functions and loops like them.

The instance's forward is wrapped and the logits of its masked rows are replaced; the loop draws, ranks and commits as
it always does. All masked slots of a row's response are guided, also those that a block-wise (semi-autoregressive) loop
will not commit yet: the reward model reads the whole response, and the method moves every open slot of it.
On top of a cache the canvas is followed by :mod:`.tracker`.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..models.base import logits_of
from ..models.loading import UnknownBlockLengthError, wrap
from .base import ForeignModel, Guidance, Integration, Parts
from .steering import Steering
from .tracker import CanvasTracker, HiddenCanvasError, Sight, visible_columns

logger = logging.getLogger("entrgi_kernels")

# A block may come with its first token (drawn from the last block's logits) and one that the loop forces.
_SEEDS = 2


class ForwardIntegration(Integration):
    """A network whose callers look at its logits; the way in for everything that brings no call of its own."""

    name = "forward"

    @staticmethod
    def recognises(target: Any) -> bool:
        return isinstance(target, nn.Module)

    @staticmethod
    def attach(target: Any, guidance: Guidance, parts: Parts) -> None:
        refuse_structural_edits(target)
        try:
            guidance.sampler = parts.sampler(target)
        except UnknownBlockLengthError:  # the loop knows it; from text it cannot be run
            mask, shift = parts.mask_token_id, parts.shift
            wrapped = wrap(target, parts.tokenizer, mask_token_id=mask, shift=shift, block_length=0)
            foreign = ForeignModel.of(target, wrapped.mask_token_id, wrapped.shift)
            guidance.sampler = parts.sampler(foreign)
        guidance.steering = Steering(guidance.sampler)
        guidance.claim(target)
        hook = LogitsHook(guidance, cfg_scale=parts.cfg_scale, canvas=parts.canvas)
        # Not a forward hook: remote code calls self.forward(...), which goes past those.
        guidance.patch("forward", hook.around(target.forward))
        own = getattr(target, "generate", None)
        if callable(own) and "editing_threshold" in inspect.signature(own).parameters:  # LLaDA2.1
            guidance.patch("generate", _edited_block(own, hook))


def refuse_structural_edits(model: Any) -> None:
    """Refuse LLaDA2.2's way of decoding.

    Raises:
        ValueError: the model's config names tokens that delete or insert slots.
    """
    config = getattr(model, "config", None)
    for name in ("delete_token_id", "split_token_id", "insert_token_id"):
        if isinstance(getattr(config, name, None), int):
            raise ValueError(
                f"this {type(model).__name__} edits by deleting and inserting slots (config.{name}, as LLaDA2.2 does): "
                "its slots move between steps, which guidance does not follow. Accepted: models that fill or replace "
                "tokens in place (LLaDA2.0, LLaDA2.1)"
            )


def _edited_block(own: Callable[..., Any], hook: LogitsHook) -> Callable[..., Any]:
    """A model's own generate that may change committed tokens of its block, which are guided as well then."""
    signature = inspect.signature(own)

    @functools.wraps(own)
    def generate(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        length = bound.arguments.get("block_length") if bound.arguments["editing_threshold"] else None
        with hook.editing(length or 0):
            return own(*args, **kwargs)

    return generate


@dataclass
class _Run:
    """One of the loop's calls, as far as its forwards show it.

    Attributes:
        prompts: token ids of each row's prompt.
        tokens, masked: [B, S], at the last forward.
        start, end: [B] int64, first response column of each row and the first one behind it.
        late: [B] bool, rows that had no response slot yet: a longer prompt goes on in the next block.
    """

    prompts: list[list[int]]
    tokens: torch.Tensor
    masked: torch.Tensor
    start: torch.Tensor
    end: torch.Tensor
    late: torch.Tensor

    def continues(self, tokens: torch.Tensor, masked: torch.Tensor, cached: bool = False) -> bool:
        """Whether a canvas is this run's.

        It has the same prompts, any columns beyond the last ones are fresh masks, and it is not all masks again. On a
        cache, fresh columns may hold a few tokens already, or be those of a row that is done.
        """
        width = self.tokens.shape[1]
        if tokens.shape[0] != self.tokens.shape[0] or tokens.shape[1] < width:
            return False
        place = torch.arange(width, device=tokens.device)
        prompt, response = place < self.start[:, None], (place >= self.start[:, None]) & (place < self.end[:, None])
        same = ((tokens[:, :width] == self.tokens) & ~masked[:, :width]) | ~prompt
        begun = (response & ~self.masked).any()
        again = begun & (masked[:, :width] | ~response).all()
        added = masked[:, width:]
        fresh = added.all(dim=1)
        if cached:
            fresh = fresh | ((~added).sum(dim=1) <= _SEEDS) | ~added.any(dim=1) | self.late
        return bool(same.all() & fresh.all() & ~again)

    def select(self, rows: list[int]) -> _Run:
        """Of some of the batch's rows, in another order perhaps."""
        tensors = (self.tokens, self.masked, self.start, self.end, self.late)
        return _Run([self.prompts[row] for row in rows], *(tensor[rows] for tensor in tensors))


@dataclass
class _Call:
    """What is known of a forward before it runs."""

    ids: torch.Tensor
    given: dict[str, Any]
    sight: Sight | None
    guided: bool


class LogitsHook:
    """Guides the logits of masked rows, in place, behind a forward that it is put around.

    Calls with gradients enabled, without mask tokens, or whose logits are not those of the canvas are left alone.
    Caches of keys and values are followed by :class:`CanvasTracker`.

    Args:
        guidance: the handle.
        shift: True when slot i's logits are read at position i - 1; None is the model's own way.
        cfg_scale: the scale s of a loop that puts an unconditional copy of the canvas (prompts masked) below the
            conditional one and combines ``u + (s + 1) (c - u)``. With it the combined logits are guided, and both
            halves set to them, which any scale leaves as they are. None: where such a batch is seen, the shift is
            computed at the conditional logits and added to both halves.
        canvas: for loops whose canvas cannot be followed: a callable of (input ids, keyword arguments) that returns
            (the whole canvas [B, S], the column at which the ids begin).
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
        self._eos = guidance.sampler.eos_token_id
        self._shift = guidance.sampler.model.shift if shift is None else shift
        self._cfg_scale = cfg_scale
        self._canvas = canvas
        self._prompts = prompts
        self._edited = edited or 0
        self._settings = settings
        self._signature: inspect.Signature | None = None
        self._run: _Run | None = None
        self._said: set[str] = set()
        self._tracker = CanvasTracker(self._pad)
        # The last call without masks that left a cache: a prompt, or a prompt with finished blocks.
        self._prefill: torch.Tensor | None = None
        # The last guided call on a cache: its ids, and which of its logits were moved by how much.
        self._moved: tuple[torch.Tensor, ...] | None = None

    @property
    def used(self) -> bool:
        """Whether anything was guided yet."""
        return self._run is not None

    @contextmanager
    def editing(self, columns: int) -> Iterator[None]:
        """While inside, the loop may change committed tokens of the last columns."""
        held, self._edited = self._edited, columns
        try:
            yield
        finally:
            self._edited = held

    def around(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """A module's forward, its logits guided; the same signature and return."""
        self._signature = inspect.signature(forward)

        @functools.wraps(forward)
        def guided(*args: Any, **kwargs: Any) -> Any:
            call = self._before(args, kwargs) if self._guidance.active else None
            output = forward(*args, **kwargs)
            if call is not None:
                self._after(call, output)
            return output

        return guided

    def _before(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Call | None:
        given = self._arguments(args, kwargs)
        ids = given.get("input_ids")
        if not isinstance(ids, torch.Tensor) or ids.dim() != 2:
            return None
        edits = bool(self._edited) and self._run is not None
        guided = not torch.is_grad_enabled() and (edits or bool((ids == self._mask).any()))
        if self._canvas is not None:
            return _Call(ids, given, self._given_canvas(ids, given), guided) if guided else None
        try:
            return _Call(ids, given, self._tracker.look(ids, given), guided)
        except HiddenCanvasError as error:
            if not guided:
                return _Call(ids, given, None, False)
            raise HiddenCanvasError(
                f"this call hands the model {ids.shape[1]} positions on top of a cache, and the canvas, which the "
                f"reward model must read, is hidden: {error}. Let the loop fill its cache by calls of the guided "
                "model, switch the cache off, or pass guide(..., canvas=f): f(input_ids, arguments) -> (whole canvas "
                "[B, S], column of the part)"
            ) from None

    def _given_canvas(self, ids: torch.Tensor, given: dict[str, Any]) -> Sight:
        """The place that the user's own function gives a call."""
        tokens, offset = self._canvas(ids, given)
        columns = offset + torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        return Sight(tokens, visible_columns(given, tokens), columns)

    def _after(self, call: _Call, output: Any) -> None:
        ids, sight = call.ids, call.sight
        left = self._canvas is None and self._tracker.note(sight, ids, call.given, output)
        if sight is None:
            return
        if not call.guided:
            if left and not sight.past and not torch.is_grad_enabled():
                self._prefill = ids.clone()
            return
        if left and not sight.past and self._without_prompt(ids):
            self._tracker.mark_unconditional()
            return
        logits = logits_of(output)
        if logits.shape[:2] != ids.shape:
            return
        if sight.unconditional:
            self._repeat(ids, logits)
        elif _doubled(sight.tokens, self._mask):
            half = len(ids) // 2
            upper = Sight(sight.tokens[:half], sight.visible[:half], sight.columns[:half], sight.past)
            self._guide_doubled(upper, logits[:half], logits[half:])
        else:
            self._guide(sight, ids, logits)

    def _without_prompt(self, ids: torch.Tensor) -> bool:
        """Whether a call repeats the last prefill with tokens of each row masked: classifier-free guidance."""
        last = self._prefill
        if last is None or last.shape != ids.shape:
            return False
        differs = ids != last
        run = self._run
        if run is not None and len(run.start) == len(ids) and run.tokens.shape[1] <= ids.shape[1]:
            place = torch.arange(ids.shape[1], device=ids.device)
            if bool((differs & (place >= run.start[:, None])).any()):
                return False  # the loop has masked a part of its response again
        return bool((~differs | (ids == self._mask)).all() & differs.any(dim=1).all())

    def _repeat(self, ids: torch.Tensor, logits: torch.Tensor) -> None:
        """Move the unconditional logits of a block by what its conditional ones were moved."""
        if self._moved is None or self._moved[0].shape != ids.shape or not torch.equal(self._moved[0], ids):
            self._say_once("an unconditional call without the conditional one before it: it is left as it is")
            return
        self._say_once(
            "conditional and unconditional calls (classifier-free guidance): the shift is computed at the conditional "
            "logits and added to both"
        )
        _, rows, columns, before, moved = self._moved
        ruled_out = moved == -torch.inf
        shifted = logits[rows, columns] + (moved - before)
        # Finite: the loop subtracts the conditional one, which is minus infinity there.
        logits[rows, columns] = shifted.masked_fill(ruled_out, torch.finfo(logits.dtype).min)

    def _guide(self, sight: Sight, ids: torch.Tensor, logits: torch.Tensor) -> None:
        rows, columns, steer = self._open(sight)
        if not len(rows):
            return
        before = logits[rows, columns]
        moved = steer(before.clone())
        logits[rows, columns] = moved
        self._moved = (ids.clone(), rows, columns, before, moved.clone()) if self._tracker.doubled else None

    def _guide_doubled(
        self,
        sight: Sight,
        conditional: torch.Tensor,
        unconditional: torch.Tensor,
    ) -> None:
        """Guide a batch that holds every canvas twice, the second time without its prompt."""
        rows, columns, steer = self._open(sight)
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

    def _open(self, sight: Sight) -> tuple[Any, Any, Any]:
        """The guided slots: (rows [N], columns [N] of the logits, a function that moves the logits read there)."""
        tokens, visible = sight.tokens, sight.visible
        masked = (tokens == self._mask) & visible
        if not self._edited and not bool(masked.any()):
            return (), (), None
        run = self._follow(sight, masked)
        slots = int((run.end - run.start).max())
        place = torch.arange(tokens.shape[1], device=tokens.device)
        column = run.start[:, None] + torch.arange(slots, device=tokens.device)
        exists = column < run.end[:, None]
        column = column.clamp(max=tokens.shape[1] - 1)
        # A shifting model reads slot i at i - 1; a slot whose position is not in this call stays the loop's.
        computed = torch.full_like(tokens, -1)
        order = torch.arange(sight.columns.shape[1], device=tokens.device).expand_as(sight.columns)
        computed = computed.scatter(1, sight.columns, order)
        source = computed.gather(1, (column - int(self._shift)).clamp(min=0))
        changeable = masked | (visible & (place >= tokens.shape[1] - self._edited)) if self._edited else masked
        opened = changeable.gather(1, column) & exists & (source >= 0)
        # Masked slots that this call cannot fill have no token yet: the response goes on without them, and ends where
        # nothing else follows. Where pads end a response, those among others stay what they are.
        waiting = masked.gather(1, column) & exists & ~opened
        if self._pad == self._eos:
            known = (exists & ~waiting).long()
            waiting &= known.flip(1).cumsum(dim=1).flip(1) == 0
        response = tokens.gather(1, column).masked_fill(~exists | waiting, self._pad)
        rows, places = opened.nonzero(as_tuple=True)
        return rows, source[rows, places], lambda phi: self._steering(phi, response, opened)

    def _follow(self, sight: Sight, masked: torch.Tensor) -> _Run:
        """The run that a canvas belongs to; a new one where the prompts are other ones."""
        tokens, visible, cached = sight.tokens, sight.visible, sight.past > 0
        place = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
        beyond = tokens.shape[1]
        first_mask = torch.where(masked, place, beyond).amin(dim=1)
        last = torch.where(visible, place, -1).amax(dim=1) + 1
        run, prefill, self._prefill = self._run, self._prefill, None
        if cached and run is not None and prefill is not None and prefill.shape[1] < run.tokens.shape[1]:
            run = None  # the loop has begun anew, with a prompt
        if run is not None and sight.rows is not None and max(sight.rows) < len(run.tokens):
            run = run.select(sight.rows)
            if run.continues(tokens, masked, cached):
                self._steering.select(sight.rows)
            else:
                run = None
        if run is None or not run.continues(tokens, masked, cached):
            start = first_mask
            if self._prompts is not None:
                # Rows are aligned left or right; their first visible column tells.
                first = torch.where(visible, place, beyond).amin(dim=1)
                start = first + torch.tensor([len(ids) for ids in self._prompts], device=tokens.device)
            prompts = list(self._prompts or self._before_response(sight, start))
            self._steering.begin(prompts, start.tolist(), seed=self._guidance.seed(), **self._settings)
            late = start >= beyond if self._prompts is None else torch.zeros_like(visible[:, 0])
            run = _Run(prompts, tokens, masked, start, last, late)
        elif bool((run.late & (first_mask < beyond)).any()):
            now = run.late & (first_mask < beyond)
            start = torch.where(now, first_mask, run.start)
            whole = self._before_response(sight, start)
            prompts = [new if late else old for new, old, late in zip(whole, run.prompts, now.tolist(), strict=True)]
            self._steering.prolong(prompts, start.tolist())
            run.prompts, run.start, run.late = prompts, start, run.late & ~now
        # What a block-wise loop passes grows with its blocks.
        if beyond > run.tokens.shape[1]:
            run.end = last
        run.tokens, run.masked = tokens.clone(), masked
        self._run = run
        return run

    @staticmethod
    def _before_response(sight: Sight, start: torch.Tensor) -> list[list[int]]:
        """The visible tokens of each row before its response."""
        place = torch.arange(sight.tokens.shape[1], device=start.device)
        prompt = sight.visible & (place < start[:, None])
        return [ids[keep].tolist() for ids, keep in zip(sight.tokens, prompt, strict=True)]

    def _arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        """A call's arguments by name."""
        assert self._signature is not None
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


def _doubled(tokens: torch.Tensor, mask_token_id: int) -> bool:
    """Whether the second half of a batch is the first with more tokens of each row masked."""
    if len(tokens) % 2:
        return False
    one, two = tokens.chunk(2)
    differs = one != two
    return bool((~differs | (two == mask_token_id)).all() & differs.any(dim=1).all())
