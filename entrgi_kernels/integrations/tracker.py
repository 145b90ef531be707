"""The canvas of loops that call the model on top of a key/value cache: which tokens a cache holds, and where ids go.

A cache is known by its content: some numbers of every position's key, as one layer holds them. They are noted beside
the tokens whenever a call leaves a cache behind, and looked up when a call brings one. So caches may be cropped,
sliced, copied, reset, or lose rows; a cache whose keys no call has left behind is unknown, and nothing is guessed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sized
from dataclasses import dataclass
from typing import Any

import torch

# Numbers kept of each position's key, and how many caches are remembered: a loop holds few at a time.
_MARKS, _REMEMBERED = 16, 6


class HiddenCanvasError(ValueError):
    """A call on top of a cache, and the canvas cannot be known."""


@dataclass
class Held:
    """What a cache is known to hold.

    Attributes:
        tokens: [B, P] int64.
        visible: [B, P] bool, what attention masks have left.
        marks: [B, P, K], some numbers of each position's key.
        unconditional: a copy of another cache without its prompt (classifier-free guidance).
    """

    tokens: torch.Tensor
    visible: torch.Tensor
    marks: torch.Tensor
    unconditional: bool = False


@dataclass
class Sight:
    """One call's place in the canvas.

    Attributes:
        tokens: [B, S] int64, the canvas as far as it is known.
        visible: [B, S] bool.
        columns: [B, n] int64, where each of the call's ids stands.
        past: positions in the cache that the call builds on.
        rows: each row's index in the batch that the cache was made for; None where nothing has changed.
        base: what that cache holds; None where there is none.
        inner: positions in a second cache, that of the block at hand.
    """

    tokens: torch.Tensor
    visible: torch.Tensor
    columns: torch.Tensor
    past: int = 0
    rows: list[int] | None = None
    base: Held | None = None
    inner: int = 0

    @property
    def unconditional(self) -> bool:
        """Whether the cache is that of a canvas without its prompt."""
        return self.base is not None and self.base.unconditional


class CanvasTracker:
    """Follows the caches of one network.

    ::

        sight = tracker.look(ids, given)        # before the forward
        tracker.note(sight, ids, given, output) # after it
    """

    def __init__(self, pad_token_id: int) -> None:
        self._pad = pad_token_id
        self._held: list[Held] = []
        self._axis: int | None = None

    def look(self, ids: torch.Tensor, given: dict[str, Any]) -> Sight:
        """Where a call's ids stand.

        Args:
            ids: [B, n] int64.
            given: the call's arguments by name.

        Raises:
            HiddenCanvasError: it builds on a cache, and where or on which tokens cannot be told.
        """
        named = {id(value): (name, value) for name, value in given.items() if holds_keys(value)}
        caches = [value for _, value in sorted(named.values(), key=lambda item: "block" in item[0])]
        n = ids.shape[1]
        if not caches:
            _whole(ids, given)
            columns = torch.arange(n, device=ids.device).expand_as(ids)
            return Sight(ids, visible_columns(given, ids), columns)
        if len(caches) > 2:
            raise HiddenCanvasError(f"it builds on {len(caches)} caches: expected one, or one and that of its block")
        found = [self._find(cache, len(ids)) for cache in caches]
        (held, past, rows), block = found[0], found[1:]
        tokens, visible = held.tokens[:, :past], held.visible[:, :past]
        place, start, end, inside = given.get("replace_position"), 0, past, 0
        if block:  # finished blocks, and the one at hand: positions count inside the latter
            inner, inside, inner_rows = block[0]
            if inner_rows != rows:
                raise HiddenCanvasError("its two caches hold other rows")
            tokens = torch.cat([tokens, inner.tokens[:, :inside]], dim=1)
            visible = torch.cat([visible, inner.visible[:, :inside]], dim=1)
            start, end = past, past + inside
            place = 0 if place is None and inside == n else place
        columns = self._columns(ids, given, place, visible, start, end)
        width = max(tokens.shape[1], int(columns.max()) + 1)
        covered = torch.zeros(len(ids), width, dtype=torch.bool, device=ids.device).scatter_(1, columns, True)
        if not covered[:, tokens.shape[1] :].all():
            raise HiddenCanvasError(f"its ids stand at positions beyond the {tokens.shape[1]} that the cache holds")
        grown = width - tokens.shape[1]
        canvas = torch.nn.functional.pad(tokens, (0, grown)).scatter(1, columns, ids)
        visible = torch.nn.functional.pad(visible, (0, grown), value=True)
        visible = visible_columns(given, canvas, visible)
        return Sight(canvas, visible, columns, past, rows, held, inside)

    def note(self, sight: Sight | None, ids: torch.Tensor, given: dict[str, Any], output: Any) -> bool:
        """Note what a call has left in caches; whether it has left any.

        Args:
            sight: of :meth:`look`; None where that has failed.
            ids, given: as there.
            output: of the forward.
        """
        left = False
        after = {id(value): value for value in (*given.values(), *_values(output)) if holds_keys(value)}
        for cache in after.values():
            length = cache_length(cache)
            keys = _keys(cache, length)
            if keys is None or sight is None:
                continue
            marks = self._marks(keys, length, sight.tokens.shape[1], ids.shape[1])
            if marks is None or len(marks) != len(ids):
                continue
            width, base = marks.shape[1], sight.base
            if width == sight.tokens.shape[1]:
                self._remember(Held(sight.tokens, sight.visible, marks, sight.unconditional))
            elif base is not None and width == sight.past and torch.equal(marks, base.marks[:, :width]):
                pass  # as it was
            elif base is not None and width in (sight.inner, ids.shape[1]):  # the block's own
                part = slice(sight.past, sight.past + width)
                self._remember(Held(sight.tokens[:, part], sight.visible[:, part], marks, sight.unconditional))
            left = True
        return left

    def mark_unconditional(self) -> None:
        """The cache noted last is that of a canvas without its prompt."""
        self._held[0].unconditional = True

    @property
    def doubled(self) -> bool:
        """Whether a loop keeps a second cache, of a canvas without its prompt."""
        return any(held.unconditional for held in self._held)

    # ---- caches

    def _remember(self, held: Held) -> None:
        held.tokens, held.visible = held.tokens.clone(), held.visible.clone()
        self._held = [held, *self._held][:_REMEMBERED]

    def _find(self, cache: Any, batch: int) -> tuple[Held, int, list[int] | None]:
        """(what a cache holds, its length, its rows among those it was made of)."""
        length = cache_length(cache)
        keys = _keys(cache, length)
        marks = None if keys is None else self._marks(keys, length)
        if marks is None:
            raise HiddenCanvasError(f"the keys of a cache of class {type(cache).__name__} cannot be read")
        if len(marks) != batch:
            raise HiddenCanvasError(f"its cache has {len(marks)} rows and the call {batch}")
        width = marks.shape[1]
        for number, held in enumerate(self._held):
            known = held.marks
            if known.shape[1] < width or known.shape[2] != marks.shape[2] or known.device != marks.device:
                continue
            known, rows = known[:, :width], None
            if known.dtype != marks.dtype:
                continue
            if known.shape != marks.shape or not torch.equal(known, marks):
                same = (marks[:, None] == known[None]).flatten(2).all(dim=2)
                if not bool(same.any(dim=1).all()):
                    continue
                rows = same.long().argmax(dim=1).tolist()
            self._held.insert(0, self._held.pop(number))
            if rows is not None:  # the whole batch is kept as well: a loop may come back to it
                held = Held(held.tokens[rows], held.visible[rows], held.marks[rows], held.unconditional)
                self._remember(held)
            return held, width, rows
        raise HiddenCanvasError(
            f"its cache holds keys of {width} positions that no call seen here has computed so: it was filled before "
            "guide(), while paused, by another network, or changed behind the model's back"
        )

    def _marks(self, keys: torch.Tensor, length: int | None, *widths: int) -> torch.Tensor | None:
        """[B, P, K]: some numbers of each position's key; None where no axis of the keys is the positions'."""
        if keys.dim() not in (3, 4):
            return None
        if keys.dim() == 3:
            keys = keys[:, None]
        elif length is None and widths:
            # [B, heads, P, D] or [B, P, heads, D]: the first call that leaves such a cache tells.
            axes = [axis for axis in (2, 1) if keys.shape[axis] in widths]
            if not axes and self._axis is None:
                return None
            self._axis = axes[0] if self._axis is None and len(axes) == 1 else self._axis
        axis = 2 if self._axis is None or length is not None else self._axis
        keys = keys[:, 0] if axis == 2 else keys[:, :, 0]
        return keys[:, :length, :_MARKS].detach().clone()

    # ---- positions

    def _columns(
        self, ids: torch.Tensor, given: dict[str, Any], place: Any, visible: torch.Tensor, start: int, end: int
    ) -> torch.Tensor:
        """[B, n]: the canvas columns of a call's ids, on caches of which the last holds columns start to end."""
        count = ids.shape[1]
        run = torch.arange(count, device=ids.device).expand_as(ids)
        if place is not None:
            return start + _replaced(place, ids, end - start)
        if start:
            raise HiddenCanvasError("it replaces a part of its block and tells no replace_position")
        cached = given.get("cache_position")
        if isinstance(cached, torch.Tensor) and cached.shape == (count,):
            return cached.to(ids.device).expand_as(ids)
        told = given.get("position_ids")
        if not isinstance(told, torch.Tensor) or told.dim() != 2 or told.shape[1] != count:
            return run + end
        told = told.to(ids.device).expand_as(ids)
        real = ids != self._pad
        hidden = (~visible).sum(dim=1, keepdim=True)
        if any(bool((~real | (told == run + first)).all()) for first in (end, end - hidden)):
            return run + end
        columns = told + hidden
        if bool((~real | (columns < end)).all()) and bool(real.all()):
            return columns  # keys computed before are replaced
        raise HiddenCanvasError(
            f"its position_ids begin at {told[:, 0].tolist()} while the cache holds {end} positions: they neither "
            "follow them nor lie among them"
        )


