"""Forwards of a block-causal model: finished blocks are kept, the open one is run."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from .forwards import WholeCanvas, check_open, check_rows, wanted_places
from .modules import evaluating, plain_precision

if TYPE_CHECKING:
    from .block_causal import BlockCausal

# The group of a position that no other may see; padding is of it.
HIDDEN = 1 << 40

_CLOSED = "no block is open: open() comes before masked_logits()"


def visible(queries: torch.Tensor, keys: torch.Tensor | None = None) -> torch.Tensor:
    """[B, Q, K] bool: what positions of groups [B, Q] see of those of groups [B, K] (themselves where none are given).

    Those that nobody may see, padding, see everything: a row that sees nothing yields NaN in some kernels.
    """
    keys = queries if keys is None else keys
    return keys[:, None, :] <= queries[:, :, None]


def check_inside(local: torch.Tensor, block_length: int) -> None:
    """Raise ValueError unless slots [N], counted from the beginning of each row's block, lie in it."""
    outside = (local < 0) | (local >= block_length)
    if bool(outside.any()):
        offset = int(local[outside][0])
        raise ValueError(
            f"{int(outside.sum())} masked slots lie outside their row's open block, one {abs(offset)} columns "
            f"{'before' if offset < 0 else 'behind'} its begin: expected slots 0 to {block_length - 1} of it"
        )


