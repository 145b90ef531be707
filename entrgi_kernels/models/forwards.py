"""What a model is asked in one batch's generation, block after block."""

from __future__ import annotations

import inspect
from typing import Any, Protocol

import torch


class Forwards(Protocol):
    """The forwards of one batch's generation, as ``model.forwards`` makes them.

    A block is opened, its logits are asked for as often as it takes, then the next one is opened. Whether anything is
    kept between two calls is the model's affair: the logits are the same.
    """

    def open(self, tokens: torch.Tensor, first: torch.Tensor, rows: torch.Tensor | None = None) -> None:
        """A new block begins, or the open one goes on with other rows.

        Args:
            tokens: [R', S] int64, the canvases of the rows that go on.
            first: [R'] int64, the column at which each row's block begins. All before it is final; the block ends
                ``block_length`` columns further on, or with the canvas; what lies behind is not looked at. Without
                blocks it says nothing.
            rows: [R'] int64, which rows of the call before these are: None for all of them in their order. A row may be
                left out, and may be there twice; what is kept of it follows.

        Raises:
            ValueError: a shape does not fit, a row is none of the call's before, or a block begins where it cannot.
        """
        ...

    def masked_logits(
        self,
        tokens: torch.Tensor,
        masked: torch.Tensor,
        *,
        positions: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Logits [N, V] of the masked slots of the open block.

        Args:
            tokens: [R', S] int64, the canvases.
            masked: [R', S] bool, True where logits are wanted.
            positions: [N] int64, ``masked.flatten().nonzero()`` where the caller already has it.
            out: [N, V] contiguous, memory for the result; it is used where that saves a copy.

        Raises:
            ValueError: a shape does not fit, or a slot lies outside the open block.
            RuntimeError: what was kept of finished blocks was changed by somebody else.
        """
        ...


class WholeCanvas:
    """Forwards that run whole canvases and keep nothing: for every model that has only ``masked_logits``.

    Args:
        model: the adapter.
        attention: [R, S] bool, True at real tokens.
    """

    def __init__(self, model: Any, attention: torch.Tensor) -> None:
        self._model, self._attention = model, attention
        taken = inspect.signature(model.masked_logits).parameters
        self._takes = {name for name in ("positions", "out") if name in taken}

    def open(self, tokens: torch.Tensor, first: torch.Tensor, rows: torch.Tensor | None = None) -> None:
        """See :class:`Forwards`; here a block means nothing but its rows."""
        if rows is not None:
            if rows.device.type == "cpu":  # elsewhere looking would mean waiting
                check_rows(rows, self._attention.shape[0])
            self._attention = self._attention.index_select(0, rows)
        check_open(tokens, first, self._attention.shape)

    def masked_logits(
        self,
        tokens: torch.Tensor,
        masked: torch.Tensor,
        *,
        positions: torch.Tensor | None = None,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See :class:`Forwards`."""
        given = {"positions": positions, "out": out}
        wanted = {name: given[name] for name in self._takes if given[name] is not None}
        return self._model.masked_logits(tokens, self._attention, masked, **wanted)


def forwards_of(model: Any, tokens: torch.Tensor, attention: torch.Tensor, start: int, repeats: int = 1) -> Forwards:
    """The forwards of one batch's generation, for any model that follows ``DiffusionModel``.

    Args:
        model: an adapter; one without ``forwards`` of its own runs whole canvases.
        tokens: [R, S] int64, prompts padded on the left, then the responses' slots.
        attention: [R, S] bool, True at real tokens.
        start: column at which the responses begin.
        repeats: this many consecutive rows share their prompt.
    """
    make = getattr(model, "forwards", None)
    return WholeCanvas(model, attention) if make is None else make(tokens, attention, start, repeats)


def wanted_places(masked: torch.Tensor, positions: torch.Tensor | None = None) -> torch.Tensor:
    """[N] int64: `positions`, where the caller has them, else where [R, S] bool `masked` is True, row after row."""
    return masked.flatten().nonzero().squeeze(1) if positions is None else positions


def check_open(tokens: torch.Tensor, first: torch.Tensor, shape: Any) -> None:
    """Raise ValueError unless tokens are int64 of `shape` [R', S], and `first` is int64 of [R']."""
    for name, tensor, wanted in (("tokens", tokens, tuple(shape)), ("first", first, (shape[0],))):
        if tensor.shape != wanted or tensor.is_floating_point():
            raise ValueError(f"{name} must be int64 of shape {wanted}, got {tensor.dtype} of {tuple(tensor.shape)}")


def check_rows(rows: torch.Tensor, count: int) -> list[int]:
    """The rows as a list.

    Raises:
        ValueError: not int64 [R'], or one is not among the `count` rows of the call before.
    """
    if rows.dim() != 1 or rows.is_floating_point():
        raise ValueError(f"rows must be int64 of one dimension, got {rows.dtype} of shape {tuple(rows.shape)}")
    listed = rows.tolist()
    for row in listed:
        if not 0 <= row < count:
            raise ValueError(f"rows must name rows of the call before, 0 to {count - 1}; got {row}")
    return listed