def _whole(ids: torch.Tensor, given: dict[str, Any]) -> None:
    """Refuse a call without a cache whose positions tell that its ids are a part: keys are kept inside the model."""
    for name in ("cache_position", "position_ids"):
        told = given.get(name)
        if isinstance(told, torch.Tensor) and 0 < told.dim() < 3 and told.shape[-1] == ids.shape[1]:
            first = told.reshape(-1, ids.shape[1]).amin(dim=1)
            if bool((first > 1).any()):  # some count from one, and give pads a one
                raise HiddenCanvasError(f"its {name} begin at {first.tolist()}, and no cache is handed over")
    if given.get("replace_position") is not None:
        raise HiddenCanvasError("it has a replace_position, and no cache is handed over")


def holds_keys(value: Any) -> bool:
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


def cache_length(cache: Any) -> int | None:
    """How many positions a cache holds, where it tells."""
    length = getattr(cache, "get_seq_length", None)
    return int(length()) if callable(length) else None


def _keys(cache: Any, length: int | None) -> torch.Tensor | None:
    """The keys of the first layer that holds all positions: [B, heads, P, D], [B, P, heads, D] or [B, P, D].

    A sliding window holds fewer. Caches that tell their length keep positions on the last axis but one.
    """
    layers = getattr(cache, "layers", None)
    layers = getattr(cache, "key_cache", None) if layers is None else layers
    if layers is None:
        layers = list(cache.values()) if isinstance(cache, Mapping) else cache
    if not isinstance(layers, (list, tuple)):
        return None
    for layer in layers:
        keys = layer[0] if isinstance(layer, (list, tuple)) and len(layer) else getattr(layer, "keys", layer)
        if isinstance(keys, torch.Tensor) and keys.dim() > 2 and keys.shape[-2] >= (length or 1):
            return keys
    return None