class CroppedCanvas(WholeCanvas):
    """Whole canvases, but for what lies behind the open blocks and is not seen from them.

    Args:
        model: the adapter.
        attention: [R, S] bool, True at real tokens.
    """

    def __init__(self, model: BlockCausal, attention: torch.Tensor) -> None:
        super().__init__(model, attention)
        self._cropped = attention
        self._first: torch.Tensor | None = None
        self._looked = False

    def open(self, tokens: torch.Tensor, first: torch.Tensor, rows: torch.Tensor | None = None) -> None:
        """See :class:`Forwards`."""
        super().open(tokens, first, rows)
        end = int(first.max()) + self._model.block_length if first.numel() else 0
        self._first, self._looked = first, False
        self._cropped = self._attention[:, :end]  # the very same tensor at each step: what is derived from it is kept

    def masked_logits(
        self,
        tokens: torch.Tensor,
        masked: torch.Tensor,
        *,
        positions: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See :class:`Forwards`."""
        width, end = tokens.shape[1], self._cropped.shape[1]
        positions = wanted_places(masked, positions)
        row, column = positions.div(width, rounding_mode="floor"), positions % width
        if self._first is None:
            raise RuntimeError(_CLOSED)
        if not self._looked or tokens.device.type == "cpu":
            check_inside(column - self._first[row], self._model.block_length)
            self._looked = True
        positions = row * end + column
        given = {"positions": positions, "out": out, "first": self._first}
        return self._model.masked_logits(tokens[:, :end], self._cropped, masked[:, :end], **given)


class BlockForwards:
    """The forwards of one batch, with the keys and values of finished blocks kept.

    A block's keys are those of its final tokens. They come with the next block's first forward, which runs both: one
    forward a block less than running it once more, and none where nothing follows.

    Args:
        model: the adapter.
        tokens: [R, S] int64, the canvases.
        attention: [R, S] bool, True at real tokens; padding is on the left.
        start: column at which the responses begin.
        repeats: this many consecutive rows share their prompt, which is run once for all of them.
    """

    def __init__(
        self, model: BlockCausal, tokens: torch.Tensor, attention: torch.Tensor, start: int, repeats: int
    ) -> None:
        self._model, self._shape, self._opened = model, tuple(tokens.shape), False
        pads = (~attention).sum(dim=1).tolist()
        prompts = [row // repeats for row in range(len(pads))]
        self._parts: list[_Part] = []
        apart = sorted(set(pads)) if model.runs_apart else [None]
        for pad in apart:
            members = [row for row in range(len(pads)) if pad in (None, pads[row])]
            part = _Part(
                model, self._shape[1], start, [pads[row] for row in members], [prompts[row] for row in members]
            )
            part.members = members
            self._parts.append(part)

    def open(self, tokens: torch.Tensor, first: torch.Tensor, rows: torch.Tensor | None = None) -> None:
        """See :class:`Forwards`."""
        kept = list(range(self._shape[0])) if rows is None else check_rows(rows, self._shape[0])
        check_open(tokens, first, (len(kept), self._shape[1]))
        begins = first.tolist()
        parts: list[_Part] = []
        for part in self._parts:
            place = {row: index for index, row in enumerate(part.members)}
            members = [new for new, row in enumerate(kept) if row in place]
            # Networks that make their own mask take rows whose blocks begin alike.
            split = sorted({begins[new] for new in members}) if self._model.runs_apart else [None]
            for begin in split:
                chosen = [new for new in members if begin in (None, begins[new])]
                local = [place[kept[new]] for new in chosen]
                if not chosen:
                    continue
                fresh = part if len(split) == 1 else part.copy()
                fresh.select(local, tokens.device)
                fresh.members = chosen
                fresh.open(tokens if len(chosen) == len(kept) else tokens[chosen], [begins[new] for new in chosen])
                parts.append(fresh)
        self._parts, self._shape, self._opened = parts, (len(kept), self._shape[1]), True

    def masked_logits(
        self,
        tokens: torch.Tensor,
        masked: torch.Tensor,
        *,
        positions: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See :class:`Forwards`."""
        for name, tensor in (("tokens", tokens), ("masked", masked)):
            if tuple(tensor.shape) != self._shape:
                raise ValueError(f"{name} must be of shape {self._shape}, got {tuple(tensor.shape)}")
        if not self._opened:
            raise RuntimeError(_CLOSED)
        positions = wanted_places(masked, positions)
        model, width = self._model, self._shape[1]
        row, column = positions.div(width, rounding_mode="floor"), positions % width
        with torch.no_grad(), plain_precision(tokens.device), evaluating(model.module):
            if positions.numel() == 0:
                return torch.empty(0, model.vocab_size, device=tokens.device, dtype=model.dtype)
            if len(self._parts) == 1:
                return self._parts[0].logits(tokens, row, column, out)
            found: torch.Tensor | None = None
            for part in self._parts:
                index = torch.full(self._shape[:1], -1, device=tokens.device)
                members = torch.tensor(part.members, device=tokens.device)
                index[members] = torch.arange(len(part.members), device=tokens.device)
                chosen = (index[row] >= 0).nonzero().squeeze(1)
                if chosen.numel() == 0:
                    continue
                logits = part.logits(tokens[members], index[row[chosen]], column[chosen], None)
                if found is None:
                    found = logits.new_empty(positions.numel(), logits.shape[-1])
                found[chosen] = logits
            assert found is not None  # every row is in a part
            return found


class _Part:
    """Rows that run together, and what is kept of their finished blocks.

    Columns of the cache are no columns of the canvas: each row's finished blocks stand in it in order, with gaps that
    nobody sees where another row had more to add.
    """

    def __init__(self, model: BlockCausal, width: int, start: int, pads: list[int], prompts: list[int]) -> None:
        self.members: list[int] = []
        self._model, self._width, self._start = model, width, start
        self._reads_before = model.shift or model.causal_context
        self._pads, self._prompts = pads, prompts
        self._forget()

    def _forget(self) -> None:
        """Nothing is kept; every row's finished tokens are to be run."""
        from .kept_keys import KeptKeys

        self._cache = KeptKeys(self._width + self._model.block_length)
        self._done = list(self._pads)  # columns before these are kept
        self._begins = list(self._pads)
        self._groups: torch.Tensor | None = None  # [r, C] int64, the block of each column of the cache
        self._carry: torch.Tensor | None = (
            None  # [r, W], what the last kept position of a row gives the head; if shifted
        )
        self._final: torch.Tensor | None = None  # [r, S], the tokens that the kept keys are of
        self._usual: tuple[torch.Tensor, dict[str, Any]] | None = None
        self._columns: tuple[torch.Tensor, ...] = ()

    def copy(self) -> _Part:
        """Another part of the same state."""
        other = _Part(self._model, self._width, self._start, self._pads, self._prompts)
        vars(other).update(vars(self))
        other._cache = self._cache.copy()
        return other

    def select(self, rows: list[int], device: torch.device) -> None:
        """These rows go on, in this order."""
        if rows == list(range(len(self._pads))):
            return
        for name in ("_pads", "_prompts", "_done", "_begins"):
            setattr(self, name, [getattr(self, name)[row] for row in rows])
        index = torch.tensor(rows, dtype=torch.int64, device=device)
        self._check_cache()
        self._cache.select(index)
        for name in ("_groups", "_carry", "_final"):
            kept = getattr(self, name)
            if kept is not None:
                setattr(self, name, kept.index_select(0, index.to(kept.device)))

    def open(self, tokens: torch.Tensor, begins: list[int]) -> None:
        """A block begins at these columns.

        Raises:
            ValueError: a row's lies before what is kept, or is no multiple of the block length from its first token.
        """
        block = self._model.block_length
        for begin, done, pad in zip(begins, self._done, self._pads, strict=True):
            if begin < done or (not self._model.causal_context and (begin - pad) % block):
                raise ValueError(
                    f"a block begins at column {begin} of a row with {pad} columns of padding, {done} columns of which "
                    f"are done: expected a multiple of {block} behind the padding, not before what is done"
                )
        self._begins, self._usual = begins, None
        self._place(tokens.device)
        if self._final is not None:
            kept = torch.arange(self._width, device=tokens.device) < self._columns[1][:, None]
            if bool(((tokens != self._final) & kept).any()):  # somebody edited them: their keys are others now
                self._forget()
                self._begins, self._prompts = begins, list(range(len(begins)))
                self._place(tokens.device)
        if self._cache.length() == 0 and max(begins) <= self._start:
            self._run_prompts(tokens)

    def logits(
        self, tokens: torch.Tensor, row: torch.Tensor, column: torch.Tensor, out: torch.Tensor | None
    ) -> torch.Tensor:
        """Logits [N, V] of slots of the open block; the first call also runs what has become final before it."""
        begins, done, pads = self._columns
        pending = max(b - d for b, d in zip(self._begins, self._done, strict=True))
        apart, length = self._model.runs_apart, self._model.block_length
        if apart:  # nothing hides what lies behind the canvas
            length = max(0, min(self._width - self._begins[0], length))
        local = column - begins[row]
        if pending or tokens.device.type == "cpu":  # else it was looked at in this block's first forward
            check_inside(local, self._model.block_length)
        span = pending + length
        if apart and span == 1:  # a canvas that ends with a block's first slot: some networks fail on a single query
            text = tokens[:, self._pads[0] :]
            real = torch.ones_like(text, dtype=torch.bool)
            positions = row * text.shape[1] + column - self._pads[0]
            return self._model.masked_logits(text, real, real, positions=positions, out=out)
        at = row * span + pending + local
        if self._reads_before:
            # A block's first slot is read at the last position before it: run now, run before, or not there at all.
            before = torch.where((done > pads)[row], len(self._begins) * span + row, at)
            before = torch.where((begins == done)[row], before, at - 1)
            at = torch.where(local == 0, before, at - 1 if self._model.shift else at)
        return self._run(tokens, pending, length, at, out)

    def _run_prompts(self, tokens: torch.Tensor) -> None:
        """Run what is final of each prompt once, for all rows that share it."""
        leaders = [self._prompts.index(prompt) for prompt in dict.fromkeys(self._prompts)]
        pending = max(b - d for b, d in zip(self._begins, self._done, strict=True))
        order = {self._prompts[row]: index for index, row in enumerate(leaders)}
        follow = [order[prompt] for prompt in self._prompts]
        leading, prompt = [leaders[index] for index in follow], tokens[:, : self._start]
        shared = all(
            (self._pads[row], self._begins[row]) == (self._pads[other], self._begins[other])
            for row, other in enumerate(leading)
        )
        if not pending or len(leaders) == len(follow) or not shared or not torch.equal(prompt, prompt[leading]):
            return
        pads, prompts, begins = self._pads, self._prompts, self._begins
        nothing = torch.zeros(1, dtype=torch.int64, device=tokens.device)
        self.select(leaders, tokens.device)
        self._place(tokens.device)
        with torch.no_grad(), plain_precision(tokens.device), evaluating(self._model.module):
            self._run(tokens[leaders], pending, 0, nothing, None)
        self.select(follow, tokens.device)
        self._pads, self._prompts, self._begins, self._final = pads, prompts, begins, tokens.clone()
        self._place(tokens.device)

    def _place(self, device: torch.device) -> None:
        """Put each row's columns on the device: where its block begins, what is done, its padding."""
        self._columns = torch.tensor([self._begins, self._done, self._pads], dtype=torch.int64, device=device).unbind()

    def _run(
        self, tokens: torch.Tensor, pending: int, length: int, at: torch.Tensor, out: torch.Tensor | None
    ) -> torch.Tensor:
        """Logits at flat positions `at` of [r, pending + length], behind which stand the r carried rows.

        The first `pending` columns, final ones, are kept afterwards, the others are not.
        """
        self._check_cache()
        kept = 0 if self._groups is None else self._groups.shape[1]
        if pending or self._usual is None:
            columns, arguments, groups = self._arguments(tokens, pending, length)
            if not pending:
                self._usual = columns, arguments
        else:
            columns, arguments = self._usual
        ids = tokens.gather(1, columns.clamp_max(self._width - 1))
        carried: list[torch.Tensor] = []
        try:
            picked = self._model._picked(ids, arguments, self._pick(at, pending, pending + length, carried), out)
            grown = self._cache.length()
            if grown != kept + pending + length:
                raise RuntimeError(
                    f"{type(self._model.module).__name__} left {grown} positions in a cache that had {kept} and was to "
                    f"grow by {pending + length}"
                )
        except BaseException:
            self._cache.cut(kept)
            raise
        self._cache.cut(kept + pending)
        if pending:
            new = groups[:, :pending]
            self._groups = new if self._groups is None else torch.cat([self._groups, new], dim=1)
            self._done, self._final = list(self._begins), tokens.clone()
            begins, _, pads = self._columns
            self._columns = begins, begins, pads
            self._carry = carried[0] if carried else None
        return picked

    def _arguments(
        self, tokens: torch.Tensor, pending: int, length: int
    ) -> tuple[torch.Tensor, dict[str, Any], torch.Tensor]:
        """Columns [r, n] of the canvas to run, the network's arguments, and the columns' blocks [r, n]."""
        begins, done, pads = (column[:, None] for column in self._columns)
        columns = begins - pending + torch.arange(pending + length, device=tokens.device)
        real = (columns >= done) & (columns < self._width)
        positions = (columns - pads).masked_fill(~real, 0)
        groups = self._model.groups(positions, real, begins - pads)
        keys = groups if self._groups is None else torch.cat([self._groups, groups], dim=1)
        arguments = self._model.call_arguments(positions, visible(groups, keys), self._cache)
        return columns.clamp_min(0), arguments, groups

    def _pick(
        self, at: torch.Tensor, pending: int, span: int, carried: list[torch.Tensor]
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        """What takes the wanted rows of [r * span, W], and with them the carried ones of the next block."""

        def pick(rows: torch.Tensor) -> torch.Tensor:
            if not self._reads_before:
                return rows.index_select(0, at.to(rows.device))
            count = len(self._begins)
            if self._carry is not None:
                rows = torch.cat([rows, self._carry.to(rows.device)])
            if pending:
                last = [
                    row * span + pending - 1 if begin > done or self._carry is None else count * span + row
                    for row, (begin, done) in enumerate(zip(self._begins, self._done, strict=True))
                ]
                carried[:] = [rows.index_select(0, torch.tensor(last, device=rows.device))]
            return rows.index_select(0, at.to(rows.device))

        return pick

    def _check_cache(self) -> None:
        """Raise RuntimeError where the cache is not as it was left."""
        kept, found = 0 if self._groups is None else self._groups.shape[1], self._cache.length()
        if found != kept:
            raise RuntimeError(
                f"the cache of finished blocks holds {found} positions, {kept} were left in it: somebody else cropped "
                "or grew it; expected it to be left alone"
            )