def _values(output: Any) -> list[Any]:
    """What an output holds."""
    entries = output.values() if isinstance(output, Mapping) else output if isinstance(output, (list, tuple)) else ()
    return [*entries, *getattr(output, "__dict__", {}).values()]


def _replaced(place: Any, ids: torch.Tensor, width: int) -> torch.Tensor:
    """[B, n]: positions of a cache that a call's ids replace, from whatever form the loop tells them in."""
    count = ids.shape[1]
    run = torch.arange(count, device=ids.device).expand_as(ids)
    if isinstance(place, torch.Tensor) and place.dim() and place.shape[-1] == width and bool((place <= 1).all()):
        chosen = place.to(ids.device).bool().reshape(-1, width).expand(len(ids), width)
        if bool((chosen.sum(dim=1) == count).all()):
            return chosen.nonzero()[:, 1].view_as(ids)
    elif isinstance(place, torch.Tensor) and place.dim() and place.shape[-1] == count:
        return place.to(ids.device).long().reshape(-1, count).expand_as(ids)
    elif isinstance(place, slice):
        first, last, step = place.indices(width)
        if step == 1 and last - first == count:
            return run + first
    elif isinstance(place, (list, tuple)) and len(place) == 2 and place[1] - place[0] == count:
        return run + int(place[0])
    elif isinstance(place, int) or (isinstance(place, torch.Tensor) and not place.dim()):
        return run + int(place)
    raise HiddenCanvasError(f"its replace_position does not tell places of {count} ids among {width} positions")


def visible_columns(given: dict[str, Any], tokens: torch.Tensor, known: torch.Tensor | None = None) -> torch.Tensor:
    """[B, S] bool: positions that anything attends to, from whatever form of attention mask the call carries."""
    mask = given.get("attention_mask")
    if not isinstance(mask, torch.Tensor) or mask.dim() not in (2, 3, 4) or mask.shape[-1] != tokens.shape[1]:
        return torch.ones_like(tokens, dtype=torch.bool) if known is None else known
    if mask.dim() == 2:
        seen = mask.bool()
    else:
        # Numbers are added to scores, or are zeros and ones.
        added = mask.is_floating_point() and not bool((mask > 0).any())
        allowed = mask > torch.finfo(mask.dtype).min / 2 if added else mask.bool()
        seen = allowed.any(dim=-2)
        seen = seen[:, 0] if mask.dim() == 4 else seen
    return seen.expand_as(tokens)
